"""EdiVal-Bench: success of each turn by the check of its edit type.

``B`` chains, one for each image; ``N`` turns. The CSV has 572 images in 1,716 rows, one for each
prefix of three turns; ``read_chains`` joins the rows of an image to one chain. The checks are those
of the benchmark's public scorer, on the images before and after a turn, both resized to 512 x 512:

| edit type | success |
|---|---|
| subject_add | The object is found after. With a place, its center is more than 0.03 of the image to that side of the center of the reference, found before. The judge confirms that it is new. |
| subject_remove | The best box of the target before (0.35, boxes that fill the image excluded) has an IoU below 0.2 with the best box after, or there is no box after. For hats and birds it is also enough that no "hat" or "bird" is found after. |
| subject_replace | A box of the new object after overlaps a box of the target before. The judge confirms the replacement. |
| position_change | The numbers of targets and of references are the same before and after (0.40, by names without color and material, which the judge supplies). The best box of the target is on the requested side of the best box of the reference, in whole pixels, and neither contains the other. |
| count_change | The target is found before, and the requested number of it is found after. |
| color_alter, material_alter | The judge, shown both images, confirms the edit. |
| text_change | The new text is in the text that is read after: in the whole image, or in the box of the object before, if the object is also found after. |
| background_change | Each object to keep is found after (0.25), its best box does not fill the image, and the judge confirms the new background. |

Scores of boxes are above the threshold in parentheses, else above 0.30. Where objects are counted,
boxes of an IoU above 0.8 are one. A box fills the image if both of its sides are above 0.98 of it
(0.9 for background_change). Names to replace are sought without a plural's "es" or "s".

Differences from the public scorer:

- A lost answer loses the turn. There it counts as no, and a name without an answer is kept whole.
- Wording and form of the questions are this library's own. There any answer that contains "yes" is
  a yes. The judge is not called if the boxes alone decide.
- The public scorer counts an instruction that it cannot parse as failed (7 of the 1,716 turns of
  the benchmark: background changes that name nothing to keep). Here such a turn gets the single
  question of ``JudgePrompt``: image, instruction, image.
- With a ``TextReader``, text is read by it and not by the judge.

``TypeScores.ways`` lists the sources of each verdict.
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import anyio
import anyio.to_thread
import torch
from PIL import Image

from mteditflow.chains import Chain
from mteditflow.evaluation.benchmarks.boxes import Boxes
from mteditflow.evaluation.benchmarks.edival_checks import (
    CHECKS,
    LEAST,
    LostAnswerError,
    TextReader,
    Turn,
)
from mteditflow.evaluation.benchmarks.edival_questions import YES_OR_NO as SINGLE
from mteditflow.evaluation.benchmarks.edival_questions import (
    Question,
    plain_name,
    transcription,
    yes_or_no,
)
from mteditflow.evaluation.provenance import json_hash
from mteditflow.planner import Edit, edits, parse_formatted
from mteditflow.rewards import ChatClient, ScoredDetector, TurnScores
from mteditflow.rewards.consistency.regions import SIZE, Pictures, clean_names
from mteditflow.rewards.images import png_data_url
from mteditflow.rewards.judge.judge import Marks, check_images, turn_scores
from mteditflow.rewards.transport.concurrency import gather

SINGLE_QUESTION = "single question"
AT_ONCE = 64  # chains whose resized and encoded images are in memory at once


@dataclass(frozen=True, eq=False)
class TypeScores:
    """Success of every turn, and the sources of the verdict.

    Attributes:
        scores: 0 or 1, [B, N], float32.
        ways: sources of the verdict for each turn of each chain: "detector", "judge", "OCR",
            several of them joined by " + ", or "single question"; ``report_of`` counts them.
    """

    scores: TurnScores
    ways: tuple[tuple[str, ...], ...]


class EdiValJudge:
    """Scorer of the success of each turn by the check of its edit type (see the module).

    Args:
        client: client of the judge's endpoints.
        detector: detector of objects, with scores.
        reader: reader of text; ``None`` lets the judge read it.

    Source: EdiVal-Bench (arXiv 2509.13399), its public implementation.
    """

    def __init__(
        self, client: ChatClient, detector: ScoredDetector, *, reader: TextReader | None = None
    ) -> None:
        self.client, self.detector, self.reader = client, detector, reader

    async def score(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image.Image]]
    ) -> TypeScores:
        """Check every turn of B chains.

        Args:
            chains: B chains with ``formatted_instructions``; if these are missing or have another
                form, the single question decides.
            images: for each chain N + 1 images: the reference, then the result of each turn.

        Raises:
            ValueError: there is no chain, or its images are too few, too many or unreadable.
            TypeError: an image is not a PIL image.
        """
        shown = await anyio.to_thread.run_sync(check_images, chains, images)
        slots, alone = anyio.Semaphore(AT_ONCE), anyio.CapacityLimiter(1)
        work = zip(chains, shown, strict=True)
        verdicts = await gather([partial(self._chain, *each, slots, alone) for each in work])
        marks = [[(range(n, n + 1), x) for n, (x, _) in enumerate(own)] for own in verdicts]
        ways = tuple(tuple(way for _, way in own) for own in verdicts)
        return TypeScores(turn_scores(chains, marks), ways)

    async def _chain(
        self,
        chain: Chain,
        images: Sequence[Image.Image],
        slots: anyio.Semaphore,
        alone: anyio.CapacityLimiter,
    ) -> list[tuple[Marks, str]]:
        """Check the turns of a chain; local models (detector, reader) serve one call at a time."""
        async with slots:
            resized = await anyio.to_thread.run_sync(lambda: [_resized(x) for x in images])
            find = _finder(self.detector, resized)
            urls = await anyio.to_thread.run_sync(lambda: [png_data_url(x) for x in resized])

            def turn(n: int) -> Turn:
                return Turn(
                    chain.instructions[n],
                    resized[n : n + 2],
                    urls[n : n + 2],
                    self.client,
                    lambda side, name: find(n + side, name),
                    self.reader,
                    alone,
                )

            return await gather([partial(_verdict, chain, n, turn(n)) for n in range(chain.turns)])


async def _verdict(chain: Chain, n: int, turn: Turn) -> tuple[Marks, str]:
    """Return the score of a turn, or its loss, and the sources of the verdict."""
    edit = _edit(chain, n)
    try:
        success = await (_single(turn) if edit is None else CHECKS[type(edit)](turn, edit))
        marks: Marks = (float(success),)
    except LostAnswerError as error:
        marks = error.lost
    return marks, SINGLE_QUESTION if edit is None else " + ".join(turn.used)


def questions_version() -> str:
    """Return a hash of the text and answer schema of all questions of the checks."""
    images = ["image:0", "image:1"]
    asked: list[Question[Any]] = [
        _single_question("A", images),
        yes_or_no("A", images),
        yes_or_no("A", images[:1]),
    ]
    asked += [plain_name("A"), transcription(images[0])]
    return json_hash([(x.content, x.schema) for x in asked])


def _single_question(instruction: str, urls: Sequence[str]) -> Question[tuple[float, ...]]:
    request = SINGLE.request([instruction], urls)
    return Question(request.content, request.read, request.max_tokens, SINGLE.schema(1))


async def _single(turn: Turn) -> bool:
    return await turn.ask(_single_question(turn.instruction, turn.urls)) == (1,)


def _edit(chain: Chain, n: int) -> Edit | None:
    """Return the parsed edit of a turn; ``None`` if the public scorer could not parse it."""
    if chain.formatted_instructions is None:
        return None
    with suppress(ValueError):
        edit = parse_formatted(chain.formatted_instructions[n])
        if isinstance(edit, edits.BackgroundChange) and not edit.kept:
            return _with_kept(edit, chain.instructions[n])
        return edit
    return None


def _with_kept(edit: edits.BackgroundChange, instruction: str) -> Edit | None:
    """Return the edit with the objects to keep that the instruction names, ``None`` if no match.

    EdiVal-Bench's instructions have one of two forms; only the first names objects.
    """
    form = re.search(r"remain the (.+) unchanged|Change the background to \[", instruction)
    if form is None:
        return None
    return edit.model_copy(update={"kept": tuple(form[1].split(","))}) if form[1] else edit


def _resized(image: Image.Image) -> Image.Image:
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _finder(detector: ScoredDetector, images: Sequence[Image.Image]) -> Callable[[int, str], Boxes]:
    """Return a cached search of image n for a name; equal images are searched once."""
    pictures = Pictures()
    index = [pictures.add(image) for image in images]

    @cache
    def search(picture: int, names: tuple[str, ...]) -> Boxes:
        if not names:
            return Boxes(
                torch.empty(0, 4, dtype=torch.float32, device="cpu"),
                torch.empty(0, dtype=torch.float32, device="cpu"),
            )
        # With the least threshold of all checks, so that each check filters the cached boxes.
        ((boxes, scores),) = detector.detect([pictures.pixels[picture]], [names], threshold=LEAST)
        return Boxes(boxes.float().cpu() / SIZE, scores.float().cpu())

    return lambda n, name: search(index[n], clean_names([name]))
