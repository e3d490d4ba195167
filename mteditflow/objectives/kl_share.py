"""KL to the reference on a random share of the units: fewer forward passes, no bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mteditflow._checks import check_number
from mteditflow.objectives.keys import RoundKey
from mteditflow.objectives.units import ALL, Rows, Units, member_mean


def check_kl_share(share: float, kl_coef: float) -> None:
    """Raise ``ValueError`` unless the share of the KL is in (0, 1], and 1 if ``kl_coef`` is 0."""
    check_number("kl_share", share, low=0.0, high=1.0, open_low=True)
    if share < 1 and kl_coef == 0:
        raise ValueError(f"kl_share: has an effect only where kl_coef > 0, got {share}")


def share_kl(units: Units, share: float, key: RoundKey) -> Units:
    """Draw the units whose KL to the reference is computed, at weight ``1 / share``.

    Every ``1 / share``-th unit of a trajectory is drawn from a random start (systematic sampling).
    Each unit has probability ``share``, so that the weighted KL is unbiased, and the number drawn
    from a trajectory differs from its share of the units by less than one. The draw is the same on
    any ranks and in any micro-batches.

    Args:
        units: units of one member, in the order of trajectories.
        share: share of the units, in (0, 1]; 1 leaves them as they are.
        key: source of the random starts.
    """
    if share == 1:
        return units
    trajectory = units.rows[:, 0, 0].contiguous()
    starts = {b: key.number("kl", key.first + b) / 2**63 for b in trajectory.tolist()}
    start = torch.tensor(
        [starts[b] for b in trajectory.tolist()], dtype=torch.float64, device="cpu"
    )
    # Taken are the units at which the running sum of shares, from the start, passes an integer.
    every = torch.arange(len(units), dtype=torch.float64, device="cpu")
    # searchsorted gives each trajectory's first unit, so positions count from 0 within it.
    passed = share * (every - torch.searchsorted(trajectory, trajectory)) + start
    taken = (passed + share).floor() > passed.floor()
    return replace(units, kl_weight=taken.float() / share)


def kl_units(units: Units) -> Tensor | None:
    """Return the units whose KL to the reference is computed, int64 [R]; ``None`` means all.

    At least one, if need be of weight 0: with sharded weights every rank must make the same number
    of forward passes.
    """
    if units.kl_weight is None:
        return None
    found = units.kl_weight.nonzero()[:, 0]
    return found if len(found) else found.new_zeros(1)


def weighted_kl(units: Units, kl: Callable[[Rows], Tensor]) -> Tensor:
    """Return the weighted KL of each unit to the reference, [U]; 0 where it is not computed.

    Args:
        units: U units of K members.
        kl: function that returns the KL of some of their K * U rows, given as int64 [R] on the CPU,
            or of all of them, given as a slice.
    """
    chosen = kl_units(units)
    if chosen is None:
        return member_mean(units, kl(ALL))
    assert units.kl_weight is not None
    members = torch.arange(units.rows.shape[1], dtype=torch.int64, device="cpu")
    value = kl((chosen + len(units) * members[:, None]).flatten()).view(-1, len(chosen)).mean(dim=0)
    weighted = value * units.kl_weight[chosen].to(value)
    return weighted.new_zeros(len(units)).index_copy(0, chosen.to(value.device), weighted)
