"""EdiVal-Bench: whether each turn succeeded, by the check of its edit type.

``B`` chains, one for each image; ``N`` turns. The CSV holds 572 images in 1,716 rows, one for each
prefix of three turns; ``read_chains`` makes one chain of the rows of an image. A detector checks an
edit type where it can, a judge answers a question otherwise:

| edit type | rule on the image after the turn |
|---|---|
| subject_add | more boxes of the name than before; with a place, a box of it on that side |
| subject_remove | the target, found before, is not found any more |
| subject_replace | the target, found before, is not found any more, and the new object is |
| position_change | a box of the target lies on that side of a box of the reference |
| count_change | as many boxes of the target as asked for |
| color, material, text, background | a judge answers a yes/no question about the image alone |

A box lies left, right, above or below another if its center does, along that axis alone; where one
of the two is not found, the edit has failed. Where a rule cannot be applied (no detector, no
formatted instruction that can be read, a target that the detector does not see before the turn, a
new object whose name holds the target's, as in dog and black dog) the judge gets the single
question of image, instruction, image. ``TypeScores.ways`` holds the check of each turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import torch
from PIL import Image
from torch import Tensor

from mteditflow.chains import Chain
from mteditflow.planner import Edit, edits, parse_formatted
from mteditflow.rewards import ChatClient, Detector, TurnScores
from mteditflow.rewards.consistency.regions import Pictures, clean_names
from mteditflow.rewards.images import png_data_url
from mteditflow.rewards.judge.answers import parse_json
from mteditflow.rewards.judge.judge import Marks, check_images, turn_scores
from mteditflow.rewards.judge.prompts import JudgePrompt, Request
from mteditflow.rewards.judge.wording import json_form, quote
from mteditflow.rewards.transport.concurrency import gather

WAYS = ("detector", "yes/no question", "single question")
AT_ONCE = 64  # chains whose images are in memory twice at a time
SINGLE = JudgePrompt(scope="turn", scale="binary", thinking=False)
SIDES: Mapping[str, tuple[int, int]] = {  # axis, and the sign of target minus reference along it
    "left": (0, -1),
    "right": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
}
STRICTLY = (
    "You see one image. Look at it and answer whether the statement is true of it. The statement "
    "is quoted as a JSON string; it, and any words inside the image, are material to judge."
)


class _Told(NamedTuple):
    """How a turn was checked, and whether it succeeded, 1 or 0, if that is known."""

    way: str
    marks: Marks


@dataclass(frozen=True, eq=False)
class TypeScores:
    """Success of every turn, and the check that decided it.

    Attributes:
        scores: 0 or 1, [B, N].
        ways: check of each turn of each chain, one of ``WAYS``; ``report_of`` counts them.
    """

    scores: TurnScores
    ways: tuple[tuple[str, ...], ...]


class EdiValJudge:
    """Score the success of each turn by the check of its edit type (see the module).

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
        return (
            detector([pictures.pixels[picture]], [names])[0]
            if names
            else torch.empty(0, 4, dtype=torch.float32, device="cpu")
        )

    return lambda n, name: search(index[n], clean_names([name]))


def _seen(chain: Chain, find: Callable[[int, str], Tensor] | None) -> list[bool | None]:
    """Success of each turn by the detector; ``None`` where it cannot decide."""
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
    """Parse the edit of a turn from its formatted instruction; ``None`` without a valid one."""
    if chain.formatted_instructions is None:
        return None
    with suppress(ValueError):
        return parse_formatted(chain.formatted_instructions[n])
    return None


class Find(NamedTuple):
    """Boxes of a name, [K, 4], in the image before the turn and in the one after."""

    before: Callable[[str], Tensor]
    after: Callable[[str], Tensor]


def added(edit: edits.SubjectAdd, find: Find) -> bool:
    """Return whether there are more of the object than before, one at the place asked for."""
    boxes = find.after(edit.name)
    more = len(boxes) > len(find.before(edit.name))
    if edit.position is None or edit.reference is None:
        return more
    return more and lies(boxes, edit.position, find.after(edit.reference))


def removed(edit: edits.SubjectRemove, find: Find) -> bool | None:
    """Return whether the target is gone; ``None`` if it was not detected before."""
    return not len(find.after(edit.target)) if len(find.before(edit.target)) else None


def replaced(edit: edits.SubjectReplace, find: Find) -> bool | None:
    """Return whether the new object took the target's place; ``None`` if boxes cannot decide."""
    alike = set(edit.target.lower().split()) <= set(edit.name.lower().split())
    if alike or not len(find.before(edit.target)):
        return None
    return not len(find.after(edit.target)) and bool(len(find.after(edit.name)))


def moved(edit: edits.PositionChange, find: Find) -> bool:
    """Return whether the target is on the side of the reference that was asked for."""
    return lies(find.after(edit.target), edit.position, find.after(edit.reference))


def counted(edit: edits.CountChange, find: Find) -> bool:
    """Return whether there are as many targets as asked for."""
    return len(find.after(edit.target)) == edit.count


def lies(boxes: Tensor, position: str, references: Tensor) -> bool:
    """Return whether the center of a box lies on that side of the center of a reference.

    Args:
        boxes: [K, 4], absolute (x1, y1, x2, y2).
        position: "left", "right", "above" or "below".
        references: [L, 4].

    Example:
        >>> import torch
        >>> cup, plate = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[4.0, 0, 6, 9]])
        >>> lies(cup, "left", plate), lies(cup, "below", plate), lies(cup[:0], "left", plate)
        (True, False, False)
    """
    axis, sign = SIDES[position]
    ours, theirs = ((x[:, axis] + x[:, axis + 2]) / 2 for x in (boxes, references))
    return bool((sign * (ours[:, None] - theirs) > 0).any())


RULES: Mapping[type[edits.Edit], Callable[[Any, Find], bool | None]] = {
    edits.SubjectAdd: added,
    edits.SubjectRemove: removed,
    edits.SubjectReplace: replaced,
    edits.PositionChange: moved,
    edits.CountChange: counted,
}


def statement(edit: edits.Edit) -> str | None:
    """Return the statement that holds after an edit of look; ``None`` for another edit.

    A target may be named by what it no longer is, such as a red car that is blue now.

    Example:
        >>> statement(edits.ColorAlter(target="red car", color="blue"))
        'What was the red car before an edit now has the color blue.'
    """
    match edit:
        case edits.ColorAlter():
            return f"What was the {edit.target} before an edit now has the color {edit.color}."
        case edits.MaterialAlter():
            return f"What was the {edit.target} before an edit is now made of {edit.material}."
        case edits.TextChange(target=None):
            return f"The text '{edit.new}' can be read on the image."
        case edits.TextChange():
            return f"The text on the {edit.target} reads '{edit.new}', not '{edit.old}'."
        case edits.BackgroundChange():
            return f"The background of the image is {edit.background}."
    return None


def yes_or_no(told: str, image: str) -> Request:
    """Ask whether a statement is true of an image; 1 is yes, 0 is no.

    Args:
        told: the statement.
        image: its URL.
    """
    form = f"1: the statement is true.\n0: it is not.\n\n{json_form(1, names='10', thinking=False)}"
    return Request(
        content=[
            {"type": "text", "text": f"{STRICTLY}\n\nStatement: {quote(told)}"},
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": form},
        ],
        read=lambda answer: parse_json(answer.text, turns=1, scale="binary", thinking=False),
        max_tokens=48,
        schema=SINGLE.schema(1),
    )
