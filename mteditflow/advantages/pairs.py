"""Online preference pairs: a better and a worse member of each group."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mteditflow._checks import Numbers, as_rewards, check_rank


class Pairs(NamedTuple):
    """Numbers of the trajectories that make P pairs, by ascending group id.

    Attributes:
        winner: the better one of each pair, int64 [P].
        loser: the worse one, int64 [P].
    """

    winner: Tensor
    loser: Tensor


@torch.no_grad()
def group_pairs(reward: Numbers, group: Numbers, *, valid: Numbers | None = None) -> Pairs:
    """Best against worst of each group: one pair from every group whose valid rewards differ.

    A group of equal rewards, or with fewer than two valid members, gives none. Among members of
    the same reward the first in the batch is taken.

    Args:
        reward: one per trajectory, finite where valid, float32 or float64, [B].
        group: integer group id of each trajectory, [B].
        valid: boolean [B]; ``None`` means all are valid. The rest is never read and never paired.

    Returns:
        Pairs, from 0 to the number of groups.

    Raises:
        ValueError: shapes do not match, a valid reward is not finite.
        TypeError: a dtype is not the one stated.

    Source: online use of Diffusion-DPO (arXiv 2311.12908), whose pairs come from annotators.

    Example:
        >>> reward = torch.tensor([0.1, 0.9, 0.5, 1.0, 1.0])
        >>> group_pairs(reward, torch.tensor([7, 7, 7, 2, 2]))
        Pairs(winner=tensor([1]), loser=tensor([0]))
    """
    reward, group, valid = as_rewards(reward, group, valid)
    check_rank("reward", reward, 1, "[B]", maximum=1)
    names, index = torch.unique(group, return_inverse=True)
    value = torch.where(valid, reward, torch.nan)
    first = torch.arange(len(reward), dtype=torch.int64, device=reward.device)

    def extreme(reduce: str, start: float) -> tuple[Tensor, Tensor]:
        """Return each group's extreme reward, and the first trajectory that has it."""
        found = torch.full((len(names),), start, dtype=reward.dtype, device=reward.device)
        found = found.scatter_reduce(0, index, torch.where(valid, reward, start), reduce)
        number = torch.where(value == found[index], first, len(reward))
        place = torch.full_like(names, len(reward), dtype=torch.int64)
        return found, place.scatter_reduce(0, index, number, "amin")

    (best, winner), (worst, loser) = extreme("amax", -torch.inf), extreme("amin", torch.inf)
    differ = best > worst
    return Pairs(winner[differ], loser[differ])
