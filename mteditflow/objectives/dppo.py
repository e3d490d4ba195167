"""Flow-DPPO as an objective."""

from __future__ import annotations

from dataclasses import dataclass

from mteditflow._checks import check_number
from mteditflow.losses.dppo import divergence_gated_loss
from mteditflow.objectives.base import Card, Output, Velocity
from mteditflow.objectives.replay import ReplayObjective
from mteditflow.objectives.samples import Samples
from mteditflow.objectives.units import Units, member_advantages, member_mask


@dataclass(frozen=True, kw_only=True)
class DPPO(ReplayObjective):
    r"""Flow-DPPO: no gradient away from the old policy outside a KL trust region; no ratio clip.

    Rows of advantage 0 are left out if ``kl_coef`` is 0.

    Args:
        threshold: KL to the old policy's step above which a step gets no gradient away from it,
            >= 0, with the reduction of the log-probs; 1e-7 .. 1e-5 for means over elements.

    The other fields are those of every objective that replays steps: ``solver``, ``noise_level``,
    ``stochastic_steps``, ``window_interval``, ``share``, ``kl_coef`` and ``importance_cap``.

    Metrics: "policy_loss", "old_kl" (KL of each step to the old policy's), "beyond" (1 if "old_kl"
    exceeds the threshold, else 0), "kl", "importance_weight".

    Raises:
        ValueError: a number is out of range.

    Source: Flow-DPPO (arXiv 2606.11025), Eq. 17-18.

    Example:
        >>> DPPO(threshold=1e-6, solver="dance", noise_level=0.3).step_solver
        DanceSDE(noise_level=0.3)
    """

    card = Card(
        title="Flow-DPPO",
        papers=("2606.11025",),
        losses=("divergence_gated_loss",),
        needs="log-probs of steps, old policy",
        passes="1 + 1 (0)",
    )

    threshold: float = 1e-6
    """KL to the old policy's step, mean over elements, above which a step is moved no further."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, low=0.0)

    def __call__(
        self, velocity: Velocity, samples: Samples, units: Units, *, old_is_current: bool = False
    ) -> Output:
        """See ``Objective``."""
        replay = self.replay(velocity, samples, units, old_is_current=old_is_current)
        divergence = replay.old_kl()
        loss = divergence_gated_loss(
            replay.log_prob,
            self.start(replay),
            member_advantages(units, replay.log_prob),
            divergence,
            threshold=self.threshold,
            valid=member_mask(units, divergence),
        )
        metrics = {"old_kl": divergence, "beyond": (divergence > self.threshold).float()}
        return self.output(units, loss, replay, metrics)
