"""Scoring in a run, by judge and consistency server or by a custom scorer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from PIL.Image import Image
from torch import Tensor

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

from .config import CONSECUTIVE, ConfigError, Rewards
from .declared import consistency_terms, declared_scale, declared_terms
from .scorers import CheckedScorer, named_scorer, require_regions

PATIENCE = 300.0  # s, longest wait of a request for a server that is out


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

    @property
    def out(self) -> list[str]:
        """URLs of the servers that do not answer now; a custom scorer has none."""
        return self._scorer.out if isinstance(self._scorer, Services) else []


def judge_client(config: Rewards, **options: Any) -> ChatClient:
    """Return a client of the configured judge; its API key comes from the environment."""
    return ChatClient(
        config.judge,
        config.judge_model,
        api_key=read_secret("OPENAI_API_KEY"),
        request=config.request,
        **_limits(config) | options,
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
        **_limits(config) | options,
    )


def _limits(config: Rewards) -> dict[str, Any]:
    return {
        "concurrency": config.concurrency,
        "timeout": config.timeout,
        "patience": PATIENCE,
    }


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

    @property
    def out(self) -> list[str]:
        """URLs of the servers that do not answer now."""
        found: dict[str, None] = {}  # two pairings share a server
        for client in (self.client, *self._looks.values()):
            states = client.statistics.endpoints
            found |= {url: None for url, state in states.items() if state == "out"}
        return list(found)

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
