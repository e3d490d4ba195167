"""FlowAWR as an objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mteditflow._checks import check_choice, check_number
from mteditflow.advantages.softmax import softmax_advantage
from mteditflow.losses.flow_awr import exact_flow_awr_loss, flow_awr_loss
from mteditflow.losses.nft import velocity_kl
from mteditflow.objectives.base import Card, Output, Velocity
from mteditflow.objectives.forward import ForwardObjective
from mteditflow.objectives.keys import Key
from mteditflow.objectives.samples import Samples, turn_values
from mteditflow.objectives.units import Units, member_advantages, member_mask


@dataclass(frozen=True, kw_only=True)
class FlowAWR(ForwardObjective):
    r"""FlowAWR: regress to the old policy's velocity, displaced by the exponential advantage.

    ``units`` maps its advantages to ``softmax_advantage`` over the valid members of each group,
    turn by turn (and token by token for per-token advantages), so all members of a group must be in
    one call. The softmax ignores a constant per group, so that group-centered advantages and raw
    rewards both work. Advantages divided by the std of the batch (``rewards.std`` "batch" in the
    trainer) at temperature 1 reproduce the published setting. Division by each group's own std
    amounts to a separate temperature per group.

    Rows of advantage 0 still pull to the old policy, so they are trained. Invalid rows are left
    out. A row takes one forward pass if the old policy is the current one, else two.

    Args:
        temperature: gamma > 0 in units of the advantages given to ``units``; smaller values take
            larger steps. ``None`` uses the given advantages without a softmax.
        form: "displaced", the paper's regression, or "exact", importance-weighted flow matching,
            whose minimum is the tilted policy itself. "exact" needs a temperature.

    The other fields are those of every objective of the forward process: ``renoise``, ``kl_coef``,
    ``norm_coef``, ``old_slope`` and ``old_maximum``.

    Metrics: "policy_loss", "old_kl" (velocity KL to the old policy), "kl", "norm_hinge".

    Raises:
        ValueError: a number is out of range, or "exact" has no temperature.

    Source: FlowAWR (arXiv 2606.30376), with the advantage of public code; "exact" is this
        library's.

    Example:
        >>> FlowAWR(temperature=0.5).old_decay(100)
        0.1
    """

    card = Card(
        title="FlowAWR",
        papers=("2606.30376",),
        losses=("softmax_advantage", "flow_awr_loss", "exact_flow_awr_loss"),
        needs="old policy",
        passes="1 + 1 (0)",
        tokens=True,
        whole_groups=True,
    )

    temperature: float | None = 1.0
    """Temperature of the softmax over a group, in units of the advantage; smaller values take
    larger steps. None: use advantages as they are."""
    form: Literal["displaced", "exact"] = "displaced"
    """displaced: the published regression; exact: importance-weighted flow matching."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, ("displaced", "exact"))
        if self.temperature is not None:
            check_number("temperature", self.temperature, low=0.0, open_low=True)
        elif self.form == "exact":
            raise ValueError(
                "temperature: expected a number for form 'exact', whose weight 1 + advantage must "
                "not be negative, got None"
            )

    @property
    def zero_matters(self) -> bool:
        """True: at advantage 0 the pull to the old policy remains."""
        return True

    def units(
        self,
        samples: Samples,
        advantage: Tensor | None,
        valid: Tensor | None = None,
        *,
        key: Key,
        minibatches: int = 1,
    ) -> list[Units]:
        """See ``Objective``: one row for each noise level of each turn."""
        if advantage is not None and self.temperature is not None:
            # Before units are drawn: the softmax needs whole groups, minibatches may split them.
            values, valid = turn_values(samples, advantage, valid, tokens=True)
            columns = values.flatten(1)  # [B, N] or [B, N * tokens]; one softmax per column
            counted = valid.repeat_interleave(columns.shape[1] // valid.shape[1], dim=1)
            tilted = softmax_advantage(
                columns, samples.group.cpu(), valid=counted, temperature=self.temperature
            )
            advantage = tilted.view(values.shape)
        return super().units(samples, advantage, valid, key=key, minibatches=minibatches)

    def __call__(
        self, velocity: Velocity, samples: Samples, units: Units, *, old_is_current: bool = False
    ) -> Output:
        """See ``Objective``."""
        states, at = self.states(velocity, samples, units, old_is_current=old_is_current)
        current, old, target = at.current, at.old, states.target
        exists = member_mask(units, current)
        with torch.no_grad():
            old_kl = velocity_kl(current, old, valid=exists)
        advantage = member_advantages(units, old_kl)  # in full precision, unlike some velocities
        if self.form == "exact":
            loss = exact_flow_awr_loss(current, target, advantage, valid=exists)
        else:
            loss = flow_awr_loss(current, old, target, advantage, valid=exists)
        return self.output(units, loss, at, {"old_kl": old_kl})
