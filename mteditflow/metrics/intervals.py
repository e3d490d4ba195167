r"""Confidence intervals of metrics over chains.

A share of one outcome per chain gets Wilson's interval, and a paired difference of two such shares
Newcombe's. Both keep a positive width if all outcomes agree. Everything else (means, corpus
averages, shares of several turns per chain) is bootstrapped over chains.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_numbers,
    as_real,
    check_callable,
    check_count,
    check_floating,
    check_generator,
    check_kind,
    check_number,
    check_rank,
    check_real,
    check_same_shape,
    check_values,
    first_tensor,
)
from mteditflow._reduce import in_float64
from mteditflow.metrics.shares import success_and_mask

FEW_CASES = 10
"""An estimate over fewer cases is marked in tables and figures: its interval is rough."""
_AT_ONCE = 2**22  # resampled numbers held in memory at once


class Interval(NamedTuple):
    """Estimate with a confidence interval; tensors of one shape."""

    estimate: Tensor
    low: Tensor
    high: Tensor


def bootstrap_interval(
    statistic: Callable[..., Tensor],
    *samples: Numbers,
    generator: torch.Generator,
    resamples: int = 2000,
    confidence: float = 0.95,
    vectorized: bool = False,
) -> Interval:
    """Percentile bootstrap over chains for any statistic of aligned samples.

    All samples are resampled with the SAME chains, so that a difference of two runs on the same
    chains is a paired difference.

    Args:
        statistic: function that maps resampled tensors to a tensor of fixed shape. The tensors are
            copies and may be modified.
        *samples: each [C, ...] with the same C; row c of each belongs to chain c. Integers and
            booleans in lists and arrays count as float32; a tensor keeps its dtype.
        generator: generator of the resampling, on the CPU.
        resamples: number of bootstrap resamples.
        confidence: mass of the interval, between 0 and 1.
        vectorized: whether ``torch.vmap`` may run the statistic over many resamples at once, which
            is far faster. The metrics of this package allow it, and so does any function without
            branches on values, ``item`` or boolean indexing.

    Returns:
        Interval of the statistic's shape; ``estimate`` is the statistic of the given samples. Where
        it is NaN, so are both ends. Elsewhere resamples with a NaN statistic are ignored.

    Raises:
        ValueError: there is no sample, the numbers of chains differ, a number is out of range, or
            ``torch.vmap`` cannot run the statistic with ``vectorized=True``.
        TypeError: the statistic is not floating point.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Example:
        >>> before, after = torch.zeros(50, 1), torch.ones(50, 1)
        >>> gain = bootstrap_interval(
        ...     lambda a, b: b.mean() - a.mean(), before, after,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> gain.low
        tensor(1.)
    """
    if not samples:
        raise ValueError("samples: expected at least one tensor, got none")
    tensors = [
        as_numbers(f"samples[{i}]", x) if isinstance(x, Tensor) else as_real(f"samples[{i}]", x)
        for i, x in enumerate(samples)
    ]
    count = len(tensors[0]) if tensors[0].ndim else 0
    for position, sample in enumerate(tensors):
        check_rank(f"samples[{position}]", sample, 1, "[C, ...]")
        check_real(**{f"samples[{position}]": sample})
        if len(sample) != count:
            raise ValueError(
                f"samples[{position}]: expected {count} chains like samples[0], got {len(sample)}"
            )
    check_callable("statistic", statistic)
    check_generator("generator", generator)
    check_count("resamples", resamples)
    check_number("confidence", confidence, low=0.0, high=1.0, open_low=True, open_high=True)
    check_kind("vectorized", vectorized, bool, "True or False")
    estimate = statistic(*(sample.clone() for sample in tensors))
    check_floating(statistic=estimate)
    # One draw of chains for all samples, which pairs them.
    draws = torch.randint(
        count, (resamples, count), generator=generator, dtype=torch.int64, device="cpu"
    )

    def replicate(draw: Tensor) -> Tensor:
        return statistic(*(sample[draw] for sample in tensors))

    if vectorized:
        size = max(1, _AT_ONCE // max(1, sum(sample.numel() for sample in tensors)))
        found = _vectorized(replicate, draws, size)
    else:
        found = torch.stack([replicate(draw) for draw in draws])
    (replicates,) = in_float64(found)
    tail = (1 - confidence) / 2
    low, high = (_quantile(replicates, q).to(estimate) for q in (tail, 1 - tail))
    return Interval(estimate, *(torch.where(estimate.isnan(), estimate, x) for x in (low, high)))


def _quantile(x: Tensor, q: float) -> Tensor:
    """Return the quantile over the first axis of the entries that are not NaN."""
    below, above = (x.nanquantile(q, dim=0, interpolation=how) for how in ("lower", "higher"))
    # Interpolation would give inf - inf; the sum is infinite where one of the two is.
    finite = below.isfinite() & above.isfinite()
    between = torch.where(finite, x.nanquantile(q, dim=0), below + above)
    return torch.where(below == above, below, between)


def _vectorized(replicate: Callable[[Tensor], Tensor], draws: Tensor, size: int) -> Tensor:
    """Run a statistic over ``size`` resamples at once."""
    try:
        return torch.vmap(replicate, chunk_size=size)(draws)
    # The statistic has already run on the given samples, so vmap is the cause.
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition(". ")[0].removeprefix("vmap: ")
        raise ValueError(
            "statistic: expected a function that torch.vmap can run, got one that raises "
            f"{type(error).__name__} ({reason}); use vectorized=False"
        ) from error


def wilson_interval(
    successes: Numbers | float, count: Numbers | float, *, confidence: float = 0.95
) -> Interval:
    r"""Score interval of a share: one outcome per case, 0 or 1.

    .. math:: \frac{p + z^2 / 2n \pm z \sqrt{p (1 - p) / n + z^2 / 4n^2}}{1 + z^2 / n}

    Unlike a bootstrap it keeps a positive width if all outcomes agree: two successes of two give
    [0.34, 1].

    Args:
        successes: number of cases that succeeded, any shape, in [0, ``count``]; may be fractional.
        count: number n of cases, >= 0, same shape.
        confidence: mass of the interval, between 0 and 1.

    Returns:
        Interval of shares in [0, 1], float64; NaN where there is no case.

    Raises:
        ValueError: shapes differ, or a number is out of range.

    Source: Wilson (1927); Newcombe, Statistics in Medicine 17:857 (1998), method 3.

    Example:
        >>> estimate, low, high = wilson_interval(2, 2)
        >>> f"{estimate:.2f} [{low:.2f}, {high:.2f}]"
        '1.00 [0.34, 1.00]'
    """
    check_number("confidence", confidence, low=0.0, high=1.0, open_low=True, open_high=True)
    like = first_tensor(successes, count)
    device = None if like is None else like.device
    named = {"successes": successes, "count": count}
    x, n = (as_numbers(name, v, device=device) for name, v in named.items())
    check_real(successes=x, count=n)
    x, n = x.double(), n.double()
    check_same_shape(count=n, successes=x)
    check_values("count", n, n >= 0, "a number of cases >= 0")
    check_values("successes", x, (x >= 0) & (x <= n), "a number from 0 to count")
    z = -NormalDist().inv_cdf((1 - confidence) / 2)  # of the tail: (1 + confidence) / 2 may be 1
    share = x / n
    # All terms times n, so that none overflows for a weighted count near 0.
    center = x + z**2 / 2
    half = z * (x * (1 - share) + z**2 / 4).sqrt()
    low, high = ((center + sign * half) / (n + z**2) for sign in (-1, 1))
    # The end at 0 or 1 is exact if all outcomes agree; rounding would move it.
    return Interval(share, torch.where(x == 0, share, low), torch.where(x == n, share, high))


def paired_difference_interval(
    before: Numbers, after: Numbers, *, valid: Numbers | None = None, confidence: float = 0.95
) -> Interval:
    r"""Interval of the difference of two shares over the same chains: after minus before.

    With Wilson's intervals [l, u] of both shares and the correlation phi of the outcomes,

    .. math:: d \pm \sqrt{a^2 - 2 \phi a b + b^2},

    where a and b are the distances from the shares to those ends of their intervals that make the
    difference smallest or largest. The width stays positive if no chain changed. A positive phi is
    corrected for continuity: with the table's counts e (both succeed), f and g (only one does) and
    h (neither), n / 2 is subtracted from the numerator e h - f g, down to 0 at most.

    Args:
        before: 0 or 1 per turn, [C, N]; boolean, integer or floating point.
        after: same chains, same shape.
        valid: boolean, [C, N]: turns that count in both.
        confidence: mass of the interval, between 0 and 1.

    Returns:
        Interval of differences in [-1, 1], [N], float64; NaN for a turn without valid chains.

    Raises:
        ValueError: shapes differ, a value is neither 0 nor 1, or a number is out of range.
        TypeError: ``valid`` is not boolean.

    Source: Newcombe, Statistics in Medicine 17:2635 (1998), method 10.

    Example:
        >>> before = torch.tensor([[1], [1]])
        >>> estimate, low, high = paired_difference_interval(before, before)
        >>> f"{float(estimate):.2f} [{float(low):.2f}, {float(high):.2f}]"
        '0.00 [-0.66, 0.66]'
    """
    named = {"before": as_real("before", before), "after": as_real("after", after)}
    check_real(**named)
    check_same_shape(**named)
    (first, mask), (second, _) = (success_and_mask(name, x, valid) for name, x in named.items())
    first, second = (torch.where(mask, x, 0).double() for x in (first, second))
    n, old, new = mask.sum(dim=0).double(), first.sum(dim=0), second.sum(dim=0)
    both = (first * second).sum(dim=0)
    first_share, second_share = (wilson_interval(x, n, confidence=confidence) for x in (old, new))
    # phi of the 2 x 2 table: cross = e h - f g, corrected toward 0 for continuity if positive.
    cross = both * (n - old - new + both) - (old - both) * (new - both)
    cross = torch.where(cross > 0, (cross - n / 2).clamp(min=0), cross)
    scale = (old * (n - old) * new * (n - new)).sqrt()
    phi = torch.where(scale > 0, cross / scale, 0)
    return interval_difference(second_share, first_share, correlation=phi)


def interval_difference(
    first: Interval, second: Interval, *, correlation: Numbers | float = 0.0
) -> Interval:
    r"""Interval of first minus second from the intervals of both (method of variance recovery).

    Args:
        first: interval of one estimate.
        second: interval of the other estimate, same shape.
        correlation: correlation of the two estimates, in [-1, 1]: a number, or a tensor of their
            shape. The default 0 gives a wider interval than a positive correlation would.

    Returns:
        Interval of the same shape.

    Raises:
        ValueError: shapes differ, or a correlation lies outside [-1, 1].
        TypeError: an argument is not an ``Interval`` of floating-point tensors.

    Source: Newcombe, Statistics in Medicine 17:2635 (1998); Zou and Donner, Statistics in Medicine
        27:1693 (2008).

    Example:
        >>> found = interval_difference(wilson_interval(9, 10), wilson_interval(5, 10))
        >>> f"{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]"
        '0.40 [-0.00, 0.68]'
    """
    for name, interval in (("first", first), ("second", second)):
        check_kind(name, interval, Interval, "an Interval, such as that of wilson_interval")
        parts = interval._asdict()
        check_same_shape(**{f"{name}.{part}": x for part, x in parts.items()})
        check_floating(**{f"{name}.{part}": x for part, x in parts.items()})
    check_same_shape(**{"first.estimate": first.estimate, "second.estimate": second.estimate})
    phi = as_real("correlation", correlation, like=first.estimate)
    check_floating(correlation=phi)
    if phi.ndim:
        check_same_shape(**{"first.estimate": first.estimate, "correlation": phi})
    # NaN passes: a turn without chains has no correlation.
    check_values("correlation", phi, ~(phi.abs() > 1), "values in [-1, 1]")

    def distance(a: Tensor, b: Tensor) -> Tensor:
        # clamp: at |phi| = 1 and a = b rounding may fall below 0.
        return (a.square() - 2 * phi * a * b + b.square()).clamp(min=0).sqrt()

    estimate = first.estimate - second.estimate
    low = distance(first.estimate - first.low, second.high - second.estimate)
    high = distance(first.high - first.estimate, second.estimate - second.low)
    return Interval(estimate, estimate - low, estimate + high)


def alike_interval(
    value: Tensor, count: Tensor, bounds: tuple[float, float], *, confidence: float = 0.95
) -> Interval:
    """Interval of a mean of bounded scores if all observed cases have the same score.

    If n of n cases agree, the share of cases in the population that differ is at most q = 1 - W,
    with Wilson's lower end W for n successes of n. Those cases may lie anywhere in the bounds.

    Args:
        value: common score of all cases, any shape, in ``bounds``.
        count: number n of cases, same shape.
        bounds: range of the scores, or of the differences of two.
        confidence: mass of the interval, between 0 and 1.

    Returns:
        Interval of the same shape and dtype; NaN where there is no case.

    Example:
        >>> low, high = alike_interval(torch.tensor(0.9), torch.tensor(12), (0, 1))[1:]
        >>> f"[{low:.2f}, {high:.2f}]"
        '[0.68, 0.92]'
    """
    unlike = 1 - wilson_interval(count, count, confidence=confidence).low
    low, high = (value - unlike * (value - end) for end in bounds)
    return Interval(value, low.to(value), high.to(value))
