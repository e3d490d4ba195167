"""Comparison of two evaluations of the same chains: paired differences, most changed chains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mteditflow.chains import Chain
from mteditflow.evaluation.evaluation import CONSISTENCY, FOLLOWING, Evaluation
from mteditflow.evaluation.intervals import interval_of, without_width
from mteditflow.evaluation.long_chains import survival_differences
from mteditflow.evaluation.provenance import noise_of_both, require_same_judge
from mteditflow.evaluation.report import Report, in_words, lost_chains
from mteditflow.evaluation.tabulation import Numbers, at_ends
from mteditflow.metrics import (
    Interval,
    conditional_success,
    interval_difference,
    paired_difference_interval,
    wilson_interval,
)


class BeforeAfter(NamedTuple):
    """Scalar of both evaluations and after minus before, each with its interval."""

    before: Interval
    after: Interval
    difference: Interval


@dataclass(frozen=True, eq=False)
class Comparison:
    """Differences between two evaluations, each over the chains that have the metric in both.

    Attributes:
        before: round of the first evaluation.
        after: round of the second evaluation.
        turn: the last turn, N, counted from 1.
        chains: number of chains behind each metric at turn N, counted in both evaluations.
        difference: after minus before at turn N of each metric, scalars: percentage points for IF,
            Marginal, CC and Overall, the term's own unit for another term.
        marginal_ratio: Marginal(N) / Marginal(1), >= 0, and for each other term its mean at turn N
            over its mean at turn 1, of the chains that have both turns. It is not a share of the
            success at turn 1: chains that fail at turn 1 and succeed at turn N raise it, even above
            1. NaN where the value at turn 1 is 0.
        ratio_chains: number of chains behind each ``marginal_ratio``, in both evaluations.
        conditional_success: P(success at N | success at 1) in percent; NaN where no chain succeeded
            at turn 1.
        conditional_chains: number of chains that succeeded at turn 1, before and after.
    """

    before: int
    after: int
    turn: int
    chains: Mapping[str, int]
    difference: Mapping[str, Interval]
    marginal_ratio: Mapping[str, BeforeAfter]
    ratio_chains: Mapping[str, int]
    conditional_success: BeforeAfter
    conditional_chains: tuple[int, int]


def compare(before: Evaluation, after: Evaluation, *, across_judges: bool = False) -> Comparison:
    """Compare two evaluations, chain by chain, with 95% intervals over chains.

    Newcombe's interval for the paired differences of IF and Marginal, Wilson's for conditional
    success, a bootstrap for the others. A bootstrapped interval without width, since all chains
    agree, is replaced: for shares by one from Wilson's intervals of their parts, for CC and Overall
    as described in ``evaluation.intervals``, for other terms by NaN.

    Args:
        before: the first evaluation.
        after: the second evaluation, of the same chains.
        across_judges: whether their judges may differ; the difference then mixes a change of the
            images with a change of the judge.

    Raises:
        ValueError: chains, terms, success threshold or judge differ.

    Example:
        >>> from mteditflow.rewards import TurnScores
        >>> def evaluation(round, scores):
        ...     terms = {"following": TurnScores(torch.tensor(scores), torch.ones(2, 2) > 0, {})}
        ...     return Evaluation(round, ("1", "2"), (("a", "b"), ("c", "d")), terms, success_at=1)
        >>> before = evaluation(0, [[1.0, 0.0], [0.0, 1.0]])
        >>> comparison = compare(before, evaluation(100, [[1.0, 1.0], [1.0, 1.0]]))
        >>> comparison.difference["instruction_following"].estimate
        tensor(100.)
        >>> comparison.marginal_ratio["marginal"].before.estimate
        tensor(1.)
        >>> [float(x.estimate) for x in comparison.conditional_success]
        [0.0, 100.0, 100.0]
    """
    check_comparable(before, after, across_judges=across_judges)
    names, (first, second) = before.names, paired_samples(before, after)
    ratio_names = [name for name in names if name == "marginal" or name in before.others]
    with_ratio = [names.index(name) for name in ratio_names]

    def statistic(*samples: Tensor) -> Tensor:
        """Return metrics at turn N, then ratios and conditional: each before, after, difference."""
        parts = samples[: len(first)], samples[len(first) :]
        metrics = [before.per_turn(*part) for part in parts]
        ends = [before.per_turn(*at_ends(*part))[with_ratio] for part in parts]
        given = [100 * conditional_success(x, valid=exists)[-1:] for x, exists, *_ in parts]
        old, new = (
            torch.cat([_last_over_first(x), share]) for x, share in zip(ends, given, strict=True)
        )
        last = [x[:, -1] for x in (*metrics, metrics[1] - metrics[0])]
        return torch.cat([*last, old, new, new - old])

    bootstrapped = torch.stack(interval_of(statistic, (*first, *second)))
    # Columns of ``statistic``: three blocks of all metrics, then three of ratios and conditional.
    end = 3 * len(names)
    tables, pairs = bootstrapped[:, :end], bootstrapped[:, end:]
    changes = _changes(before, tables, first, second)
    columns = ([Interval(*x) for x in part.T] for part in pairs.chunk(3, dim=1))
    *ratios, given = (BeforeAfter(*values) for values in zip(*columns, strict=True))
    shares = [before.outcomes(*samples) for samples in (first, second)]
    marginals = [own["marginal"] for own in shares]
    # Marginal is a share, so Wilson's ends replace a flat bootstrap; other terms have no such law.
    marginal, *others = ratios
    widest = _widened(marginal, *(_ratio(*own) for own in marginals))
    marginal_ratio = dict(zip(ratio_names, [widest, *map(_spread, others)], strict=True))
    counts = before.counts_of(*first)[:, -1].tolist()
    both_turns = before.counts_of(*at_ends(*first))[with_ratio, -1].tolist()
    old_first, new_first = (int(_succeeded_first(*own).sum()) for own in marginals)
    return Comparison(
        before.round,
        after.round,
        before.turns,
        dict(zip(names, counts, strict=True)),
        difference=changes | _paired(*shares),
        marginal_ratio=marginal_ratio,
        ratio_chains=dict(zip(ratio_names, both_turns, strict=True)),
        conditional_success=_conditional(given, *marginals),
        conditional_chains=(old_first, new_first),
    )


def _changes(
    evaluation: Evaluation, tables: Tensor, before: tuple[Tensor, ...], after: tuple[Tensor, ...]
) -> dict[str, Interval]:
    """Return the differences at turn N from bootstrapped metrics before, after and difference."""
    mend, edge = evaluation.intervals, torch.zeros(1, dtype=torch.bool, device="cpu")
    old, new, change = (x[..., None].contiguous() for x in tables.chunk(3, dim=1))
    counts = evaluation.fewest_of(*before)[:, -1:]
    for table, samples in ((old, before), (new, after)):
        for name, (outcome, counted) in evaluation.outcomes(*samples).items():
            success, count = (outcome & counted)[:, -1:].sum(dim=0), counted[:, -1:].sum(dim=0)
            table[1:, evaluation.names.index(name)] = (
                100 * torch.stack(wilson_interval(success, count)[1:]).float()
            )
        edge |= mend.levels(table, counts)
    mend.changes(change, counts, new, old, edge)
    return {name: Interval(*change[:, i, 0]) for i, name in enumerate(evaluation.names)}


def _spread(pair: BeforeAfter) -> BeforeAfter:
    """Replace the ends of an interval without width by NaN: all chains are alike."""
    size = torch.maximum(pair.before.estimate.abs(), pair.after.estimate.abs())
    flat = [without_width(x, size) for x in pair]
    return BeforeAfter(
        *(
            Interval(x.estimate, *(end.masked_fill(none, torch.nan) for end in x[1:]))
            for x, none in zip(pair, flat, strict=True)
        )
    )


Outcome = tuple[Tensor, Tensor]  # outcome and counted, each [C, N]


def paired_samples(
    before: Evaluation, after: Evaluation
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the samples of both evaluations; a turn or a term counts only if both have it."""
    (old, judged, *first), (new, also_judged, *second) = before.samples, after.samples
    both = judged & also_judged
    gaps = [x.isnan() | y.isnan() for x, y in zip(first, second, strict=True)]
    first, second = (
        [x.masked_fill(gap, torch.nan) for x, gap in zip(own, gaps, strict=True)]
        for own in (first, second)
    )
    return (old, both, *first), (new, both, *second)


