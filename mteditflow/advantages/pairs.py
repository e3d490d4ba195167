"""Online preference pairs: a better and a worse member of each group."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mteditflow._checks import Numbers, as_rewards, check_rank


class Pairs(NamedTuple):
    """Batch indices of the trajectories in P pairs, ordered by ascending group id.

    Attributes:
        winner: index of the better trajectory of each pair, int64 [P].
        loser: index of the worse one, int64 [P].
    """

    winner: Tensor
    loser: Tensor


@torch.no_grad()
def group_pairs(reward: Numbers, group: Numbers, *, valid: Numbers | None = None) -> Pairs:
    """Pair the best and the worst member of each group whose valid rewards differ.

    A group of equal rewards, or with fewer than two valid members, gives no pair. Ties go to the
    first member in the batch.

    Args:
        reward: one per trajectory, finite where valid, float32 or float64, [B].
        group: integer group id of each trajectory, [B].
        valid: boolean [B]; ``None`` means all are valid. Other rewards are never read or paired.

    Returns:
        Pairs, between 0 and one per group.

    Raises:
        ValueError: shapes do not match, a valid reward is not finite.
        TypeError: a dtype is not the one stated.

    Source: Diffusion-DPO (arXiv 2311.12908), with pairs from online rewards in place of
        annotators.

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
        # Invalid values are NaN and equal nothing; len(reward) never wins the minimum below.
        number = torch.where(value == found[index], first, len(reward))
        place = torch.full_like(names, len(reward), dtype=torch.int64)
        return found, place.scatter_reduce(0, index, number, "amin")

    (best, winner), (worst, loser) = extreme("amax", -torch.inf), extreme("amin", torch.inf)
    differ = best > worst  # false for equal rewards, and for -inf > inf of groups without a member
    return Pairs(winner[differ], loser[differ])
