"""Flow-GRPO as an objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mteditflow._checks import check_choice, check_number
from mteditflow.losses.clipped import clipped_surrogate_loss
from mteditflow.objectives.base import Card, Output, Velocity
from mteditflow.objectives.keys import Key
from mteditflow.objectives.replay import ReplayObjective, estimated_kl, ratio_metrics
from mteditflow.objectives.samples import Samples
from mteditflow.objectives.step_weights import weigh_by_noise
from mteditflow.objectives.units import Units, member_advantages, member_mask


@dataclass(frozen=True, kw_only=True)
class GRPO(ReplayObjective):
    r"""Flow-GRPO: replay stochastic steps and raise the probability of those of good rollouts.

    Rows of advantage 0 are left out if ``kl_coef`` is 0.

    Args:
        clip_low: how far a ratio may fall below 1, in [0, 1); 1e-4 .. 1e-5 is usual for
            mean-reduced log-probs.
        clip_high: how far a ratio may rise above 1, >= 0.
        step_weight: "uniform", or "tempflow": the weight of a step is the std of the noise that it
            adds, over the mean of its turn's stored steps; see ``noise_step_weight``.

    The other fields are those of every objective that replays steps: ``solver``, ``noise_level``,
    ``stochastic_steps``, ``window_interval``, ``share``, ``kl_coef``, ``kl_share`` and
    ``importance_cap``.

    ``check_ratios`` verifies on a fresh rollout that every ratio is 1 before the first update. This
    fails if solver, noise level or reduction differ from the rollout's. Ratios of summed log-probs
    need clip ranges of 0.1 .. 0.2.

    Metrics: "policy_loss", "ratio", "clip_fraction", "old_kl" (an unbiased estimate, from the
    sample alone, of the KL to the policy that sampled: of the joint KL for summed log-probs, where
    it is never negative, and of the KL per element for mean log-probs), "kl", "importance_weight".

    Raises:
        ValueError: a number is out of range.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 4, 20-22; Flow-GRPO (arXiv 2505.05470); a window of
        steps, MixGRPO (arXiv 2507.21802); weights of steps, TempFlow-GRPO (arXiv 2508.04324).

    Example:
        >>> GRPO(stochastic_steps=2, window_interval=1).sampling(1, steps=4).stochastic_steps
        range(1, 3)
    """

    card = Card(
        title="Flow-GRPO, MixGRPO",
        papers=("2505.05470", "2507.21802"),
        losses=("clipped_surrogate_loss",),
        needs="log-probs of steps",
        passes="1",
    )

    clip_low: float = 1e-4
    """How far ratios of mean log-probs may fall below 1."""
    clip_high: float = 1e-4
    """How far ratios of mean log-probs may rise above 1."""
    step_weight: Literal["uniform", "tempflow"] = "uniform"
    """Weight of a step in the policy loss: 1, or TempFlow's, the std of the noise that it adds over
    the mean of its turn's steps: noisy steps count more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("step_weight", self.step_weight, ("uniform", "tempflow"))
        check_number("clip_low", self.clip_low, low=0.0, high=1.0, open_high=True)
        check_number("clip_high", self.clip_high, low=0.0)

    def units(
        self,
        samples: Samples,
        advantage: Tensor | None,
        valid: Tensor | None = None,
        *,
        key: Key,
        minibatches: int = 1,
    ) -> list[Units]:
        """See ``Objective``: one row for each stochastic step, or a share of them."""
        drawn = super().units(samples, advantage, valid, key=key, minibatches=minibatches)
        if self.step_weight == "uniform":
            return drawn
        return weigh_by_noise(drawn, samples, self.step_solver)

    def __call__(
        self, velocity: Velocity, samples: Samples, units: Units, *, old_is_current: bool = False
    ) -> Output:
        """See ``Objective``."""
        replay = self.replay(velocity, samples, units, old_is_current=old_is_current)
        log_prob, old_log_prob = replay.log_prob, self.start(replay)
        loss = clipped_surrogate_loss(
            log_prob,
            old_log_prob,
            member_advantages(units, log_prob),
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            valid=member_mask(units, log_prob),
        )
        log_ratio = (log_prob - old_log_prob).detach()
        metrics = ratio_metrics(log_ratio, self.clip_low, self.clip_high)
        metrics["old_kl"] = estimated_kl(log_ratio, replay.reduction)
        return self.output(units, loss, replay, metrics)
