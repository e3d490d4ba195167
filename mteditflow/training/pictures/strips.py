"""Strips of chains: the reference, and each turn's image with its instruction and scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from mteditflow.evaluation.evaluation import FOLLOWING
from mteditflow.evaluation.figures import AMBER, BAD, FAINT, GOOD, INK, SOFT, house_style
from mteditflow.rewards import TurnScores
from mteditflow.training.pictures.page import Page, line_height, text_width, wrap

SMALL, LARGE, LARGE_FROM = 1.75, 2.7, 128  # inches of an image; pixels from which it is LARGE
MARGIN, GAP, LABEL, BLOCK_GAP = 0.28, 0.13, 0.3, 0.34  # inches
TITLE_SIZE, TEXT_SIZE, SCORE_SIZE = 12.5, 9.5, 8.5  # points
WIDEST, NARROWEST = 17.0, 4.23  # inches: two blocks are side by side if they fit into WIDEST
# A chain up to ONE_ROW wide has one row; longer ones are wrapped, to be legible at 1,600 pixels.
ONE_ROW, WRAPPED = 17.75, 12.1  # inches
ABOVE_TITLE, UNDER_TITLE, UNDER_LEGEND = 0.8 * MARGIN, 0.03, 0.2  # inches
UNDER_HEADER, OVER_SCORES, UNDER_STRIP = 0.07, 0.045, 0.16  # inches
BESIDE_LABEL = 0.17  # inches from the middle of a label to its strip
TALLEST, CHAIN_LINES = 2.0, 3  # largest height over width of an image; lines of a chain's name
FRAME: dict[str, Any] = {"linewidth": 3.2}
DASHED = FRAME | {"linestyle": (0, (2.4, 1.6)), "capstyle": "butt"}
REFERENCE_FRAME = {"color": FAINT, "linewidth": 2}


@dataclass(frozen=True, eq=False)
class Strip:
    """One trajectory to be drawn.

    Args:
        chain_id: id of its chain; adjacent strips of one chain share the lines of instructions.
        instructions: one instruction per turn, N.
        images: images [reference, turn 1, ..., turn N]; the reference is None for text to image.
        terms: scores by name; "following" colors the frames.
        row: row of this trajectory in the terms.
        label: label at the left, such as "member 3".

    Raises:
        ValueError: there are not N + 1 images.
    """

    chain_id: str
    instructions: Sequence[str]
    images: Sequence[Image.Image | None]
    terms: Mapping[str, TurnScores]
    row: int
    label: str = ""

    def __post_init__(self) -> None:
        if len(self.images) != len(self.instructions) + 1:
            raise ValueError(
                f"images: expected {len(self.instructions) + 1}, the reference and one per "
                f"instruction, got {len(self.images)}"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Return width and height of its first image, in pixels."""
        return next(image.size for image in self.images if image is not None)

    def score_lines(self, turn: int, width: float) -> list[tuple[str, str, str]]:
        """Return (name, value, color) of each line under a turn, none wider than ``width``."""
        lines: list[tuple[str, str, str]] = []
        for name, scores in self.terms.items():
            value, color = _shown(scores, self.row, turn)
            if text_width(f"{name}   {value}", SCORE_SIZE) <= width:
                lines.append((name, value, color))
                continue
            lines += [(x, "", SOFT) for x in wrap(name, width, SCORE_SIZE)]
            lines += [("", x, color) for x in wrap(value, width, SCORE_SIZE)]
        return lines

    def mark(self, turn: int, success_at: float) -> tuple[str, str, str]:
        """Return the line on the success of a turn, in the form of ``score_lines``."""
        score, color = float(self.terms[FOLLOWING].score[self.row, turn]), INK
        if score != score:  # NaN
            return "no score", "", color
        color = self.frame(turn, success_at)["color"]
        return "✓ followed" if score >= success_at else "✗ failed", "", color

    def frame(self, turn: int, success_at: float) -> dict[str, Any]:
        """Return color and line style of the frame around a turn's image."""
        scores = self.terms[FOLLOWING]
        score = float(scores.score[self.row, turn])
        if score != score:
            return {"color": INK, **DASHED}
        color = GOOD if score >= success_at else AMBER if score >= success_at / 2 else BAD
        return {"color": color, **FRAME}


