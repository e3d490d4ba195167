r"""Group-relative advantages, and the fusion of several rewards.

Shapes: ``B`` trajectories; those that share a group id form a group (they share one reference
image and one instruction chain). Ids are any integers, in any order, groups of any size. A
``valid`` mask keeps lost rewards out: an invalid trajectory takes no part in any mean or std and
gets advantage 0, as if it were deleted. Statistics are accumulated in float64. Nothing here
carries a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mteditflow._checks import (
    check_choice,
    check_full_precision,
    check_mask,
    check_number,
    check_rank,
    check_shape,
    check_values,
)

STDS = ("group", "batch", "none")


def group_advantage(
    reward: Tensor,
    group: Tensor,
    *,
    valid: Tensor | None = None,
    std: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    r"""Group-normalised advantage, :math:`A_i = (R_i - \mathrm{mean} R) / (\mathrm{std} R + eps)`.

    Exactly 0 for a group whose valid rewards are all equal, for a group with fewer than two valid
    members, and for every invalid member. The std is that of the population (divides by the count).

    Args:
        reward: finite where valid, float32 or float64; [B], or [B, N] to normalise each turn in its
            group on its own.
        group: integer group id of each trajectory, [B].
        valid: boolean, shape of ``reward``; ``None`` means all are valid. What stands in an invalid
            entry, NaN included, is never read.
        std: "group" divides by the group's std; "batch" by the std of all valid rewards (per turn),
            "none" only subtracts the group's mean (and ignores ``eps``).
        eps: added to the std, >= 0; keeps rounding noise in a nearly constant group small.

    Returns:
        Shape and dtype of ``reward``, detached.

    Raises:
        ValueError: shapes do not match, the batch is empty, a valid reward is not finite.
        TypeError: reward is not float32/float64, group is not integer, valid is not boolean.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 3; batch std as in Flow-GRPO's global std.

    Example:
        >>> reward = torch.tensor([0.0, 1.0, 5.0, 5.0])
        >>> group_advantage(reward, torch.tensor([7, 7, 2, 2]), eps=0.0)
        tensor([-1.,  1.,  0.,  0.])
    """
    check_choice("std", std, STDS)
    check_number("eps", eps, low=0.0)
    valid = _check_rewards({"reward": reward}, group, valid)
    index = _group_index(group)
    deviation, count = _deviation(reward, index, valid)
    if std != "none":
        if std == "group":
            spread = _root_mean_square(deviation, count, index)[index]
        else:
            everyone = torch.zeros_like(index)
            spread = _root_mean_square(*_deviation(reward, everyone, valid), everyone)[everyone]
        scale = spread + eps
        deviation = torch.where(scale > 0, deviation / scale, 0)
    comparable = valid & (count[index] >= 2)
    return torch.where(comparable, deviation, 0).to(reward.dtype)


def fuse_advantages(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group: Tensor,
    *,
    valid: Tensor | None = None,
    std: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    r"""Advantage-level fusion: :math:`A = \sum_k w_k A_k`, each reward group-normalised on its own.

    A weight then means the same whatever the spread of its reward: the paper's choice, with weight
    1 for instruction following and 0.15 to 0.2 for content consistency.

    Args:
        rewards: name to reward, each [B] (or [B, N]), finite where valid.
        weights: name to weight, the same names as ``rewards``.
        group: integer group id of each trajectory, [B].
        valid: boolean, shape of the rewards; false where ANY reward was lost. Such a trajectory
            takes no part in the statistics of any reward.
        std: "group", "batch" or "none", as in ``group_advantage``.
        eps: as in ``group_advantage``.

    Returns:
        Shape of one reward, detached; 0 where invalid.

    Raises:
        ValueError: names differ or are missing, shapes do not match, a valid reward is not finite,
            a weight is not finite.
        TypeError: as in ``group_advantage``.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 7, 18, 19.

    Example:
        >>> rewards = {"if": torch.tensor([0.0, 1.0]), "cc": torch.tensor([0.9, 0.8])}
        >>> fuse_advantages(rewards, {"if": 1.0, "cc": 0.2}, torch.tensor([0, 0]), eps=0.0)
        tensor([-0.8000,  0.8000])
    """
    valid = _check_named(rewards, weights, group, valid)
    return _weighted_sum(
        rewards,
        weights,
        lambda reward: group_advantage(reward, group, valid=valid, std=std, eps=eps),
    )


def fuse_rewards(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group: Tensor,
    *,
    valid: Tensor | None = None,
    std: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    r"""Reward-level fusion: :math:`R = \sum_k w_k R_k`, then one group advantage.

    The reward with the larger spread dominates. Same arguments as ``fuse_advantages``, so the two
    can be swapped.

    Args:
        rewards: name to reward, each [B] (or [B, N]), finite where valid.
        weights: name to weight, the same names as ``rewards``.
        group: integer group id of each trajectory, [B].
        valid: boolean, shape of the rewards; false where ANY reward was lost.
        std: "group", "batch" or "none", as in ``group_advantage``.
        eps: as in ``group_advantage``.

    Returns:
        Shape of one reward, detached; 0 where invalid.

    Raises:
        ValueError: names differ or are missing, shapes do not match, a valid reward is not finite,
            a weight is not finite.
        TypeError: as in ``group_advantage``.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 6, 17.

    Example:
        >>> rewards = {"if": torch.tensor([0.0, 1.0]), "cc": torch.tensor([0.9, 0.8])}
        >>> fuse_rewards(rewards, {"if": 1.0, "cc": 0.2}, torch.tensor([0, 0]), eps=0.0)
        tensor([-1.,  1.])
    """
    valid = _check_named(rewards, weights, group, valid)
    reward = _weighted_sum(rewards, weights, lambda reward: torch.where(valid, reward, 0))
    return group_advantage(reward, group, valid=valid, std=std, eps=eps)


def clamp_advantage(advantage: Tensor, *, limit: float = 5.0) -> Tensor:
    """Bound an advantage to [-limit, limit], so that one outlier cannot own an update.

    Args:
        advantage: any shape.
        limit: positive; peers use 5.

    Returns:
        Shape of ``advantage``.

    Raises:
        ValueError: ``limit`` is not positive.
        TypeError: ``advantage`` is not float32 or float64.

    Source: Flow-GRPO (arXiv 2505.05470), its implementation's clip of advantages.

    Example:
        >>> clamp_advantage(torch.tensor([-9.0, 0.5]), limit=5.0)
        tensor([-5.0000,  0.5000])
    """
    check_full_precision(advantage=advantage)
    check_number("limit", limit, low=0.0, open_low=True)
    return advantage.clamp(-limit, limit)


def renormalize_advantage(
    advantage: Tensor, *, valid: Tensor | None = None, eps: float = 1e-4
) -> Tensor:
    """Bring a fused advantage back to mean 0 and std 1 over the batch, after GDPO.

    Args:
        advantage: fused advantage, [B] (or [B, N]: each turn on its own).
        valid: boolean, shape of ``advantage``; the rest takes no part and gets 0.
        eps: added to the std, >= 0.

    Returns:
        Shape and dtype of ``advantage``, detached.

    Raises:
        ValueError: the batch is empty, shapes do not match, a valid advantage is not finite.
        TypeError: advantage is not float32/float64, valid is not boolean.

    Source: GDPO (arXiv 2601.05242), batch-wise advantage normalisation.

    Example:
        >>> renormalize_advantage(torch.tensor([0.0, 4.0]), eps=0.0)
        tensor([-1.,  1.])
    """
    check_rank("advantage", advantage, 1, "[B] or [B, N]")
    one_group = torch.zeros(len(advantage), dtype=torch.int64, device=advantage.device)
    return group_advantage(advantage, one_group, valid=valid, eps=eps)


def group_std(reward: Tensor, group: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Population std of each trajectory's group: what ``group_advantage`` divides by, without eps.

    Args:
        reward: finite where valid, float32 or float64, [B] or [B, N].
        group: integer group id of each trajectory, [B].
        valid: boolean, shape of ``reward``.

    Returns:
        Shape and dtype of ``reward``, detached: the std of the group that each member belongs to;
        exactly 0 for constant groups and for groups with fewer than two valid members.

    Raises:
        ValueError: shapes do not match, the batch is empty, a valid reward is not finite.
        TypeError: as in ``group_advantage``.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 3.

    Example:
        >>> group_std(torch.tensor([0.0, 2.0, 5.0]), torch.tensor([0, 0, 1]))
        tensor([1., 1., 0.])
    """
    valid = _check_rewards({"reward": reward}, group, valid)
    index = _group_index(group)
    deviation, count = _deviation(reward, index, valid)
    return _root_mean_square(deviation, count, index)[index].to(reward.dtype)


