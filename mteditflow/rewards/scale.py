"""Scale of a scorer: the range of its scores, and the score from which a turn is followed.

A threshold has a meaning only on its scale: 1 means "followed" on 0..1 and "not at all" on 1..5.
Every scorer declares a ``Scale``; scores and thresholds outside it are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mteditflow._checks import check_no_booleans, check_number, check_tensor

SHOWN = 5  # values that a message lists
ROUNDING = 1e-5  # rounding by which a cosine may exceed 1; scores are not clamped


def check_range(
    name: str, score: Tensor, low: float, high: float, *, whole: bool = False, slack: float = 0.0
) -> None:
    """Check that all scores, apart from NaN, are in [low, high].

    Args:
        name: name of the scores, for the message.
        score: scores of any shape; NaN where there is none.
        low: worst score.
        high: best score.
        whole: whether scores must be whole numbers.
        slack: tolerance for rounding beyond both ends.

    Raises:
        ValueError: a score is outside; the message lists such values.
        TypeError: ``score`` is not a tensor, or is boolean on another scale than 0..1.

    Example:
        >>> check_range("consistency", torch.tensor([0.9, torch.nan, 85.0]), 0, 1)
        Traceback (most recent call last):
        ValueError: consistency: expected scores in 0..1, got 85
    """
    check_tensor(name, score)
    if score.dtype == torch.bool and (low, high) == (0, 1):
        return
    check_no_booleans(name, score, f"scores in {low:g}..{high:g}")
    seen = torch.unique(score[~score.isnan()])
    off = (seen < low - slack) | (seen > high + slack)
    if whole:
        off |= seen != seen.round()
    if bool(off.any()):
        kind = "whole scores" if whole else "scores"
        shown = ", ".join(f"{x:g}" for x in seen[off][:SHOWN].tolist())
        more = ", ..." if int(off.sum()) > SHOWN else ""
        raise ValueError(f"{name}: expected {kind} in {low:g}..{high:g}, got {shown}{more}")


@dataclass(frozen=True)
class Scale:
    """Range of scores with the threshold of success.

    Args:
        low: worst score.
        high: best score, above ``low``.
        success: score from which a turn counts as followed, in (low, high].
        whole: whether scores are whole numbers.

    Raises:
        ValueError: ``high`` is not above ``low``, or the threshold is outside the scale.
        TypeError: an argument is not a number.

    Example:
        >>> import torch
        >>> print(LIKERT, BINARY, sep="; ")
        whole numbers in 1..5, followed from 5; whole numbers in 0..1, followed from 1
        >>> LIKERT.normalize(torch.tensor([1.0, 3.0, 5.0]))
        tensor([0.0000, 0.5000, 1.0000])
        >>> BINARY.check("following", torch.tensor([[0.0, 1.0], [torch.nan, 1.0]]))
        >>> LIKERT.with_success(7)
        Traceback (most recent call last):
        ValueError: success: expected a finite number in (1, 5], got 7
    """

    low: float
    high: float
    success: float
    whole: bool = False

    def __post_init__(self) -> None:
        check_number("low", self.low)
        check_number("high", self.high, low=self.low, open_low=True)
        check_number("success", self.success, low=self.low, high=self.high, open_low=True)
        for name in ("low", "high", "success"):  # floats, so that equal scales are equal in files
            object.__setattr__(self, name, float(getattr(self, name)))

    def __str__(self) -> str:
        kind = "whole numbers" if self.whole else "numbers"
        return f"{kind} in {self.low:g}..{self.high:g}, followed from {self.success:g}"

    def with_success(self, success: float | None) -> Scale:
        """Return the scale with another threshold; None keeps its own.

        Raises:
            ValueError: the threshold is not in (low, high].
        """
        return self if success is None else replace(self, success=success)

    def check(self, name: str, score: Tensor) -> None:
        """Check that all scores, apart from NaN, are on the scale.

        Args:
            name: name of the scores, for the message.
            score: scores of any shape; NaN where there is none.

        Raises:
            ValueError: a score is off the scale; the message lists such values.
            TypeError: ``score`` is not a tensor, or is boolean on another scale than 0..1.
        """
        check_range(name, score, self.low, self.high, whole=self.whole)

    def normalize(self, score: Tensor) -> Tensor:
        """Map scores to [0, 1]: (score - low) / (high - low), float32 (float64 if given).

        Raises:
            ValueError: a score is off the scale.
            TypeError: ``score`` is not a tensor.
        """
        self.check("score", score)
        wide = score.to(torch.promote_types(score.dtype, torch.float32))
        return (wide - self.low) / (self.high - self.low)

    def followed(self, score: Tensor) -> Tensor:
        """Return which turns were followed, boolean, shape of ``score``; False for NaN."""
        return score >= self.success


#: Yes or no.
BINARY = Scale(0, 1, success=1, whole=True)
#: 1 to 5, of which 5 is followed completely.
LIKERT = Scale(1, 5, success=5, whole=True)
#: Scales of the library's judge by the name of its prompt's ``scale``.
SCALES: Mapping[str, Scale] = {"binary": BINARY, "likert": LIKERT}
#: Ranges of content consistency: a cosine of features, and a share such as 1 - mean difference.
COSINE, SHARE = (-1.0, 1.0), (0.0, 1.0)
