"""Rewards of a round, aggregated once for the log, selection, watch and advantages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor

from mteditflow._reduce import masked_mean
from mteditflow.advantages.credit import Signal, TrajectoryCredit
from mteditflow.advantages.group import group_std
from mteditflow.advantages.selection import GroupSelection, select_groups
from mteditflow.advantages.turns import turn_average
from mteditflow.diagnostics import advantage_correlation, variance_ratio, zero_variance_share
from mteditflow.rewards import TurnScores
from mteditflow.training.metrics_file import LOST, REWARD, UNMEASURED


@dataclass(frozen=True)
class Aggregation:
    """Map from the scores of a term to rewards.

    Args:
        normalize: maps scores [K] to rewards [K], such as ``normalize_likert``.
        reduce: maps rewards of the turns to one reward of the chain, such as ``turn_average`` or
            ``binary_and``.
    """

    normalize: Callable[[Tensor], Tensor]
    reduce: Callable[..., Tensor] = turn_average


@dataclass(frozen=True, eq=False)
class RoundRewards:
    """Rewards of B trajectories per turn and per trajectory, from the scores of all ranks.

    Args:
        terms: scores per turn by name, each [B, N].
        aggregations: by the name of a term, the map from its scores to its reward.
        group: integer group id of each trajectory, [B].
        trained: names of the rewards that are trained on, to which ``means`` and ``numbers`` are
            restricted; ``None``: all.

    Attributes:
        turn: reward of each turn, [B, N], by name.
        whole: reward of the trajectory, assigned to each of its turns, [B, N], by name.

    Raises:
        KeyError: on access, if an aggregation has no term.

    Example:
        >>> from mteditflow import normalize_likert
        >>> scores = TurnScores(torch.tensor([[5.0], [1.0]]), torch.ones(2, 1) > 0, {})
        >>> how = {"following": Aggregation(normalize_likert)}
        >>> rewards = RoundRewards({"following": scores}, how, group=torch.tensor([0, 0]))
        >>> numbers = rewards.numbers()
        >>> numbers["reward/following"], numbers["score/following/turn_1"], numbers["invalid_share"]
        (0.5, 3.0, 0.0)
    """

    terms: Mapping[str, TurnScores]
    aggregations: Mapping[str, Aggregation]
    group: Tensor
    trained: Sequence[str] | None = None

    @property
    def names(self) -> list[str]:
        """Return the names of the rewards that are trained on."""
        return list(self.aggregations if self.trained is None else self.trained)

    @cached_property
    def turn(self) -> dict[str, Signal]:
        """Return the reward of each turn, [B, N], by name."""
        return {
            name: self.terms[name].turn_reward(aggregation.normalize)
            for name, aggregation in self.aggregations.items()
        }

    @cached_property
    def whole(self) -> dict[str, Signal]:
        """Return the reward of the trajectory, assigned to each of its turns, [B, N], by name."""
        return {
            name: self.terms[name].credited(
                signal.value, TrajectoryCredit(self.aggregations[name].reduce)
            )
            for name, signal in self.turn.items()
        }

    def reward(self, name: str) -> Signal:
        """Return one reward per trajectory, [B]; NaN where it was not measured."""
        # Every turn has the trajectory's reward, so the first stands for all.
        return Signal(*(x[:, 0] for x in self.whole[name]))

    @property
    def means(self) -> dict[str, float]:
        """Return the mean of each reward over the trajectories that have it; NaN if none has."""
        signals = {name: self.reward(name) for name in self.names}
        return {name: float(x.value[x.measured].mean()) for name, x in signals.items()}

    @property
    def absent(self) -> list[str]:
        """Return the names of the rewards that no trajectory has; they train nothing."""
        return [name for name in self.names if not self.reward(name).measured.any()]

    def informative(self, name: str, *, top: float = 1.0, bottom: float = 0.0) -> GroupSelection:
        """Select the informative groups, whose members differ; see ``mteditflow.select_groups``."""
        value, valid, measured = self.reward(name)
        return select_groups(
            value, self.group, valid=valid, measured=measured, top=top, bottom=bottom
        )

    def spreads(self, name: str) -> dict[int, float]:
        """Return the std of a reward by group, over groups in which two or more members have it."""
        value, _, measured = self.reward(name)
        members = Counter(self.group[measured].tolist())
        spread = group_std(value, self.group, valid=measured)
        found = dict(zip(self.group.tolist(), spread.tolist(), strict=True))
        return {group: found[group] for group, count in members.items() if count > 1}

    def numbers(self) -> dict[str, float]:
        """Return a flat summary of the round for ``metrics.jsonl`` and trackers.

        Returns:
            Numbers by name, NaN where nothing is measured: "reward/<term>", the mean over
            trajectories that have it; "score/<term>/turn_<n>", the mean score of a turn;
            "group/<term>/std", the mean standard deviation within groups; "group/<term>/no_spread",
            the share of groups with a standard deviation of 0;
            "group/variance_ratio/<term>/<term>" and "group/correlation/<term>/<term>", within
            groups and over trajectories that have both; "invalid_share", the share of trajectories
            that lost a reward and are not trained on; "unmeasured/<term>", the share of
            trajectories in which there was nothing to measure; "trajectories", B; and
            "lost/<reason>", the number of trajectories that lost a score, each counted once.
        """
        rewards = {name: self.reward(name) for name in self.names}
        valid = torch.stack([reward.valid for reward in rewards.values()]).all(dim=0)
        numbers = {f"{REWARD}{name}": mean for name, mean in self.means.items()}
        for name, reward in rewards.items():
            spread = group_std(reward.value, self.group, valid=reward.measured)
            mean_spread = float(masked_mean(spread, reward.measured))
            numbers[f"group/{name}/std"] = mean_spread if reward.measured.any() else math.nan
            same = zero_variance_share(reward.value, self.group, valid=reward.measured)
            numbers[f"group/{name}/no_spread"] = float(same)
            numbers[f"{UNMEASURED}{name}"] = self.terms[name].unmeasured_share
        for (a, first), (b, second) in combinations(rewards.items(), 2):
            pair, both = (first.value, second.value, self.group), first.measured & second.measured
            numbers[f"group/variance_ratio/{a}/{b}"] = float(variance_ratio(*pair, valid=both))
            numbers[f"group/correlation/{a}/{b}"] = float(advantage_correlation(*pair, valid=both))
        for name, scores in self.terms.items():
            means = scores.score.nanmean(dim=0).tolist()
            numbers |= {f"score/{name}/turn_{n}": x for n, x in enumerate(means, start=1)}
        numbers["invalid_share"] = float((~valid).float().mean())
        numbers["trajectories"] = len(valid)
        lost = lost_reasons(self.terms)
        return numbers | {f"{LOST}{reason}": count for reason, count in lost.items()}


def lost_reasons(terms: Mapping[str, TurnScores]) -> dict[str, int]:
    """Count the trajectories that lost a score, by the reason of the first lost score of each.

    The most frequent reason is the first.
    """
    first: dict[int, str] = {}
    for scores in terms.values():
        for (b, _), lost in sorted(scores.lost.items(), key=lambda item: item[0]):
            first.setdefault(b, lost.fault.value)
    return dict(Counter(first.values()).most_common())
