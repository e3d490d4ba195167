"""Two evaluations of the same chains, compared pairwise at the last turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mteditflow.evaluation.evaluation import Evaluation, interval_of
from mteditflow.metrics import Interval


@dataclass(frozen=True, eq=False)
class Comparison:
    """What training changed, on the chains that count in both evaluations.

    Attributes:
        before: round of the first evaluation.
        after: round of the second.
        turn: the last turn, N, counted from 1.
        chains: number of chains that count in both.
        difference: after minus before at turn N of each metric, scalars: percent points for IF,
            Marginal, CC and Overall, its own unit for another term.
        kept: of Marginal and of each other term, its value at turn N divided by that at turn 1,
            before and after; the lower, the worse the exposure bias. NaN if that at turn 1 is 0.
        kept_difference: the second minus the first of these, in percent points, scalars.
    """

    before: int
    after: int
    turn: int
    chains: int
    difference: Mapping[str, Interval]
    kept: Mapping[str, tuple[float, float]]
    kept_difference: Mapping[str, Interval]


def compare(before: Evaluation, after: Evaluation) -> Comparison:
    """Compare two evaluations, chain by chain, with 95% bootstrap intervals over chains.

    Raises:
        ValueError: they are not of the same chains, terms and success.

    Example:
        >>> from mteditflow.rewards import TurnScores
        >>> def evaluation(round, scores):
        ...     terms = {"following": TurnScores(torch.tensor(scores), torch.ones(2, 2) > 0, {})}
        ...     return Evaluation(round, ("1", "2"), (("a", "b"), ("c", "d")), terms, success_at=1)
        >>> before = evaluation(0, [[1.0, 0.0], [1.0, 1.0]])
        >>> comparison = compare(before, evaluation(100, [[1.0, 1.0], [1.0, 1.0]]))
        >>> comparison.difference["instruction_following"].estimate
        tensor(50.)
        >>> comparison.kept["marginal"]
        (0.5, 1.0)
    """
    check_comparable(before, after)
    names, rows = before.names, before.valid & after.valid
    first, second = before.samples(rows), after.samples(rows)
    falling = [i for i, name in enumerate(names) if name == "marginal" or name in before.others]

    def difference(*samples: Tensor) -> Tensor:
        old, new = (
            before.per_turn(*part) for part in (samples[: len(first)], samples[len(first) :])
        )
        return torch.cat([(new - old)[:, -1], 100 * (_kept(new) - _kept(old))[falling]])

    interval = interval_of(difference, (*first, *second), (len(names) + len(falling),))
    scalars = [Interval(*values) for values in zip(*interval, strict=True)]
    empty = torch.full((len(names),), torch.nan)
    old, new = (_kept(before.per_turn(*x)) if bool(rows.any()) else empty for x in (first, second))
    return Comparison(
        before.round,
        after.round,
        before.turns,
        int(rows.sum()),
        difference=dict(zip(names, scalars[: len(names)], strict=True)),
        kept={names[i]: (float(old[i]), float(new[i])) for i in falling},
        kept_difference={names[i]: x for i, x in zip(falling, scalars[len(names) :], strict=True)},
    )


def _kept(metrics: Tensor) -> Tensor:
    """Share of the first turn's value that the last keeps: [metrics, N] -> [metrics]."""
    first, last = metrics[:, 0], metrics[:, -1]
    return torch.where(first == 0, torch.nan, last / first)


def check_comparable(before: Evaluation, after: Evaluation) -> None:
    """Raise ValueError unless two evaluations are of the same chains, terms and success."""
    for name in ("chain_ids", "instructions", "names", "success_at"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            raise ValueError(f"after: expected the {name} of before, got others")
