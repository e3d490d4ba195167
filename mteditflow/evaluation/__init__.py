"""Evaluation of edited chains: metrics with intervals, reports, and comparisons of two editors.

Each name is imported on first use. Import the submodules ``evaluation.benchmarks`` (EdiVal,
ImgEdit, GEdit, LME, MSE, MICE), ``evaluation.seeds``, ``evaluation.tables`` and
``evaluation.gallery`` by their full names. Needs the extra ``mteditflow[rewards]``.
"""

from typing import TYPE_CHECKING

from mteditflow._lazy import lazy

if TYPE_CHECKING:
    from mteditflow.evaluation.comparison import (
        BeforeAfter,
        Comparison,
        compare,
        most_changed,
        report_difference,
    )
    from mteditflow.evaluation.evaluation import Evaluation
    from mteditflow.evaluation.figures import draw_report, draw_survival
    from mteditflow.evaluation.long_chains import destroyed_below, no_change_wear
    from mteditflow.evaluation.ocr import RapidOcr
    from mteditflow.evaluation.preference import PickScore, Preference
    from mteditflow.evaluation.provenance import JudgedBy, MadeBy, Provenance
    from mteditflow.evaluation.report import Report, report_of
    from mteditflow.evaluation.scorers import EditRewardScorer, EditScoreScorer, PickScoreScorer
    from mteditflow.evaluation.text_scorer import TextScorer
    from mteditflow.evaluation.turn_scorer import EditedTurn, TurnScorer
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "BeforeAfter": ".comparison",
            "Comparison": ".comparison",
            "EditRewardScorer": ".scorers",
            "EditScoreScorer": ".scorers",
            "EditedTurn": ".turn_scorer",
            "Evaluation": ".evaluation",
            "JudgedBy": ".provenance",
            "MadeBy": ".provenance",
            "PickScore": ".preference",
            "PickScoreScorer": ".scorers",
            "Preference": ".preference",
            "Provenance": ".provenance",
            "RapidOcr": ".ocr",
            "Report": ".report",
            "TextScorer": ".text_scorer",
            "TurnScorer": ".turn_scorer",
            "compare": ".comparison",
            "destroyed_below": ".long_chains",
            "draw_report": ".figures",
            "draw_survival": ".figures",
            "most_changed": ".comparison",
            "no_change_wear": ".long_chains",
            "report_difference": ".comparison",
            "report_of": ".report",
        },
        "rewards",
    )

__all__ = [
    "BeforeAfter",
    "Comparison",
    "EditRewardScorer",
    "EditScoreScorer",
    "EditedTurn",
    "Evaluation",
    "JudgedBy",
    "MadeBy",
    "PickScore",
    "PickScoreScorer",
    "Preference",
    "Provenance",
    "RapidOcr",
    "Report",
    "TextScorer",
    "TurnScorer",
    "compare",
    "destroyed_below",
    "draw_report",
    "draw_survival",
    "most_changed",
    "no_change_wear",
    "report_difference",
    "report_of",
]
