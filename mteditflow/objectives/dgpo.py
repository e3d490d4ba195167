"""Direct group preference optimization as an objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mteditflow._checks import check_choice, check_number
from mteditflow.losses.awm import matching_log_prob
from mteditflow.losses.dgpo import dgpo_loss
from mteditflow.objectives.base import Card, Output, Velocity
from mteditflow.objectives.grouped import GroupObjective, unit_of_member
from mteditflow.objectives.samples import Samples
from mteditflow.objectives.units import Units, member_advantages, member_mask, member_mean


@dataclass(frozen=True, kw_only=True)
class DGPO(GroupObjective):
    r"""DGPO: advantage-weighted matching in groups, with less weight on groups ranked correctly.

    A unit is a group at one turn, all members at the same flow time and noise, so a micro-batch of
    one unit is a forward pass of a whole group. A group whose advantages are all 0 is left out
    unless a regularizer acts on it. Advantages should sum to 0 in each group.

    Args:
        dgpo_beta: rate at which a group's weight falls as its ranking improves, >= 0.
        ratio_clip: half width, in (0, 1), of the range of :math:`\exp(l_{old} - l)` around 1
            outside which a row is moved no further; ``None``: no bound, and no forward pass of the
            old policy.
        anchor: policy whose matching losses the ranking is compared with: "reference", or "old",
            which follows the current policy.

    The other fields are those of every objective of the forward process: ``renoise``, ``kl_coef``,
    ``norm_coef``, ``old_slope`` and ``old_maximum``.

    Metrics: "policy_loss", "preferred" (share of groups ranked better than by the anchor), "kl",
    "norm_hinge".

    Raises:
        ValueError: a number is out of range.

    Source: DGPO (arXiv 2510.08425). The bound on the ratio and the moving anchor are known from
        public code alone; the paper's samplers and guidance are the rollout's.

    Example:
        >>> from mteditflow.objectives import CleanSamples
        >>> samples = CleanSamples(torch.randn(5, 1, 8), group=torch.tensor([0, 0, 0, 1, 1]))
        >>> key = torch.Generator().manual_seed(0)
        >>> advantage = torch.tensor([1.0, 0.0, -1.0, 1.0, -1.0])
        >>> (units,) = DGPO().units(samples, advantage, key=key)
        >>> units.rows[:, :, 0], units.mask[1]  # the second group is padded with its first member
        (tensor([[0, 1, 2],
                [3, 4, 3]]), tensor([ True,  True, False]))
    """

    card = Card(
        title="DGPO",
        papers=("2510.08425",),
        losses=("dgpo_loss",),
        needs="reference; whole groups; the old policy samples",
        passes="1 + 1",
        old_kl=False,
        whole_groups=True,
    )

    dgpo_beta: float = 100.0
    """Rate at which a group's weight falls as its ranking improves; 10 to 100, thousands with a
    moving anchor."""
    ratio_clip: float | None = None
    """Half width of the ratio's range outside which a row is moved no further; costs a forward pass
    of the old policy. None: no bound."""
    anchor: Literal["reference", "old"] = "reference"
    """Policy whose ranking of a group is the baseline."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("dgpo_beta", self.dgpo_beta, low=0.0)
        if self.ratio_clip is not None:
            check_number(
                "ratio_clip", self.ratio_clip, low=0.0, high=1.0, open_low=True, open_high=True
            )
        check_choice("anchor", self.anchor, ("reference", "old"))

    def __call__(
        self, velocity: Velocity, samples: Samples, units: Units, *, old_is_current: bool = False
    ) -> Output:
        """See ``Objective``."""
        states, at = self.states(velocity, samples, units, old_is_current=old_is_current)
        exists, target = member_mask(units, at.current), states.target
        anchor = at.old if self.anchor == "old" else at.reference
        advantage = member_advantages(units, target)
        loss = dgpo_loss(
            at.current,
            anchor,
            target,
            advantage,
            unit_of_member(units, target.device),
            dgpo_beta=self.dgpo_beta,
            old_velocity=None if self.ratio_clip is None else at.old,
            ratio_clip=self.ratio_clip,
            valid=exists,
        )
        with torch.no_grad():
            gain = matching_log_prob(at.current, target, valid=exists)
            gain = gain - matching_log_prob(anchor, target, valid=exists)
            preferred = member_mean(units, advantage * gain) > 0
        metrics = {"preferred": preferred.float()}
        return self.output(units, member_mean(units, loss), at, metrics)
