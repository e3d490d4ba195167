r"""FlowAWR's advantage: the density ratio of the reward-tilted policy to the old one, minus 1.

The optimum of expected reward under a KL to the old policy is :math:`\pi^* \propto \pi_{old}\,
e^{R/\gamma}`. On samples of the old policy, the density ratio :math:`\pi^* / \pi_{old}` is
estimated by the group's softmax times the group's size. The advantage is that ratio minus 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mteditflow._checks import Numbers, as_rewards, check_number
from mteditflow._reduce import in_float64
from mteditflow.advantages.group import check_layout, group_index, group_std, group_sum


def softmax_advantage(
    reward: Numbers,
    group: Numbers,
    *,
    valid: Numbers | None = None,
    temperature: float | None = None,
    floor: float = 1e-6,
    gate_floor: float | None = None,
) -> Tensor:
    r"""Exponential advantage, :math:`A_i = e^{R_i/\gamma} / \mathrm{mean}_j\,e^{R_j/\gamma} - 1`.

    The mean is over the G valid members j of the row's group. A lies in [-1, G - 1] and sums to 0
    in each group. As the temperature grows, :math:`\gamma A` tends to the reward minus the group's
    mean. As it falls to 0, the best member gets G - 1, or k equally good ones G / k - 1 each, and
    all others -1. Equal rewards, and a group with a single valid member, give exactly 0. Adding a
    constant to a group's rewards changes nothing at a given temperature. With the default
    temperature, scaling all rewards by a positive factor changes nothing while the std stays above
    ``floor``.

    Args:
        reward: finite where valid; [B], or [B, N] to treat each turn on its own. Dtypes, ids and
            layouts as in ``group_advantage``.
        group: integer group id of each trajectory, [B].
        valid: boolean, shape of ``reward``; other entries are never read and get 0.
        temperature: :math:`\gamma > 0` in units of the reward; ``None`` takes the population std
            of all valid rewards (per turn).
        floor: smallest default temperature, > 0, in units of the reward; unused if a temperature is
            given.
        gate_floor: ``None`` for no gate. Otherwise advantages are divided by their std over the
            batch (per turn), but at least by this floor, > 0, which keeps them small when nearly
            all groups have equal rewards. They may then leave [-1, G - 1], so do not combine it
            with ``exact_flow_awr_loss``.

    Returns:
        Shape and dtype of ``reward``, detached.

    Raises:
        ValueError: as in ``group_advantage``; a temperature or floor is not positive.
        TypeError: as in ``group_advantage``.

    Source: FlowAWR (arXiv 2606.30376) for the tilted target. Known from public code only: the
    softmax over the group, the batch std as temperature with floor 1e-6, and the gate for
    rule-based rewards with floor 1e-2. It is not known whether the paper's floor refers to A or to
    A / G. The population std, the treatment of invalid members and the separate treatment of turns
    are this library's.

    Example:
        >>> reward = torch.tensor([0.0, 1.0, 5.0, 5.0])
        >>> softmax_advantage(reward, torch.tensor([7, 7, 2, 2]), temperature=1.0)
        tensor([-0.4621,  0.4621,  0.0000,  0.0000])
    """
    reward, group, valid = as_rewards(reward, group, valid)
    check_layout(reward, group)
    check_number("floor", floor, low=0.0, open_low=True)
    for name, value in (("temperature", temperature), ("gate_floor", gate_floor)):
        if value is not None:
            check_number(name, value, low=0.0, open_low=True)
    exact, index, mask = in_float64(reward.detach(), group_index(group), valid)

    def batch_std(x: Tensor, least: float) -> Tensor:
        # One group of all trajectories: the group std is then that of the batch, per turn.
        return group_std(x, torch.zeros_like(index), valid=mask).clamp(min=least)

    scale = batch_std(exact, floor) if temperature is None else temperature
    # (R - max R) / gamma <= 0, so that no exponential overflows; halves, so that no difference of
    # huge rewards does.
    below = (exact / 2 - _group_max(exact, index, mask) / 2) / scale * 2
    weight = torch.where(mask, below.exp(), 0)
    count = group_sum(mask.to(weight.dtype), index)
    advantage = torch.where(mask, weight * count / group_sum(weight, index) - 1, 0)
    if gate_floor is not None:
        advantage = advantage / batch_std(advantage, gate_floor)
    return advantage.to(reward)


def _group_max(x: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """Largest valid entry of each member's group."""
    value = torch.where(mask, x, -torch.inf)
    rows = index.reshape(index.shape + (1,) * (x.ndim - 1)).expand_as(x)
    top = torch.full_like(value, -torch.inf).scatter_reduce(0, rows, value, "amax")
    return top.index_select(0, index)
