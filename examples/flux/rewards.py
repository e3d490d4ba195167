"""Who scores a run: a judge and a consistency server, or a scorer of the user's own."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import anyio
import torch
from PIL.Image import Image
from torch import Tensor

import mteditflow as mt
from mteditflow.chains import Chain
from mteditflow.rewards import (
    AnswerCache,
    Background,
    ChatClient,
    ConsistencyClient,
    ConsistencyScores,
    Judge,
    JudgePrompt,
    Reward,
    TurnScores,
)

from .config import ConfigError, Rewards

Submit = Callable[[Sequence[Chain], Sequence[Sequence[Image]]], "Future[Mapping[str, TurnScores]]"]


class Scorer(Protocol):
    """What scores chains; ``--rewards.scorer module:name`` names a class of it."""

    async def score(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image]]
    ) -> Mapping[str, TurnScores]:
        """Score every turn of B chains.

        Args:
            chains: their records.
            images: of each the reference and what each turn made, RGB.

        Returns:
            Scores by name, each [B, N]; "following" among them.
        """


class Services:
    """A judge for "following", and a consistency server for "consistency", asked at once."""

    def __init__(self, config: Rewards, cache: AnswerCache) -> None:
        prompt = JudgePrompt(config.scope, config.scale, config.thinking, config.answer_format)
        self.client = ChatClient(
            config.judge,
            config.judge_model,
            api_key=os.environ.get("OPENAI_API_KEY"),
            cache=cache,
            concurrency=config.concurrency,
            timeout=config.timeout,
        )
        self._judge = Judge(self.client, prompt)
        self._looks = None
        if config.consistency:
            self._looks = ConsistencyClient(
                config.consistency,
                pairing=config.pairing,
                token=os.environ.get("MTEDITFLOW_TOKEN"),
                cache=cache,
                concurrency=config.concurrency,
                timeout=config.timeout,
            )
        self._features = config.terms == "features"

    async def score(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image]]
    ) -> dict[str, TurnScores]:
        """See ``Scorer``."""
        found: dict[str, TurnScores] = {}

        async def follow() -> None:
            found["following"] = await self.following(chains, images)

        async def look() -> None:
            if self._looks is not None:
                found.update(self.consistency(await self._looks.score(chains, images)))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            tasks.start_soon(look)
        return dict(sorted(found.items(), reverse=True))

    async def following(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image]]
    ) -> TurnScores:
        """Ask how well each turn was followed."""
        return await self._judge.score(chains, images)

    def consistency(self, scores: ConsistencyScores) -> dict[str, TurnScores]:
        """Name the terms of what the consistency server found."""
        return {"consistency": scores.scores if self._features else scores.l1_scores}


@contextmanager
def scoring(config: Rewards, cache: Path) -> Iterator[Submit]:
    """Score in the background while the block lasts.

    Args:
        config: who scores.
        cache: file of the answers: a round that is done again does not ask again.

    Returns:
        Takes chains and images, and returns the future of their scores.
    """
    with AnswerCache(cache) as answers, Background() as background:
        scorer = Services(config, answers) if config.scorer is None else named_scorer(config.scorer)
        yield lambda chains, images: background.submit(scorer.score, chains, images)


def named_scorer(path: str) -> Scorer:
    """Make the scorer that an import path names."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"rewards.scorer: expected module:name, got {path!r} ({error})"
        ) from error


def rewards_of(config: Rewards, terms: Mapping[str, TurnScores]) -> dict[str, Reward]:
    """One reward per trajectory of each term that is trained, [B].

    Raises:
        ConfigError: a weight above 0, or the floor, has no term.
    """
    return {name: terms[name].reward(_aggregate(config, name)) for name in _trained(config, terms)}


