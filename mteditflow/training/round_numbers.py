"""The numbers of a round, flat, as ``metrics.jsonl`` and every tracker take them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor

from mteditflow._reduce import masked_mean
from mteditflow.advantages.group import group_std
from mteditflow.diagnostics import advantage_correlation, variance_ratio, zero_variance_share
from mteditflow.rewards import Reward, TurnScores
from mteditflow.training.metrics_file import LOST


def round_numbers(
    terms: Mapping[str, TurnScores], rewards: Mapping[str, Reward], group: Tensor
) -> dict[str, float]:
    """Summarise the scores of a round of B trajectories.

    Args:
        terms: scores per turn by name, each [B, N].
        rewards: of those that are trained on, one per trajectory, [B].
        group: integer group ids, [B].

    Returns:
        By name (NaN where nothing is valid): "reward/<term>", the mean over valid trajectories;
        "score/<term>/turn_<n>", the mean score of a turn; "group/<term>/std", the mean standard
        deviation inside groups, and "group/<term>/no_spread", the share of groups without any;
        "group/variance_ratio/<term>/<term>" and "group/correlation/<term>/<term>" inside groups;
        "invalid_share", of trajectories that are not trained on; "trajectories", B; and
        "lost/<reason>", trajectories that lost a score, each counted once.

    Example:
        >>> scores = TurnScores(torch.tensor([[5.0], [1.0]]), torch.ones(2, 1) > 0, {})
        >>> reward = Reward(torch.tensor([1.0, 0.0]), torch.tensor([True, True]))
        >>> group = torch.tensor([0, 0])
        >>> numbers = round_numbers({"following": scores}, {"following": reward}, group)
        >>> numbers["reward/following"], numbers["score/following/turn_1"], numbers["invalid_share"]
        (0.5, 3.0, 0.0)
    """
    numbers: dict[str, float] = {}
    valid = torch.stack([reward.valid for reward in rewards.values()]).all(dim=0)
    for name, reward in rewards.items():
        numbers[f"reward/{name}"] = float(reward.value[reward.valid].mean())
        spread = masked_mean(group_std(reward.value, group, valid=reward.valid), reward.valid)
        numbers[f"group/{name}/std"] = float(spread)
        same = zero_variance_share(reward.value, group, valid=reward.valid)
        numbers[f"group/{name}/no_spread"] = float(same)
    for (a, first), (b, second) in combinations(rewards.items(), 2):
        pair = (first.value, second.value, group)
        numbers[f"group/variance_ratio/{a}/{b}"] = float(variance_ratio(*pair, valid=valid))
        numbers[f"group/correlation/{a}/{b}"] = float(advantage_correlation(*pair, valid=valid))
    for name, scores in terms.items():
        means = scores.score.nanmean(dim=0).tolist()
        numbers |= {f"score/{name}/turn_{n}": x for n, x in enumerate(means, start=1)}
    numbers["invalid_share"] = float((~valid).float().mean())
    numbers["trajectories"] = len(valid)
    return numbers | {f"{LOST}{reason}": count for reason, count in lost_reasons(terms).items()}


def lost_reasons(terms: Mapping[str, TurnScores]) -> dict[str, int]:
    """Trajectories that lost a score, by the reason of the first one; the most frequent first."""
    first: dict[int, str] = {}
    for scores in terms.values():
        for (b, _), lost in sorted(scores.lost.items(), key=lambda item: item[0]):
            first.setdefault(b, lost.fault.value)
    return dict(Counter(first.values()).most_common())
