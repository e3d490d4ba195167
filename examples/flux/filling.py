"""Dynamic sampling (DAPO): replace uninformative groups by others, within a bound.

Source: DAPO (arXiv 2503.14476).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

import torch
from PIL.Image import Image

from mteditflow.objectives import Buckets
from mteditflow.pipelines import Rollout
from mteditflow.rewards import TurnScores
from mteditflow.training import RoundRewards

from .advantages import round_rewards, turn_advantages, turn_signals
from .run import Run
from .sampling import RoundChains, Scores, await_all, chains_at, gather, sample

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Sampled:
    """A sampled and scored round.

    Attributes:
        drawn: this rank's chains.
        rollout: their rollout.
        images: reference and result of each turn, [B][N + 1].
        scores: this rank's scores by term, [B, N] each.
        rewards: rewards of all ranks.
    """

    drawn: RoundChains
    rollout: Rollout | Buckets
    images: Sequence[Sequence[Image | None]]
    scores: Scores
    rewards: RoundRewards


def fill(run: Run, sampled: Sampled) -> Sampled:
    """Sample other chains in place of uninformative groups; a collective call.

    A group is uninformative if all of its advantages are 0 or left out, or if a member's reward is
    lost. Chains outside the round are drawn in an order fixed by its random key, until
    ``data.extra_groups`` are used up or all groups are informative. Only informative groups replace
    others, so the round never gets worse. Places, and the noise at them, do not depend on the
    number of ranks.

    The run's metrics get "filling/groups", the number of replaced groups, "filling/left", that of
    groups still uninformative, and "filling/trajectories", that of additional trajectories.

    Raises:
        Stopped: a signal arrived while waiting for scores.
    """
    queue = _others(run, sampled.rewards)[: run.config.data.extra_groups]
    poor, replaced, attempt = poor_groups(run, sampled.rewards), 0, 0
    total = len(queue)
    while queue and poor:
        chosen, queue = dict(zip(poor, queue, strict=False)), queue[len(poor) :]
        attempt += 1
        sampled, better = _attempt(run, sampled, chosen, attempt)
        replaced += better
        poor = poor_groups(run, sampled.rewards)
        run.stop_if_requested()
    spent = (total - len(queue)) * run.config.data.group_size
    run.numbers |= {"filling/groups": replaced, "filling/trajectories": spent}
    run.numbers["filling/left"] = len(poor)
    return sampled


def poor_groups(run: Run, rewards: RoundRewards) -> list[int]:
    """Return the ids of uninformative groups, as ``fill`` defines them, in order."""
    config = run.config.rewards
    signals, weights = turn_signals(config, rewards, run.state.multipliers)
    found = turn_advantages(config, rewards, signals, weights, run.state.history)
    trains = (found.valid & (found.value != 0)).any(dim=1)
    kept = torch.stack([rewards.reward(name).valid for name in rewards.names]).all(dim=0)
    members = {group: rewards.group == group for group in dict.fromkeys(rewards.group.tolist())}
    return [g for g, own in members.items() if not (trains[own].any() and kept[own].all())]


def _others(run: Run, rewards: RoundRewards) -> list[int]:
    """Return the chains outside the round, shuffled by the round's key, equal on all ranks."""
    there = set(rewards.group.tolist())
    others = [index for index in range(len(run.chains)) if index not in there]
    Random(run.key.number("extra chains")).shuffle(others)
    return others


def _attempt(
    run: Run, sampled: Sampled, chosen: Mapping[int, int], number: int
) -> tuple[Sampled, int]:
    """Sample one replacement chain for each chosen group.

    Args:
        run: the run.
        sampled: the round so far.
        chosen: id of each group to replace, with the chain to try.
        number: number of the attempt, which keys its noise.

    Returns:
        The round with the informative replacements, and their number.
    """
    group = sampled.drawn.group.tolist()
    places = [b for b, own in enumerate(group) if own in chosen]
    purpose = f"extra noise {number}"
    if places:
        drawn = chains_at(run, [chosen[group[b]] for b in places])
        rollout, images, scores = sample(run, drawn, purpose=purpose, places=places)
        extra = replace(sampled, drawn=drawn, rollout=rollout, images=images, scores=scores)
    else:  # no place on this rank: join the collective call in which the others await scores
        await_all(run, [], "rewards")
        extra = sampled
    order = list(range(len(group)))
    for k, b in enumerate(places):
        order[b] = len(group) + k
    # Gather twice: with all replacements, to see which are informative, then with those only.
    whole = _scored(run, _mixed(sampled, extra, order))
    worse = set(poor_groups(run, whole.rewards))
    kept = {old for old, new in chosen.items() if new not in worse}
    if len(kept) == len(chosen):
        return whole, len(kept)
    order = [place if group[b] in kept else b for b, place in enumerate(order)]
    return _scored(run, _mixed(sampled, extra, order)), len(kept)


def _scored(run: Run, sampled: Sampled) -> Sampled:
    """Return a round with rewards recomputed from the scores of all ranks; a collective call."""
    scores, group, _ = gather(run, sampled.scores, sampled.drawn.group)
    return replace(sampled, rewards=round_rewards(run.config.rewards, scores, group))


def _mixed(first: Sampled, second: Sampled, order: Sequence[int]) -> Sampled:
    """Return the trajectories at ``order`` in the concatenation of two samples."""
    if order == list(range(len(first.drawn.group))):
        return first
    index = torch.tensor(order, dtype=torch.int64, device="cpu")

    assert isinstance(first.rollout, Rollout)
    assert isinstance(second.rollout, Rollout)

    def taken(a: Sequence[Value], b: Sequence[Value]) -> list[Value]:
        both = [*a, *b]
        return [both[place] for place in order]

    ours, theirs = first.drawn, second.drawn
    drawn = RoundChains(
        chains=taken(ours.chains, theirs.chains),
        references=taken(ours.references, theirs.references),
        group=torch.cat([ours.group, theirs.group])[index],
        seen=taken(ours.seen, theirs.seen),
        instructions=taken(ours.instructions, theirs.instructions),
        edits=torch.cat([ours.edits, theirs.edits])[index],
    )
    return replace(
        first,
        drawn=drawn,
        rollout=Rollout.concatenate([first.rollout, second.rollout]).select(index),
        images=taken(first.images, second.images),
        scores={
            name: TurnScores.concatenate([own, second.scores[name]]).select(order)
            for name, own in first.scores.items()
        },
    )
