"""Batch samplers of rounds of groups: each chain G times, split over ranks, resumable.

``GroupSampler`` iterates over all chains in shuffled order; ``InformativeSampler`` prefers chains
whose groups are still informative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Sized
from random import Random
from typing import Any, ClassVar

from torch.utils.data import Sampler

from mteditflow._checks import check_choice, check_count, check_number
from mteditflow.advantages.selection import draw_probabilities

REMAINDERS = ("drop", "wrap")


class RoundSampler(Sampler[list[int]]):
    """Base of round samplers: one list of indices per round, of which each rank takes a slice.

    Arguments are those of ``GroupSampler``.
    """

    # Arguments that the order depends on. Ranks are not among them, so a run may resume on more.
    _depends: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        chains: Sized,
        *,
        groups: int,
        group_size: int,
        ranks: int,
        rank: int,
        split_groups: bool,
        seed: int,
    ) -> None:
        for name, value in (("groups", groups), ("group_size", group_size), ("ranks", ranks)):
            check_count(name, value)
        for name, value in (("rank", rank), ("seed", seed)):
            check_count(name, value, low=0)
        if rank >= ranks:
            raise ValueError(f"rank: expected an integer in [0, {ranks}), got {rank}")
        if groups > len(chains):
            raise ValueError(f"groups: expected at most the {len(chains)} chains, got {groups}")
        size = groups * group_size
        name, shared = ("groups * group_size", size) if split_groups else ("groups", groups)
        if shared % ranks:
            more = -(-shared // ranks) * ranks
            raise ValueError(
                f"{name}: expected a multiple of the {ranks} ranks, got {shared}; next: {more}"
            )
        self._own = slice(rank * size // ranks, (rank + 1) * size // ranks)
        self._chains, self._groups, self._group_size = len(chains), groups, group_size
        self._seed = seed

    def _indices(self, chains: Sequence[int]) -> list[int]:
        """Return this rank's indices in the round of these chains."""
        return [chain for chain in chains for _ in range(self._group_size)][self._own]

    def _plan(self) -> dict[str, Any]:
        return {name: getattr(self, f"_{name}") for name in self._depends}

    def _check_plan(self, state: Mapping[str, Any]) -> None:
        for name, own in self._plan().items():
            if state.get(name) != own:
                raise ValueError(
                    f"state: expected {name} = {own!r}, as in this sampler, got {state.get(name)!r}"
                )


