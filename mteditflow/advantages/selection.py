r"""Selection of informative groups, and sampling probabilities of chains.

A group is informative if the rewards of its members differ. A group in which all succeed, all fail,
or all get the same reward has no advantage to learn from. Objectives that pull toward the old
policy still move the weights on such a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_ids,
    as_mask,
    as_numbers,
    as_real,
    check_count,
    check_full_precision,
    check_number,
    check_rank,
    check_real,
    check_rewards,
)
from mteditflow.advantages.group import group_std


@dataclass(frozen=True, eq=False)
class GroupSelection:
    """Mask of trajectories to train on, and counts of dropped groups by reason.

    Attributes:
        keep: valid members of kept groups, boolean [B]: use it as ``valid`` of
            ``fuse_advantages``, or as the weight of the loss.
        counts: number of groups by outcome: "kept"; "short", too few valid and measured members;
            "saturated", all at the top reward or above; "hopeless", none above the bottom reward;
            "flat", a std of rewards that is too small.
    """

    keep: Tensor
    counts: Mapping[str, int]


@torch.no_grad()
def select_groups(
    reward: Numbers,
    group: Numbers,
    *,
    valid: Numbers | None = None,
    measured: Numbers | None = None,
    top: float | None = None,
    bottom: float | None = None,
    spread: float = 0.0,
    members: int = 2,
) -> GroupSelection:
    r"""Drop uninformative groups and count them by reason.

    A group is counted under the first reason that holds: fewer than ``members`` valid and measured
    members, all of them at ``top`` or above, all at ``bottom`` or below, a population std of at
    most ``spread``.

    Args:
        reward: one per trajectory, finite where valid and measured, float32 or float64, [B].
        group: integer group id of each trajectory, [B].
        valid: boolean [B]; ``None`` means all are valid. Other members are never read or kept.
        measured: boolean [B]; false where there was nothing to measure. Such a member does not
            count in the decision and is kept if its group is, because other rewards may train it.
            ``None`` means all were measured.
        top: reward at or above which nothing is left to gain; ``None`` disables this reason.
        bottom: reward at or below which nothing was achieved; ``None`` disables this reason.
        spread: largest std that counts as uninformative, >= 0, in units of the reward; 0 drops only
            groups of equal rewards.
        members: fewest valid and measured members, at least 2.

    Returns:
        GroupSelection.

    Raises:
        ValueError: shapes do not match, a valid reward is not finite, a number is out of range,
            ``bottom`` is not below ``top``.
        TypeError: a dtype is not the one stated.

    Source: dynamic sampling of DAPO (arXiv 2503.14476), which drops groups whose answers are all
        right or all wrong.

    Example:
        >>> reward = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0])
        >>> selection = select_groups(
        ...     reward, torch.tensor([0, 0, 1, 1, 2, 2]), top=1.0, bottom=0.0
        ... )
        >>> selection.keep
        tensor([False, False, False, False,  True,  True])
        >>> selection.counts
        {'kept': 1, 'short': 0, 'saturated': 1, 'hopeless': 1, 'flat': 0}
    """
    reward = as_real("reward", reward)
    check_full_precision(reward=reward)
    check_rank("reward", reward, 1, "[B]", maximum=1)
    group = as_ids(group, reward.device)
    has = as_mask("measured", measured, reward, "[B]")
    mask = as_mask("valid", valid, reward, "[B]")
    check_rewards({"reward": reward}, group, mask, {"reward": has})
    counted = mask & has
    check_number("spread", spread, low=0.0)
    check_count("members", members, low=2)
    for name, bound in (("top", top), ("bottom", bottom)):
        if bound is not None:
            check_number(name, bound)
    if top is not None and bottom is not None and bottom >= top:
        raise ValueError(f"bottom: expected a number below top = {top}, got {bottom}")
    names, index = torch.unique(group.long(), return_inverse=True)
    zeros = torch.zeros(len(names), dtype=torch.int64, device=reward.device)

    def in_all(holds: Tensor) -> Tensor:
        """Return, per group, whether ``holds`` is true for every counted member."""
        return zeros.index_add(0, index, (counted & ~holds).long()) == 0

    count = zeros.index_add(0, index, counted.long())
    none = torch.zeros_like(count, dtype=torch.bool)
    reasons = {
        "short": count < members,
        "saturated": none if top is None else in_all(reward >= top),
        "hopeless": none if bottom is None else in_all(reward <= bottom),
        "flat": in_all(group_std(reward, group, valid=counted) <= spread),
    }
    # A group counts under its first reason only, so the counts add up to the number of groups.
    left, counts = ~none, {}
    for name, drop in reasons.items():
        counts[name] = int((left & drop).sum())
        left = left & ~drop
    return GroupSelection(left[index] & mask, {"kept": int(left.sum()), **counts})


def draw_probabilities(spread: Numbers, *, uniform: float = 0.2) -> list[float]:
    r"""Sampling probability of each chain, from the reward spread of its last group.

    .. math:: p_i = u / C + (1 - u) \, s_i / \sum_j s_j

    A chain that every member of its group solves, or none, is uninformative now, but may become
    informative as the policy changes. The uniform share keeps revisiting it.

    Args:
        spread: one per chain, [C], finite and >= 0, such as the std of its last group's rewards.
        uniform: share u of draws that are uniform over chains, in (0, 1]; 1 ignores the spread.

    Returns:
        C probabilities that sum to 1, all above 0; uniform if every spread is 0.

    Raises:
        ValueError: there is no chain, a spread is negative or not finite, ``uniform`` is out of
            range.

    Source: this library's mixture of spread-proportional and uniform sampling, motivated by DAPO's
        dynamic sampling (arXiv 2503.14476), which discards uninformative groups after the rollout.

    Example:
        >>> draw_probabilities([0.0, 0.3], uniform=0.5)
        [0.25, 0.75]
    """
    check_number("uniform", uniform, low=0.0, high=1.0, open_low=True)
    values = as_numbers("spread", spread)
    check_real(spread=values)
    if values.numel() == 0:
        raise ValueError("spread: expected one for each chain, got none")
    check_rank("spread", values, 1, "[C]", maximum=1)
    numbers = [float(s) for s in values.tolist()]
    for i, s in enumerate(numbers):
        check_number(f"spread[{i}]", s, low=0.0)
    largest, count = max(numbers), len(numbers)
    if largest == 0:
        return [1 / count] * count
    relative = [s / largest for s in numbers]  # so that no product underflows and no sum overflows
    total = sum(relative)
    return [uniform / count + (1 - uniform) * (s / total) for s in relative]
