"""Scores of chains that an editor made: metrics with intervals, and two editors compared.

Needs the extra ``mteditflow[rewards]``.
"""

from mteditflow.evaluation.comparison import Comparison, compare
from mteditflow.evaluation.evaluation import Evaluation

__all__ = ["Comparison", "Evaluation", "compare"]
