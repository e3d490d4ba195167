r"""Group-relative advantages, and the fusion of several rewards.

Shapes: ``B`` trajectories; those that share a group id form a group (they share one reference
image and one instruction chain). Ids are any integers, in any order, groups of any size. A
``valid`` mask keeps lost rewards out: an invalid trajectory takes no part in any mean or std and
gets advantage 0, as if it were deleted. In fusion ``measured`` marks, reward by reward, where there
was something to measure: an unmeasured reward is no evidence, and costs the trajectory none of its
others. Statistics are accumulated in float64. Nothing here carries a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mteditflow._checks import (
    check_choice,
    check_full_precision,
    check_mask,
    check_number,
    check_rank,
    check_rewards,
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
    valid = check_rewards({"reward": reward}, group, valid)
    return _normalize(reward, _group_index(group), valid, std, eps)


def fuse_advantages(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group: Tensor,
    *,
    valid: Tensor | None = None,
    measured: Mapping[str, Tensor] | None = None,
    std: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    r"""Advantage-level fusion: :math:`A = \sum_k w_k A_k`, each reward group-normalised on its own.

    A weight then means the same whatever the spread of its reward: the paper's choice, with weight
    1 for instruction following and 0.15 to 0.2 for content consistency. A reward is normalized over
    the members of the group in which it was measured, and adds exactly 0 to the others.

    Args:
        rewards: name to reward, each [B] (or [B, N]), finite where valid and measured.
        weights: name to weight, the same names as ``rewards``.
        group: integer group id of each trajectory, [B].
        valid: boolean, shape of the rewards; false where ANY reward was lost. Such a trajectory
            takes no part in the statistics of any reward.
        measured: name to boolean, shape of the rewards: false where there was nothing to measure.
            A reward without an entry was measured everywhere; ``None``: all were.
        std: "group", "batch" or "none", as in ``group_advantage``.
        eps: as in ``group_advantage``.

    Returns:
        Shape of one reward, detached; 0 where invalid.

    Raises:
        ValueError: names differ or are missing, shapes do not match, a measured valid reward is not
            finite, a weight is not finite.
        TypeError: as in ``group_advantage``; ``measured`` is not boolean.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 7, 18, 19.

    Example:
        >>> rewards = {"if": torch.tensor([0.0, 1.0]), "cc": torch.tensor([0.9, 0.8])}
        >>> fuse_advantages(rewards, {"if": 1.0, "cc": 0.2}, torch.tensor([0, 0]), eps=0.0)
        tensor([-0.8000,  0.8000])
        >>> measured = {"cc": torch.tensor([False, False])}
        >>> weights, group = {"if": 1.0, "cc": 0.2}, torch.tensor([0, 0])
        >>> fuse_advantages(rewards, weights, group, measured=measured, eps=0.0)
        tensor([-1.,  1.])
    """
    counted = _check_named(rewards, weights, group, valid, measured)
    index = _group_index(group)
    advantages = {
        name: _normalize(reward, index, counted[name], std, eps) for name, reward in rewards.items()
    }
    return _weighted_sum(advantages, weights)


def fuse_rewards(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group: Tensor,
    *,
    valid: Tensor | None = None,
    measured: Mapping[str, Tensor] | None = None,
    std: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    r"""Reward-level fusion: :math:`R = \sum_k w_k R_k`, then one group advantage.

    The reward with the larger spread dominates. Same arguments as ``fuse_advantages``, so the two
    can be swapped. A sum needs all its terms: an unmeasured reward counts as the mean of those
    measured in its group. A trajectory in which no reward with a weight was measured takes no part.

    Args:
        rewards: name to reward, each [B] (or [B, N]), finite where valid and measured.
        weights: name to weight, the same names as ``rewards``.
        group: integer group id of each trajectory, [B].
        valid: boolean, shape of the rewards; false where ANY reward was lost.
        measured: name to boolean, shape of the rewards: false where there was nothing to measure.
            A reward without an entry was measured everywhere; ``None``: all were.
        std: "group", "batch" or "none", as in ``group_advantage``.
        eps: as in ``group_advantage``.

    Returns:
        Shape of one reward, detached; 0 where invalid.

    Raises:
        ValueError: names differ or are missing, shapes do not match, a measured valid reward is not
            finite, a weight is not finite, or a reward with a weight was measured in no member of a
            group: leave such groups out (``group_measured`` finds them), or use
            ``fuse_advantages``.
        TypeError: as in ``group_advantage``; ``measured`` is not boolean.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 6, 17.

    Example:
        >>> rewards = {"if": torch.tensor([0.0, 1.0]), "cc": torch.tensor([0.9, 0.8])}
        >>> fuse_rewards(rewards, {"if": 1.0, "cc": 0.2}, torch.tensor([0, 0]), eps=0.0)
        tensor([-1.,  1.])
        >>> rewards["cc"], measured = torch.tensor([0.9, torch.nan]), torch.tensor([True, False])
        >>> fuse_rewards(
        ...     rewards, {"if": 1.0, "cc": 0.2}, torch.tensor([0, 0]), measured={"cc": measured},
        ...     eps=0.0,
        ... )
        tensor([-1.,  1.])
    """
    counted = _check_named(rewards, weights, group, valid, measured)
    index = _group_index(group)
    used = [name for name in rewards if weights[name] != 0] or list(rewards)
    part = torch.stack([counted[name] for name in used]).any(dim=0)
    filled = {
        name: reward if measured is None else _filled(reward, index, counted[name])
        for name, reward in rewards.items()
    }
    for name in used:
        _check_group_measured(name, group, ~part | _in_group(counted[name], index))
    return _normalize(_weighted_sum(filled, weights), index, part, std, eps)


def group_measured(measured: Tensor, group: Tensor) -> Tensor:
    """Whether a reward was measured in any member of each trajectory's group.

    Args:
        measured: boolean [B] (or [B, N]: each turn on its own), such as ``Signal.measured``.
        group: integer group id of each trajectory, [B].

    Returns:
        Boolean, shape of ``measured``, equal in all members of a group.

    Raises:
        ValueError: shapes do not match.
        TypeError: ``measured`` is not boolean, or ``group`` is not integer.

    Example:
        >>> group_measured(torch.tensor([True, False, False]), torch.tensor([4, 4, 7]))
        tensor([ True,  True, False])
    """
    check_rank("measured", measured, 1, "[B] or [B, N]", maximum=2)
    check_mask("measured", measured, measured.shape, "[B] or [B, N]")
    check_rewards({"measured": measured.float()}, group, None)
    return _in_group(measured, _group_index(group))


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
    valid = check_rewards({"advantage": advantage}, None, valid)
    one_group = torch.zeros(len(advantage), dtype=torch.int64, device=advantage.device)
    return _normalize(advantage, one_group, valid, "group", eps)


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
    valid = check_rewards({"reward": reward}, group, valid)
    index = _group_index(group)
    return _root_mean_square(*_deviation(reward, index, valid), index).to(reward.dtype)


def _group_index(group: Tensor) -> Tensor:
    """Arbitrary ids -> ids in 0..B-1, without a data-dependent shape (so that it compiles)."""
    ids = group.long()  # uint64 above int64 wraps around, which keeps distinct ids distinct
    if not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in ids.aminmax())
        if high - low < len(ids):  # dense ids need no sorting, the most expensive step
            return ids - low
    ordered, order = ids.sort()
    is_new = torch.cat([torch.zeros_like(ordered[:1]), (ordered[1:] != ordered[:-1]).long()])
    return torch.empty_like(order).scatter(0, order, is_new.cumsum(0))


def _normalize(reward: Tensor, index: Tensor, valid: Tensor, std: str, eps: float) -> Tensor:
    """``group_advantage`` of checked rewards."""
    check_choice("std", std, STDS)
    check_number("eps", eps, low=0.0)
    deviation, count = _deviation(reward, index, valid)
    if std == "group":
        scale = _root_mean_square(deviation, count, index) + eps
    elif std == "batch":
        one_group = torch.zeros_like(index)
        scale = _root_mean_square(*_deviation(reward, one_group, valid), one_group) + eps
    else:
        scale = torch.ones_like(deviation)
    # 0 / 0 where all is equal and eps is 0; the deviation is exactly 0 there.
    return torch.where(scale > 0, deviation / scale, 0).to(reward.dtype)


def _deviation(reward: Tensor, index: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Reward minus its group's mean (0 where invalid), and the group's valid members (1 for none).

    In float64. The group's minimum is taken off first, which makes a constant group exactly 0.
    """
    floor, mean, count = _group_mean(reward, index, valid)
    return torch.where(valid, reward.detach().double() - floor - mean, 0), count


