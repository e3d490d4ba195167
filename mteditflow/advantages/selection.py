r"""Informative groups: which to train on, and which chains to draw again.

A group is informative through the differences between its members. Where all succeed, all fail, or
all get the same reward, there are none; objectives that pull to the old policy still move the
weights there.
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
    """Which trajectories to train on, and how many groups were dropped for which reason.

    Attributes:
        keep: valid members of the groups that are kept, boolean [B]: use it as ``valid`` of
            ``fuse_advantages``, or as weight of the loss.
        counts: groups by what became of them: "kept"; "short", too few valid members; "saturated",
            all at the top reward or above; "hopeless", none above the bottom reward; "flat",
            rewards that differ too little.
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
    r"""Drop uninformative groups, and count the reasons.

    A group is counted under the first reason that holds: fewer than ``members`` valid and measured
    members, all of them at ``top`` or above, all at ``bottom`` or below, a population std of at
    most ``spread``.

    Args:
        reward: one per trajectory, finite where valid and measured, float32 or float64, [B].
        group: integer group id of each trajectory, [B].
        valid: boolean [B]; ``None`` means all are valid. The rest is never read and never kept.
        measured: boolean [B]; false where there was nothing to measure. Such a member has no say,
            and is kept with its group: other rewards may train it. ``None`` means all were.
        top: reward from which on nothing is left to gain; ``None``: none is.
        bottom: reward up to which nothing was achieved; ``None``: none is.
        spread: std that teaches nothing, >= 0; 0 drops groups of equal rewards alone.
        members: fewest valid members, at least 2.

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
        """Return whether it holds for every member that counts, by group."""
        return zeros.index_add(0, index, (counted & ~holds).long()) == 0

    count = zeros.index_add(0, index, counted.long())
    none = torch.zeros_like(count, dtype=torch.bool)
    reasons = {
        "short": count < members,
        "saturated": none if top is None else in_all(reward >= top),
        "hopeless": none if bottom is None else in_all(reward <= bottom),
        "flat": in_all(group_std(reward, group, valid=counted) <= spread),
    }
    left, counts = ~none, {}
    for name, drop in reasons.items():
        counts[name] = int((left & drop).sum())
        left = left & ~drop
    return GroupSelection(left[index] & mask, {"kept": int(left.sum()), **counts})


def draw_probabilities(spread: Numbers, *, uniform: float = 0.2) -> list[float]:
    r"""How likely each chain is to be drawn next, given how much its last groups spread.

    .. math:: p_i = u / C + (1 - u) \, s_i / \sum_j s_j

    A chain that all members of its group solve, or none, teaches nothing now, but may after the
    policy has changed: the uniform share comes back to it.

    Args:
        spread: of each of C chains, >= 0, such as the std of its last group's rewards.
        uniform: share u of draws that is spread evenly, in (0, 1]; 1 ignores the spread.

    Returns:
        C probabilities, all above 0; even ones where no chain has a spread.

    Raises:
        ValueError: there is no chain, a spread is negative or not finite, ``uniform`` is out of
            range.

    Source: sampling in proportion to what is left to learn, mixed with uniform draws; the idea of
        DAPO's dynamic sampling (arXiv 2503.14476) without the groups that it throws away.

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
