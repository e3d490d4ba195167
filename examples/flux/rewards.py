"""Scoring in a run, by judge and consistency server or a custom scorer, and turn advantages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import torch
from PIL.Image import Image
from torch import Tensor

import mteditflow as mt
from mteditflow.chains import Chain
from mteditflow.evaluation import JudgedBy
from mteditflow.evaluation.code_version import code_version
from mteditflow.evaluation.provenance import prompt_version
from mteditflow.rewards import (
    SCALES,
    AnswerCache,
    Background,
    ChatClient,
    ConsistencyClient,
    ConsistencyScores,
    Judge,
    JudgePrompt,
    Scale,
    TurnScores,
    consistency_identity,
    judge_identity,
    reach_endpoints,
)
from mteditflow.rewards.command_line import QUESTION, read_secret, require_reachable
from mteditflow.training import Aggregation, RoundRewards

from .config import CONSECUTIVE, ConfigError, Rewards
from .declared import consistency_terms, declared_scale, declared_terms
from .scorers import CheckedScorer, named_scorer, require_regions


class Submit:
    """Callable that submits chains to a scorer in the background.

    Args:
        background: where the scorer's coroutines run.
        scorer: judge and consistency server, or a custom scorer.
    """

    def __init__(self, background: Background, scorer: Services | CheckedScorer) -> None:
        self._background, self._scorer = background, scorer

    def __call__(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image | None]]
    ) -> Future[Mapping[str, TurnScores]]:
        """Return the future of scores; see ``Scorer.score``."""
        return self._background.submit(self._scorer.score, chains, images)

    def regions(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image | None]]
    ) -> Future[Mapping[str, Tensor]]:
        """Return the future of regions; see ``RegionScorer.regions``.

        Raises:
            TypeError: the scorer is not a custom one; services give no regions.
        """
        if not isinstance(self._scorer, CheckedScorer):
            raise TypeError("scorer: expected one of the user's own, which has regions")
        return self._background.submit(self._scorer.regions, chains, images)


def judge_client(config: Rewards, **options: Any) -> ChatClient:
    """Return a client of the configured judge; its API key comes from the environment."""
    return ChatClient(
        config.judge,
        config.judge_model,
        api_key=read_secret("OPENAI_API_KEY"),
        request=config.request,
        **{"concurrency": config.concurrency, "timeout": config.timeout} | options,
    )


def consistency_client(
    config: Rewards, pairing: str | None = None, **options: Any
) -> ConsistencyClient:
    """Return a client of the configured consistency server; its token comes from the environment.

    ``pairing`` defaults to the configured one; for "both" that is "reference".
    """
    own = "reference" if config.pairing == "both" else config.pairing
    return ConsistencyClient(
        config.consistency,
        pairing=pairing or own,
        token=read_secret("MTEDITFLOW_TOKEN"),
        **{"concurrency": config.concurrency, "timeout": config.timeout} | options,
    )


def pairings(config: Rewards) -> dict[str, str]:
    """Return the pairing of each term that the consistency server scores."""
    if not config.consistency:
        return {}
    if config.pairing == "both":
        return {"consistency": "reference", CONSECUTIVE: "consecutive"}
    return {"consistency": config.pairing}


class Services:
    """Judge for "following" and consistency server for the other terms, called concurrently."""

    def __init__(self, config: Rewards, cache: AnswerCache) -> None:
        self.client = judge_client(config, cache=cache)
        self._judge = Judge(self.client, prompt_of(config))
        self._looks = {
            term: consistency_client(config, pairing, cache=cache)
            for term, pairing in pairings(config).items()
        }
        self._features = config.terms == "features"

    async def score(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image]]
    ) -> dict[str, TurnScores]:
        """See ``Scorer``."""
        found: dict[str, TurnScores] = {}

        async def follow() -> None:
            found["following"] = await self.following(chains, images)

        async def look(term: str, client: ConsistencyClient) -> None:
            scores = await client.score(chains, images)
            whole = term == "consistency"
            found.update(self.consistency(scores) if whole else {term: self._compared(scores)})

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            for term, client in self._looks.items():
                tasks.start_soon(look, term, client)
        # Tasks finish in any order, but ranks gather terms one by one and need the same order.
        return dict(sorted(found.items(), reverse=True))

    async def following(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image]]
    ) -> TurnScores:
        """Return the judge's scores of following."""
        return await self._judge.score(chains, images)

    def consistency(self, scores: ConsistencyScores) -> dict[str, TurnScores]:
        """Return the terms of a response of the consistency server, by name."""
        return {"consistency": self._compared(scores)}

    def _compared(self, scores: ConsistencyScores) -> TurnScores:
        return scores.scores if self._features else scores.l1_scores


