"""Keyed random numbers: a draw depends on its key alone, not on earlier draws."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

import torch

from mteditflow._checks import check_count


@dataclass(frozen=True)
class RoundKey:
    """Key of all random numbers of a round: seed, purpose, round and place.

    A repeated round draws the same numbers, also with another number of ranks or other batches, and
    there is no random state to save. Objectives take a ``RoundKey`` or a plain ``torch.Generator``
    as their ``key``.

    Args:
        seed: seed of the run, >= 0.
        round: index of the round, from 0.
        first: index of this rank's first trajectory among the trajectories of all ranks.
        epoch: index of the pass over the round's samples, from 0.

    Raises:
        ValueError: a count is negative.
        TypeError: a count is not an integer.

    Example:
        >>> key = RoundKey(seed=0, round=3)
        >>> alone = torch.rand(1, generator=key.generator("noise", 5))
        >>> second_rank = RoundKey(seed=0, round=3, first=4)
        >>> bool(alone == torch.rand(1, generator=second_rank.generator("noise", 1)))
        True
    """

    seed: int
    round: int
    first: int = 0
    epoch: int = 0

    def __post_init__(self) -> None:
        for name in ("seed", "round", "first", "epoch"):
            check_count(name, getattr(self, name), low=0)

    def generator(self, purpose: str, trajectory: int, *rest: int) -> torch.Generator:
        """Return the generator of one of this rank's trajectories for a purpose.

        Args:
            purpose: name of the use of the numbers, such as "noise".
            trajectory: index of the trajectory on this rank.
            *rest: further integers, such as turn and step.
        """
        return torch.Generator("cpu").manual_seed(
            self.number(purpose, self.first + trajectory, *rest)
        )

    def number(self, purpose: str, *place: int) -> int:
        """Return the seed of a place, the same on every rank; ``first`` is not added to it."""
        # Epoch 0 adds nothing: the first of several passes draws the numbers of a single one.
        later = ("epoch", self.epoch) if self.epoch else ()
        return key_seed(self.seed, purpose, self.round, *place, *later)

    def of_epoch(self, epoch: int) -> RoundKey:
        """Return the key of another pass over the round's samples."""
        return replace(self, epoch=epoch)


Key = RoundKey | torch.Generator


def round_key(key: Key) -> RoundKey:
    """Return a ``RoundKey`` as it is, or one seeded by the next draw of a generator.

    Raises:
        TypeError: ``key`` is neither.
    """
    if isinstance(key, RoundKey):
        return key
    if not isinstance(key, torch.Generator):
        raise TypeError(f"key: expected a RoundKey or a torch.Generator, got {type(key).__name__}")
    seed = torch.randint(2**63 - 1, (), generator=key, dtype=torch.int64, device=key.device)
    return RoundKey(seed=int(seed), round=0)


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose stream is a function of its key alone.

    Args:
        *key: integers and strings such as ``(seed, "noise", round, trajectory)``; two keys that
            differ anywhere give independent streams.
        device: device of the generator.

    Raises:
        ValueError: there is no key.
        TypeError: a part is neither an integer nor a string.

    Example:
        >>> first, again = (keyed_generator(0, "noise", 3, 17) for _ in range(2))
        >>> bool(torch.rand(1, generator=first) == torch.rand(1, generator=again))
        True
    """
    return torch.Generator(device).manual_seed(key_seed(*key))


def key_seed(*key: int | str) -> int:
    """Hash a key to a seed below 2^63, which every device takes."""
    if not key:
        raise ValueError("key: expected at least one integer or string, got none")
    for part in key:
        if type(part) not in (int, str):
            raise TypeError(f"key: expected integers and strings, got {type(part).__name__}")
    # JSON keeps the parts apart: ("a", 12) and ("a1", 2) differ, as do 1 and "1".
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
