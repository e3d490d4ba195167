"""Every number of an evaluation as one vector: metrics by turn, their fall, and by edit type.

``C`` chains of up to ``N`` turns, ``K`` edit types.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mteditflow.chains import TASK_TYPES, Chain
from mteditflow.evaluation.evaluation import (
    CONSISTENCY,
    FOLLOWING,
    METRICS,
    PER_SAMPLE,
    Evaluation,
)

DROP, ALL = "drop", "all"  # from turn 1 to N; all turns of an edit type
BY_TYPE = METRICS[:2]  # IF and Marginal


class Place(NamedTuple):
    """Which number it is: a metric, of all chains or of one edit type, at a turn from 1 on."""

    metric: str
    edit_type: str | None
    turn: int | str


class Numbers:
    """The numbers of an evaluation as one vector, for a bootstrap over its chains.

    Attributes:
        edit_types: those that occur.
        places: which number stands where.
    """

    def __init__(self, evaluation: Evaluation, chains: Sequence[Chain]) -> None:
        if [chain.id for chain in chains] != list(evaluation.chain_ids):
            raise ValueError("chains: expected those of the evaluation in its order, got others")
        self._evaluation, turns = evaluation, evaluation.turns
        named = {name for chain in chains for name in chain.task_types or ()}
        self.edit_types = tuple(name for name in TASK_TYPES if name in named)
        steps: list[int | str] = list(range(1, turns + 1))
        self.places = [
            *(Place(x, None, turn) for x in evaluation.names for turn in [*steps, DROP]),
            *(Place(x, k, t) for k in self.edit_types for x in BY_TYPE for t in [*steps, ALL]),
        ]
        self._types = torch.full((len(chains), turns), -1)  # index of each turn's type
        for c, chain in enumerate(chains):
            for n, name in enumerate(chain.task_types or ()):
                self._types[c, n] = self.edit_types.index(name)

    def samples(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Some chains as ``values`` takes them."""
        return self._types[rows], *self._evaluation.samples(rows)

    def values(self, types: Tensor, *samples: Tensor) -> Tensor:
        """Compute all numbers of some chains, in the order of ``places``."""
        metrics = self._evaluation.per_turn(*samples)
        metrics = torch.cat([metrics, metrics[:, :1] - metrics[:, -1:]], dim=1)
        success, shares = samples[0].float(), []
        for followed in (success.cumprod(dim=1), success):
            of_type, turns = (_with_sum(x) for x in self._by_type(types, followed))
            shares.append(100 * of_type / turns)
        return torch.cat([metrics.flatten(), torch.stack(shares, dim=1).flatten()])

    def _by_type(self, types: Tensor, followed: Tensor) -> tuple[Tensor, Tensor]:
        """How many turns of each type were followed, and how many there are, both [K, N]."""
        of_type = types[..., None] == torch.arange(len(self.edit_types))
        return (followed[..., None] * of_type).sum(dim=0).T, of_type.sum(dim=0).T

    def counts(self, rows: Tensor) -> list[int]:
        """What each number is a mean over, in chains; for an edit type in turns."""
        evaluation, found = self._evaluation, []
        names = dict.fromkeys(evaluation.names, FOLLOWING) | {x: x for x in evaluation.others}
        names |= dict.fromkeys(("content_consistency", PER_SAMPLE), CONSISTENCY)
        for metric in evaluation.names:
            measured = evaluation.terms[names[metric]].measured[rows]
            both = measured[:, 0] & measured[:, -1]  # a drop is of the chains that have both ends
            found += [*measured.sum(dim=0).tolist(), int(both.sum())]
        types = self._types[rows]
        _, of_type = self._by_type(types, torch.zeros_like(types))
        for turns in _with_sum(of_type).tolist():
            found += turns * len(BY_TYPE)
        return found


def _with_sum(x: Tensor) -> Tensor:
    """Append the sum over turns: [K, N] -> [K, N + 1]."""
    return torch.cat([x, x.sum(dim=1, keepdim=True)], dim=1)