def _group_index(group: Tensor) -> Tensor:
    """Arbitrary ids -> 0, 1, 2, ... without a data-dependent shape (so that it compiles)."""
    order = group.argsort(stable=True)
    ordered = group[order]
    is_new = torch.cat([torch.zeros_like(ordered[:1]), (ordered[1:] != ordered[:-1]).long()])
    return torch.empty_like(order).scatter(0, order, is_new.cumsum(0))


def _deviation(reward: Tensor, index: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Reward minus its group's mean (0 where invalid), and valid members per group, in float64.

    The group's minimum is taken off first, which makes a constant group exactly 0.
    """
    value = reward.detach().double()
    rows = index.reshape(index.shape + (1,) * (value.ndim - 1)).expand_as(value)
    floor = torch.full_like(value, torch.inf).scatter_reduce(
        0, rows, torch.where(valid, value, torch.inf), "amin"
    )
    above_floor = torch.where(valid, value - floor[index], 0)
    count = torch.zeros_like(value).index_add(0, index, valid.double())
    total = torch.zeros_like(value).index_add(0, index, above_floor)
    mean = total / count.clamp(min=1)
    return torch.where(valid, above_floor - mean[index], 0), count


def _root_mean_square(deviation: Tensor, count: Tensor, index: Tensor) -> Tensor:
    total = torch.zeros_like(deviation).index_add(0, index, deviation.square())
    return (total / count.clamp(min=1)).sqrt()


def _check_rewards(rewards: Mapping[str, Tensor], group: Tensor, valid: Tensor | None) -> Tensor:
    """Validate and return the mask, all true if there was none."""
    first = next(iter(rewards.values()))
    check_rank("reward", first, 1, "[B] or [B, N]")
    if valid is None:
        valid = torch.ones_like(first, dtype=torch.bool)
    check_mask("valid", valid, first.shape, "of the reward")
    check_shape("group", group, first.shape[:1], "[B]")
    if group.is_floating_point() or group.is_complex() or group.dtype == torch.bool:
        raise TypeError(f"group: expected integer ids, got {group.dtype}; floats make ids collide")
    for name, reward in rewards.items():
        check_full_precision(**{name: reward})
        check_shape(name, reward, first.shape, "of the first reward")
        finite = ~valid | reward.isfinite()
        check_values(name, reward, finite, "finite rewards (mark lost ones in valid)")
    return valid


def _check_named(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group: Tensor,
    valid: Tensor | None,
) -> Tensor:
    if not rewards or set(rewards) != set(weights):
        raise ValueError(
            f"weights: expected one weight for each reward in {sorted(rewards)}, "
            f"got {sorted(weights)}"
        )
    for name, weight in weights.items():
        check_number(f"weights[{name!r}]", weight)
    return _check_rewards(
        {f"rewards[{name!r}]": reward for name, reward in rewards.items()}, group, valid
    )


def _weighted_sum(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    transform: Callable[[Tensor], Tensor],
) -> Tensor:
    terms = [weights[name] * transform(reward) for name, reward in rewards.items()]
    return torch.stack(terms).sum(dim=0)
