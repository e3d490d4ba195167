r"""Group-relative advantages, and the fusion of several rewards.

Shapes: ``B`` trajectories. Trajectories with the same group id form a group: they share one
reference image and one instruction chain. Ids are any integers in any order, and groups may have
any size. A ``valid`` mask excludes lost rewards: an invalid trajectory enters no mean or std and
gets advantage 0, as if it were deleted. In fusion, ``measured`` marks for each reward where there
was something to measure. A reward that is unmeasured adds nothing, and the trajectory keeps its
other rewards. Statistics are accumulated in float64. Nothing here carries a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_device,
    as_ids,
    as_mask,
    as_numbers,
    as_real,
    as_rewards,
    check_choice,
    check_count,
    check_full_precision,
    check_group,
    check_mask,
    check_named,
    check_number,
    check_rank,
    check_rewards,
    first_tensor,
    read,
)
from mteditflow._reduce import in_float64

STDS = ("group", "batch", "none")
_HUGE, _TINY = 2.0**500, 2.0**-400  # squares beyond these may overflow or lose bits in float64


def group_advantage(
    reward: Numbers,
    group: Numbers,
    *,
    valid: Numbers | None = None,
    std: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    r"""Group-normalized advantage, :math:`A_i = (R_i - \mathrm{mean} R) / (\mathrm{std} R + eps)`.

    Exactly 0 for a group whose valid rewards are all equal, for a group with fewer than two valid
    members, and for every invalid member. The std is the population std (divided by the count).
    If all ids differ, each trajectory is its own group and every advantage is 0.

    Args:
        reward: finite where valid; [B], or [B, N] to normalize each turn within its group. float32
            or float64. Integers below 2^24 and booleans, also in lists, count as float32; lists of
            Python floats count as float64. A layout [prompts, samples] with one id per prompt is
            refused: flatten it, as ``group_ids`` shows.
        group: integer group id of each trajectory, [B], of any width, signed or unsigned.
        valid: boolean, shape of ``reward``; ``None`` means all are valid. Invalid entries are never
            read and may be NaN.
        std: "group" divides by the group's std, "batch" by the std of all valid rewards (per turn).
            "none" only subtracts the group's mean and ignores ``eps``; differences beyond the range
            of the dtype are then infinite.
        eps: added to the std, >= 0, in units of the reward; limits the amplification of rounding
            noise in a nearly constant group.

    Returns:
        Shape and dtype of ``reward``, detached. Where values cannot be checked (under compilation
        and ``vmap``), a valid NaN makes its group NaN.

    Raises:
        ValueError: shapes do not match, the batch is empty, a valid reward is not finite, or a
            reward of two axes comes with a different id for every row.
        TypeError: reward is half precision, group is not integer, valid is not boolean.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 3; batch std as in Flow-GRPO's global std.

    Example:
        >>> reward = torch.tensor([0.0, 1.0, 5.0, 5.0])
        >>> group_advantage(reward, torch.tensor([7, 7, 2, 2]), eps=0.0)
        tensor([-1.,  1.,  0.,  0.])
    """
    reward, group, valid = as_rewards(reward, group, valid)
    check_layout(reward, group)
    return _normalize(reward, group_index(group), valid, std, eps).to(reward)


def group_ids(groups: int, members: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Group ids for rewards laid out [groups, members] (one row per prompt), after flattening.

    Args:
        groups: number of groups: prompts, or chains.
        members: trajectories per group, G.
        device: device of the ids; use that of the rewards.

    Returns:
        int64 [groups * members]: 0 repeated ``members`` times, then 1, and so on.

    Raises:
        ValueError: a count is below 1.
        TypeError: a count is not an integer.

    Example:
        >>> reward = torch.tensor([[0.0, 1.0], [5.0, 5.0], [3.0, 1.0]])  # [prompts, samples]
        >>> group_advantage(reward.flatten(), group_ids(3, 2), eps=0.0).view(3, 2)
        tensor([[-1.,  1.],
                [ 0.,  0.],
                [ 1., -1.]])
    """
    check_count("groups", groups)
    check_count("members", members)
    ids = torch.arange(groups, dtype=torch.int64, device=as_device("device", device))
    return ids[:, None].expand(-1, members).flatten()