class GroupSampler(RoundSampler):
    """Batch sampler of a DataLoader: in each round ``groups`` chains, each ``group_size`` times.

    A round is one list of indices, group after group, independent of the number of ranks. Each
    rank takes its slice, so ``mteditflow.gather_ranks`` joins the ranks' batches to the same list.
    One pass yields the remaining rounds of an epoch. An epoch has each chain in exactly one round,
    up to the remainder. The index of a chain is its group id, unique within a round.

    The loader prefetches, so only the trainer can count finished rounds: it calls ``step`` after
    each, on every rank. A sampler that loads the ``state_dict`` then continues exactly, on any
    number of ranks.

    Args:
        chains: the data set, or anything of its length.
        groups: chains in a round, over all ranks.
        group_size: G, trajectories of each chain.
        ranks: number of processes.
        rank: index of this process, in [0, ranks).
        split_groups: whether a group may be spread over ranks; ``groups * group_size`` must then
            be a multiple of ``ranks``, else ``groups`` must.
        shuffle: draw a new order in each epoch; else keep the order of the data set.
        seed: seed of the order, >= 0.
        remainder: "drop" leaves out the chains that do not fill a round at the end of an epoch;
            "wrap" fills that round with the first chains of the epoch.

    Raises:
        ValueError: a count is out of range, does not divide over the ranks, or a round needs more
            chains than there are.
        TypeError: a count is not an integer.

    Example:
        >>> sampler = GroupSampler(range(5), groups=2, group_size=2, shuffle=False)
        >>> list(sampler)
        [[0, 0, 1, 1], [2, 2, 3, 3]]
        >>> sampler.step()
        >>> resumed = GroupSampler(range(5), groups=2, group_size=2, shuffle=False)
        >>> resumed.load_state_dict(sampler.state_dict())
        >>> list(resumed)
        [[2, 2, 3, 3]]
    """

    _depends = ("chains", "groups", "group_size", "shuffle", "seed", "remainder")

    def __init__(
        self,
        chains: Sized,
        *,
        groups: int,
        group_size: int,
        ranks: int = 1,
        rank: int = 0,
        split_groups: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        remainder: str = "drop",
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
        check_choice("remainder", remainder, REMAINDERS)
        self._shuffle, self._remainder = shuffle, remainder
        self._epoch = self._round = 0
        self._passed = self._stepped = False

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return self._epoch

    def __len__(self) -> int:
        """Return the number of rounds in an epoch."""
        rounds, left = divmod(self._chains, self._groups)
        return rounds + (left > 0 and self._remainder == "wrap")

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's indices in each remaining round of the epoch.

        Raises:
            RuntimeError: the previous pass yielded all rounds, and ``step`` was never called.
        """
        if self._passed and not self._stepped:
            raise RuntimeError("step: expected a call after each round, got none in a whole pass")
        self._passed = self._stepped = False
        order = self._ordered()
        for start in range(self._round * self._groups, len(order), self._groups):
            yield self._indices(order[start : start + self._groups])
        self._passed = True

    def step(self) -> None:
        """Count a round as done; the last one of an epoch begins the next epoch."""
        self._stepped = True
        self._round += 1
        if self._round == len(self):
            self._epoch, self._round = self._epoch + 1, 0

    def state_dict(self) -> dict[str, int | bool | str]:
        """Return the finished rounds and the arguments that fix the order, as JSON types."""
        return {**self._plan(), "epoch": self._epoch, "round": self._round}

    def load_state_dict(self, state: Mapping[str, int | bool | str]) -> None:
        """Continue from another sampler's state, which may come from another number of ranks.

        Raises:
            ValueError: the state belongs to another order, which could not be continued.
        """
        self._check_plan(state)
        epoch, done = state.get("epoch"), state.get("round")
        if not (
            isinstance(epoch, int)
            and isinstance(done, int)
            and epoch >= 0
            and 0 <= done < len(self)
        ):
            raise ValueError(f"state: expected an epoch and a round of it, got {epoch!r}, {done!r}")
        self._epoch, self._round = epoch, done
        self._passed = False

    def _ordered(self) -> list[int]:
        """Return the chains of this epoch, round after round."""
        order = list(range(self._chains))
        if self._shuffle:
            # Random accepts no tuple; it seeds from text by SHA-512, equal in every process.
            Random(f"{self._seed}, {self._epoch}").shuffle(order)
        wrapped = order + order[: self._groups]  # cut below: "drop" has fewer rounds than "wrap"
        return wrapped[: len(self) * self._groups]


class InformativeSampler(RoundSampler):
    """Batch sampler that prefers informative groups: chains whose rewards differed when last drawn.

    Each round draws its chains in proportion to the spread of their groups' rewards. A chain that
    all or none of its group solved is drawn rarely, but never excluded. There are no epochs: a
    chain that was never drawn has the largest known spread, so that all are tried. Otherwise it
    works as ``GroupSampler``: a round is one list of indices, each rank takes a slice, and the
    index of a chain is its group id.

    A draw depends on the rounds before it, so a loader must not prefetch. The trainer calls
    ``step`` after each round, on every rank with the same spreads: those of all ranks' groups.

    Args:
        chains: the data set, or anything of its length.
        groups: chains in a round, over all ranks.
        group_size: G, trajectories of each chain.
        ranks: number of processes.
        rank: index of this process, in [0, ranks).
        split_groups: as in ``GroupSampler``.
        seed: seed of the draws, >= 0.
        uniform: share of draws that ignores the spreads, in (0, 1].
        memory: weight of a chain's earlier spreads in their moving average, in [0, 1).

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
        """Probability of each chain to be drawn first in the next round, [number of chains]."""
        # Optimism about unseen chains: each is drawn as often as the most informative one.
        best = max((spread for spread in self._spreads if spread is not None), default=1.0)
        known = [best if spread is None else spread for spread in self._spreads]
        return draw_probabilities(known, uniform=self._uniform)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's indices in each round, without end.

        Raises:
            RuntimeError: the next round is requested before ``step`` was called for the last one.
        """
        self._drawn = False
        while True:
            if self._drawn:
                raise RuntimeError("step: expected a call after each round, got none")
            self._drawn = True
            yield self._indices(self._draw())

    def step(self, spread: Mapping[int, float]) -> None:
        """Count a round as done and update the moving averages of its chains' spreads.

        Args:
            spread: index of a chain to the spread of its group's rewards, >= 0, such as their
                standard deviation. Omit chains with too few valid rewards; they keep their average.

        Raises:
            ValueError: a chain does not exist, or a spread is negative or not finite.
        """
        # All are checked before any is used, so that an error leaves the state unchanged.
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
        """Return finished rounds, spreads and the arguments that fix the draws, as JSON types."""
        return {**self._plan(), "round": self._round, "spreads": list(self._spreads)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from another sampler's state, which may come from another number of ranks.

        Raises:
            ValueError: the state belongs to other draws, which could not be continued.
        """
        self._check_plan(state)
        done, spreads = state.get("round"), state.get("spreads")
        if not isinstance(done, int) or isinstance(done, bool) or done < 0:
            raise ValueError(f"state: expected a round of at least 0, got {done!r}")
        if not isinstance(spreads, Sequence) or len(spreads) != self._chains:
            raise ValueError(f"state: expected {self._chains} spreads, one per chain")
        if not all(x is None or (isinstance(x, (int, float)) and x >= 0) for x in spreads):
            raise ValueError("state: expected spreads of at least 0, or None where never drawn")
        self._round, self._spreads = done, list(spreads)
        self._drawn = False

    def _draw(self) -> list[int]:
        """Draw distinct chains by their probabilities, without replacement."""
        random = Random(f"{self._seed}, {self._round}")
        # The first of independent Exp(p) times is chain i with probability p_i, and so on among the
        # rest (Efraimidis and Spirakis 2006). random() may be 0, hence log(1 - u).
        times = [-math.log(1 - random.random()) / p for p in self.probabilities]
        return sorted(range(self._chains), key=times.__getitem__)[: self._groups]
