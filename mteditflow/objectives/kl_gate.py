"""KL to the reference on the units of gated trajectories alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from mteditflow._checks import Numbers, as_numbers
from mteditflow.objectives.units import Units


def gate_kl(units: Units, gate: Numbers) -> Units:
    r"""Keep the KL to the reference of gated trajectories, and give that of the others weight 0.

    The mean of the KL over all units is then :math:`\mathrm{mean}_i\, gate_i KL_i`. The reference's
    forward passes of the others are not computed. With ``kl_share`` the weights multiply, and the
    mean stays unbiased.

    Args:
        units: units of one member, as ``units`` of GRPO, Guard, DPPO, NFT, AWM and FlowAWR returns
            them.
        gate: trajectories of the samples that keep their KL, boolean [B], such as
            ``uncertainty_gate`` returns it.

    Returns:
        The units with other ``kl_weight``; rows, advantages and ``count`` are the same.

    Raises:
        ValueError: units have several members, or one is of a trajectory beyond the gate.
        TypeError: the gate is not boolean.

    Source: GARDO (arXiv 2512.24138).

    Example:
        >>> from mteditflow.objectives import NFT, CleanSamples, RoundKey
        >>> samples = CleanSamples(torch.zeros(4, 1, 8), torch.zeros(4).long())
        >>> advantage = torch.tensor([1.0, 0.5, -0.5, -1.0])
        >>> (units,) = NFT(kl_coef=0.1).units(samples, advantage, key=RoundKey(0, 0))
        >>> gate_kl(units, torch.tensor([True, False, False, True])).kl_weight
        tensor([1., 0., 0., 1.])
    """
    kept = as_numbers("gate", gate).to(units.rows.device)
    if kept.dtype != torch.bool:
        raise TypeError(f"gate: expected booleans, got {kept.dtype}")
    if kept.ndim != 1:
        raise ValueError(f"gate: expected shape [B], got {list(kept.shape)}")
    members = units.rows.shape[1]
    if members != 1:
        raise ValueError(
            f"units: expected one member each, whose KL is gated, got {members}: the KL of a pair "
            "or a group is one number"
        )
    trajectory = units.rows[:, 0, 0]
    if len(units) and int(trajectory.max()) >= len(kept):
        raise ValueError(
            f"gate: expected one entry for each trajectory, at least {int(trajectory.max()) + 1}, "
            f"got {len(kept)}"
        )
    weight = kept[trajectory].float()
    return replace(units, kl_weight=weight if units.kl_weight is None else weight * units.kl_weight)
