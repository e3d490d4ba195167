"""Checks of EdiVal-Bench by edit type, and the tools that they use; ``edival`` has the table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import anyio
import anyio.to_thread
from PIL import Image

from mteditflow.evaluation.benchmarks.boxes import (
    Boxes,
    centers,
    contains,
    count_apart,
    iou,
    larger_than,
    lies,
)
from mteditflow.evaluation.benchmarks.edival_questions import (
    Question,
    plain_name,
    transcription,
    yes_or_no,
)
from mteditflow.planner import Edit, edits
from mteditflow.rewards import ChatClient, Lost
from mteditflow.rewards.consistency.regions import SIZE
from mteditflow.rewards.images import png_data_url

T = TypeVar("T")
BEFORE, AFTER = 0, 1  # the images of a turn

# Constants of the public scorer. Thresholds of box scores; detection runs with the least one:
USUAL, LEAST = 0.30, 0.25
OF_REMOVED, OF_COUNTS_KEPT, OF_KEPT = 0.35, 0.40, LEAST
WHOLE_IMAGE, WHOLE_IMAGE_KEPT = 0.98, 0.9  # sides of a box that fills the image: not an object
SAME_PLACE = 0.2  # IoU from which a box after is the object that should be gone
MARGIN = 0.03  # share of the image by which a new object must lie beside its reference
CONFUSED = ("hat", "bird")  # longer names of these are detected even after a removal


class TextReader(Protocol):
    """Reader of the text in an image, such as ``mteditflow.evaluation.RapidOcr``."""

    def __call__(self, image: Image.Image) -> str:
        """Return the text of an RGB image of any size; "" if there is none."""


@dataclass
class Turn:
    """A turn to check, with its tools: detector, judge and text reader.

    Attributes:
        instruction: instruction that the editor received.
        images: images before and after, 512 x 512.
        urls: the same images as data URLs.
        client: client of the judge.
        search: function of side (``BEFORE`` or ``AFTER``) and name that returns the boxes with
            scores above ``LEAST``.
        reader: reader of text; ``None`` lets the judge read it.
        alone: limiter of local models to one call at a time.
        used: tools used so far, in order (a dict as an ordered set).
    """

    instruction: str
    images: Sequence[Image.Image]
    urls: Sequence[str]
    client: ChatClient
    search: Callable[[int, str], Boxes]
    reader: TextReader | None
    alone: anyio.CapacityLimiter
    used: dict[str, None] = field(default_factory=dict)

    async def find(self, side: int, name: str, threshold: float = USUAL) -> Boxes:
        """Return the boxes of a name in the image of a side with scores above a threshold."""
        self.used["detector"] = None
        found = await anyio.to_thread.run_sync(self.search, side, name, limiter=self.alone)
        return found.above(threshold)

    async def ask(self, question: Question[T]) -> T:
        """Return the judge's answer.

        Raises:
            LostAnswerError: the answer is lost.
        """
        self.used["judge"] = None
        answer = await self.client.ask(
            question.content, question.read, max_tokens=question.max_tokens, schema=question.schema
        )
        if isinstance(answer, Lost):
            raise LostAnswerError(answer)
        return answer

    async def read(self, image: Image.Image) -> str:
        """Return the text of an image."""
        if self.reader is None:
            url = await anyio.to_thread.run_sync(png_data_url, image)
            return await self.ask(transcription(url))
        self.used["OCR"] = None
        return await anyio.to_thread.run_sync(self.reader, image, limiter=self.alone)


class LostAnswerError(Exception):
    """Lost answer of the judge, which leaves the turn without a verdict."""

    def __init__(self, lost: Lost) -> None:
        super().__init__(str(lost))
        self.lost = lost


async def added(turn: Turn, edit: edits.SubjectAdd) -> bool:
    """Check that the object is new, and beside its reference if a place is given."""
    boxes = (await turn.find(AFTER, edit.name)).boxes
    found = len(boxes) > 0
    if edit.position is not None and edit.reference is not None:
        references = (await turn.find(BEFORE, edit.reference)).boxes
        found = lies(centers(boxes), edit.position, centers(references), margin=MARGIN)
    told = f"In image 2 there is a {edit.name} that is not in image 1."
    return found and await turn.ask(yes_or_no(told, turn.urls))


async def removed(turn: Turn, edit: edits.SubjectRemove) -> bool:
    """Check that the target, found before, is no longer in its place."""
    sides = [await turn.find(side, edit.target, OF_REMOVED) for side in (BEFORE, AFTER)]
    before, after = (x.keep(~larger_than(x.boxes, WHOLE_IMAGE)).best() for x in sides)
    if not len(before):
        return False
    if not (iou(before, after) >= SAME_PLACE).any():
        return True
    for word in CONFUSED:
        if word in edit.target.lower():
            left = await turn.find(AFTER, word, OF_REMOVED)
            if not len(left.boxes):
                return True
    return False


async def replaced(turn: Turn, edit: edits.SubjectReplace) -> bool:
    """Check that the new object overlaps the place of the target."""
    old = (await turn.find(BEFORE, singular(edit.target))).boxes
    new = (await turn.find(AFTER, singular(edit.name))).boxes
    told = f"The {edit.target} of image 1 has been replaced by a {edit.name} in image 2."
    return bool((iou(old, new) > 0).any()) and await turn.ask(yes_or_no(told, turn.urls))


def singular(name: str) -> str:
    """Return a name without a final "es" or "s", plural or not, as the public scorer does.

    Example:
        >>> singular("boxes"), singular("cups"), singular("glass")
        ('box', 'cup', 'glas')
    """
    return name.removesuffix("es") if name.endswith("es") else name.removesuffix("s")


async def moved(turn: Turn, edit: edits.PositionChange) -> bool:
    """Check the place of the target, and that the numbers of both objects stayed the same."""
    target = (await turn.find(AFTER, edit.target)).best()
    reference = (await turn.find(AFTER, edit.reference)).best()
    if not len(target) or not len(reference):
        return False
    if contains(reference, target) or contains(target, reference):
        return False
    # The public scorer truncates centers to whole pixels before it compares them.
    pixels = [(centers(box) * SIZE).trunc() for box in (target, reference)]
    if not lies(pixels[0], edit.position, pixels[1]):
        return False
    for name in (edit.reference, edit.target):
        plain = await turn.ask(plain_name(name))
        sides = [await turn.find(side, plain, OF_COUNTS_KEPT) for side in (BEFORE, AFTER)]
        if count_apart(sides[BEFORE].boxes) != count_apart(sides[AFTER].boxes):
            return False
    return True


async def counted(turn: Turn, edit: edits.CountChange) -> bool:
    """Check that the target existed before, and its number after."""
    before = (await turn.find(BEFORE, edit.target)).boxes
    after = (await turn.find(AFTER, edit.target)).boxes
    return len(before) > 0 and count_apart(after) == edit.count


async def altered(turn: Turn, edit: edits.ColorAlter | edits.MaterialAlter) -> bool:
    """Check by the judge that the edit was carried out."""
    told = (
        f"Image 2 is image 1 after the edit {edit.formatted()}. The edit was carried out "
        "completely and accurately, and image 2 looks natural."
    )
    return await turn.ask(yes_or_no(told, turn.urls))


async def written(turn: Turn, edit: edits.TextChange) -> bool:
    """Check that the new text is legible: in the target's place if one is named, else anywhere."""
    image = turn.images[AFTER]
    if edit.target is not None:
        sides = [(await turn.find(side, edit.target)).best() for side in (BEFORE, AFTER)]
        if not all(len(box) for box in sides):
            return False
        left, top, right, bottom = (sides[BEFORE][0] * SIZE).clamp(0, SIZE).int().tolist()
        if right <= left or bottom <= top:
            return False
        image = image.crop((left, top, right, bottom))
    return edit.new.lower() in (await turn.read(image)).lower()


async def behind(turn: Turn, edit: edits.BackgroundChange) -> bool:
    """Check the new background, and that the objects to keep are present."""
    for name in edit.kept:
        best = (await turn.find(AFTER, name, OF_KEPT)).best()
        if not len(best) or larger_than(best, WHOLE_IMAGE_KEPT).any():
            return False
    told = f"The background of the image shows {edit.background}."
    return await turn.ask(yes_or_no(told, turn.urls[AFTER:]))


CHECKS: Mapping[type[Edit], Callable[[Turn, Any], Awaitable[bool]]] = {
    edits.SubjectAdd: added,
    edits.SubjectRemove: removed,
    edits.SubjectReplace: replaced,
    edits.PositionChange: moved,
    edits.CountChange: counted,
    edits.ColorAlter: altered,
    edits.MaterialAlter: altered,
    edits.TextChange: written,
    edits.BackgroundChange: behind,
}
