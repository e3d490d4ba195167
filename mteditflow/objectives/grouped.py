"""Objectives of the forward process whose units are whole groups at one flow time and noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mteditflow.objectives.forward import ForwardObjective
from mteditflow.objectives.keys import Key, RoundKey, round_key
from mteditflow.objectives.samples import Samples, turn_values
from mteditflow.objectives.units import Units, draw_units


@dataclass(frozen=True, kw_only=True)
class GroupObjective(ForwardObjective):
    """Common fields and units of objectives on whole groups.

    A unit is a group at one turn and noise level. It holds the group's valid members, padded to the
    largest group, all at the flow time and noise of the first one. A group with fewer than two
    valid members at a turn gives no unit. With ``renoise.shared``, time and noise depend on the
    group alone rather than on its first member; members share them in both cases. ``kl_share`` must
    be 1. Groups have equal weight, whatever their size. All members of a group must be among the
    samples of one call.
    """

    members = None
    whole_kl = "whose units are groups"

    def units(
        self,
        samples: Samples,
        advantage: Tensor | None,
        valid: Tensor | None = None,
        *,
        key: Key,
        minibatches: int = 1,
    ) -> list[Units]:
        """See ``Objective``: one group for each turn and noise level."""
        if advantage is None:
            raise TypeError(f"advantage: expected a tensor for {type(self).__name__}, got None")
        values, own = turn_values(samples, advantage, valid)
        groups, key = _Groups.of(samples.group.cpu(), values, own), round_key(key)
        drawn = draw_units(
            samples,
            groups.leads[..., None].expand(-1, -1, self.renoise.levels),
            groups.largest,  # the group is dropped for advantage 0 only if all members have it
            groups.leads,
            key=key,
            share=1.0,
            minibatches=minibatches,
            zero_matters=self.zero_matters,
            whole_groups=True,
        )
        return [self._grouped(samples, units, values, own, groups.number, key) for units in drawn]

    def _grouped(
        self,
        samples: Samples,
        units: Units,
        values: Tensor,
        own: Tensor,
        index: Tensor,
        key: RoundKey,
    ) -> Units:
        """Add the other members to the unit of every lead; all take the lead's noise."""
        lead = units.rows[:, 0]
        joins = (index == index[lead[:, 0]][:, None]) & own[:, lead[:, 1]].T  # [U, B]
        joins = pad(joins, (0, 1))  # a column that joins no unit: width 2 needs two columns
        width = max([2, *joins.sum(dim=1).tolist()])
        # A stable sort puts the members first, in the order of their trajectories.
        first = (~joins).int().argsort(dim=1, stable=True)[:, :width]
        mask = joins.take_along_dim(first, dim=1)
        rows = lead[:, None].repeat(1, mask.shape[1], 1)
        rows[..., 0] = torch.where(mask, first, rows[..., 0])
        grouped = replace(units, rows=rows, mask=mask, advantage=values[rows[..., 0], rows[..., 1]])
        return self._seeded(samples, grouped, lead[:, None].expand_as(rows), key)


def unit_of_member(units: Units, device: torch.device) -> Tensor:
    """Return the index of each member's unit, int64 [K * U], in the order of ``member_rows``."""
    return torch.arange(len(units), dtype=torch.int64, device=device).repeat(units.rows.shape[1])


class _Groups(NamedTuple):
    """Groups of B trajectories at N turns.

    Attributes:
        number: index of each trajectory's group, int64 [B].
        leads: whether a trajectory is the first valid one of a group with at least two, [B, N].
        largest: largest absolute advantage of the group's valid members, [B, N].
    """

    number: Tensor
    leads: Tensor
    largest: Tensor

    @classmethod
    def of(cls, group: Tensor, values: Tensor, own: Tensor) -> _Groups:
        names, index = torch.unique(group, return_inverse=True)
        place = index[:, None].expand_as(own)
        size = values.abs()  # 0 where not valid
        largest = size.new_zeros(len(names), size.shape[1]).scatter_reduce(0, place, size, "amax")
        count = place.new_zeros(largest.shape).index_add(0, index, own.long())
        number = torch.arange(len(index), dtype=torch.int64, device="cpu")[:, None].expand_as(own)
        first = torch.full_like(count, len(index)).scatter_reduce(
            0, place, torch.where(own, number, len(index)), "amin"
        )
        leads = (first[index] == number) & (count[index] > 1)
        return cls(index, leads, largest[index])
