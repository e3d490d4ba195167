"""Two evaluations of the same chains: paired differences everywhere, and who changed most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mteditflow.chains import Chain
from mteditflow.evaluation.comparison import check_comparable
from mteditflow.evaluation.evaluation import CONSISTENCY, FOLLOWING, Evaluation, interval_of
from mteditflow.evaluation.numbers import Numbers
from mteditflow.evaluation.report import Report, in_words, lost_chains


class Change(NamedTuple):
    """How a chain differs from one evaluation to the other."""

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
) -> Report:
    """Compute after minus before, for every number, over the chains that count in both.

    Args:
        before: scores of the chains.
        after: of the same chains in the same order, with the same terms.
        chains: with their edit types where they are known.
        title: what is compared.
        left_out: chains that are not in both, to why.

    Raises:
        ValueError: the evaluations are not of the same chains, terms and success, or the chains
            are not theirs.

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
    check_comparable(before, after)
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
        notes=("Paired differences, the second minus the first.",),
    )


def most_changed(before: Evaluation, after: Evaluation) -> list[Change]:
    """Order the chains that count in both by how much they changed, the most first.

    More turns followed or fewer weigh first, then the score of following, then consistency.

    Raises:
        ValueError: the evaluations are not of the same chains, terms and success.
    """
    check_comparable(before, after)
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