def draw_strips(strips: Sequence[Strip], *, success_at: float, title: str) -> Figure:
    """Draw strips of chains below each other, with one block per chain.

    The frame of a turn is green if its "following" score is at least ``success_at``, amber from
    half of it, red below, and dashed if there is no score. Small images are enlarged without blur;
    large ones get more space. A chain too long for one row is wrapped into rows that are legible at
    a width of 1,600 pixels, with the number of each turn and a mark of its success.

    Args:
        strips: at least one strip.
        success_at: least score of a turn that was followed: 5 for Likert, 1 for yes or no.
        title: title of any length.

    Returns:
        The figure, as wide as the longest row needs.

    Raises:
        ValueError: there is no strip.

    Example:
        >>> import torch
        >>> scores = TurnScores(torch.tensor([[5.0]]), torch.tensor([[True]]), {})
        >>> images = [Image.new("RGB", (12, 12), color) for color in ("gray", "red")]
        >>> strip = Strip("chain 7", ["Make it red"], images, {"following": scores}, row=0)
        >>> figure = draw_strips([strip], success_at=5, title="Round 100")
        >>> [text.get_text() for text in figure.texts][-2:]
        ['following', '5']
    """
    if not strips:
        raise ValueError("strips: expected at least one, got none")
    with house_style():
        same = groupby(strips, key=lambda strip: (strip.chain_id, tuple(strip.instructions)))
        cell = SMALL if max(max(x.size) for x in strips) < LARGE_FROM else LARGE
        blocks = [_Block(list(members), cell, success_at) for _, members in same]
        return _lay_out(blocks, title, _legend(success_at))


Lines = list[tuple[str, str, str]]  # name, value, color


class _Block:
    """Strips of one chain below its instructions, in several rows if it is long."""

    def __init__(self, strips: list[Strip], cell: float, success_at: float) -> None:
        self.strips, self.cell, self.success_at = strips, cell, success_at
        first = strips[0]
        self.ratio = min(max(h / w for w, h in (x.size for x in strips)), TALLEST)
        self.label = LABEL if any(strip.label for strip in strips) else 0.0
        self.rows = _rows(len(first.images), cell, self.label)
        several = len(self.rows) > 1
        words = [f"{n}. {x}" if several else x for n, x in enumerate(first.instructions, start=1)]
        named = [*wrap(first.chain_id, cell, SCORE_SIZE, most=CHAIN_LINES), "reference"]
        self.headers = [named, *(wrap(x, cell, TEXT_SIZE) for x in words)]
        self.scores = [
            [
                [strip.mark(turn, success_at)] * several + strip.score_lines(turn, cell)
                for turn in range(len(words))
            ]
            for strip in strips
        ]
        self.width = self.label + len(self.rows[0]) * (cell + GAP) - GAP
        self.height = sum(
            self._header(row) + sum(self._strip(scores, row) for scores in self.scores)
            for row in self.rows
        )

    def _header(self, row: range) -> float:
        """Return the height of the instructions above a row of images, in inches."""
        lines = max(len(self.headers[i]) for i in row)
        return line_height(TEXT_SIZE) * lines + UNDER_HEADER

    def _strip(self, scores: list[Lines], row: range) -> float:
        """Return the height of a strip's row with its scores, in inches."""
        lines = max((len(scores[i - 1]) for i in row if i), default=0)
        return self.cell * self.ratio + line_height(SCORE_SIZE) * lines + UNDER_STRIP

    def draw(self, page: Page, left: float, top: float) -> None:
        """Draw the block with its top left corner at this position."""
        start = left + self.label
        for row in self.rows:
            columns = [start + n * (self.cell + GAP) for n in range(len(row))]
            top += self._header(row)
            for x, i in zip(columns, row, strict=True):
                lines = self.headers[i]
                size, color = (TEXT_SIZE, INK) if i else (SCORE_SIZE, SOFT)
                y = top - UNDER_HEADER - line_height(size) * len(lines)
                page.text(x + self.cell / 2, y, lines, size=size, color=color, ha="center")
            for strip, scores in zip(self.strips, self.scores, strict=True):
                page.rotated(
                    start - BESIDE_LABEL,
                    top + self.cell * self.ratio / 2,
                    strip.label,
                    size=TEXT_SIZE,
                    color=INK,
                )
                for x, i in zip(columns, row, strict=True):
                    self._draw_picture(page, x, top, strip, i, scores)
                top += self._strip(scores, row)

    def _draw_picture(
        self, page: Page, x: float, y: float, strip: Strip, i: int, scores: list[Lines]
    ) -> None:
        """Draw the reference (``i = 0``), or the image of turn ``i`` with its scores below."""
        box, image = (self.cell, self.cell * self.ratio), strip.images[i]
        if i == 0:
            if image is not None:
                page.picture(x, y, box, image, **REFERENCE_FRAME)
            return
        assert image is not None
        page.picture(x, y, box, image, **strip.frame(i - 1, self.success_at))
        for n, (name, value, color) in enumerate(scores[i - 1]):
            below = y + box[1] + OVER_SCORES + n * line_height(SCORE_SIZE)
            page.text(x, below, [name], size=SCORE_SIZE, color=SOFT if value else color)
            right = x + self.cell
            page.text(right, below, [value], size=SCORE_SIZE, color=color, ha="right")