def _paired(old: Mapping[str, Outcome], new: Mapping[str, Outcome]) -> dict[str, Interval]:
    """Return differences of shares at turn N in percentage points, with Newcombe's interval."""
    found = {}
    for name, (outcome, counted) in old.items():
        first, second, valid = (x[:, -1:] for x in (outcome, new[name][0], counted))
        found[name] = _in_percent(paired_difference_interval(first, second, valid=valid))
    return found


def _conditional(pair: BeforeAfter, old: Outcome, new: Outcome) -> BeforeAfter:
    """Return P(success at N | success at 1) in percent, with Wilson's intervals."""

    def share(outcome: Tensor, counted: Tensor) -> Interval:
        given = _succeeded_first(outcome, counted)
        return _in_percent(wilson_interval((given & outcome[:, -1]).sum(), given.sum()))

    before, after = share(*old), share(*new)
    return _widened(BeforeAfter(before, after, pair.difference), before, after)


def _succeeded_first(outcome: Tensor, counted: Tensor) -> Tensor:
    """Return which chains succeeded at turn 1 and count at turn N, [C]."""
    return counted[:, 0] & counted[:, -1] & outcome[:, 0]


def _ratio(outcome: Tensor, counted: Tensor) -> Interval:
    """Return Marginal(N) / Marginal(1) with the widest interval that the ends of both allow."""
    both = counted[:, 0] & counted[:, -1]
    shares = [wilson_interval((outcome[:, n] & both).sum(), both.sum()) for n in (0, -1)]
    first, last = (Interval(*(x.float() for x in share)) for share in shares)
    return Interval(last.estimate / first.estimate, last.low / first.high, last.high / first.low)


