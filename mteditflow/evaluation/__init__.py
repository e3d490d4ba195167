"""Scores of edited chains: metrics with intervals, and two editors compared.

``evaluation.benchmarks`` (EdiVal, ImgEdit, GEdit) and ``evaluation.preference`` (PickScore) are
imported by their own names. Needs the extra ``mteditflow[rewards]``.
"""

from typing import TYPE_CHECKING

from mteditflow._lazy import lazy

if TYPE_CHECKING:
    from mteditflow.evaluation.comparison import BeforeAfter, Comparison, compare
    from mteditflow.evaluation.evaluation import Evaluation
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "BeforeAfter": ".comparison",
            "Comparison": ".comparison",
            "Evaluation": ".evaluation",
            "compare": ".comparison",
        },
        "rewards",
    )

__all__ = ["BeforeAfter", "Comparison", "Evaluation", "compare"]
