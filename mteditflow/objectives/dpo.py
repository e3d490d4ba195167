"""Online DPO as an objective: pairs of the best and the worst member of a group."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mteditflow._checks import check_number
from mteditflow.advantages.pairs import group_pairs
from mteditflow.losses.dpo import dpo_loss
from mteditflow.objectives.base import Card, Output, Velocity
from mteditflow.objectives.forward import ForwardObjective
from mteditflow.objectives.keys import Key, RoundKey, round_key
from mteditflow.objectives.samples import Samples, turn_values
from mteditflow.objectives.units import Units, draw_units, member_mask


@dataclass(frozen=True, kw_only=True)
class DPO(ForwardObjective):
    r"""Online DPO: prefer the best of a group to its worst, more than the reference does.

    A unit is a pair at one turn, both at the same flow time and noise. A group whose advantages are
    equal at a turn gives no unit there. All members of a group must be among the samples of one
    call.

    Args:
        dpo_beta: strength of the implicit KL to the reference, > 0; 2000 is usual for means over
            elements.

    The other fields are those of every objective of the forward process: ``renoise``, ``kl_coef``,
    ``norm_coef``, ``old_slope`` and ``old_maximum``.

    Metrics: "policy_loss", "preferred" (share of pairs ranked better than by the reference), "kl",
    "norm_hinge".

    Raises:
        ValueError: a number is out of range.

    Source: Diffusion-DPO (arXiv 2311.12908); Flow-DPO (arXiv 2501.13918); pairs online.

    Example:
        >>> from mteditflow.objectives import CleanSamples
        >>> samples = CleanSamples(torch.randn(4, 1, 8), group=torch.tensor([0, 0, 1, 1]))
        >>> key = torch.Generator().manual_seed(0)
        >>> (units,) = DPO().units(samples, torch.tensor([0.2, 0.9, 0.5, 0.5]), key=key)
        >>> units.rows[:, :, 0]  # one pair: trajectory 1 beats 0, group 1 is flat
        tensor([[1, 0]])
    """

    card = Card(
        title="DPO, online pairs",
        papers=("2311.12908", "2501.13918"),
        losses=("group_pairs", "dpo_loss"),
        needs="reference; the old policy samples",
        passes="2 + 2 for a pair",
        old_kl=False,
        whole_groups=True,
    )

    members = 2
    whole_kl = "whose loss evaluates the reference everywhere"

    dpo_beta: float = 2000.0
    """Strength of the implicit KL to the reference; 2000 is usual."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("dpo_beta", self.dpo_beta, low=0.0, open_low=True)

    def units(
        self,
        samples: Samples,
        advantage: Tensor | None,
        valid: Tensor | None = None,
        *,
        key: Key,
        minibatches: int = 1,
    ) -> list[Units]:
        """See ``Objective``: one pair for each group, turn and noise level."""
        if advantage is None:
            raise TypeError("advantage: expected a tensor for DPO, got None")
        values, own = turn_values(samples, advantage, valid)
        losers = _losers(values, samples.group.cpu(), own)
        paired, key = losers >= 0, round_key(key)
        drawn = draw_units(
            samples,
            paired[..., None].expand(-1, -1, self.renoise.levels),
            values,
            paired,
            key=key,
            share=1.0,
            minibatches=minibatches,
            zero_matters=True,
            whole_groups=True,
        )
        return [self._paired(samples, units, values, losers, key) for units in drawn]

    def _paired(
        self, samples: Samples, units: Units, values: Tensor, losers: Tensor, key: RoundKey
    ) -> Units:
        """Add the loser to every winner's unit, at the winner's flow time and noise."""
        winner = units.rows[:, 0]
        loser = torch.cat([losers[winner[:, 0], winner[:, 1]][:, None], winner[:, 1:]], dim=1)
        rows = torch.stack([winner, loser], dim=1)
        pairs = replace(
            units,
            rows=rows,
            mask=torch.ones_like(rows[..., 0], dtype=torch.bool),
            advantage=values[rows[..., 0], rows[..., 1]],
        )
        return self._seeded(samples, pairs, winner[:, None].expand(-1, 2, -1), key)

    def __call__(
        self, velocity: Velocity, samples: Samples, units: Units, *, old_is_current: bool = False
    ) -> Output:
        """See ``Objective``."""
        states, at = self.states(velocity, samples, units, old_is_current=old_is_current)
        exists = member_mask(units, at.current)
        # ``member_rows`` lists the winners of all units first, then the losers.
        winner, loser = torch.arange(
            2 * len(units), dtype=torch.int64, device=at.current.device
        ).chunk(2)
        loss = dpo_loss(
            at.current,
            at.reference,
            states.target,
            winner,
            loser,
            dpo_beta=self.dpo_beta,
            valid=None if exists is None else exists.view(2, -1).all(dim=0),
        )
        # The loss is log 2 at the reference and falls as the implicit reward margin grows.
        return self.output(units, loss, at, {"preferred": (loss.detach() < math.log(2)).float()})


def _losers(advantage: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """Return the loser's trajectory for each turn that wins a pair, int64 [B, N]; else -1."""
    losers = torch.full_like(advantage, -1, dtype=torch.int64)
    for turn in range(advantage.shape[1]):
        pairs = group_pairs(advantage[:, turn], group, valid=valid[:, turn])
        losers[pairs.winner, turn] = pairs.loser
    return losers
