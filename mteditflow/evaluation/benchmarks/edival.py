"""EdiVal-Bench: whether each turn succeeded, told by the check of its edit type.

``B`` chains, one for each image; ``N`` turns. The CSV holds 572 images in 1,716 rows, one for each
prefix of three turns; ``read_chains`` makes one chain of the rows of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import anyio
import anyio.to_thread
import torch
from PIL import Image
from torch import Tensor

from mteditflow.chains import Chain
from mteditflow.evaluation.benchmarks.edival_checks import (
    RULES,
    SINGLE,
    Find,
    statement,
    yes_or_no,
)
from mteditflow.planner import Edit, parse_formatted
from mteditflow.rewards import ChatClient, Detector, TurnScores
from mteditflow.rewards.consistency.regions import Pictures, clean_names
from mteditflow.rewards.images import png_data_url
from mteditflow.rewards.judge.judge import Marks, check_images, turn_scores
from mteditflow.rewards.transport.concurrency import gather

WAYS = ("detector", "yes/no question", "single question")
AT_ONCE = 64  # chains whose images are in memory twice at a time


class _Told(NamedTuple):
    """How a turn was checked, and whether it succeeded, 1 or 0, if that is known."""

    way: str
    marks: Marks


@dataclass(frozen=True, eq=False)
class TypeScores:
    """Success of every turn, and what told it.

    Attributes:
        scores: 0 or 1, [B, N].
        ways: what told each turn of each chain, one of ``WAYS``; ``report_of`` counts them.
    """

    scores: TurnScores
    ways: tuple[tuple[str, ...], ...]


class EdiValJudge:
    """Tells whether each turn succeeded, by the check of its edit type; see ``edival_checks``.

    Args:
        client: asks the endpoints.
        detector: finds objects; without one those edits get the single question.
    """

    def __init__(self, client: ChatClient, detector: Detector | None = None) -> None:
        self.client, self.detector = client, detector

    async def score(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image.Image]]
    ) -> TypeScores:
        """Check every turn of B chains.

        Args:
            chains: with ``formatted_instructions``; where they are missing or of another form, the
                single question is asked.
            images: for each chain N + 1 images: the reference, then what each turn made.

        Raises:
            ValueError: there is no chain, or its images are too few, too many or unreadable.
            TypeError: one of them is not a PIL image.
        """
        shown = await anyio.to_thread.run_sync(check_images, chains, images)
        slots, alone = anyio.Semaphore(AT_ONCE), anyio.CapacityLimiter(1)
        work = zip(chains, shown, strict=True)
        found = await gather([partial(self._chain, *each, slots, alone) for each in work])
        ways = tuple(tuple(told.way for told in own) for own in found)
        marks = [[(range(n, n + 1), told.marks) for n, told in enumerate(own)] for own in found]
        return TypeScores(turn_scores(chains, marks), ways)

    async def _chain(
        self,
        chain: Chain,
        images: Sequence[Image.Image],
        slots: anyio.Semaphore,
        alone: anyio.CapacityLimiter,
    ) -> list[_Told]:
        """Check the turns of a chain; the detector serves one at a time."""
        async with slots:
            urls = await anyio.to_thread.run_sync(lambda: [png_data_url(x) for x in images])
            find = _finder(self.detector, images) if self.detector is not None else None
            seen = await anyio.to_thread.run_sync(_seen, chain, find, limiter=alone)
            turns = range(chain.turns)
            return await gather([partial(self._turn, chain, n, urls, seen[n]) for n in turns])

    async def _turn(self, chain: Chain, n: int, urls: Sequence[str], success: bool | None) -> _Told:
        if success is not None:
            return _Told(WAYS[0], (float(success),))
        edit = _edit(chain, n)
        told = statement(edit) if edit is not None else None
        if told is None:
            way, request = WAYS[2], SINGLE.request([chain.instructions[n]], urls[n : n + 2])
        else:
            way, request = WAYS[1], yes_or_no(told, urls[n + 1])
        answer = await self.client.ask(
            request.content, request.read, max_tokens=request.max_tokens, schema=request.schema
        )
        return _Told(way, answer)


def _finder(detector: Detector, images: Sequence[Image.Image]) -> Callable[[int, str], Tensor]:
    """Search image n for a name, each once, at the size at which consistency looks."""
    pictures = Pictures()
    index = [pictures.add(image) for image in images]

    @cache
    def search(picture: int, names: tuple[str, ...]) -> Tensor:
        return detector([pictures.pixels[picture]], [names])[0] if names else torch.empty(0, 4)

    return lambda n, name: search(index[n], clean_names([name]))


def _seen(chain: Chain, find: Callable[[int, str], Tensor] | None) -> list[bool | None]:
    """What the detector tells of each turn; ``None`` where it cannot."""
    if find is None:
        return [None] * chain.turns
    seen: list[bool | None] = []
    for n in range(chain.turns):
        edit = _edit(chain, n)
        rule = RULES.get(type(edit)) if edit is not None else None
        pair = Find(partial(find, n), partial(find, n + 1))
        seen.append(rule(edit, pair) if rule is not None else None)
    return seen


def _edit(chain: Chain, n: int) -> Edit | None:
    """The edit of a turn, if its formatted instruction tells."""
    if chain.formatted_instructions is None:
        return None
    with suppress(ValueError):
        return parse_formatted(chain.formatted_instructions[n])
    return None
