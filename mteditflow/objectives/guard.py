"""GRPO-Guard as an objective."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mteditflow._checks import check_number
from mteditflow.losses.clipped import clipped_surrogate_loss
from mteditflow.losses.guard import guard_log_ratio, guard_step_weight
from mteditflow.objectives.base import Card, Output, Velocity
from mteditflow.objectives.replay import ReplayObjective, ratio_metrics
from mteditflow.objectives.samples import Samples
from mteditflow.objectives.units import Units, member_advantages, member_mask


@dataclass(frozen=True, kw_only=True)
class Guard(ReplayObjective):
    r"""GRPO-Guard: unbiased ratios, and gradients of equal scale at every step.

    Rows of advantage 0 are left out if ``kl_coef`` is 0.

    Args:
        clip_low: how far a normalized ratio may fall below 1, in [0, 1); std times GRPO's range.
        clip_high: how far a normalized ratio may rise above 1, >= 0.

    The other fields are those of every objective that replays steps: ``solver``, ``noise_level``,
    ``stochastic_steps``, ``window_interval``, ``share``, ``kl_coef`` and ``importance_cap``.

    Metrics: "policy_loss", "ratio", "clip_fraction", "old_kl" (KL of the steps to the old
    policy's), "kl", "importance_weight".

    Raises:
        ValueError: a number is out of range.

    Source: GRPO-Guard (arXiv 2510.22319); step weights are divided by the number of steps, so that
        their mean is about 1.

    Example:
        >>> Guard(clip_low=1e-3, clip_high=1e-3).old_decay(7)
        0.0
    """

    card = Card(
        title="GRPO-Guard",
        papers=("2510.22319",),
        losses=("guard_log_ratio", "guard_step_weight", "clipped_surrogate_loss"),
        needs="means of steps, old policy",
        passes="1 + 1 (0)",
    )

    clip_low: float = 1e-4
    """How far normalized ratios may fall below 1."""
    clip_high: float = 1e-4
    """How far normalized ratios may rise above 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("clip_low", self.clip_low, low=0.0, high=1.0, open_high=True)
        check_number("clip_high", self.clip_high, low=0.0)

    def __call__(
        self, velocity: Velocity, samples: Samples, units: Units, *, old_is_current: bool = False
    ) -> Output:
        """See ``Objective``."""
        replay = self.replay(velocity, samples, units, old_is_current=old_is_current)
        steps, (mean, std) = replay.steps, replay.transition
        exists = member_mask(units, mean)
        log_ratio = guard_log_ratio(
            steps.next_x, mean, replay.old_mean, std, reduction=replay.reduction, valid=exists
        )
        loss = clipped_surrogate_loss(
            log_ratio,
            torch.zeros_like(log_ratio),
            member_advantages(units, log_ratio),
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            valid=exists,
        )
        weight = guard_step_weight(self.step_solver, steps.sigma, steps.next_sigma)
        # Weights are about one over the step size, S; divided by S their mean is about 1.
        loss = loss * weight / samples.step_mask.shape[2]
        metrics = ratio_metrics(log_ratio, self.clip_low, self.clip_high)
        return self.output(units, loss, replay, {**metrics, "old_kl": replay.old_kl()})
