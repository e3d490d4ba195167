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
    TurnScores,
)
from mteditflow.training import Aggregation, RoundRewards

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
            request=config.request,
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


def round_rewards(config: Rewards, terms: Mapping[str, TurnScores], group: Tensor) -> RoundRewards:
    """Aggregate the scores of a round, once for all that reads them.

    Raises:
        ConfigError: a weight above 0, or the floor, has no term.
    """
    trained = _trained(config, terms)
    names = dict.fromkeys([*trained, "following"])
    return RoundRewards(terms, {n: _aggregation(config, n) for n in names}, group, trained)


def turn_signals(
    config: Rewards, rewards: RoundRewards, multipliers: Mapping[str, float]
) -> tuple[dict[str, mt.Signal], dict[str, float]]:
    """Credit turns with every reward that is trained on; under until_failure up to the failure.

    Args:
        config: credit, and weights of the rewards.
        rewards: rewards of the round.
        multipliers: Lagrange multiplier of the reward that has a floor.

    Returns:
        Signals [B, N] by name, and the weight of each.
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
    if config.credit == "until_failure":  # here, so that a history holds no later turns either
        following = rewards.terms["following"]
        success = following.score >= config.success
        keep = mt.stop_after_failure(success, turn_mask=following.turn_mask).bool()
        signals = {n: mt.Signal(x.value, x.valid & keep) for n, x in signals.items()}
    return signals, weights


def turn_advantages(
    config: Rewards,
    rewards: RoundRewards,
    signals: Mapping[str, mt.Signal],
    weights: Mapping[str, float],
    history: mt.RewardHistory | None = None,
) -> tuple[Tensor, Tensor]:
    """Fuse signals into the advantage of each turn and whether it is trained on, both [B, N]."""
    exists = rewards.terms["following"].turn_mask
    keep = torch.ones_like(exists)
    if config.groups == "informative":
        keep &= rewards.informative("following").keep[:, None]
    group, own = rewards.group, len(exists)
    if history is not None:
        signals, group = history.joined(signals, group)
    past = torch.ones(len(group) - own, exists.shape[1], dtype=torch.bool)
    advantage, valid = mt.turn_advantage(
        signals,
        weights,
        group,
        turn_mask=torch.cat([exists, past]),
        keep=torch.cat([keep, past]),
        fuse=mt.fuse_advantages if config.fusion == "advantages" else mt.fuse_rewards,
        std=config.std,
    )
    return mt.clamp_advantage(advantage[:own], limit=config.advantage_limit), valid[:own]


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


def _credits(config: Rewards) -> dict[mt.Credit | None, float]:
    """Credits of each reward with the share of each; None is the reward of the whole chain."""
    turn, share = mt.TurnCredit(), config.trajectory_share
    return {
        "trajectory": {None: 1.0},
        "turn": {turn: 1.0},
        "until_failure": {turn: 1.0},
        "to_go": {mt.RewardToGo(config.discount): 1.0},
        "mixture": {None: share, turn: 1 - share},
    }[config.credit]


def _aggregation(config: Rewards, name: str) -> Aggregation:
    """How a term's scores become rewards."""
    if name != "following":
        return Aggregation(lambda score: score)
    if config.aggregate == "average":
        return Aggregation(mt.normalize_likert if config.scale == "likert" else _binary)
    reduce = mt.binary_and if config.aggregate == "all" else mt.turn_average
    return Aggregation(lambda score: (score >= config.success).to(score.dtype), reduce)


def _binary(score: Tensor) -> Tensor:
    """Return scores of a binary scale.

    Raises:
        ValueError: one is neither 0 nor 1.
    """
    if not bool(((score == 0) | (score == 1)).all()):
        raise ValueError(f"following: expected 0 or 1 on a binary scale, got {score.tolist()}")
    return score
