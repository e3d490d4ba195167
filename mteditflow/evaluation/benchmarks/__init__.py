"""Public benchmarks of image editing, scored by a judge behind an OpenAI-compatible endpoint.

Wording is this library's own: compare editors with it, not with published tables.
"""

from mteditflow.evaluation.benchmarks.averages import BenchmarkReport, summarise
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

__all__ = [
    "BenchmarkReport",
    "EdiValJudge",
    "Item",
    "ItemReading",
    "ItemScores",
    "Rubric",
    "TextReader",
    "TypeScores",
    "gedit_items",
    "imgedit_items",
    "report_gedit",
    "report_imgedit",
    "score_gedit",
    "score_imgedit",
    "score_items",
    "summarise",
]
