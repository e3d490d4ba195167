"""Scores of chains that an editor made: metrics with intervals, and two editors compared.

``evaluation.benchmarks`` (EdiVal, ImgEdit, GEdit) and ``evaluation.preference`` (PickScore) are
imported by their own names. Needs the extra ``mteditflow[rewards]``.
"""

from mteditflow.evaluation.comparison import Comparison, compare
from mteditflow.evaluation.evaluation import Evaluation

__all__ = ["Comparison", "Evaluation", "compare"]
