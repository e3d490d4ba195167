"""Who scores a run: a judge and a consistency server, or a scorer of the user's own."""

from __future__ import annotations

import importlib
import os
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
    """One reward per trajectory of each term that has a weight above 0, [B].

    Raises:
        ConfigError: a weight above 0 has no term.
    """
    return {name: terms[name].reward(_aggregate(config, name)) for name in _trained(config, terms)}


def advantages_of(
    config: Rewards, terms: Mapping[str, TurnScores], group: Tensor
) -> tuple[Tensor, Tensor]:
    """Advantage of each turn, and whether it may be trained on, both [B, N].

    Raises:
        ConfigError: a weight above 0 has no term.
    """
    exists = next(iter(terms.values())).turn_mask
    if config.credit == "trajectory":
        rewards = rewards_of(config, terms)
    else:
        names = _trained(config, terms)
        rewards = {name: terms[name].turn_reward(_aggregate(config, name)) for name in names}
    valid = torch.stack([reward.valid for reward in rewards.values()]).all(dim=0)
    if config.credit == "until_failure":
        success = terms["following"].score >= config.success
        valid &= mt.stop_after_failure(success, turn_mask=exists).bool()
    values = {name: reward.value for name, reward in rewards.items()}
    weights = {name: config.weights[name] for name in rewards}
    fuse = mt.fuse_advantages if config.fusion == "advantages" else mt.fuse_rewards
    advantage = fuse(values, weights, group, valid=valid, std=config.std)
    advantage = mt.clamp_advantage(advantage, limit=config.advantage_max)
    if config.credit == "trajectory":
        return advantage[:, None].expand(exists.shape), valid[:, None] & exists
    return advantage, valid


def _trained(config: Rewards, terms: Mapping[str, TurnScores]) -> list[str]:
    """Names of the terms that have a weight above 0."""
    names = [name for name, weight in config.weights.items() if weight > 0]
    missing = [name for name in names if name not in terms]
    if missing:
        raise ConfigError(
            f"rewards.weights: expected names among {sorted(terms)}, got {missing[0]!r}"
        )
    return names


def _aggregate(config: Rewards, name: str) -> Callable[..., Tensor]:
    """What makes one reward of a term's scores per turn."""
    if name != "following":
        return mt.turn_average
    if config.aggregate == "average":
        return mt.likert_average if config.scale == "likert" else mt.binary_average
    average = mt.binary_average if config.aggregate == "successes" else mt.binary_and
    return lambda score, *, turn_mask: average(score >= config.success, turn_mask=turn_mask)
