"""Public benchmarks of image editing, scored by a judge behind an OpenAI-compatible endpoint.

The wording of the prompts is this library's own, so compare editors with each other and not with
published tables.
"""

from mteditflow.evaluation.benchmarks.averages import BenchmarkReport, summarize
from mteditflow.evaluation.benchmarks.edival import EdiValJudge, TypeScores
from mteditflow.evaluation.benchmarks.edival_checks import TextReader
from mteditflow.evaluation.benchmarks.gedit import gedit_items, report_gedit, score_gedit
from mteditflow.evaluation.benchmarks.imgedit import imgedit_items, report_imgedit, score_imgedit
from mteditflow.evaluation.benchmarks.items import (
    Item,
    ItemReading,
    ItemScores,
    Rubric,
    score_items,
)
from mteditflow.evaluation.benchmarks.lme import LmeScores, report_lme, score_lme
from mteditflow.evaluation.benchmarks.mice import MiceScores, report_mice, score_mice
from mteditflow.evaluation.benchmarks.mse import report_mse, score_mse
from mteditflow.evaluation.benchmarks.sessions import (
    Session,
    SessionReport,
    SessionScores,
    UnansweredError,
    read_sessions,
    score_turns,
)

__all__ = [
    "BenchmarkReport",
    "EdiValJudge",
    "Item",
    "ItemReading",
    "ItemScores",
    "LmeScores",
    "MiceScores",
    "Rubric",
    "Session",
    "SessionReport",
    "SessionScores",
    "TextReader",
    "TypeScores",
    "UnansweredError",
    "gedit_items",
    "imgedit_items",
    "read_sessions",
    "report_gedit",
    "report_imgedit",
    "report_lme",
    "report_mice",
    "report_mse",
    "score_gedit",
    "score_imgedit",
    "score_items",
    "score_lme",
    "score_mice",
    "score_mse",
    "score_turns",
    "summarize",
]