def teaching_groups(
    config: Rewards, terms: Mapping[str, TurnScores], group: Tensor
) -> mt.GroupSelection:
    """Groups whose chains do not all follow fully, not at all, or equally well."""
    value, valid = terms["following"].reward(_aggregate(config, "following"))
    return mt.select_groups(value, group, valid=valid, top=1.0, bottom=0.0)


def spreads_of(config: Rewards, terms: Mapping[str, TurnScores], group: Tensor) -> dict[int, float]:
    """Spread of how well the chains of each group follow; of groups with two that are known."""
    value, valid = terms["following"].reward(_aggregate(config, "following"))
    members = Counter(group[valid].tolist())
    spread = mt.group_std(value, group, valid=valid)
    found = dict(zip(group.tolist(), spread.tolist(), strict=True))
    return {chain: found[chain] for chain, count in members.items() if count > 1}


def advantages_of(
    config: Rewards,
    terms: Mapping[str, TurnScores],
    group: Tensor,
    multipliers: Mapping[str, float],
) -> tuple[Tensor, Tensor]:
    """Advantage of each turn, and whether it may be trained on, both [B, N].

    Args:
        config: who is credited, and how terms are fused.
        terms: scores by name, each [B, N].
        group: integer group ids, [B].
        multipliers: of the term that has a floor.

    Raises:
        ConfigError: a weight above 0, or the floor, has no term.
    """
    exists = next(iter(terms.values())).turn_mask
    own = {name: config.weights.get(name, 0.0) for name in _trained(config, terms)}
    signals, weights = {}, {}
    for name, weight in mt.constrained_weights(own, multipliers).items():
        for i, (credit, share) in enumerate(_credits(config, name).items()):
            signals[f"{name}/{i}"] = terms[name].credited(_aggregate(config, name), credit)
            weights[f"{name}/{i}"] = weight * share
    keep = torch.ones_like(exists)
    if config.credit == "until_failure":
        success = terms["following"].score >= config.success
        keep &= mt.stop_after_failure(success, turn_mask=exists).bool()
    if config.groups == "teaching":
        keep &= teaching_groups(config, terms, group).keep[:, None]
    fuse = mt.fuse_advantages if config.fusion == "advantages" else mt.fuse_rewards
    advantage, valid = mt.turn_advantage(
        signals, weights, group, turn_mask=exists, keep=keep, fuse=fuse, std=config.std
    )
    return mt.clamp_advantage(advantage, limit=config.advantage_max), valid


def _trained(config: Rewards, terms: Mapping[str, TurnScores]) -> list[str]:
    """Names of the terms that have a weight above 0, or a floor."""
    names = [name for name, weight in config.weights.items() if weight > 0]
    if config.floor is not None and "consistency" not in names:
        names.append("consistency")
    missing = [name for name in names if name not in terms]
    if missing:
        raise ConfigError(
            f"rewards.weights: expected names among {sorted(terms)}, got {missing[0]!r}"
        )
    return names


def _credits(config: Rewards, name: str) -> dict[mt.Credit, float]:
    """Who is credited with a term, and the share of each."""
    strict = name == "following" and config.aggregate == "all"
    whole = mt.TrajectoryCredit(mt.binary_and if strict else mt.turn_average)
    turn, share = mt.TurnCredit(), config.trajectory_share
    return {
        "trajectory": {whole: 1.0},
        "turn": {turn: 1.0},
        "until_failure": {turn: 1.0},
        "to_go": {mt.RewardToGo(config.discount): 1.0},
        "mixture": {whole: share, turn: 1 - share},
    }[config.credit]


def _aggregate(config: Rewards, name: str) -> Callable[..., Tensor]:
    """What makes one reward of a term's scores per turn."""
    if name != "following":
        return mt.turn_average
    if config.aggregate == "average":
        return mt.likert_average if config.scale == "likert" else mt.binary_average
    average = mt.binary_average if config.aggregate == "successes" else mt.binary_and
    return lambda score, *, turn_mask: average(score >= config.success, turn_mask=turn_mask)
