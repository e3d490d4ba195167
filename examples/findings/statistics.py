r"""Intervals over seeds, and verdicts by rule.

Seeds are blocks: with one seed all settings share editor, chains, adapters and noise. In the model
value = setting + seed + error the difference of two settings over S seeds has the interval

    mean difference +- t \sqrt{2 s^2 / S},   s^2 = sum of squared errors / ((K - 1) (S - 1)),

with t of Student's distribution with (K - 1)(S - 1) degrees of freedom: the errors of all K
settings are pooled (a randomised block design). A bootstrap over three seeds would be too narrow,
since three cannot show the tails; t by the three differences alone is valid, but 4.3 errors wide.
What is assumed in exchange is that settings scatter alike; the figures show every seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.distributions import StudentT


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its 95% interval; NaN ends where one seed gives none."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Of the claim that this difference is above 0."""
        if math.isnan(self.low):
            return "no interval from one seed"
        if self.low > 0:
            return "seen"
        return "reversed" if self.high < 0 else "not separated"

    def __format__(self, spec: str) -> str:
        """Write mean and ends, each by the format of a number."""
        if math.isnan(self.low):
            return format(self.mean, spec)
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@cache
def t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's distribution, by its integral, to 0.001."""
    x = torch.linspace(0, 20, 200_001, dtype=torch.float64)
    density = StudentT(torch.tensor(float(freedom), dtype=torch.float64)).log_prob(x).exp()
    return float(x[1:][torch.cumulative_trapezoid(density, x) >= 0.475][0])


def mean_interval(values: Tensor) -> Interval:
    """Mean over S seeds ``[S]`` with its t-interval, S - 1 degrees of freedom."""
    seeds, mean = len(values), float(values.mean())
    if seeds < 2:
        return Interval(mean, math.nan, math.nan)
    half = t_quantile(seeds - 1) * float(values.std()) / math.sqrt(seeds)
    return Interval(mean, mean - half, mean + half)


def block_error(values: Tensor) -> float:
    """Standard deviation s of a value of K settings with S seeds, ``[K, S]``; NaN for one seed."""
    settings, seeds = values.shape
    error = values - values.mean(1, keepdim=True) - values.mean(0, keepdim=True) + values.mean()
    freedom = (settings - 1) * (seeds - 1)
    return math.sqrt(float(error.square().sum()) / freedom) if freedom else math.nan


def difference_interval(values: Tensor, first: int, second: int) -> Interval:
    """First minus second of K settings with S seeds ``[K, S]``, paired by seed, errors pooled."""
    settings, seeds = values.shape
    mean, error = float((values[first] - values[second]).mean()), block_error(values)
    if math.isnan(error):
        return Interval(mean, math.nan, math.nan)
    half = t_quantile((settings - 1) * (seeds - 1)) * error * math.sqrt(2 / seeds)
    return Interval(mean, mean - half, mean + half)