def _widened(pair: BeforeAfter, before: Interval, after: Interval) -> BeforeAfter:
    """Replace intervals without width by intervals from the parts."""
    wide = (before, after, interval_difference(after, before))
    return BeforeAfter(
        *(
            Interval(x.estimate, other.low, other.high) if bool(x.low == x.high) else x
            for x, other in zip(pair, wide, strict=True)
        )
    )


def _in_percent(interval: Interval) -> Interval:
    return Interval(*(100 * x.float().squeeze() for x in interval))


def _last_over_first(metrics: Tensor) -> Tensor:
    """Return the value at turn N over that at turn 1, NaN over 0: [metrics, N] -> [metrics]."""
    first, last = metrics[:, 0], metrics[:, -1]
    return torch.where(first == 0, torch.nan, last / first)


def check_comparable(before: Evaluation, after: Evaluation, *, across_judges: bool) -> None:
    """Raise ValueError unless chains, terms, success threshold and judge are the same."""
    if not across_judges:
        judges = (x.provenance.judged_by for x in (before, after))
        require_same_judge(*judges, known=False)
    terms = [sorted(x.terms) for x in (before, after)]
    if terms[0] != terms[1]:  # whatever the judge: there is nothing to subtract
        raise ValueError(f"after: expected the terms {terms[0]} of before, got {terms[1]}")
    fields = ("chain_ids", "instructions", "success_at")
    for name in fields[: 2 if across_judges else 3]:  # the threshold belongs to the judge's scale
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            raise ValueError(f"after: expected the {name} of before, got others")


class Change(NamedTuple):
    """Changes of a chain from one evaluation to the other."""

    row: int  # row of the chain in both evaluations
    turns: int  # followed turns, after minus before
    following: float  # mean difference of the following score over turns that have it in both
    consistency: float  # mean difference of consistency over such turns; 0 if there is none