def check_services(config: Rewards) -> None:
    """Check scorer, scale and URLs, without any request.

    Raises:
        ConfigError: the scorer does not exist, or its scale is not the configured one.
        ValueError: a URL does not end in /v1, or a request option cannot be sent.
    """
    scale_of(config)
    if config.regions and config.scorer is not None:
        require_regions(config.scorer)
    if config.judge:
        judge_client(config)
    if config.consistency:
        consistency_client(config)


def require_services(config: Rewards, *, images: int) -> None:
    """Send one small request to every judge and consistency server, before the run.

    Args:
        config: options of the services.
        images: largest number of images in one request to the judge.

    Raises:
        ValueError: a service does not answer; the message has the reason.
    """
    brief = {"timeout": min(config.timeout, QUESTION), "attempts": 2}
    if config.judge:
        client = judge_client(config, **brief)
        found = anyio.run(partial(reach_endpoints, client, images=images))
        require_reachable("rewards.judge", found)
    if config.consistency:
        found = anyio.run(consistency_client(config, **brief).reach)
        require_reachable("rewards.consistency", found)


@contextmanager
def scoring(config: Rewards, cache: Path) -> Iterator[Submit]:
    """Score in the background inside the block.

    Args:
        config: options of scoring.
        cache: file of answers, so that a repeated round sends no request twice.

    Returns:
        Callable that takes chains and images, and returns the future of their scores.

    Raises:
        ConfigError: the scorer does not exist, or its scale is not the configured one.
    """
    with AnswerCache(cache) as answers, Background() as background:
        own = None if config.scorer is None else own_scorer(config, config.scorer)
        yield Submit(background, own or Services(config, answers))


def own_scorer(config: Rewards, path: str) -> CheckedScorer:
    """Return an instance of a custom scorer whose results are checked.

    Raises:
        ConfigError: the scorer does not exist, its scale is not the configured one, or its terms
            are no names.
        ScorerError: its constructor raises.
    """
    judge = JudgedBy(scorer=path, terms=consistency_terms(path))
    scale, terms = scale_of(config), declared_terms(path)
    return CheckedScorer(path, scale, judge.consistency_range, terms)


def scale_of(config: Rewards) -> Scale:
    """Return the scale of "following", with the configured threshold of success.

    Raises:
        ConfigError: the scorer declares no scale and none is configured, the configured scale
            differs from the declared one, or the threshold is outside the scale.
    """
    scale = SCALES[config.scale or "likert"]
    if config.scorer is not None:
        scale = _declared(config.scorer, config.scale)
    try:
        return scale.with_success(config.success)
    except ValueError as error:
        raise ConfigError(f"rewards.{error}, on the scale of {scale}") from error


def _declared(scorer: str, given: str | None) -> Scale:
    """Return the scale that a scorer's class declares, else the configured one.

    Raises:
        ConfigError: both exist and differ, or neither exists.
    """
    declared = declared_scale(scorer)
    if declared is not None:
        if given is not None and SCALES[given] != declared:
            raise ConfigError(
                f"rewards.scale: expected the scale that {scorer} declares, {declared}, got {given}"
            )
        return declared
    if given is None:
        raise ConfigError(
            f"rewards.scorer: expected a class with the attribute scale, got {scorer} without; add "
            "to it, for instance, scale = mteditflow.rewards.LIKERT (1 to 5, followed from 5), "
            "BINARY or Scale(0, 10, success=8); or give rewards.scale"
        )
    return SCALES[given]


def prompt_of(config: Rewards) -> JudgePrompt:
    """Return the prompt of the judge."""
    scale = config.scale or "likert"
    return JudgePrompt(config.scope, scale, config.thinking, config.answer_format)


def judged_by(config: Rewards) -> JudgedBy:
    """Return the provenance of scores; asks servers for their identity, which takes seconds."""
    scale = scale_of(config)
    if config.scorer is not None:
        version = code_version(named_scorer(config.scorer))
        return JudgedBy(
            scorer=f"{config.scorer} {version or ''}".strip(),
            scale=scale,
            terms=consistency_terms(config.scorer),
        )
    judge, looks, found = config.judge, config.consistency, JudgedBy()
    if judge:
        key = read_secret("OPENAI_API_KEY")
        identity = partial(judge_identity, judge, config.judge_model, api_key=key)
        found = JudgedBy(
            judge=config.judge_model,
            judge_server=anyio.run(identity),
            prompt=prompt_version(prompt_of(config)),
            request=config.request.stated,
            scope=config.scope,
            scale=scale,
            checks="question",
        )
    if looks:
        token = read_secret("MTEDITFLOW_TOKEN")
        server = anyio.run(partial(consistency_identity, looks, token=token))
        own = {"consistency_server": server, "terms": config.terms, "pairing": config.pairing}
        found = found.model_copy(update=own)
    return found


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