def _rows(pictures: int, cell: float, label: float) -> list[range]:
    """Split the images of a chain into rows of about equal length; one row if it fits."""
    around = 2 * MARGIN + label - GAP
    if pictures * (cell + GAP) + around <= ONE_ROW:
        return [range(pictures)]
    most = int((WRAPPED - around) / (cell + GAP))
    length = math.ceil(pictures / math.ceil(pictures / most))
    return [range(i, min(i + length, pictures)) for i in range(0, pictures, length)]


def _lay_out(blocks: list[_Block], title: str, legend: str) -> Figure:
    """Put blocks on a page below a title, in two columns if they fit."""
    widest = max(block.width for block in blocks)
    columns = 2 if len(blocks) > 1 and 2 * widest + BLOCK_GAP + 2 * MARGIN <= WIDEST else 1
    width = max(columns * (widest + BLOCK_GAP) - BLOCK_GAP, NARROWEST) + 2 * MARGIN
    heading = wrap(title, width - 2 * MARGIN, TITLE_SIZE)
    small = wrap(legend, width - 2 * MARGIN, SCORE_SIZE)
    rows = [blocks[i : i + columns] for i in range(0, len(blocks), columns)]
    heights = [max(block.height for block in row) for row in rows]
    top = MARGIN + line_height(TITLE_SIZE) * len(heading) + line_height(SCORE_SIZE) * len(small)
    top += UNDER_LEGEND
    gaps = BLOCK_GAP * (len(rows) - 1)
    page = Page(width, top + sum(heights) + gaps + MARGIN / 2)
    page.text(MARGIN, ABOVE_TITLE, heading, size=TITLE_SIZE, color=INK)
    under = ABOVE_TITLE + line_height(TITLE_SIZE) * len(heading) + UNDER_TITLE
    page.text(MARGIN, under, small, size=SCORE_SIZE, color=SOFT)
    for row, height in zip(rows, heights, strict=True):
        for i, block in enumerate(row):
            # Align at the bottom, where the images of blocks of equally many strips line up.
            drop = height - block.height if len(block.strips) == len(row[0].strips) else 0.0
            block.draw(page, MARGIN + i * (widest + BLOCK_GAP), top + drop)
        top += height + BLOCK_GAP
    return page.figure


def _legend(success_at: float) -> str:
    return (
        f"Frames: green, followed (a score of {success_at:g} or more); amber, half of that or "
        "more; red, less; dashed, no score."
    )


def _shown(scores: TurnScores, row: int, turn: int) -> tuple[str, str]:
    """Return the text of a score, and its color."""
    if (row, turn) in scores.lost:
        return f"lost: {scores.lost[row, turn].fault.value}", BAD
    score = float(scores.score[row, turn])
    if score != score:
        return "not measured", SOFT
    return f"{score:.0f}" if score == round(score) else f"{score:.3f}", INK