def report_difference(
    before: Evaluation,
    after: Evaluation,
    chains: Sequence[Chain],
    *,
    title: str,
    left_out: Mapping[str, str],
    across_judges: bool = False,
) -> Report:
    """Report after minus before, each number over the chains that have it in both.

    Args:
        before: the first evaluation.
        after: the second evaluation, of the same chains in the same order, with the same terms.
        chains: the chains, with their edit types if known.
        title: title of the report.
        left_out: chain that is missing in one of them to the reason.
        across_judges: as in ``compare``; a note of the report then lists the differences.

    Raises:
        ValueError: chains, terms, success threshold or judge of the evaluations differ, or
            ``chains`` are not theirs.

    Example:
        >>> from mteditflow.rewards import TurnScores
        >>> def evaluation(*scores):
        ...     terms = {"following": TurnScores(torch.tensor(scores), torch.ones(2, 1) > 0, {})}
        ...     return Evaluation(0, ("1", "2"), ("a", "b"), terms, success_at=1)
        >>> chains = [Chain(id=x, image="x.png", instructions=("a",)) for x in "12"]
        >>> found = report_difference(
        ...     evaluation([0.0], [1.0]), evaluation([1.0], [1.0]), chains, title="x", left_out={}
        ... )
        >>> found.find("marginal", 1).estimate
        50.0
    """
    check_comparable(before, after, across_judges=across_judges)
    numbers = Numbers(before, chains)
    first, second = paired_samples(before, after)
    interval = numbers.difference(first, second)
    gaps = [evaluation.unmeasured for evaluation in (before, after)]
    makers = before.provenance.made_by, after.provenance.made_by
    return Report(
        title=title,
        turns=before.turns,
        asked=len(before) + len(left_out),
        scored=len(before),
        left_out=dict(left_out),
        lost=lost_chains(after) | lost_chains(before),
        unmeasured={name: max(x.get(name, 0) for x in gaps) for name in gaps[0] | gaps[1]},
        estimates=(
            *in_words(numbers.places, interval, numbers.counts(first)),
            *in_words(*survival_differences(first, second)),
        ),
        notes=(
            f"Second minus first, paired by chain, {noise_of_both(*makers)}.",
            *_judges(before, after),
        ),
        sources=(before.provenance, after.provenance),
    )


def _judges(before: Evaluation, after: Evaluation) -> list[str]:
    """Return a note of the differences between the judges, if there are any."""
    judges = [x.provenance.judged_by for x in (before, after)]
    differ = judges[0].differences(judges[1])
    return [f"ACROSS JUDGES: they differ in {'; '.join(differ)}."] if differ else []


def most_changed(
    before: Evaluation, after: Evaluation, *, across_judges: bool = False
) -> list[Change]:
    """Return the chains judged at every turn in both, sorted by size of change, largest first.

    The number of followed turns counts first, then the following score, then consistency.

    Args:
        before: the first evaluation.
        after: the second evaluation, of the same chains.
        across_judges: as in ``compare``.

    Raises:
        ValueError: chains, terms, success threshold or judge differ.
    """
    check_comparable(before, after, across_judges=across_judges)
    turns = (after.success.long() - before.success.long()).sum(dim=1).tolist()
    following = _mean_change(before, after, FOLLOWING)
    consistency = [0.0] * len(before)
    if CONSISTENCY in before.terms:
        consistency = _mean_change(before, after, CONSISTENCY)
    rows = judged_in_both(before, after).nonzero().flatten().tolist()
    changes = [Change(row, turns[row], following[row], consistency[row]) for row in rows]
    return sorted(changes, key=lambda x: tuple(-abs(value) for value in x[1:]))


def judged_in_both(before: Evaluation, after: Evaluation) -> Tensor:
    """Return which chains were judged at every turn in both evaluations, boolean [C]."""
    following = (x.terms[FOLLOWING] for x in (before, after))
    first, second = ((x.measured == x.turn_mask).all(dim=1) for x in following)
    return first & second


def _mean_change(before: Evaluation, after: Evaluation, name: str) -> list[float]:
    """Return each chain's mean change over the turns that have the term in both, else 0."""
    change = after.terms[name].score.double() - before.terms[name].score.double()
    means: list[float] = change.nanmean(dim=1).nan_to_num().tolist()
    return means
