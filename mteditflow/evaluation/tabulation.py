"""All numbers of an evaluation as one vector, by turn and by edit type, for one bootstrap.

``C`` chains of up to ``N`` turns, ``K`` edit types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mteditflow.chains import TASK_TYPES, Chain
from mteditflow.evaluation.evaluation import CONSISTENCY, Evaluation, outcomes
from mteditflow.evaluation.intervals import METRICS, OVERALL, interval_of
from mteditflow.metrics import (
    Interval,
    interval_difference,
    paired_difference_interval,
    wilson_interval,
)

DROP, ALL = "drop", "all"  # turn 1 minus turn N; all turns of an edit type
SURVIVAL, SURVIVED = "survival", "turns_survived"  # Kaplan-Meier, in percent; a number of turns
MEAN, MEDIAN = "mean", "median"  # of the turns survived
BY_TYPE = METRICS[:2]  # IF and Marginal
TURNS_SHOWN = (1, 3, 5, 8, 10, 15, 20)  # turns in tables of long chains
FEW_TURNS = 8  # largest number of turns at which tables show all
ENDS = [0, -1]  # the first turn and the last


class Place(NamedTuple):
    """Name of a number: metric, edit type (None: all turns), and turn from 1 or a word."""

    metric: str
    edit_type: str | None
    turn: int | str


def turns_shown(turns: int) -> list[int]:
    """Return the turns that tables show: all up to 8, else 1, 3, 5, 8, 10, 15, 20, 30, ..., N.

    Example:
        >>> turns_shown(3), turns_shown(12)
        ([1, 2, 3], [1, 3, 5, 8, 10, 12])
    """
    if turns <= FEW_TURNS:
        return list(range(1, turns + 1))
    return sorted({x for x in (*TURNS_SHOWN, *range(30, turns, 10)) if x < turns} | {turns})


class Numbers:
    """All numbers of an evaluation as one vector, for one bootstrap over its chains.

    Args:
        evaluation: scores of the chains.
        chains: its chains in its order, with their edit types if known.

    Attributes:
        edit_types: edit types that occur, in the order of ``TASK_TYPES``.
        places: name of each entry of the vector.

    Raises:
        ValueError: the chains are not those of the evaluation in its order.
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
        self._types = torch.full(
            (len(chains), turns), -1, dtype=torch.int64, device="cpu"
        )  # index of each turn's type
        for c, chain in enumerate(chains):
            for n, name in enumerate(chain.task_types or ()):
                self._types[c, n] = self.edit_types.index(name)

    def values(self, types: Tensor, *samples: Tensor) -> Tensor:
        """Compute all numbers of some chains, [number of places], in the order of ``places``."""
        metrics = self._evaluation.per_turn(*samples)
        metrics = torch.cat([metrics, self._drops(metrics, *samples)[:, None]], dim=1)
        shares = []
        for outcome, counted in self._by_type(types, *samples[:2]):
            of_type, turns = (_with_sum(x.sum(dim=1)) for x in (outcome & counted, counted))
            shares.append(100 * of_type / turns)
        return torch.cat([metrics.flatten(), torch.stack(shares, dim=1).flatten()])

    def interval(self, samples: tuple[Tensor, ...]) -> Interval:
        """Compute all numbers with their 95% intervals, in the order of ``places``."""
        found = torch.stack(interval_of(self.values, (self._types, *samples)))
        self._mend_levels(found, samples)
        return Interval(*found)

    def _mend_levels(self, found: Tensor, samples: tuple[Tensor, ...]) -> Tensor:
        """Replace the bootstrapped intervals of shares and of numbers without spread, in place.

        Returns:
            Where Overall takes the ends of its parts, by turn and, last, for its drop: [N + 1].
        """
        table, by_type = self._tables(found)
        for i, (outcome, counted) in self._outcomes(samples):
            table[1:, i, :-1] = _ends(_share(outcome, counted))
            table[1:, i, -1:] = _ends(_fall(outcome, counted))
        for i, (outcome, counted) in enumerate(self._by_type(self._types, *samples[:2])):
            by_type[1:, :, i, :-1] = _ends(_share(outcome, counted, dim=1))
            # Several turns of one chain are not independent: the bootstrap over chains stays here.
            pooled = by_type[..., i, -1]
            _widen(pooled, _share_of_chains(pooled[0], counted))
        return self._mend_metrics(table, samples)

    def _mend_metrics(self, table: Tensor, samples: tuple[Tensor, ...]) -> Tensor:
        """Replace intervals without width of CC, Overall and other terms, in place.

        The table is [3, metrics, N + 1]; its last column holds the drops.
        """
        counts = self._with_drops(self._evaluation.fewest_of, samples)
        mend, levels, falls = self._evaluation.intervals, table[..., :-1], table[..., -1:]
        edge = mend.levels(levels, counts[:, :-1])
        ends = levels[..., ENDS]
        edge_of_fall = edge[ENDS].any(dim=0, keepdim=True)
        mend.changes(falls, counts[:, -1:], ends[..., :1], ends[..., 1:], edge_of_fall)
        return torch.cat([edge, edge_of_fall])

    def difference(self, before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> Interval:
        """Compute the paired differences of all numbers, after minus before, with intervals."""

        def statistic(types: Tensor, *samples: Tensor) -> Tensor:
            old, new = samples[: len(before)], samples[len(before) :]
            numbers = self.values(types, *old), self.values(types, *new)
            return torch.cat([*numbers, numbers[1] - numbers[0]])

        bootstrapped = torch.stack(interval_of(statistic, (self._types, *before, *after)))
        old, new, found = (x.contiguous() for x in bootstrapped.chunk(3, dim=1))
        edges = self._mend_levels(old, before) | self._mend_levels(new, after)
        table, by_type = self._tables(found)
        pairs = zip(*(self._outcomes(run) for run in (before, after)), strict=True)
        for (i, (first, counted)), (_, (second, _)) in pairs:
            table[1:, i, :-1] = _ends(paired_difference_interval(first, second, valid=counted))
            falls = interval_difference(_fall(second, counted), _fall(first, counted))
            _widen(table[:, i, -1:], falls)
        counts = self._with_drops(self._evaluation.fewest_of, before)
        after_table, before_table = (self._tables(numbers)[0] for numbers in (new, old))
        self._evaluation.intervals.changes(table, counts, after_table, before_table, edges)
        self._mend_types(by_type, before, after, (old, new))
        return Interval(*found)

    def _mend_types(
        self,
        by_type: Tensor,
        before: tuple[Tensor, ...],
        after: tuple[Tensor, ...],
        numbers: tuple[Tensor, Tensor],
    ) -> None:
        """Replace the intervals of differences of shares by edit type, in place."""
        shares = [self._tables(x)[1] for x in numbers]
        for i in range(len(BY_TYPE) * bool(self.edit_types)):
            (old, counted), (new, _) = (
                self._by_type(self._types, *run[:2])[i] for run in (before, after)
            )
            flat = [x.transpose(0, 1).flatten(1) for x in (old, new, counted)]  # [C, K N]
            ends = _ends(paired_difference_interval(flat[0], flat[1], valid=flat[2]))
            by_type[1:, :, i, :-1] = ends.reshape(2, *old.shape[::2])
            pooled = (_share_of_chains(x[0, :, i, -1], counted) for x in reversed(shares))
            _widen(by_type[..., i, -1], interval_difference(*pooled))

    def _outcomes(self, samples: tuple[Tensor, ...]) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Yield index, outcome and counted of each metric that is a share of chains."""
        for name, pair in self._evaluation.outcomes(*samples).items():
            yield self._evaluation.names.index(name), pair

    def counts(self, samples: tuple[Tensor, ...]) -> list[int]:
        """Return the denominator of each number, in chains, or in turns for an edit type."""
        chains = self._with_drops(self._evaluation.counts_of, samples)
        pairs = self._by_type(self._types, *samples[:2])
        turns = torch.stack([_with_sum(counted.sum(dim=1)) for _, counted in pairs], dim=1)
        found: list[int] = torch.cat([chains.flatten(), turns.flatten()]).tolist()
        return found

    def _with_drops(self, counts_of: Callable[..., Tensor], samples: tuple[Tensor, ...]) -> Tensor:
        """Return the chains behind each metric by turn, and behind its drop: [metrics, N + 1]."""
        chains, drops = counts_of(*samples), counts_of(*at_ends(*samples))[:, -1:]
        for i, (_, counted) in self._outcomes(samples):
            drops[i] = (counted[:, 0] & counted[:, -1]).sum()
        if CONSISTENCY in self._evaluation.terms:  # Overall is no mean, so its drop is unpaired
            drops[OVERALL] = chains[OVERALL, ENDS].min()
        return torch.cat([chains, drops * (self._evaluation.turns > 1)], dim=1)

    def _drops(self, metrics: Tensor, *samples: Tensor) -> Tensor:
        """Return turn 1 minus turn N of each metric, over the chains that have both: [metrics]."""
        first, last = self._evaluation.per_turn(*at_ends(*samples)).unbind(dim=1)
        drops = first - last
        if self._evaluation.turns == 1:  # a drop needs two turns
            return torch.full_like(first, torch.nan)
        for i, (outcome, counted) in self._outcomes(samples):
            both = counted[:, 0] & counted[:, -1]
            fall = (outcome[:, 0].float() - outcome[:, -1].float()) * both
            drops[i] = 100 * fall.sum() / both.sum()
        if CONSISTENCY in self._evaluation.terms:
            drops[OVERALL] = metrics[OVERALL, 0] - metrics[OVERALL, -1]
        return drops

    def _by_type(
        self, types: Tensor, success: Tensor, judged: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Return outcome and counted of IF and Marginal by edit type, each [K, C, N]."""
        of_type = types == torch.arange(len(self.edit_types), device=types.device)[:, None, None]
        pairs = outcomes(success, judged).values()
        return [(outcome.expand_as(of_type), of_type & counted) for outcome, counted in pairs]

    def _tables(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of numbers [R, places]: [R, metrics, N + 1] and [R, K, 2, N + 1]."""
        columns = self._evaluation.turns + 1
        end = len(self._evaluation.names) * columns
        metrics = len(self._evaluation.names), columns
        by_type = len(self.edit_types), len(BY_TYPE), columns
        count = len(rows)
        return rows[:, :end].view(count, *metrics), rows[:, end:].view(count, *by_type)


def at_ends(success: Tensor, judged: Tensor, *scores: Tensor) -> tuple[Tensor, ...]:
    """Return turns 1 and N of samples, each [C, 2]; a score counts only if both are there."""
    both = judged[:, ENDS].all(dim=1, keepdim=True).expand(-1, len(ENDS))
    ends = [x[:, ENDS] for x in scores]
    paired = [x.masked_fill(x.isnan().any(dim=1, keepdim=True), torch.nan) for x in ends]
    return success[:, ENDS], both, *paired


def _share(outcome: Tensor, counted: Tensor, dim: int = 0) -> Interval:
    return wilson_interval((outcome & counted).sum(dim=dim), counted.sum(dim=dim))


def _share_of_chains(percent: Tensor, counted: Tensor) -> Interval:
    """Return Wilson's interval of a share of turns as if all turns of a chain were one case.

    It is the widest possible, since turns of a chain that agree carry no further information.

    Args:
        percent: share of turns in percent, [K].
        counted: turns that count, boolean [K, C, N].
    """
    chains = counted.any(dim=2).sum(dim=1)
    return wilson_interval((percent.double() / 100).nan_to_num().clamp(0, 1) * chains, chains)


def _fall(outcome: Tensor, counted: Tensor) -> Interval:
    """Return turn 1 minus turn N, paired by chain: [1]; NaN if N is 1."""
    both = counted[:, :1] & counted[:, -1:] & (counted.shape[1] > 1)
    return paired_difference_interval(outcome[:, -1:], outcome[:, :1], valid=both)


def _ends(interval: Interval) -> Tensor:
    """Return low and high in percent, stacked: [2, ...]."""
    return 100 * torch.stack([interval.low, interval.high]).float()


def _widen(table: Tensor, interval: Interval) -> None:
    """Replace bootstrapped intervals without width in a table [3, ...], which is in percent."""
    table[1:] = torch.where(table[1] == table[2], _ends(interval), table[1:])


def _with_sum(x: Tensor) -> Tensor:
    """Append the sum over turns: [K, N] -> [K, N + 1]."""
    return torch.cat([x, x.sum(dim=1, keepdim=True)], dim=1)
