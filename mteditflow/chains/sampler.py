"""Rounds of groups: each chain G times, over ranks, shuffled, to be resumed at any round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from random import Random
from typing import Any, ClassVar

from torch.utils.data import Sampler

from mteditflow._checks import check_choice, check_count

REMAINDERS = ("drop", "wrap")


class RoundSampler(Sampler[list[int]]):
    """What samplers of rounds share: a list of indices a round, of which each rank has a slice.

    Arguments are those of ``GroupSampler``.
    """

    _depends: ClassVar[tuple[str, ...]]  # what the order depends on, by the names of arguments

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
            raise ValueError(f"{name}: expected a multiple of the {ranks} ranks, got {shared}")
        self._own = slice(rank * size // ranks, (rank + 1) * size // ranks)
        self._chains, self._groups, self._group_size = len(chains), groups, group_size
        self._seed = seed

    def _indices(self, chains: Sequence[int]) -> list[int]:
        """This rank's indices in the round of these chains."""
        return [chain for chain in chains for _ in range(self._group_size)][self._own]

    def _plan(self) -> dict[str, Any]:
        return {name: getattr(self, f"_{name}") for name in self._depends}

    def _check_plan(self, state: Mapping[str, Any]) -> None:
        for name, own in self._plan().items():
            if state.get(name) != own:
                raise ValueError(f"state: expected {name} = {own!r}, got {state.get(name)!r}")


class GroupSampler(RoundSampler):
    """Batch sampler of a DataLoader: in each round ``groups`` chains, each ``group_size`` times.

    The round is one list of indices, group after group, whatever the number of ranks; a rank gets
    its slice of it, so ``mteditflow.gather_ranks`` joins the ranks' batches to that same list. One
    pass gives the rounds of one epoch that are left; an epoch has each chain in exactly one round,
    up to the remainder. The index of a chain is its group id: no two groups of a round share it.

    The loader fetches ahead of the training, so that only the trainer knows which rounds are done:
    it calls ``step`` after each, on every rank. What ``state_dict`` returns then continues exactly,
    on any number of ranks.

    Args:
        chains: the data set, or anything of its length.
        groups: chains in a round, over all ranks.
        group_size: G, trajectories of each.
        ranks: number of processes.
        rank: this one, in [0, ranks).
        split_groups: whether a group may be spread over ranks; ``groups * group_size`` must then
            be a multiple of ``ranks``, else ``groups`` must.
        shuffle: draw a new order in each epoch; else that of the data set.
        seed: of the order.
        remainder: "drop" leaves the chains out that do not fill a round at the end of an epoch;
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
        """Number of epochs that are done."""
        return self._epoch

    def __len__(self) -> int:
        """Return the number of rounds in an epoch."""
        rounds, left = divmod(self._chains, self._groups)
        return rounds + (left > 0 and self._remainder == "wrap")

    def __iter__(self) -> Iterator[list[int]]:
        """Rounds of this epoch that are left: this rank's indices in each.

        Raises:
            RuntimeError: the pass before gave all rounds, and no ``step`` was called for them.
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
        """Return which rounds are done, and what the order depends on; JSON can hold it."""
        return {**self._plan(), "epoch": self._epoch, "round": self._round}

    def load_state_dict(self, state: Mapping[str, int | bool | str]) -> None:
        """Go on where another sampler was, which may have been on another number of ranks.

        Raises:
            ValueError: the state is of another order, which could not be continued.
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
        """Chains of this epoch, round after round."""
        order = list(range(self._chains))
        if self._shuffle:
            Random(f"{self._seed}, {self._epoch}").shuffle(order)
        wrapped = order + order[: self._groups]
        return wrapped[: len(self) * self._groups]