def _group_mean(reward: Tensor, index: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Minimum of each member's group, mean above it, and its valid members (1 for none)."""
    value = torch.where(valid, reward.detach().double(), torch.inf)
    rows = index.reshape(index.shape + (1,) * (value.ndim - 1)).expand_as(value)
    floor = torch.full_like(value, torch.inf).scatter_reduce(0, rows, value, "amin")
    floor = floor.index_select(0, index)
    count = _group_sum(valid.double(), index).clamp(min=1)
    return floor, _group_sum(torch.where(valid, value - floor, 0), index) / count, count


def _filled(reward: Tensor, index: Tensor, counted: Tensor) -> Tensor:
    """Put the mean of the group's counted members into all others, 0 where there are none."""
    floor, mean, _ = _group_mean(reward, index, counted)
    mean = torch.where(floor.isfinite(), floor + mean, 0).to(reward.dtype)
    return torch.where(counted, reward.detach(), mean)


def _in_group(mask: Tensor, index: Tensor) -> Tensor:
    """Whether the mask holds for any member of each member's group."""
    return _group_sum(mask.double(), index) > 0


def _root_mean_square(deviation: Tensor, count: Tensor, index: Tensor) -> Tensor:
    return (_group_sum(deviation.square(), index) / count).sqrt()


def _group_sum(x: Tensor, index: Tensor) -> Tensor:
    """Sum over each member's group, given back to every member."""
    return torch.zeros_like(x).index_add(0, index, x).index_select(0, index)


def _check_named(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group: Tensor,
    valid: Tensor | None,
    measured: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """Validate; return where each reward counts: valid and measured."""
    if not rewards:
        raise ValueError("rewards: expected at least one named reward, got none")
    if set(rewards) != set(weights):
        raise ValueError(
            f"weights: expected one weight for each reward in {sorted(rewards)}, "
            f"got {sorted(weights)}"
        )
    for name, weight in weights.items():
        check_number(f"weights[{name!r}]", weight)
    measured = measured or {}
    if unknown := set(measured) - set(rewards):
        raise ValueError(f"measured: expected names among {sorted(rewards)}, got {sorted(unknown)}")
    first = next(iter(rewards))
    for name, mask in measured.items():
        check_mask(f"measured[{name!r}]", mask, rewards[first].shape, f"of rewards[{first!r}]")
    checked = {f"rewards[{name!r}]": reward for name, reward in rewards.items()}
    masks = {f"rewards[{name!r}]": mask for name, mask in measured.items()}
    valid = check_rewards(checked, group, valid, masks)
    return {name: valid & measured[name] if name in measured else valid for name in rewards}


def _check_group_measured(name: str, group: Tensor, ok: Tensor) -> None:
    """Raise ``ValueError`` naming the first group in which a reward was not measured at all."""
    if torch.compiler.is_compiling() or bool(ok.all()):
        return
    row = int((~ok).nonzero()[0, 0])
    raise ValueError(
        f"rewards[{name!r}]: expected a measured reward in every group, got none in group "
        f"{int(group[row])}; leave the group out (group_measured), or use fuse_advantages, where "
        "an unmeasured reward adds 0"
    )


def _weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum in the order of the names, so that the order of the mapping changes no bit."""
    return torch.stack([weights[name] * terms[name] for name in sorted(terms)]).sum(dim=0)
