"""Advantage-weighted matching as an objective."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mteditflow._checks import check_choice, check_number
from mteditflow.losses.awm import (
    WEIGHTINGS,
    Weighting,
    matching_log_prob,
    matching_surrogate_loss,
)
from mteditflow.losses.nft import velocity_kl
from mteditflow.objectives.base import Card, Metrics, Output, Velocity
from mteditflow.objectives.forward import ForwardObjective
from mteditflow.objectives.replay import ratio_metrics
from mteditflow.objectives.samples import Samples
from mteditflow.objectives.units import Units, member_advantages, member_mask


@dataclass(frozen=True, kw_only=True)
class AWM(ForwardObjective):
    r"""Advantage-weighted matching: the clipped surrogate on matching losses in place of log-probs.

    Rows of advantage 0 are left out unless a regularizer acts on them. The paper regularizes toward
    a moving average of the policy with weight 1. Here that weight is ``old_kl_coef``, and the
    average is the old policy; ``old_maximum=0.3`` gives the paper's decay, min(0.001 per round,
    0.3). This term can bound the loss from below: on-policy with the "uniform" weighting, its
    curvature is advantage + ``old_kl_coef`` (times 2 over the number of elements), which is not
    negative if all advantages are at least ``-old_kl_coef``. With ``rewards.advantage_limit`` 1 in
    the trainer, weight 1 ensures that.

    Args:
        weighting: function of matching loss and flow time that stands in for the log-prob; see
            ``matching_log_prob``.
        clip_low: how far the ratio of matching losses may fall below 1, in [0, 1).
        clip_high: how far the ratio may rise above 1, >= 0.
        old_kl_coef: weight of the velocity KL to the old policy, >= 0.

    The other fields are those of every objective of the forward process: ``renoise``, ``kl_coef``,
    ``norm_coef``, ``old_slope`` and ``old_maximum``.

    Metrics: "policy_loss" (the old KL included), "ratio", "clip_fraction", "old_kl", "kl",
    "norm_hinge".

    Raises:
        ValueError: a number is out of range.

    Source: Advantage Weighted Matching (arXiv 2509.25050).

    Example:
        >>> AWM(clip_low=1e-3, clip_high=2e-3).old_decay(100)
        0.1
    """

    card = Card(
        title="AWM",
        papers=("2509.25050",),
        losses=("matching_surrogate_loss", "matching_log_prob"),
        needs="old policy",
        passes="1 + 1 (0)",
        tokens=True,
    )

    weighting: Weighting = "uniform"
    """Weighting of matching losses: by flow time (sigma, sigma_squared) and size (huber forms)."""
    clip_low: float = 1e-4
    """How far the ratio of matching losses may fall below 1."""
    clip_high: float = 1e-4
    """How far the ratio of matching losses may rise above 1."""
    old_kl_coef: float = 0.0
    """Weight of the velocity KL to the old policy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_number("clip_low", self.clip_low, low=0.0, high=1.0, open_high=True)
        check_number("clip_high", self.clip_high, low=0.0)
        check_number("old_kl_coef", self.old_kl_coef, low=0.0)

    @property
    def zero_matters(self) -> bool:
        """Whether a unit of advantage 0 can change the gradient."""
        return super().zero_matters or self.old_kl_coef > 0

    def __call__(
        self, velocity: Velocity, samples: Samples, units: Units, *, old_is_current: bool = False
    ) -> Output:
        """See ``Objective``."""
        states, at = self.states(velocity, samples, units, old_is_current=old_is_current)
        exists = member_mask(units, at.current)
        sigma = None if self.weighting == "uniform" else states.sigma
        with torch.no_grad():
            log_prob, old_log_prob = (
                matching_log_prob(
                    v, states.target, weighting=self.weighting, sigma=sigma, valid=exists
                )
                for v in (at.current, at.old)
            )
        loss = matching_surrogate_loss(
            at.current,
            at.old,
            states.target,
            member_advantages(units, log_prob),
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            weighting=self.weighting,
            sigma=sigma,
            valid=exists,
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.old_kl_coef > 0):
            old_kl = velocity_kl(at.current, at.old, valid=exists)
        if self.old_kl_coef > 0:
            loss = loss + self.old_kl_coef * old_kl
        metrics: Metrics = ratio_metrics(log_prob - old_log_prob, self.clip_low, self.clip_high)
        return self.output(units, loss, at, {**metrics, "old_kl": old_kl})
