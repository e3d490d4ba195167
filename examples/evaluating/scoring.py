"""Score chains and their images in parts, by services or a custom scorer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain as joined
from pathlib import Path
from typing import NamedTuple

import anyio.to_thread
import torch
from mteditflow_examples.flux.config import Rewards
from mteditflow_examples.flux.scorers import Scorer
from mteditflow_examples.flux.scoring import (
    Services,
    check_services,
    judged_by,
    own_scorer,
    scale_of,
)
from PIL.Image import Image

from mteditflow.chains import NO_CHANGE, Chain, ChainError
from mteditflow.evaluation import Evaluation, MadeBy, Provenance, destroyed_below, no_change_wear
from mteditflow.evaluation.benchmarks import EdiValJudge, TextReader
from mteditflow.evaluation.benchmarks.edival import SINGLE_QUESTION, questions_version
from mteditflow.rewards import (
    AnswerCache,
    Background,
    ConsistencyScores,
    ScoredDetector,
    TurnScores,
)
from mteditflow.rewards.command_line import check_source
from mteditflow.rewards.scale import COSINE, SHARE

from .images import MadeImages, no_images

DESTROYED_BELOW = "--destroyed-below"
PART = 32  # chains per part; one part is loaded while another is scored


class WithParts(Services):
    """The services, with consistency's object and background terms, whose averages CC needs."""

    def consistency(self, scores: ConsistencyScores) -> dict[str, TurnScores]:
        """See ``Services``."""
        l1 = "" if self._features else "_l1"
        parts = {
            name: TurnScores(getattr(scores, f"{name}{l1}"), scores.turn_mask, scores.lost)
            for name in ("object", "background")
        }
        return super().consistency(scores) | parts


class Checks(NamedTuple):
    """Models for the checks by edit type, besides the judge."""

    detector: ScoredDetector
    reader: TextReader | None


class ByType(WithParts):
    """The services, with success decided by a check for each turn's edit type.

    Attributes:
        ways: method that decided each turn, by id of the chain.
    """

    def __init__(self, config: Rewards, cache: AnswerCache, checks: Checks) -> None:
        super().__init__(config, cache)
        self._checks = EdiValJudge(self.client, checks.detector, reader=checks.reader)
        self.ways: dict[str, tuple[str, ...]] = {}

    async def following(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image]]
    ) -> TurnScores:
        """See ``Services``."""
        found = await self._checks.score(chains, images)
        self.ways |= zip((chain.id for chain in chains), found.ways, strict=True)
        return found.scores


class Asks(NamedTuple):
    """Scores requested in addition to the rewards.

    Attributes:
        by_type: whether the check for its edit type decides if a turn succeeded.
        detector: Grounding DINO for these checks, path or Hub id.
        ocr: whether rapidocr reads the text of text edits, in place of the judge.
        preference: path or Hub id of a preference model; None: no preference score.
        destroyed_below: consistency with the original below which a turn counts as destroyed; None:
            collapse is not measured unless the scorer flags destroyed turns.
    """

    by_type: bool
    detector: str | None
    ocr: bool
    preference: str | None
    destroyed_below: float | None

    def check(self, config: Rewards) -> None:
        """Refuse conflicting or invalid options, before anything is loaded.

        Raises:
            ValueError: options exclude each other, the scorer or a model does not exist, the
                scorer's scale differs from the given one, a threshold is out of range, or a URL
                does not end in /v1.
        """
        if self.by_type and (config.scorer is not None or config.scale != "binary"):
            raise ValueError("--checks edival: expected no --scorer and --scale binary")
        if self.by_type != (self.detector is not None):
            raise ValueError("--checks edival, --detector: expected both or neither")
        if self.ocr and not self.by_type:
            raise ValueError("--ocr: expected --checks edival with it")
        if self.ocr and find_spec("rapidocr") is None:
            raise ValueError("--ocr: expected rapidocr (pip install 'mteditflow[ocr]'), got none")
        for name, source in (("--detector", self.detector), ("--preference", self.preference)):
            if source is not None:
                check_source(name, source, "config.json")
        if self.destroyed_below is not None:
            if config.scorer is None and not config.consistency:
                raise ValueError(f"{DESTROYED_BELOW}: expected --consistency or --scorer with it")
            low, high = SHARE if config.terms == "l1" else COSINE
            if not low <= self.destroyed_below <= high:
                raise ValueError(
                    f"{DESTROYED_BELOW}: expected a consistency in {low:g}..{high:g}, got "
                    f"{self.destroyed_below:g}"
                )
        check_services(config)

    def provenance(self, config: Rewards, made_by: MadeBy) -> Provenance:
        """Return the provenance of scores and images."""
        judge = judged_by(config)
        if self.by_type:
            reader = f"rapidocr {version('rapidocr')}" if self.ocr else None
            changes = {"checks": "edival", "detector": self.detector, "text_reader": reader}
            judge = judge.model_copy(update=changes | {"prompt": questions_version()})
        beside = {"preference": self.preference, "destroyed_below": self.destroyed_below}
        judge = judge.model_copy(update=beside)
        return Provenance(judged_by=judge, made_by=made_by)

    def load_checks(self, device: torch.device) -> Checks | None:
        """Load the models for checks by edit type; None if they are not used."""
        if self.detector is None:
            return None
        # Imported here, since importing transformers takes seconds.
        from mteditflow.rewards import GroundingDino

        detector, reader = GroundingDino.from_pretrained(self.detector, device=device), None
        if self.ocr:
            from mteditflow.evaluation import RapidOcr

            reader = RapidOcr()
        return Checks(detector, reader)