def fuse_advantages(
    rewards: Mapping[str, Numbers],
    weights: Mapping[str, float],
    group: Numbers,
    *,
    valid: Numbers | None = None,
    measured: Mapping[str, Numbers] | None = None,
    std: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    r"""Advantage-level fusion: :math:`A = \sum_k w_k A_k`, each reward group-normalized on its own.

    The effect of a weight then does not depend on the spread of its reward. This is the paper's
    choice, with weight 1 for instruction following and 0.15 to 0.2 for content consistency. A
    reward is normalized over the group members in which it was measured, and adds exactly 0 to the
    others.

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
            finite, a weight is not finite, or the rewards are laid out [prompts, samples] as in
            ``group_advantage``.
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
    named, ids, counted = _check_named(rewards, weights, group, valid, measured)
    index = group_index(ids)
    advantages = {
        name: _normalize(reward, index, counted[name], std, eps) for name, reward in named.items()
    }
    return _weighted_sum(advantages, weights).to(_result_like(named))


def fuse_rewards(
    rewards: Mapping[str, Numbers],
    weights: Mapping[str, float],
    group: Numbers,
    *,
    valid: Numbers | None = None,
    measured: Mapping[str, Numbers] | None = None,
    std: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    r"""Reward-level fusion: :math:`R = \sum_k w_k R_k`, then one group advantage.

    The reward with the larger spread dominates. The arguments are those of ``fuse_advantages``, so
    the two can be swapped. A sum needs all its terms, so an unmeasured reward is imputed by the
    mean of those measured in its group. A trajectory in which no reward with a nonzero weight was
    measured is excluded from the statistics.

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
    named, ids, counted = _check_named(rewards, weights, group, valid, measured)
    index = group_index(ids)
    used = [name for name in rewards if weights[name] != 0] or list(rewards)
    part = torch.stack([counted[name] for name in used]).any(dim=0)
    for name in used:
        _check_group_measured(name, ids, ~part | _in_group(counted[name], index))
    own, takes_part = in_float64(index, part)
    exact = {name: in_float64(reward.detach(), counted[name]) for name, reward in named.items()}
    # One power of two per group, shared by its rewards, so that no product and no sum overflows.
    sizes = [torch.where(mask, reward.abs(), 0) for reward, mask in exact.values()]
    unit = _in_range(torch.stack(sizes).amax(dim=0), own, takes_part)[1]
    weight_unit = _weight_unit(weights)
    terms = {name: _filled(reward * unit, own, mask) for name, (reward, mask) in exact.items()}
    total = _weighted_sum(terms, {name: w * weight_unit for name, w in weights.items()})
    advantage = _normalize(total, own, takes_part, std, eps, unit=unit * weight_unit)
    return advantage.to(_result_like(named))


def group_measured(measured: Numbers, group: Numbers) -> Tensor:
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
    mask = as_numbers("measured", measured)
    check_rank("measured", mask, 1, "[B] or [B, N]", maximum=2)
    check_mask("measured", mask, mask.shape, "[B] or [B, N]")
    ids = as_ids(group, mask.device)
    check_group(ids, mask.shape)
    return _in_group(mask, group_index(ids))


def clamp_advantage(advantage: Numbers, *, limit: float = 5.0) -> Tensor:
    """Clamp an advantage to [-limit, limit], so that no outlier dominates an update.

    Args:
        advantage: any shape; integers count as float32.
        limit: largest absolute advantage, > 0; 5 in Flow-GRPO's implementation.

    Returns:
        Shape and dtype of ``advantage``. Gradient flows where it is not clamped.

    Raises:
        ValueError: ``limit`` is not positive.
        TypeError: ``advantage`` is half precision.

    Source: Flow-GRPO (arXiv 2505.05470), its implementation's clip of advantages.

    Example:
        >>> clamp_advantage(torch.tensor([-9.0, 0.5]), limit=5.0)
        tensor([-5.0000,  0.5000])
    """
    advantage = as_real("advantage", advantage)
    check_full_precision(advantage=advantage)
    check_number("limit", limit, low=0.0, open_low=True)
    return advantage.clamp(-limit, limit)


def renormalize_advantage(
    advantage: Numbers, *, valid: Numbers | None = None, eps: float = 1e-4
) -> Tensor:
    """Normalize a fused advantage to mean 0 and std 1 over the batch, as GDPO does.

    Args:
        advantage: fused advantage, [B] (or [B, N]: each turn on its own), finite where valid.
        valid: boolean, shape of ``advantage``; other entries are excluded and get 0.
        eps: added to the std, >= 0.

    Returns:
        Shape and dtype of ``advantage``, detached.

    Raises:
        ValueError: the batch is empty, shapes do not match, a valid advantage is not finite.
        TypeError: advantage is not float32/float64, valid is not boolean.

    Source: GDPO (arXiv 2601.05242), batch-wise advantage normalization.

    Example:
        >>> renormalize_advantage(torch.tensor([0.0, 4.0]), eps=0.0)
        tensor([-1.,  1.])
    """
    advantage = as_real("advantage", advantage)
    check_full_precision(advantage=advantage)
    check_rank("advantage", advantage, 1, "[B] or [B, N]", maximum=2)
    mask = as_mask("valid", valid, advantage, "of advantage")
    check_rewards({"advantage": advantage}, None, mask)
    one_group = torch.zeros(len(advantage), dtype=torch.int64, device=advantage.device)
    return _normalize(advantage, one_group, mask, "group", eps).to(advantage)


def group_std(reward: Numbers, group: Numbers, *, valid: Numbers | None = None) -> Tensor:
    """Population std of each trajectory's group, the divisor of ``group_advantage`` without eps.

    Args:
        reward: finite where valid, [B] or [B, N], as in ``group_advantage``.
        group: integer group id of each trajectory, [B].
        valid: boolean, shape of ``reward``.

    Returns:
        Shape and dtype of ``reward``, detached: the std of the group that each member belongs to;
        exactly 0 for constant groups and for groups with fewer than two valid members.

    Raises:
        ValueError: as in ``group_advantage``.
        TypeError: as in ``group_advantage``.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 3.

    Example:
        >>> group_std(torch.tensor([0.0, 2.0, 5.0]), torch.tensor([0, 0, 1]))
        tensor([1., 1., 0.])
    """
    reward, group, valid = as_rewards(reward, group, valid)
    check_layout(reward, group)
    value, index, valid = in_float64(reward.detach(), group_index(group), valid)
    value, unit = _in_range(value, index, valid)
    return (_root_mean_square(*_deviation(value, index, valid), index) / unit).to(reward)


def all_alone(group: Tensor) -> bool:
    """Whether every trajectory is alone in its group; false where ids cannot be read."""
    ids = group.long().sort().values
    return read((ids[1:] == ids[:-1]).any()) is False


def check_layout(reward: Tensor, group: Tensor) -> None:
    """Raise for rewards laid out [prompts, samples] with one id per prompt."""
    if reward.ndim < 2 or 1 in reward.shape or not all_alone(group):
        return
    rows, columns = reward.shape
    raise ValueError(
        f"reward: expected [B, N], trajectories by turns, with ids that trajectories share, got "
        f"[{rows}, {columns}] with {rows} different ids: every group has one member, every "
        "advantage would be 0; rewards laid out [prompts, samples] take "
        f"group_advantage(reward.flatten(), group_ids({rows}, {columns})).view({rows}, {columns})"
    )


def group_index(group: Tensor) -> Tensor:
    """Map arbitrary ids to 0..B-1 without a data-dependent shape, so that it compiles."""
    ids = group.long()  # uint64 above int64 wraps around, which keeps distinct ids distinct
    bounds = read(torch.stack(ids.aminmax()))
    if bounds and bounds[1] - bounds[0] < len(ids):  # dense ids skip the sort, the costliest step
        dense: Tensor = ids - bounds[0]
        return dense
    # torch.unique would do it, but the shape of its result depends on the data.
    ordered, order = ids.sort()
    is_new = torch.cat([torch.zeros_like(ordered[:1]), (ordered[1:] != ordered[:-1]).long()])
    return torch.empty_like(order).scatter(0, order, is_new.cumsum(0))


def _normalize(
    reward: Tensor,
    index: Tensor,
    valid: Tensor,
    std: str,
    eps: float,
    *,
    unit: Tensor | None = None,
) -> Tensor:
    """``group_advantage`` of checked rewards, in float64.

    ``unit`` [B] or [B, N] is the factor by which each reward was multiplied beforehand. It is taken
    out again, so that ``eps`` stays in units of the original reward.
    """
    check_choice("std", std, STDS)
    check_number("eps", eps, low=0.0)
    exact, index, valid = in_float64(reward.detach(), index, valid)
    given = torch.ones_like(exact) if unit is None else unit
    value, own = _in_range(exact, index, valid)
    deviation, count = _deviation(value, index, valid)
    if std == "group":
        scale = _root_mean_square(deviation, count, index) + eps * given * own
    elif std == "batch":
        # Groups may have different units, and a batch std needs a common one: the smallest.
        one_group, common = torch.zeros_like(index), given.amin(dim=0)
        value, whole = _in_range(exact * (common / given), one_group, valid)
        spread = _root_mean_square(*_deviation(value, one_group, valid), one_group)
        # Bounded, as the product may leave float64 where the group holds nothing but zeros.
        factor = ((own / whole) * (given / common)).clamp(max=torch.finfo(own.dtype).max)
        scale = (spread + eps * common * whole) * factor
    else:
        deviation, scale = deviation / own, given
    # 0 / 0 for a constant group with eps 0, where the deviation is exactly 0. A NaN scale is not 0,
    # so an unchecked NaN is kept.
    return torch.where(scale == 0, 0, deviation / scale)


def _in_range(value: Tensor, index: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each group by a power of two, so that no square overflows or vanishes.

    Returns:
        The scaled values and the factor of each, which is 1 for rewards of ordinary size.
    """
    size = torch.where(valid, value.abs(), 0)
    rows = index.reshape(index.shape + (1,) * (value.ndim - 1)).expand_as(value)
    peak = torch.zeros_like(size).scatter_reduce(0, rows, size, "amax").index_select(0, index)
    unit = torch.ones_like(peak).masked_fill(peak > _HUGE, 2.0**-564)
    unit = unit.masked_fill(peak < _TINY, 2.0**700)
    return value * unit, unit


def _weight_unit(weights: Mapping[str, float]) -> float:
    """Power of two that scales the weights, as ``_in_range`` scales rewards.

    Its product with any unit of ``_in_range`` is a finite float64 above 0.
    """
    peak = max(map(abs, weights.values()))
    return 2.0**-450 if peak > _HUGE else 2.0**320 if peak < _TINY else 1.0


def _deviation(reward: Tensor, index: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Reward minus its group's mean (0 where invalid), and the count of valid members, at least 1.

    In float64. The group's minimum is subtracted first, which makes a constant group exactly 0.
    """
    floor, mean, count = _group_mean(reward, index, valid)
    # In this order: reward - (floor + mean) would round, and a constant group would not be 0.
    return torch.where(valid, reward - floor - mean, 0), count


def _group_mean(reward: Tensor, index: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Minimum of each member's group, mean above it, and count of valid members, at least 1."""
    value = torch.where(valid, reward, torch.inf)
    rows = index.reshape(index.shape + (1,) * (value.ndim - 1)).expand_as(value)
    floor = torch.full_like(value, torch.inf).scatter_reduce(0, rows, value, "amin")
    floor = floor.index_select(0, index)
    count = group_sum(valid.to(value.dtype), index).clamp(min=1)
    return floor, group_sum(torch.where(valid, value - floor, 0), index) / count, count


def _filled(reward: Tensor, index: Tensor, counted: Tensor) -> Tensor:
    """Replace uncounted entries by the mean of the group's counted members, 0 if there are none."""
    floor, mean, _ = _group_mean(reward, index, counted)
    mean = torch.where(floor.isinf(), 0, floor + mean)
    return torch.where(counted, reward, mean)


def _in_group(mask: Tensor, index: Tensor) -> Tensor:
    """Whether the mask holds for any member of each member's group."""
    return group_sum(mask.long(), index) > 0


def _root_mean_square(deviation: Tensor, count: Tensor, index: Tensor) -> Tensor:
    return (group_sum(deviation.square(), index) / count).sqrt()


def group_sum(x: Tensor, index: Tensor) -> Tensor:
    """Sum over each member's group, broadcast to its members."""
    return torch.zeros_like(x).index_add(0, index, x).index_select(0, index)


def _check_named(
    rewards: Mapping[str, Numbers],
    weights: Mapping[str, float],
    group: Numbers,
    valid: Numbers | None,
    measured: Mapping[str, Numbers] | None,
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Return checked rewards, group ids, and masks of where each reward is valid and measured."""
    check_named("rewards", rewards, "rewards")
    check_named("weights", weights, "numbers")
    if not rewards:
        raise ValueError("rewards: expected at least one named reward, got none")
    if set(rewards) != set(weights):
        raise ValueError(
            f"weights: expected one weight for each reward in {sorted(rewards)}, "
            f"got {sorted(weights)}"
        )
    for name, weight in weights.items():
        check_number(f"weights[{name!r}]", weight)
    measured = {} if measured is None else measured
    check_named("measured", measured, "masks")
    if unknown := set(measured) - set(rewards):
        raise ValueError(f"measured: expected names among {sorted(rewards)}, got {sorted(unknown)}")
    like = first_tensor(*rewards.values())
    named = {n: as_real(f"rewards[{n!r}]", reward, like=like) for n, reward in rewards.items()}
    first, reward = next(iter(named.items()))
    check_full_precision(**{f"rewards[{n!r}]": x for n, x in named.items()})
    masks = {
        name: as_mask(f"measured[{name!r}]", measured.get(name), reward, f"of rewards[{first!r}]")
        for name in named
    }
    ids = as_ids(group, reward.device)
    mask = check_rewards(
        {f"rewards[{name!r}]": reward for name, reward in named.items()},
        ids,
        as_mask("valid", valid, reward, f"of rewards[{first!r}]"),
        {f"rewards[{name!r}]": mask for name, mask in masks.items()},
    )
    check_layout(named[first], ids)
    return named, ids, {name: mask & masks[name] for name in named}


def _check_group_measured(name: str, group: Tensor, ok: Tensor) -> None:
    """Raise ``ValueError`` naming the first group in which a reward was not measured at all."""
    if read(ok.all()) is not False:
        return
    row = int((~ok).nonzero()[0, 0])
    raise ValueError(
        f"rewards[{name!r}]: expected a measured reward in every group, got none in group "
        f"{int(group[row])}; leave the group out (group_measured), or use fuse_advantages, where "
        "an unmeasured reward adds 0"
    )


def _result_like(named: Mapping[str, Tensor]) -> Tensor:
    """Empty tensor of the dtype that all rewards promote to, on their device."""
    return torch.stack([reward[:0] for reward in named.values()])


def _weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Weighted sum in the order of the names, so that the order of the mapping changes no bit."""
    return torch.stack([weights[name] * terms[name] for name in sorted(terms)]).sum(dim=0)
