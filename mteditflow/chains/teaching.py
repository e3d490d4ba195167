"""Rounds of the chains that still teach: drawn by what their groups showed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sized
from random import Random
from typing import Any

from mteditflow._checks import check_number
from mteditflow.advantages.selection import draw_probabilities
from mteditflow.chains.sampler import RoundSampler


class InformativeSampler(RoundSampler):
    """Draws each round's chains anew, in proportion to how much the rewards of their groups spread.

    A chain whose group all solved, or none, comes seldom; it is never left out for good. In place
    of epochs: a chain that was never drawn counts as much as the best one, so that all are tried.
    In all else as ``GroupSampler``: a round is one list of indices, each rank has a slice, the
    index of a chain is its group id.

    A draw depends on the rounds before it, so that a loader must not fetch ahead. The trainer calls
    ``step`` after each round, on every rank with the same spreads, those of all ranks' groups.

    Args:
        chains: the data set, or anything of its length.
        groups: chains in a round, over all ranks.
        group_size: G, trajectories of each.
        ranks: number of processes.
        rank: this one, in [0, ranks).
        split_groups: as in ``GroupSampler``.
        seed: of the draws.
        uniform: share of draws that ignores the spreads, in (0, 1].
        memory: share that a chain's earlier spreads keep beside a new one, in [0, 1).

    Raises:
        ValueError: a number is out of range, or does not divide over the ranks.
        TypeError: a count is not an integer.

    Example:
        >>> sampler = InformativeSampler(range(4), groups=2, group_size=2)
        >>> first = next(iter(sampler))
        >>> sampler.step({chain: 0.0 if chain == first[0] else 0.5 for chain in first})
        >>> resumed = InformativeSampler(range(4), groups=2, group_size=2)
        >>> resumed.load_state_dict(sampler.state_dict())
        >>> next(iter(resumed)) == next(iter(sampler))
        True
    """

    _depends = ("chains", "groups", "group_size", "seed", "uniform", "memory")

    def __init__(
        self,
        chains: Sized,
        *,
        groups: int,
        group_size: int,
        ranks: int = 1,
        rank: int = 0,
        split_groups: bool = False,
        seed: int = 0,
        uniform: float = 0.2,
        memory: float = 0.5,
    ) -> None:
        super().__init__(
            chains,
            groups=groups,
            group_size=group_size,
            ranks=ranks,
            rank=rank,
            split_groups=split_groups,
            seed=seed,
        )
        check_number("uniform", uniform, low=0.0, high=1.0, open_low=True)
        check_number("memory", memory, low=0.0, high=1.0, open_high=True)
        self._uniform, self._memory = uniform, memory
        self._round = 0
        self._spreads: list[float | None] = [None] * self._chains
        self._drawn = False

    @property
    def probabilities(self) -> list[float]:
        """How likely each chain is to be the first one drawn now."""
        best = max((spread for spread in self._spreads if spread is not None), default=1.0)
        known = [best if spread is None else spread for spread in self._spreads]
        return draw_probabilities(known, uniform=self._uniform)

    def __iter__(self) -> Iterator[list[int]]:
        """Rounds without end: this rank's indices in each.

        Raises:
            RuntimeError: a round is asked for before ``step`` was called for the last one.
        """
        self._drawn = False
        while True:
            if self._drawn:
                raise RuntimeError("step: expected a call after each round, got none")
            self._drawn = True
            yield self._indices(self._draw())

    def step(self, spread: Mapping[int, float]) -> None:
        """Count a round as done.

        Args:
            spread: chain to the spread of its group's rewards, >= 0, such as their std; without the
                chains of which too little is known, as where rewards were lost.

        Raises:
            ValueError: a chain does not exist, a spread is negative or not finite.
        """
        for chain, value in spread.items():
            if not 0 <= chain < self._chains:
                raise ValueError(f"spread: expected chains in [0, {self._chains}), got {chain}")
            check_number(f"spread[{chain}]", value, low=0.0)
        for chain, value in spread.items():
            before = self._spreads[chain]
            kept = 0.0 if before is None else self._memory
            self._spreads[chain] = kept * (before or 0.0) + (1 - kept) * value
        self._round, self._drawn = self._round + 1, False

    def state_dict(self) -> dict[str, Any]:
        """Return rounds done, spreads, and what the draws depend on; JSON can hold it."""
        return {**self._plan(), "round": self._round, "spreads": list(self._spreads)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another sampler was, which may have been on another number of ranks.

        Raises:
            ValueError: the state is of other draws, which could not be continued.
        """
        self._check_plan(state)
        self._round, self._spreads = state["round"], list(state["spreads"])
        self._drawn = False

    def _draw(self) -> list[int]:
        """Distinct chains: those whose exponential clocks, of their probabilities, ring first."""
        random = Random(f"{self._seed}, {self._round}")
        rings = [-math.log(1 - random.random()) / p for p in self.probabilities]
        return sorted(range(self._chains), key=rings.__getitem__)[: self._groups]
