r"""Runs over several seeds: intervals of means and of differences, with verdicts on claims.

Shapes: ``K`` settings, ``S`` seeds, ``C`` chains, ``R`` resamples.

Seeds are blocks: with one seed all settings share editor, chains, adapters and noise. In the model
value = setting + seed + error the difference of two settings over S seeds has the interval

.. math:: \bar d \pm t \sqrt{2 s^2 / S}, \qquad s^2 = \sum e^2 / ((K - 1) (S - 1))

with the quantile t of Student's distribution with (K - 1)(S - 1) degrees of freedom. The errors of
all K settings are pooled (a randomized block design). A bootstrap over three seeds would be too
narrow, since three values do not show the tails. A t-interval of the three differences alone is
valid, but reaches 4.3 standard errors to each side. Pooling assumes that all settings have the same
error variance, so show the values of every seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mteditflow._checks import check_count, check_floating, check_rank


@dataclass(frozen=True)
class SeedInterval:
    """Mean over seeds with the ends of its 95% interval; the ends are NaN for a single seed.

    Example:
        >>> f"{SeedInterval(2.0, 1.0, 3.0):+.1f}", SeedInterval(2.0, 1.0, 3.0).verdict
        ('+2.0 [+1.0, +3.0]', 'seen')
    """

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Verdict on the claim that this difference is above 0."""
        return self.above(0.0)

    def above(self, bound: float) -> str:
        """Return the verdict on the claim that this difference is above a bound.

        A negative bound is the margin of a claim of non-inferiority.

        Example:
            >>> SeedInterval(-0.5, -2.0, 1.0).above(-3.0)
            'seen'
        """
        if math.isnan(self.low):
            return "no interval from one seed"
        if self.low > bound:
            return "seen"
        return "reversed" if self.high < bound else "not separated"

    def __format__(self, spec: str) -> str:
        """Format mean and ends, each with the given format of a number."""
        if math.isnan(self.low):
            return format(self.mean, spec)
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def mean_interval(values: Tensor) -> SeedInterval:
    """Return the mean over seeds with its t-interval, S - 1 degrees of freedom.

    Args:
        values: values of one setting, one per seed, [S].

    Returns:
        Mean and 95% interval.

    Raises:
        ValueError: values are not [S].
        TypeError: they are not floating point.

    Example:
        >>> f"{mean_interval(torch.tensor([1.0, 2.0, 3.0])):.2f}"
        '2.00 [-0.48, 4.48]'
    """
    check_floating(values=values)
    check_rank("values", values, 1, "[S]", maximum=1)
    seeds, mean = len(values), float(values.mean())
    if seeds < 2:
        return SeedInterval(mean, math.nan, math.nan)
    half = _t_quantile(seeds - 1) * float(values.std()) / math.sqrt(seeds)
    return SeedInterval(mean, mean - half, mean + half)


def difference_interval(values: Tensor, first: int, second: int) -> SeedInterval:
    """Return first setting minus second, paired by seed, with the errors of all settings pooled.

    Args:
        values: values of all settings and seeds, [K, S].
        first: row of the setting to subtract from.
        second: row of the setting to subtract.

    Returns:
        Mean difference and 95% interval.

    Raises:
        ValueError: values are not [K, S].
        TypeError: they are not floating point.

    Example:
        >>> values = torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 6.0]])
        >>> f"{difference_interval(values, 1, 0):.2f}"
        '2.33 [0.90, 3.77]'
    """
    error = block_error(values)
    settings, seeds = values.shape
    mean = float((values[first] - values[second]).mean())
    if math.isnan(error):
        return SeedInterval(mean, math.nan, math.nan)
    # Each of the two means has variance s^2 / S; the seed effect cancels in their difference.
    half = _t_quantile((settings - 1) * (seeds - 1)) * error * math.sqrt(2 / seeds)
    return SeedInterval(mean, mean - half, mean + half)


def block_error(values: Tensor) -> float:
    """Return the standard deviation s of the error in value = setting + seed + error.

    Args:
        values: values of all settings and seeds, [K, S].

    Returns:
        The pooled error; NaN if K or S is 1, which leaves no degree of freedom.

    Raises:
        ValueError: values are not [K, S].
        TypeError: they are not floating point.

    Example:
        >>> round(block_error(torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 6.0]])), 3)
        0.408
    """
    return float(setting_errors(values).square().mean().sqrt())


def setting_errors(values: Tensor) -> Tensor:
    """Return the standard deviation of the error of every setting alone.

    The mean of their squares is the square of ``block_error``, which assumes that they are equal.

    Args:
        values: values of all settings and seeds, [K, S].

    Returns:
        Errors [K]; NaN if K or S is 1, which leaves no degree of freedom.

    Raises:
        ValueError: values are not [K, S].
        TypeError: they are not floating point.

    Example:
        >>> values = torch.tensor([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [3.0, 4.0, 8.0]])
        >>> setting_errors(values)
        tensor([0.7071, 0.7071, 1.4142])
    """
    check_floating(values=values)
    check_rank("values", values, 2, "[K, S]", maximum=2)
    settings, seeds = values.shape
    error = values - values.mean(1, keepdim=True) - values.mean(0, keepdim=True) + values.mean()
    freedom = (seeds - 1) * (settings - 1) / settings
    return (error.square().sum(1) / freedom).sqrt() if freedom else values[:, 0] * math.nan


def resampled_means(
    values: Sequence[Mapping[str, Tensor]], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Tensor]:
    """Return means over resampled chains of one seed, the same chains for all settings.

    A bootstrap over chains measures the variation due to the choice of held-out chains and ignores
    that of other seeds, so its interval is narrower than one over seeds.

    Args:
        values: for each of K settings, name to values, [C], of the same chains.
        resamples: number of resamples, R.
        seed: seed of the draws.

    Returns:
        Name to means, [R, K], float64.

    Raises:
        ValueError: ``resamples`` is below 1.

    Example:
        >>> means = resampled_means([{"x": torch.ones(5)}, {"x": torch.zeros(5)}], resamples=2)
        >>> means["x"].tolist()
        [[1.0, 0.0], [1.0, 0.0]]
    """
    check_count("resamples", resamples)
    first = next(iter(values[0].values()))
    generator, chains = torch.Generator().manual_seed(seed), len(first)
    draws = torch.randint(
        chains, (resamples, chains), generator=generator, dtype=torch.int64, device="cpu"
    )
    # A resample as weights [R, C], 1/C per draw of a chain: all means are then one matrix product.
    ones = torch.full(draws.shape, 1 / chains, dtype=torch.float64, device="cpu")
    weights = torch.zeros_like(ones).scatter_add(1, draws, ones)
    return {
        name: weights @ torch.stack([own[name].double() for own in values], dim=1)
        for name in values[0]
    }


def percentile_ends(samples: Tensor) -> tuple[float, float]:
    """Return the ends of the 95% percentile interval of resampled values, [R].

    Example:
        >>> percentile_ends(torch.arange(41.0))
        (1.0, 39.0)
    """
    low, high = samples.quantile(
        torch.tensor([0.025, 0.975], dtype=samples.dtype, device=samples.device)
    ).tolist()
    return low, high


@cache
def _t_quantile(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t-distribution, to 0.001.

    torch has no such quantile: integrate the density from 0 until it reaches 0.975 - 0.5.
    """
    # 20 is above the largest quantile, 12.71 at 1 degree of freedom.
    x = torch.linspace(0, 20, 200_001, dtype=torch.float64, device="cpu")
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    density = scale / math.sqrt(math.pi * freedom) * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    return float(x[1:][torch.cumulative_trapezoid(density, x) >= 0.475][0])
