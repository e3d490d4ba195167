r"""95% intervals of an evaluation's metrics over its chains, with a width even without spread.

A bootstrap has no width where all chains are alike, though the mean is not certain. A mean of
bounded scores (CC) still has an interval. Where all n chains have the value x, the share of chains
unlike them is at most :math:`q = 1 - W_n`, with Wilson's lower end :math:`W_n` for n successes of
n. Those chains may have any value in [low, high], so the mean lies in

.. math:: [x - q (x - low), \; x + q (high - x)].

At the ends of the range this is Wilson's interval. Where IF or CC is without spread, Overall takes
the lower ends of both and the upper ends of both: the widest interval possible. A term whose range
is unknown gets no interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mteditflow.metrics import Interval, bootstrap_interval, interval_difference, overall
from mteditflow.metrics.intervals import alike_interval

METRICS = ("instruction_following", "marginal", "content_consistency", "overall")  # in percent
PER_SAMPLE = "content_consistency_per_sample"  # in percent
COLLAPSE = "collapse"  # CR, in percent, from the flags of the term DESTROYED
DESTROYED, WEAR = "destroyed", "wear"  # terms: flag 0 or 1; distance to the original in [0, 1]
IF, CC, OVERALL = (METRICS.index(METRICS[i]) for i in (0, 2, 3))
MEANS = (METRICS[CC], PER_SAMPLE)  # means of bounded scores, in percent
UNIT_MEANS = (DESTROYED, WEAR)  # means of scores in [0, 1]
ROUNDING = 1e-6  # float32 noise in the width of an interval of equal numbers, relative to a unit


def interval_of(statistic: Callable[..., Tensor], samples: tuple[Tensor, ...]) -> Interval:
    """Bootstrap a statistic over chains with a fixed seed; NaN where the statistic is NaN."""
    seeded = torch.Generator().manual_seed(0)
    return bootstrap_interval(statistic, *samples, generator=seeded, vectorized=True)


def without_width(interval: Interval, unit: Tensor | float) -> Tensor:
    """Return which intervals have no width, up to rounding of numbers of the size ``unit``."""
    return (interval.high - interval.low) <= ROUNDING * unit


def bounded_interval(
    found: Interval, count: Tensor, bounds: tuple[float, float]
) -> tuple[Interval, Tensor]:
    """Replace a bootstrapped interval of a mean of bounded scores where it has no width.

    Args:
        found: bootstrapped interval, tensors of one shape.
        count: number of chains behind each estimate, same shape.
        bounds: range of the scores, (low, high), in the unit of the interval.

    Returns:
        The interval, and where it was replaced, boolean of the same shape.
    """
    flat = without_width(found, bounds[1] - bounds[0])
    return _replaced(found, alike_interval(found.estimate, count, bounds), flat), flat


def overall_interval(
    found: Interval, following: Interval, consistency: Interval, edge: Tensor
) -> Interval:
    """Replace a bootstrapped interval of Overall where a part of it is without spread.

    Args:
        found: the bootstrapped interval.
        following: interval of IF, same shape and unit.
        consistency: interval of CC, same shape and unit.
        edge: where all chains agree in IF or in CC, boolean of the same shape.

    Returns:
        The interval; at ``edge`` from Overall of both lower ends to Overall of both upper ends.
    """
    # Overall increases in both parts, so the ends of the parts give its extreme values.
    ends = (overall(*pair) for pair in zip(following[1:], consistency[1:], strict=True))
    return _replaced(found, Interval(found.estimate, *ends), edge)


class MetricIntervals:
    """Replacement of intervals without width in tables [metrics, T] of an evaluation's metrics.

    Args:
        names: names of the metrics, in the order of the tables.
        bounds: range of content consistency, such as (0, 1); tables hold it in percent.
    """

    def __init__(self, names: Sequence[str], bounds: tuple[float, float]) -> None:
        self._names = tuple(names)
        percent = (100 * bounds[0], 100 * bounds[1])
        self._bounds = dict.fromkeys(MEANS, percent) | dict.fromkeys(UNIT_MEANS, (0.0, 1.0))

    def levels(self, table: Tensor, counts: Tensor) -> Tensor:
        """Replace bootstrapped intervals of metrics where they have no width.

        Args:
            table: estimate, low, high, [3, metrics, T], changed in place; the interval of IF must
                be Wilson's already.
            counts: number of chains behind each, [metrics, T].

        Returns:
            Where Overall takes the ends of its parts, boolean [T].
        """
        edge = (table[0, IF] == 0) | (table[0, IF] == 100)
        for i, name in enumerate(self._names):
            if name in self._bounds:
                own = Interval(*table[:, i])
                found, flat = bounded_interval(own, counts[i], self._bounds[name])
                table[:, i] = torch.stack(found)
                edge = edge | flat if i == CC else edge
        self._drop_flat(table, table)
        if METRICS[OVERALL] in self._names:
            own, following, content = (Interval(*table[:, i]) for i in (OVERALL, IF, CC))
            table[:, OVERALL] = torch.stack(overall_interval(own, following, content, edge))
        return edge

    def changes(
        self, table: Tensor, counts: Tensor, after: Tensor, before: Tensor, edge: Tensor
    ) -> None:
        """Replace bootstrapped intervals of paired differences where they have no width.

        Args:
            table: estimate, low, high of ``after`` minus ``before``, [3, metrics, T], changed in
                place.
            counts: number of chains behind each, [metrics, T].
            after: table of the metrics that are subtracted from, as ``levels`` leaves it.
            before: table of the metrics that are subtracted, likewise.
            edge: where Overall of either takes the ends of its parts, boolean [T].
        """
        for i, name in enumerate(self._names):
            if name in self._bounds:
                low, high = self._bounds[name]
                # A difference of two scores in [low, high] lies in [low - high, high - low].
                own, change = Interval(*table[:, i]), (low - high, high - low)
                table[:, i] = torch.stack(bounded_interval(own, counts[i], change)[0])
        self._drop_flat(table, torch.maximum(after[0].abs(), before[0].abs())[None])
        if METRICS[OVERALL] in self._names:
            own, new, old = (Interval(*x[:, OVERALL]) for x in (table, after, before))
            flat = edge | without_width(own, 100.0)
            table[:, OVERALL] = torch.stack(_replaced(own, interval_difference(new, old), flat))

    def _drop_flat(self, table: Tensor, sizes: Tensor) -> None:
        """Set intervals without width to NaN for terms whose range is unknown."""
        for i, name in enumerate(self._names):
            if name not in (*METRICS, *self._bounds, COLLAPSE):
                unit = sizes[:, i].abs().amax(dim=0)
                flat = without_width(Interval(*table[:, i]), unit)
                table[1:, i] = table[1:, i].masked_fill(flat, torch.nan)


def _replaced(interval: Interval, other: Interval, where: Tensor) -> Interval:
    low, high = (torch.where(where, y, x) for x, y in zip(interval[1:], other[1:], strict=True))
    return Interval(interval.estimate, low, high)
