"""Reward history per chain: earlier rounds join the statistics of small groups."""

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
    check_values,
)
from mteditflow.advantages.credit import Signal

UNMEASURED = "unmeasured"  # replaces the number in an entry; None marks a lost one
_Number = float | str | None
_Entry = dict[str, list[list[_Number]]]


@dataclass(frozen=True)
class RewardHistory:
    """Signals of the last rounds of each chain, which join the statistics of its next group.

    A group of two or four has a noisy mean and standard deviation. With the history its members are
    also compared with earlier rollouts of the same chain. Those came from older policies, so the
    mean lags behind by up to ``rounds`` visits of the chain. A group without history is normalized
    on its own.

    Args:
        rounds: number of past visits of a chain that are kept, >= 1.
        entries: stored signals by group id. They are the whole state: ``state_dict`` returns them
            in a form that JSON can hold, and ``from_state`` restores them.

    Raises:
        ValueError: ``rounds`` is below 1.
        TypeError: a group id is not an integer.

    Source: the per-prompt statistics of implementations of Flow-GRPO (arXiv 2505.05470), with a
        bound on their age.

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
        """Append the stored signals of the groups in this batch.

        Args:
            signals: name to signal, each [B, N].
            group: integer group id of each trajectory, [B].

        Returns:
            Signals [B + P, N] and group ids [B + P], with P stored trajectories. Compute advantages
            on them and keep the first B rows. Stored entries that were unmeasured or lost stay so.
            Entries with other names or another number of turns count as lost.

        Raises:
            ValueError: shapes do not match, or a measured number is not finite.
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
        """Return the history with this round added, cut to the last ``rounds`` visits of a chain.

        Args:
            signals: name to signal, each [B, N], as given to ``joined``.
            group: integer group id of each trajectory, [B].

        Raises:
            ValueError: shapes do not match, or a measured number is not finite.
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
        """Return the entries in a form that JSON can hold; group ids become strings."""
        return {str(name): list(kept) for name, kept in self.entries.items()}

    @classmethod
    def from_state(cls, rounds: int, state: Mapping[str, Any]) -> RewardHistory:
        """Return the history restored from a ``state_dict``, cut to the last ``rounds`` visits."""
        return cls(rounds, {int(name): list(kept)[-rounds:] for name, kept in state.items()})

    def _check(self, signals: Mapping[str, Signal], group: Numbers) -> Tensor:
        """Check signals and ids; return the ids as a tensor."""
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
            # Stored as it is, it would come back as unmeasured.
            finite = ~signal.measured | signal.value.isfinite()
            check_values(f"signals[{name!r}]", signal.value, finite, "finite values where measured")
        return ids


def _listed(signal: Signal, own: Tensor) -> list[list[_Number]]:
    """Return rows of a signal as lists, with ``UNMEASURED`` or ``None`` (lost) for no number."""
    rows = zip(*(x[own].tolist() for x in signal), strict=True)
    return [
        [x if has else UNMEASURED if ok else None for x, ok, has in zip(*row, strict=True)]
        for row in rows
    ]


def _signal(rows: Sequence[Sequence[_Number]], turns: int, like: Tensor) -> Signal:
    """Return stored rows as a signal [P, N] in the dtype and on the device of ``like``."""
    numbers = [[x if isinstance(x, (int, float)) else math.nan for x in row] for row in rows]
    valid = [[x is not None for x in row] for row in rows]
    value = torch.tensor(numbers, dtype=like.dtype, device=like.device).reshape(-1, turns)
    mask = torch.tensor(valid, dtype=torch.bool, device=like.device).reshape(-1, turns)
    return Signal(value, mask, value.isfinite())


def _rows(entry: _Entry, term: str, turns: int) -> list[list[_Number]]:
    """Return the stored rows of a term, all lost if their count or number of turns differs."""
    count = len(next(iter(entry.values())))
    rows = entry.get(term, [])
    # Runs may change their rewards or chain lengths between rounds; old entries then do not fit.
    fits = len(rows) == count and all(len(row) == turns for row in rows)
    return rows if fits else [[None] * turns] * count
