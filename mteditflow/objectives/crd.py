"""Centered reward distillation as an objective."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mteditflow._checks import check_number
from mteditflow.losses.crd import crd_loss, kl_coef_by_reward
from mteditflow.losses.nft import velocity_kl
from mteditflow.objectives.base import Card, Output, Velocity
from mteditflow.objectives.grouped import GroupObjective, unit_of_member
from mteditflow.objectives.samples import Samples
from mteditflow.objectives.units import Units, member_advantages, member_mask, member_mean


@dataclass(frozen=True, kw_only=True)
class CRD(GroupObjective):
    r"""CRD: regression of implicit rewards to rewards, both centered in their group.

    A unit is a group at one turn, all members at the same flow time and noise, so a micro-batch of
    one unit is a forward pass of a whole group. A group of equal advantages is trained too, because
    its implicit rewards are still pulled together.

    Args:
        crd_beta: reward per implicit reward, > 0; large values keep the policy near the old one.
        advantage_max: advantage at which the reward saturates, > 0.
        adaptive: whether errors are divided by their own detached mean absolute value.
        kl_floor: weight of the KL of the worst rows, which rises with the reward to ``kl_coef``;
            ``None``: ``kl_coef`` for all rows.

    The other fields are those of every objective of the forward process: ``renoise``, ``kl_coef``,
    ``norm_coef``, ``old_slope`` and ``old_maximum``.

    Metrics: "policy_loss", "old_kl" (velocity KL to the old policy), "kl" (with ``kl_floor`` each
    row's KL is scaled by its weight over ``kl_coef``), "norm_hinge".

    Raises:
        ValueError: a number is out of range, or ``kl_floor`` comes without a ``kl_coef``.

    Source: CRD (arXiv 2603.14128). Centering is by group, as in the paper; public code centers over
        all rows of a step, which ``crd_loss`` supports too.

    Example:
        >>> CRD(kl_coef=0.1, kl_floor=1e-4).zero_matters
        True
    """

    card = Card(
        title="CRD",
        papers=("2603.14128",),
        losses=("crd_loss", "kl_coef_by_reward"),
        needs="old policy; whole groups",
        passes="1 + 1 (0)",
        whole_groups=True,
    )

    crd_beta: float = 1.0
    """Reward per implicit reward; large values keep the policy near the old one."""
    advantage_max: float = 5.0
    """Advantage at which the reward saturates."""
    adaptive: bool = False
    """Divide errors by their own detached mean absolute value."""
    kl_floor: float | None = None
    """Weight of the KL of the worst rows, rising with the reward to kl_coef. None: kl_coef for all
    rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("crd_beta", self.crd_beta, low=0.0, open_low=True)
        check_number("advantage_max", self.advantage_max, low=0.0, open_low=True)
        if not isinstance(self.adaptive, bool):
            kind = type(self.adaptive).__name__
            raise TypeError(f"adaptive: expected True or False, got {kind}")
        if self.kl_floor is not None:
            if self.kl_coef == 0:
                raise ValueError(
                    f"kl_floor: has an effect only where kl_coef > 0, got {self.kl_floor}"
                )
            check_number("kl_floor", self.kl_floor, low=0.0, high=self.kl_coef)

    @property
    def zero_matters(self) -> bool:
        """True: implicit rewards of a group of equal advantages are pulled together."""
        return True

    def __call__(
        self, velocity: Velocity, samples: Samples, units: Units, *, old_is_current: bool = False
    ) -> Output:
        """See ``Objective``."""
        states, at = self.states(velocity, samples, units, old_is_current=old_is_current)
        exists, target = member_mask(units, at.current), states.target
        advantage = member_advantages(units, target)
        loss = crd_loss(
            at.current,
            at.old,
            target,
            advantage,
            unit_of_member(units, target.device),
            crd_beta=self.crd_beta,
            advantage_max=self.advantage_max,
            adaptive=self.adaptive,
            valid=exists,
        )
        scale = None
        if self.kl_floor is not None:
            coefficient = kl_coef_by_reward(
                advantage,
                kl_coef=self.kl_coef,
                kl_floor=self.kl_floor,
                advantage_max=self.advantage_max,
            )
            scale = coefficient / self.kl_coef  # ``output`` multiplies by kl_coef
        with torch.no_grad():
            old_kl = member_mean(units, velocity_kl(at.current, at.old, valid=exists))
        metrics = {"old_kl": old_kl}
        return self.output(units, member_mean(units, loss), at, metrics, kl_scale=scale)
