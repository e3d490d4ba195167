"""From the scores of a round to the advantages of its turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

import mteditflow as mt
from mteditflow.rewards import (
    TurnScores,
)
from mteditflow.training import Aggregation, RoundRewards

from .config import ConfigError, Rewards
from .scoring import scale_of


def round_rewards(config: Rewards, terms: Mapping[str, TurnScores], group: Tensor) -> RoundRewards:
    """Return the rewards of a round, aggregated from its scores.

    Raises:
        ConfigError: a reward with weight above 0, or with a floor, has no scores.
    """
    trained = _trained(config, terms)
    names = dict.fromkeys([*trained, "following"])
    return RoundRewards(terms, {n: aggregation(config, n) for n in names}, group, trained)


def turn_signals(
    config: Rewards, rewards: RoundRewards, multipliers: Mapping[str, float]
) -> tuple[dict[str, mt.Signal], dict[str, float]]:
    """Assign credit for every trained reward to turns; under until_failure, up to the failure.

    Args:
        config: credit, and weights of the rewards.
        rewards: rewards of the round.
        multipliers: Lagrange multiplier by name of a reward with a floor.

    Returns:
        Signals [B, N] by "<reward>/<index of the credit>", and the weight of each.
    """
    own = {name: config.weights.get(name, 0.0) for name in rewards.names}
    signals, weights = {}, {}
    for name, weight in mt.constrained_weights(own, multipliers).items():
        for i, (credit, share) in enumerate(_credits(config).items()):
            reward = rewards.turn[name].value
            signals[f"{name}/{i}"] = (
                rewards.whole[name]
                if credit is None
                else rewards.terms[name].credited(reward, credit)
            )
            weights[f"{name}/{i}"] = weight * share
    if config.credit == "until_failure":  # mask signals, so the history excludes those turns, too
        following = rewards.terms["following"]
        # An identity turn has no following score, and so cannot fail.
        success = scale_of(config).followed(following.score) | following.unmeasured
        keep = mt.stop_after_failure(success, turn_mask=following.turn_mask).bool()
        signals = {
            n: mt.Signal(x.value, x.valid & keep, x.measured & keep) for n, x in signals.items()
        }
    return signals, weights


class Advantages(NamedTuple):
    """Advantages of a round.

    Attributes:
        value: advantage of each turn, [B, N].
        valid: turns to train on, boolean [B, N].
        unfused_groups: number of groups with turns left out because a reward was measured in no
            member, so that reward fusion has no sum there; 0 under advantage fusion.
    """

    value: Tensor
    valid: Tensor
    unfused_groups: int


def turn_advantages(
    config: Rewards,
    rewards: RoundRewards,
    signals: Mapping[str, mt.Signal],
    weights: Mapping[str, float],
    history: mt.RewardHistory | None = None,
) -> Advantages:
    """Normalize signals within groups and fuse them into one advantage per turn.

    Args:
        config: fusion, divisor, and clamp of advantages.
        rewards: rewards of the round.
        signals: signals by name, as returned by ``turn_signals``.
        weights: weight of each signal.
        history: rewards of earlier rounds that enter the statistics of groups.
    """
    joined = _Joined.of(config, rewards, signals, history)
    keep, own = joined.keep, len(rewards.group)
    if config.fusion == "rewards":
        keep = keep & _measured_in_groups(joined.signals, weights, joined.group, keep)
    left_out = joined.keep & ~keep & joined.exists
    advantage = joined.fused(config, weights, keep)
    # Remembered rows only enter the statistics of their groups; they are cut off here.
    return Advantages(
        mt.clamp_advantage(advantage.value[:own], limit=config.advantage_limit),
        advantage.valid[:own],
        len(rewards.group[left_out[:own].any(dim=1)].unique()),
    )


def reward_advantages(
    config: Rewards,
    rewards: RoundRewards,
    signals: Mapping[str, mt.Signal],
    weights: Mapping[str, float],
    history: mt.RewardHistory | None = None,
) -> dict[str, Tensor]:
    """Return the share of each reward in ``turn_advantages`` under advantage fusion, [B, N] each.

    The shares add up to the advantages before the clamp.
    """
    joined = _Joined.of(config, rewards, signals, history)
    used = [name for name, weight in weights.items() if weight != 0]
    # Every reward is normalized over the turns that are valid for all, or shares would not add up.
    valid = torch.stack([joined.signals[name].valid for name in used]).all(dim=0)
    found = {}
    for reward in dict.fromkeys(name.rpartition("/")[0] for name in used):
        own = {name: weights[name] for name in used if name.rpartition("/")[0] == reward}
        found[reward] = joined.fused(config, own, joined.keep & valid).value[: len(rewards.group)]
    return found


class _Joined(NamedTuple):
    """Signals of a round's B trajectories, followed by P remembered ones of earlier rounds.

    Attributes:
        signals: signals by name, [B + P, N].
        group: integer group ids, [B + P].
        keep: turns that may be trained on, boolean [B + P, N].
        exists: turns that exist, boolean [B + P, N].
    """

    signals: Mapping[str, mt.Signal]
    group: Tensor
    keep: Tensor
    exists: Tensor

    @classmethod
    def of(
        cls,
        config: Rewards,
        rewards: RoundRewards,
        signals: Mapping[str, mt.Signal],
        history: mt.RewardHistory | None,
    ) -> _Joined:
        exists = rewards.terms["following"].turn_mask
        keep = torch.ones_like(exists)
        if config.groups == "informative":
            keep &= rewards.informative("following").keep[:, None]
        group, own = rewards.group, len(exists)
        if history is not None:
            signals, group = history.joined(signals, group)
        past = torch.ones(len(group) - own, exists.shape[1], dtype=torch.bool)
        return cls(signals, group, torch.cat([keep, past]), torch.cat([exists, past]))

    def fused(self, config: Rewards, weights: Mapping[str, float], keep: Tensor) -> mt.Signal:
        """Fuse the signals in ``weights``, with statistics over the kept turns."""
        return mt.turn_advantage(
            {name: self.signals[name] for name in weights},
            weights,
            self.group,
            turn_mask=self.exists,
            keep=keep,
            fuse=mt.fuse_advantages if config.fusion == "advantages" else mt.fuse_rewards,
            std=config.std,
        )


def _measured_in_groups(
    signals: Mapping[str, mt.Signal], weights: Mapping[str, float], group: Tensor, keep: Tensor
) -> Tensor:
    """Return turns whose group has each weighted signal measured in a valid member, [B, N].

    Turns where no member has any signal stay, too: ``turn_advantage`` treats them as unmeasured.
    """
    used = [signal for name, signal in signals.items() if weights[name] != 0]
    valid = torch.stack([signal.valid for signal in used]).all(dim=0) & keep
    there = [mt.group_measured(signal.measured & valid, group) for signal in used]
    return torch.stack(there).all(dim=0) | ~torch.stack(there).any(dim=0)


def _trained(config: Rewards, terms: Mapping[str, TurnScores]) -> list[str]:
    """Return the names of terms with a weight above 0 or a floor.

    Raises:
        ConfigError: such a term has no scores.
    """
    names = [name for name, weight in config.weights.items() if weight > 0]
    if config.floor is not None and "consistency" not in names:
        names.append("consistency")
    missing = [name for name in names if name not in terms]
    if missing:
        raise ConfigError(
            f"rewards.weights: expected names among {sorted(terms)}, got {missing[0]!r}"
        )
    return names


def _credits(config: Rewards) -> dict[mt.Credit | None, float]:
    """Return the credit assignments of each reward with their shares; None: the whole chain's."""
    turn, share = mt.TurnCredit(), config.trajectory_share
    return {
        "trajectory": {None: 1.0},
        "turn": {turn: 1.0},
        "until_failure": {turn: 1.0},
        "to_go": {mt.RewardToGo(config.discount): 1.0},
        "mixture": {None: share, turn: 1 - share},
    }[config.credit]


def aggregation(config: Rewards, name: str) -> Aggregation:
    """Return how a term's scores become rewards: per turn, and over turns."""
    if name != "following":
        return Aggregation(lambda score: score)
    scale = scale_of(config)
    if config.aggregate == "average":
        return Aggregation(scale.normalize)
    reduce = mt.binary_and if config.aggregate == "all" else mt.turn_average
    return Aggregation(lambda score: scale.followed(score).to(score.dtype), reduce)
