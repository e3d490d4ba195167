"""Two evaluations of the same chains: paired differences, and the chains that changed most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mteditflow.chains import Chain
from mteditflow.evaluation.evaluation import CONSISTENCY, FOLLOWING, Evaluation, interval_of
from mteditflow.evaluation.provenance import require_same_judge
from mteditflow.evaluation.report import Numbers, Report, in_words, lost_chains
from mteditflow.metrics import Interval, conditional_success


class BeforeAfter(NamedTuple):
    """A scalar before and after, and after minus before, each with its interval."""

    before: Interval
    after: Interval
    difference: Interval


@dataclass(frozen=True, eq=False)
class Comparison:
    """Differences between two evaluations, on the chains that count in both.

    Attributes:
        before: round of the first evaluation.
        after: round of the second.
        turn: the last turn, N, counted from 1.
        chains: number of chains that count in both.
        difference: after minus before at turn N of each metric, scalars: percent points for IF,
            Marginal, CC and Overall, its own unit for another term.
        marginal_ratio: Marginal(N) / Marginal(1), >= 0, and likewise the mean of each other term at
            turn N over that at turn 1. Both are of all chains, so it is no share of the success at
            turn 1: chains that fail at turn 1 and succeed at turn N raise it, above 1 too. NaN
            where the value at turn 1 is 0.
        conditional_success: P(success at N | success at 1) in percent; NaN where no chain succeeded
            at turn 1.
    """

    before: int
    after: int
    turn: int
    chains: int
    difference: Mapping[str, Interval]
    marginal_ratio: Mapping[str, BeforeAfter]
    conditional_success: BeforeAfter


def compare(before: Evaluation, after: Evaluation, *, across_judges: bool = False) -> Comparison:
    """Compare two evaluations, chain by chain, with 95% bootstrap intervals over chains.

    Args:
        before: the first evaluation.
        after: the second, of the same chains.
        across_judges: whether their judges may differ; the difference is then as much the judges'
            as the images'.

    Raises:
        ValueError: they are not of the same chains, terms and success, or not of one judge.

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
    names, rows = before.names, before.valid & after.valid
    first, second = before.samples(rows), after.samples(rows)
    ratio_names = [name for name in names if name == "marginal" or name in before.others]
    with_ratio = [names.index(name) for name in ratio_names]

    def statistic(*samples: Tensor) -> Tensor:
        """Differences at turn N; then before, after and difference of ratios and conditional."""
        parts = samples[: len(first)], samples[len(first) :]
        metrics = [before.per_turn(*part) for part in parts]
        given = [100 * conditional_success(x, valid=exists)[-1:] for x, exists, *_ in parts]
        old, new = (
            torch.cat([_last_over_first(x[with_ratio]), share])
            for x, share in zip(metrics, given, strict=True)
        )
        return torch.cat([(metrics[1] - metrics[0])[:, -1], old, new, new - old])

    width = len(ratio_names) + 1
    interval = interval_of(statistic, (*first, *second), (len(names) + 3 * width,))
    scalars = [Interval(*values) for values in zip(*interval, strict=True)]
    columns = (scalars[len(names) + i * width :][:width] for i in range(3))
    *ratios, given = (BeforeAfter(*values) for values in zip(*columns, strict=True))
    return Comparison(
        before.round,
        after.round,
        before.turns,
        int(rows.sum()),
        difference=dict(zip(names, scalars, strict=False)),
        marginal_ratio=dict(zip(ratio_names, ratios, strict=True)),
        conditional_success=given,
    )


def _last_over_first(metrics: Tensor) -> Tensor:
    """Value at turn N over that at turn 1, NaN over 0: [metrics, N] -> [metrics]."""
    first, last = metrics[:, 0], metrics[:, -1]
    return torch.where(first == 0, torch.nan, last / first)


def check_comparable(before: Evaluation, after: Evaluation, *, across_judges: bool) -> None:
    """Raise ValueError unless two evaluations are of the same chains, terms, success and judge."""
    if not across_judges:
        judges = (x.provenance.judged_by for x in (before, after))
        require_same_judge(*judges, known=False)
    fields = ("chain_ids", "instructions", "names", "success_at")
    for name in fields[: 3 if across_judges else 4]:  # a threshold is of a judge's scale
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            raise ValueError(f"after: expected the {name} of before, got others")


class Change(NamedTuple):
    """Changes of a chain from one evaluation to the other."""

    row: int
    turns: int  # more turns followed than before; below 0: fewer
    following: float  # difference of the mean scores of following
    consistency: float  # likewise; 0 where it is not scored


def report_difference(
    before: Evaluation,
    after: Evaluation,
    chains: Sequence[Chain],
    *,
    title: str,
    left_out: Mapping[str, str],
    across_judges: bool = False,
) -> Report:
    """Compute after minus before, for every number, over the chains that count in both.

    Args:
        before: scores of the chains.
        after: of the same chains in the same order, with the same terms.
        chains: with their edit types where they are known.
        title: what is compared.
        left_out: chains that are not in both, to why.
        across_judges: as in ``compare``; a note of the report then names what differs.

    Raises:
        ValueError: the evaluations are not of the same chains, terms, success and judge, or the
            chains are not theirs.

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
    rows = before.valid & after.valid
    types, *first = numbers.samples(rows)
    second = after.samples(rows)

    def difference(types: Tensor, *samples: Tensor) -> Tensor:
        old, new = samples[: len(first)], samples[len(first) :]
        return numbers.values(types, *new) - numbers.values(types, *old)

    interval = interval_of(difference, (types, *first, *second), (len(numbers.places),))
    return Report(
        title=title,
        turns=before.turns,
        asked=len(before) + len(left_out),
        counted=int(rows.sum()),
        left_out=dict(left_out),
        lost=lost_chains(after) | lost_chains(before),
        estimates=tuple(in_words(numbers.places, interval, numbers.counts(rows))),
        notes=("Paired differences, the second minus the first.", *_judges(before, after)),
        sources=(before.provenance, after.provenance),
    )


def _judges(before: Evaluation, after: Evaluation) -> list[str]:
    """Name what differs between the judges, if anything does."""
    judges = [x.provenance.judged_by for x in (before, after)]
    differ = judges[0].differences(judges[1])
    return [f"ACROSS JUDGES: they differ in {'; '.join(differ)}."] if differ else []


def most_changed(
    before: Evaluation, after: Evaluation, *, across_judges: bool = False
) -> list[Change]:
    """Order the chains that count in both by how much they changed, the most first.

    More turns followed or fewer weigh first, then the score of following, then consistency.

    Args:
        before: the first evaluation.
        after: the second, of the same chains.
        across_judges: as in ``compare``.

    Raises:
        ValueError: the evaluations are not of the same chains, terms, success and judge.
    """
    check_comparable(before, after, across_judges=across_judges)
    turns = (after.success.long() - before.success.long()).sum(dim=1).tolist()
    following = _mean_change(before, after, FOLLOWING)
    consistency = [0.0] * len(before)
    if CONSISTENCY in before.terms:
        consistency = _mean_change(before, after, CONSISTENCY)
    rows = (before.valid & after.valid).nonzero().flatten().tolist()
    changes = [Change(row, turns[row], following[row], consistency[row]) for row in rows]
    return sorted(changes, key=lambda x: tuple(-abs(value) for value in x[1:]))


def _mean_change(before: Evaluation, after: Evaluation, name: str) -> list[float]:
    means = (x.terms[name].score.double().nanmean(dim=1) for x in (after, before))
    change: list[float] = torch.sub(*means).tolist()
    return change