class Scored(NamedTuple):
    """Result of scoring.

    Attributes:
        evaluation: evaluation of the chains whose images could be read.
        ways: method that decided each of their turns.
        left_out: reason by id of each other chain.
    """

    evaluation: Evaluation
    ways: list[tuple[str, ...]]
    left_out: dict[str, str]


class WithWear:
    """Wrapper of a scorer that adds the wear of identity turns, unless the scorer has "wear"."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    async def score(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image]]
    ) -> Mapping[str, TurnScores]:
        """See ``Scorer``."""
        found = await self._scorer.score(chains, images)
        if "wear" in found:
            return found
        return {**found, "wear": await anyio.to_thread.run_sync(no_change_wear, chains, images)}


class WithPreference:
    """Wrapper of a scorer that adds scores of a human-preference model."""

    def __init__(self, scorer: Scorer, hub_id: str, device: torch.device) -> None:
        # Imported here, since importing the CLIP of transformers takes seconds.
        from mteditflow.evaluation import PickScore, Preference

        self._scorer = scorer
        self._preference = Preference(PickScore.from_pretrained(hub_id, device=str(device)))

    async def score(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image]]
    ) -> Mapping[str, TurnScores]:
        """See ``Scorer``."""
        found = await self._scorer.score(chains, images)
        return {**found, **await self._preference.score(chains, images)}


def score_chains(
    config: Rewards,
    chains: Sequence[Chain],
    images: MadeImages,
    asks: Asks,
    *,
    cache: Path,
    device: torch.device,
    done: Callable[[int], None],
) -> Scored:
    """Score all chains whose images can be read.

    Args:
        config: options of scoring.
        chains: chains, in the order of the result.
        images: their images.
        asks: scores requested in addition.
        cache: file of answers, which are not requested again; created once the images of a chain
            have been read.
        device: device of local models.
        done: called with the number of chains of each finished part.

    Raises:
        ValueError: no chain has readable images, or the scorer refuses one.
    """
    left_out: dict[str, str] = {}
    starts = range(0, len(chains), PART)
    parts = (_readable(chains[start : start + PART], images, left_out) for start in starts)
    readable = (part for part in parts if part)
    first = next(readable, None)
    if first is None:
        raise no_images(left_out)
    waiting: deque[Future[Mapping[str, TurnScores]]] = deque()
    found: list[Mapping[str, TurnScores]] = []

    def take() -> None:
        found.append(waiting.popleft().result())
        done(len(next(iter(found[-1].values()))))

    with ExitStack() as stack:
        own = _scorer(config, asks, cache, device, stack)
        scorer: Scorer = own
        if any((chain.task_types or ("",))[0] == NO_CHANGE for chain in chains):
            scorer = WithWear(scorer)
        if asks.preference is not None:
            scorer = WithPreference(scorer, asks.preference, device)
        background = stack.enter_context(Background())
        for part in joined([first], readable):
            waiting.append(background.submit(scorer.score, *zip(*part, strict=True)))
            if len(waiting) > 1:  # one part is scored while the next one is loaded
                take()
        while waiting:
            take()
    scored = [chain for chain in chains if chain.id not in left_out]
    ways = own.ways if isinstance(own, ByType) else {}
    otherwise = config.scorer or SINGLE_QUESTION
    deciding = [ways.get(chain.id, (otherwise,) * chain.turns) for chain in scored]
    evaluation = _evaluation(config, scored, found, asks.destroyed_below)
    return Scored(evaluation, deciding, left_out)


def _scorer(
    config: Rewards, asks: Asks, cache: Path, device: torch.device, stack: ExitStack
) -> Scorer:
    """Return the scorer; services store their answers in a file that ``stack`` closes."""
    if config.scorer is not None:
        return own_scorer(config, config.scorer)
    checks = asks.load_checks(device)
    answers = stack.enter_context(AnswerCache(cache))
    return WithParts(config, answers) if checks is None else ByType(config, answers, checks)


def _readable(
    chains: Sequence[Chain], images: MadeImages, left_out: dict[str, str]
) -> list[tuple[Chain, list[Image]]]:
    """Return chains with their images; add unreadable ones to ``left_out`` with the reason."""

    def read(chain: Chain) -> list[Image]:
        try:
            return images.load(chain)
        except ChainError as error:
            left_out[chain.id] = str(error)
            return []

    pairs = ((chain, read(chain)) for chain in chains)
    return [pair for pair in pairs if pair[1]]


def _evaluation(
    config: Rewards,
    chains: Sequence[Chain],
    parts: Sequence[Mapping[str, TurnScores]],
    threshold: float | None,
) -> Evaluation:
    """Join the scores of all parts, and flag destroyed turns; the caller adds the provenance.

    Raises:
        ValueError: a threshold is given, and consistency is not scored, or the scorer flags
            destroyed turns itself.
    """
    terms = {name: TurnScores.concatenate([part[name] for part in parts]) for name in parts[0]}
    if threshold is not None:
        if "consistency" not in terms or "destroyed" in terms:
            raise ValueError(
                f"{DESTROYED_BELOW}: expected a term 'consistency' and none of the name "
                f"'destroyed', got the terms {sorted(terms)}"
            )
        terms["destroyed"] = destroyed_below(terms["consistency"], threshold)
    return Evaluation(
        round=0,
        chain_ids=[chain.id for chain in chains],
        instructions=[chain.instructions for chain in chains],
        terms=terms,
        success_at=scale_of(config).success,
    )
