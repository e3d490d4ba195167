"""On-policy distillation as an objective."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mteditflow._checks import check_number
from mteditflow.flow.trajectory import Steps
from mteditflow.losses.distillation import distillation_loss
from mteditflow.objectives.base import Card, Objective, Output, Sampling, Velocity, masked_output
from mteditflow.objectives.keys import Key, round_key
from mteditflow.objectives.samples import Samples, recorded_steps, valid_turns
from mteditflow.objectives.units import Units, check_units, draw_units, member_mask, member_rows
from mteditflow.objectives.velocities import Velocities


@dataclass(frozen=True, kw_only=True)
class Distillation(Objective):
    r"""On-policy distillation: match a teacher's velocity at the states that the student reached.

    It needs no reward. The teacher is defined by ``velocity("teacher", ...)``: another model, or
    the base model under another conditioning, such as the clean image of each turn (MT-OPSD).

    Args:
        share: share of the steps of every turn that is trained, in (0, 1], redrawn each pass.

    Metrics: "policy_loss".

    Raises:
        ValueError: the share is out of range.

    Source: DanceOPD (arXiv 2606.27377); MT-OPSD (arXiv 2609.35611), Eq. 5.

    Example:
        >>> Distillation(share=0.5).sampling(0, steps=4)
        Sampling(solver=None, stochastic_steps=None)
    """

    card = Card(
        title="Distillation",
        papers=("2606.27377", "2609.35611"),
        losses=("distillation_loss",),
        needs="teacher; no reward",
        passes="1 + 1",
        rewarded=False,
        old_kl=False,
    )

    share: float = 1.0
    """Share of the steps of every turn that is trained, redrawn in every pass."""

    def __post_init__(self) -> None:
        check_number("share", self.share, low=0.0, high=1.0, open_low=True)

    def sampling(self, round: int, *, steps: int) -> Sampling:  # noqa: A002
        """See ``Objective``; any sampler can be used, deterministic ones included."""
        return Sampling()

    def units(
        self,
        samples: Samples,
        advantage: Tensor | None = None,
        valid: Tensor | None = None,
        *,
        key: Key,
        minibatches: int = 1,
    ) -> list[Units]:
        """See ``Objective``: one row for each step, or a share of them; ``advantage`` is None."""
        if advantage is not None:
            raise TypeError("advantage: expected None for Distillation, which has no reward")
        exists, recorded = valid_turns(samples, valid), recorded_steps(samples)
        return draw_units(
            samples,
            recorded & exists[..., None],
            None,
            exists,
            key=round_key(key),
            share=self.share,
            minibatches=minibatches,
            zero_matters=True,
        )

    def __call__(
        self, velocity: Velocity, samples: Samples, units: Units, *, old_is_current: bool = False
    ) -> Output:
        """See ``Objective``."""
        check_units(units, members=1, drawn=False)
        steps = Steps(*(x.detach() for x in samples.steps_at(member_rows(units))))
        at = Velocities(velocity, steps.x_t, steps.sigma, units, old_is_current=old_is_current)
        loss = distillation_loss(at.current, at.teacher, valid=member_mask(units, at.current))
        return masked_output(units, loss, {"policy_loss": loss})
