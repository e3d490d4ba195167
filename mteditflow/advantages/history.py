"""Rewards of earlier rounds of the same chain, for groups too small for a mean of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_ids,
    check_count,
    check_integers,
    check_kind,
    check_named,
    check_rank,
    check_shape,
)
from mteditflow.advantages.credit import Signal

UNMEASURED = "unmeasured"  # in an entry, in place of a number; None stands for a lost one
_Number = float | str | None
_Entry = dict[str, list[list[_Number]]]


@dataclass(frozen=True)
class RewardHistory:
    """Signals of the last rounds of each chain; they join the statistics of its next group.

    A group of two or four has a noisy mean and standard deviation. With the history its members are
    compared with earlier rollouts of the same chain too, which were made by older policies: the
    mean lags behind by up to ``rounds`` visits of the chain. A group without any history is
    normalized alone.

    Args:
        rounds: visits of a chain that are remembered, >= 1.
        entries: remembered signals by group id. All the state there is: ``state_dict`` returns it
            as JSON can hold it, ``from_state`` reads that.

    Raises:
        ValueError: ``rounds`` is below 1.
        TypeError: a group id is not an integer.

    Source: the per-prompt statistics that implementations of Flow-GRPO (arXiv 2505.05470) keep,
        with a bound on their age.

    Example:
        >>> from mteditflow import TurnCredit, turn_advantage
        >>> history, group = RewardHistory(rounds=2), torch.tensor([7, 7])
        >>> first = {"r": TurnCredit()(torch.tensor([[0.0], [0.0]]))}
        >>> history = history.updated(first, group)
        >>> signals = {"r": TurnCredit()(torch.tensor([[1.0], [1.0]]))}
        >>> alone = turn_advantage(signals, {"r": 1.0}, group, eps=0.0)
        >>> joined, groups = history.joined(signals, group)
        >>> both = turn_advantage(joined, {"r": 1.0}, groups, eps=0.0)
        >>> alone.value.flatten(), both.value[:2].flatten()
        (tensor([0., 0.]), tensor([1., 1.]))
    """

    rounds: int
    entries: Mapping[int, Sequence[_Entry]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_count("rounds", self.rounds)
        for name in self.entries:
            if isinstance(name, bool) or not isinstance(name, int):
                raise TypeError(
                    f"entries: expected integer group ids, got {name!r}; from_state reads what "
                    "state_dict returned, and JSON has held"
                )

    def joined(
        self, signals: Mapping[str, Signal], group: Numbers
    ) -> tuple[dict[str, Signal], Tensor]:
        """Append the remembered signals of the groups that are there.

        Args:
            signals: name to signal, each [B, N].
            group: integer group id of each trajectory, [B].

        Returns:
            Signals [B + P, N] and group ids [B + P]; cut advantages computed with them to the
            first B. What was unmeasured or lost then still is. Remembered entries of other names or
            numbers of turns count as lost.

        Raises:
            ValueError: shapes do not match.
            TypeError: ``group`` is not integer, or a mask not boolean.
        """
        group = self._check(signals, group)
        turns = next(iter(signals.values())).value.shape[1]
        past = [
            (name, entry)
            for name in dict.fromkeys(group.tolist())
            for entry in self.entries.get(name, ())
        ]
        ids = [name for name, entry in past for _ in next(iter(entry.values()))]
        found = {}
        for term, signal in signals.items():
            rows = [row for _, entry in past for row in _rows(entry, term, turns)]
            past_signal = _signal(rows, turns, signal.value)
            found[term] = Signal(*map(torch.cat, zip(signal, past_signal, strict=True)))
        more = torch.tensor(ids, dtype=group.dtype, device=group.device)
        return found, torch.cat([group, more])

    def updated(self, signals: Mapping[str, Signal], group: Numbers) -> RewardHistory:
        """Return the history after a round.

        Args:
            signals: name to signal, each [B, N], as given to ``joined``.
            group: integer group id of each trajectory, [B].

        Raises:
            ValueError: shapes do not match.
            TypeError: ``group`` is not integer, or a mask not boolean.
        """
        group = self._check(signals, group)
        entries = {name: list(kept) for name, kept in self.entries.items()}
        for name in dict.fromkeys(group.tolist()):
            own = group == name
            entry = {term: _listed(signal, own) for term, signal in signals.items()}
            entries[name] = [*entries.get(name, ()), entry][-self.rounds :]
        return RewardHistory(self.rounds, entries)

    def state_dict(self) -> dict[str, Any]:
        """Return the entries as JSON holds them."""
        return {str(name): list(kept) for name, kept in self.entries.items()}

    @classmethod
    def from_state(cls, rounds: int, state: Mapping[str, Any]) -> RewardHistory:
        """Return the history that ``state_dict`` was taken from, cut to ``rounds``."""
        return cls(rounds, {int(name): list(kept)[-rounds:] for name, kept in state.items()})

    def _check(self, signals: Mapping[str, Signal], group: Numbers) -> Tensor:
        """Return the ids, after checks of all."""
        check_named("signals", signals, "signals")
        if not signals:
            raise ValueError("signals: expected at least one, got none")
        for name, signal in signals.items():
            check_kind(f"signals[{name!r}]", signal, Signal, "a Signal, as a Credit returns it")
        first, signal = next(iter(signals.items()))
        check_rank(f"signals[{first!r}]", signal.value, 2, "[B, N]", maximum=2)
        ids = as_ids(group, signal.value.device)
        check_rank("group", ids, 1, "[B]", maximum=1)
        check_integers("group", ids, "ids")
        shape = (len(ids), signal.value.shape[1])
        for name, signal in signals.items():
            check_shape(f"signals[{name!r}]", signal.value, shape, "[B, N]")
        return ids


def _listed(signal: Signal, own: Tensor) -> list[list[_Number]]:
    """Return some rows of a signal, a word where unmeasured and None where lost."""
    rows = zip(*(x[own].tolist() for x in signal), strict=True)
    return [
        [x if has else UNMEASURED if ok else None for x, ok, has in zip(*row, strict=True)]
        for row in rows
    ]


def _signal(rows: Sequence[Sequence[_Number]], turns: int, like: Tensor) -> Signal:
    """Return remembered rows as a signal [P, N] in the dtype and on the device of a tensor."""
    numbers = [[x if isinstance(x, (int, float)) else math.nan for x in row] for row in rows]
    valid = [[x is not None for x in row] for row in rows]
    value = torch.tensor(numbers, dtype=like.dtype, device=like.device).reshape(-1, turns)
    mask = torch.tensor(valid, dtype=torch.bool, device=like.device).reshape(-1, turns)
    return Signal(value, mask, value.isfinite())


def _rows(entry: _Entry, term: str, turns: int) -> list[list[_Number]]:
    """Return the remembered rows of a term, all of them lost where they do not fit."""
    count = len(next(iter(entry.values())))
    rows = entry.get(term, [])
    fits = len(rows) == count and all(len(row) == turns for row in rows)
    return rows if fits else [[None] * turns] * count
