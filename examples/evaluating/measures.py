"""Metrics per turn of scored chains, with intervals over chains."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mteditflow import (
    Interval,
    content_consistency,
    instruction_following,
    marginal_success,
    overall,
    wilson_interval,
)
from mteditflow.evaluation.intervals import bounded_interval, interval_of, overall_interval
from mteditflow.rewards import LIKERT, ConsistencyScores, TurnScores
from mteditflow.rewards.scale import COSINE, SHARE

Scale = Literal["binary", "likert"]
Terms = Literal["features", "pixels"]
TERMS: dict[Terms, tuple[str, str]] = {
    "features": ("object", "background"),
    "pixels": ("object_l1", "background_l1"),
}


class Measure(NamedTuple):
    """A metric per turn, with its samples."""

    name: str
    statistic: Callable[..., Tensor]  # maps samples to the metric, [N]
    samples: tuple[Tensor, ...]  # each [B, N], NaN for missing scores
    chains: Tensor  # number of chains at each turn, [N]; for Overall the minimum of IF's and CC's
    bounds: tuple[float, float]  # range of the scores
    percent: bool = True
    share: bool = False  # a share of chains with a binary outcome, so Wilson's interval applies
    parts: tuple[Measure, ...] = ()  # for Overall: IF and CC


def measures(
    following: TurnScores | None, kept: ConsistencyScores | None, scale: Scale, terms: Terms
) -> list[Measure]:
    """Return all metrics that the available scores allow."""
    found: list[Measure] = []
    if following is not None:
        # IF needs all turns up to n to be judged, Marginal only turn n.
        success, judged = (following.score,), following.measured.long()
        whole, own = judged.cumprod(dim=1).sum(dim=0), judged.sum(dim=0)
        if scale == "likert":
            title, bounds = "Likert, mean", (LIKERT.low, LIKERT.high)
            found.append(Measure(title, content_consistency, success, own, bounds, percent=False))
        else:
            metrics = of_valid(instruction_following), of_valid(marginal_success)
            found.append(
                Measure("IF: all turns so far", metrics[0], success, whole, SHARE, share=True)
            )
            found.append(
                Measure("Marginal: this turn", metrics[1], success, own, SHARE, share=True)
            )
    if kept is not None:
        parts = tuple(getattr(kept, term) for term in TERMS[terms])
        scores = kept.scores if terms == "features" else kept.l1_scores
        some, means = scores.measured.sum(dim=0), (scores.score,)
        bounds = COSINE if terms == "features" else SHARE
        own_of = {"CC: mean of each term's mean": parts, "CC: mean of the chains' means": means}
        content = [Measure(x, content_consistency, own, some, bounds) for x, own in own_of.items()]
        both, found = (*found[:1], content[0]), [*found, *content]
        if following is not None and scale == "binary":
            title = "Overall: of IF and the first CC"
            fewer = torch.minimum(whole, some)
            found.append(Measure(title, overall_of, success + parts, fewer, SHARE, parts=both))
    return found


def of_valid(metric: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a metric of success with NaN for invalid entries, in place of a mask."""
    return lambda success: metric(success.nan_to_num(), valid=success.isfinite())


def overall_of(success: Tensor, *terms: Tensor) -> Tensor:
    """Return Overall(n) of instruction following and consistency, [N]."""
    return overall(of_valid(instruction_following)(success), content_consistency(*terms))


def interval_over_chains(measure: Measure) -> tuple[Interval, Tensor]:
    """Return the interval over chains, and a mask of turns with equal chains, boolean [N].

    A share of chains has Wilson's interval, other metrics a bootstrap interval. A bootstrap of zero
    width is replaced by the interval of a bounded mean, and for Overall by one from its parts; see
    ``mteditflow.evaluation.intervals``.
    """
    if measure.share:
        share = measure.statistic(*measure.samples)
        successes = share.nan_to_num().double() * measure.chains
        interval = wilson_interval(successes.round(), measure.chains)
        return Interval(*(x.float() for x in interval)), (share == 0) | (share == 1)
    found = interval_of(measure.statistic, measure.samples)
    if not measure.parts:
        return bounded_interval(found, measure.chains, measure.bounds)
    (following, one), (consistency, other) = map(interval_over_chains, measure.parts)
    return overall_interval(found, following, consistency, one | other), one | other


def summarize(measure: Measure) -> dict[str, Any]:
    """Return estimate, 95% interval and number of chains per turn, as JSON values."""
    unit = 100 if measure.percent else 1
    interval, _ = interval_over_chains(measure)
    estimate, low, high = ([finite(unit * x) for x in value.tolist()] for value in interval)
    return {
        "estimate": estimate,
        "interval": list(zip(low, high, strict=True)),
        "chains": measure.chains.tolist(),
    }


def finite(value: float) -> float | None:
    """Round to two decimals; None for NaN, which JSON lacks."""
    return round(value, 2) if math.isfinite(value) else None
