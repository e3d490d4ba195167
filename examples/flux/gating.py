"""Gated KL: only trajectories whose trained rewards look too good are held to the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import mteditflow as mt
from mteditflow.objectives import Output, Units
from mteditflow.training import RoundRewards

from .advantages import aggregation
from .config import ConfigError, Gate, Rewards
from .run import GATED, Run

UNCERTAINTY = "gate/uncertainty"


class RoundGate(NamedTuple):
    """Gate of the B trajectories of a round, over all ranks.

    Attributes:
        gate: trajectories that keep their KL to the reference, boolean [B].
        uncertainty: rank of the trained rewards beyond the auxiliary ones', float64 [B] in
            [-1, 1]; 0 where not ranked.
        ranked: trajectories that have all rewards, boolean [B]; the others are never gated.
    """

    gate: Tensor
    uncertainty: Tensor
    ranked: Tensor

    @property
    def mean(self) -> float:
        """Mean uncertainty of the ranked trajectories of 0 or more, which the share follows.

        The mean of all is 0 but for ties, since any reward's ranks have the same mean. NaN where
        fewer than two trajectories are ranked, or none is at 0 or more.
        """
        above = self.uncertainty[self.ranked & (self.uncertainty >= 0)]
        return float(above.mean()) if self.ranked.sum() > 1 and len(above) else math.nan


def gate_round(run: Run, rewards: RoundRewards) -> Tensor:
    """Return which trajectories of all ranks keep their KL, boolean [B], and log how many do.

    Raises:
        ConfigError: the scorer gives no such auxiliary reward.
    """
    assert run.state.gate is not None
    config, share = run.config, run.state.gate.value
    found = round_gate(config.gate, config.rewards, rewards, run.state.multipliers, share)
    run.numbers |= {
        "gate/share": share,
        UNCERTAINTY: found.mean,
        "gate/trajectories": float(found.gate.double().mean()),
        "gate/unranked": float((~found.ranked).double().mean()),
    }
    return found.gate


def round_gate(
    gate: Gate,
    config: Rewards,
    rewards: RoundRewards,
    multipliers: Mapping[str, float],
    share: float,
) -> RoundGate:
    """Gate the trajectories that the trained rewards rank above the auxiliary ones.

    The proxy is the sum of the trajectory's trained rewards at their weights, multipliers included,
    as ``RoundRewards.reward`` has them: before groups normalize them, and without credit to turns.

    Args:
        gate: names of the auxiliary rewards.
        config: weights, and how turns become rewards; of the auxiliary ones alike.
        rewards: rewards of the round, of all ranks.
        multipliers: Lagrange multipliers of the round.
        share: share of the ranked trajectories to gate.

    Raises:
        ConfigError: the scorer gives no such auxiliary reward.
    """
    missing = [name for name in gate.auxiliary if name not in rewards.terms]
    if missing:
        raise ConfigError(
            f"gate.auxiliary: expected names among {sorted(rewards.terms)}, got {missing[0]!r}"
        )
    others = RoundRewards(
        rewards.terms, {n: aggregation(config, n) for n in gate.auxiliary}, rewards.group
    )
    auxiliary = {name: others.reward(name) for name in gate.auxiliary}
    proxy = trained_sum(config, rewards, multipliers)
    ranked = torch.stack([proxy.measured, *(x.measured for x in auxiliary.values())]).all(dim=0)
    values = {name: x.value.double() for name, x in auxiliary.items()}
    uncertainty = mt.rank_uncertainty(proxy.value, values, valid=ranked)
    return RoundGate(mt.uncertainty_gate(uncertainty, share, valid=ranked), uncertainty, ranked)


def trained_sum(
    config: Rewards, rewards: RoundRewards, multipliers: Mapping[str, float]
) -> mt.Signal:
    """Return the sum of the trained rewards of each trajectory at their weights, float64 [B].

    A reward that no trajectory of the round has adds nothing. A trajectory that lacks one which
    others have is not measured: its sum is not comparable.
    """
    own = {name: config.weights.get(name, 0.0) for name in rewards.names}
    weights = mt.constrained_weights(own, multipliers)
    used = [name for name, x in weights.items() if x != 0 and name not in rewards.absent]
    signals = [rewards.reward(name) for name in used]
    count = len(rewards.group)
    value = torch.zeros(count, dtype=torch.float64, device="cpu")
    valid = measured = torch.ones(count, dtype=torch.bool, device="cpu")
    for name, signal in zip(used, signals, strict=True):
        value = value + weights[name] * signal.value.double()
        valid, measured = valid & signal.valid, measured & signal.measured
    return mt.Signal(value, valid, measured)


def counting_gated(output: Output, units: Units, gate: Tensor) -> Output:
    """Add to the metrics of units whether the trajectory of each is gated, 1 or 0; 0 where idle."""
    gated = gate.cpu()[units.rows[:, 0, 0]] & units.mask[:, 0]
    return output._replace(metrics={**output.metrics, GATED: gated.to(output.loss)})


def resumed(share: mt.GatedShare, value: float, means: Sequence[float]) -> mt.GatedShare:
    """Return a share as it was, within the bounds and the window that it has now."""
    kept = min(max(value, share.minimum), share.maximum)
    return replace(share, value=kept, means=tuple(means[-share.window :]))
