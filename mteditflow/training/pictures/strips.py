"""Strips of chains: the reference, what each turn made of it, its instruction and its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from mteditflow.evaluation.evaluation import FOLLOWING
from mteditflow.evaluation.figures import AMBER, BAD, DPI, FAINT, GOOD, INK, SOFT, house_style
from mteditflow.rewards import TurnScores

POINTS = 72  # in an inch
LEADING = 1.32  # from one line to the next, in font sizes
SMALL, LARGE, LARGE_FROM = 1.75, 2.7, 128  # inches of a picture; pixels that need the large one
MARGIN, GAP, LABEL, BLOCK_GAP = 0.28, 0.13, 0.3, 0.34  # inches
TITLE_SIZE, TEXT_SIZE, SCORE_SIZE = 12.5, 9.5, 8.5  # points
WIDEST, NARROWEST = 17.0, 4.23  # inches: two blocks stand side by side where WIDEST is enough
ABOVE_TITLE, UNDER_TITLE, UNDER_LEGEND = 0.8 * MARGIN, 0.03, 0.2  # inches
UNDER_HEADER, OVER_SCORES, UNDER_STRIP = 0.07, 0.045, 0.16  # inches
BESIDE_LABEL = 0.17  # inches from the middle of a label to its strip
TALLEST, CHAIN_LINES = 2.0, 3  # height over width of a picture; lines of a chain's name
BASELINE = 1.02  # from the top of a line, in font sizes
FRAME: dict[str, Any] = {"linewidth": 3.2}
DASHED = FRAME | {"linestyle": (0, (2.4, 1.6)), "capstyle": "butt"}
REFERENCE_FRAME = {"color": FAINT, "linewidth": 2}
UPWARDS: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "center"}


@dataclass(frozen=True, eq=False)
class Strip:
    """One trajectory to be drawn.

    Args:
        chain_id: of its chain; strips of one chain that follow each other share instructions.
        instructions: one per turn, N.
        images: [reference, turn 1, ..., turn N]; the reference is None where there was none.
        terms: scores by name; "following" colors the frames.
        row: of this trajectory in the terms.
        label: said at its left, such as "member 3".
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
        """Width and height of its first image, pixels."""
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

    def frame(self, turn: int, success_at: float) -> dict[str, Any]:
        """Color and line of the frame around what a turn made."""
        scores = self.terms[FOLLOWING]
        score = float(scores.score[self.row, turn])
        if score != score:
            return {"color": INK, **DASHED}
        color = GOOD if score >= success_at else AMBER if score >= success_at / 2 else BAD
        return {"color": color, **FRAME}


def draw_strips(strips: Sequence[Strip], *, success_at: float, title: str) -> Figure:
    """Draw strips of chains under each other, in blocks of one chain.

    The frame of a turn is green if its "following" score is at least ``success_at``, amber from
    half of it, red below, and dashed if there is none. Images of 12 pixels are enlarged without
    blur; large ones get more room.

    Args:
        strips: at least one.
        success_at: score from which a turn is followed: 5 for Likert, 1 for yes or no.
        title: in words, of any length.

    Returns:
        The figure, as wide as the longest chain needs.

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


class _Block:
    """The strips of one chain, under its instructions."""

    def __init__(self, strips: list[Strip], cell: float, success_at: float) -> None:
        self.strips, self.cell, self.success_at = strips, cell, success_at
        first = strips[0]
        self.ratio = min(max(h / w for w, h in (x.size for x in strips)), TALLEST)
        self.label = LABEL if any(strip.label for strip in strips) else 0.0
        named = [*wrap(first.chain_id, cell, SCORE_SIZE, most=CHAIN_LINES), "reference"]
        self.headers = [named, *(wrap(x, cell, TEXT_SIZE) for x in first.instructions)]
        self.header = line_height(TEXT_SIZE) * max(map(len, self.headers)) + UNDER_HEADER
        self.scores = [
            [strip.score_lines(turn, cell) for turn in range(len(first.instructions))]
            for strip in strips
        ]
        self.width = self.label + len(self.headers) * (cell + GAP) - GAP
        self.height = self.header + sum(self._row(scores) for scores in self.scores)

    def _row(self, scores: list[list[tuple[str, str, str]]]) -> float:
        """Height of a strip with its scores."""
        lines = max(map(len, scores))
        return self.cell * self.ratio + line_height(SCORE_SIZE) * lines + UNDER_STRIP

    def draw(self, page: Page, left: float, top: float) -> None:
        """Draw the block with its top left corner here."""
        columns = [left + self.label + i * (self.cell + GAP) for i in range(len(self.headers))]
        for i, (x, lines) in enumerate(zip(columns, self.headers, strict=True)):
            size, color = (TEXT_SIZE, INK) if i else (SCORE_SIZE, SOFT)
            y = top + self.header - UNDER_HEADER - line_height(size) * len(lines)
            page.text(x + self.cell / 2, y, lines, size=size, color=color, ha="center")
        y = top + self.header
        for strip, scores in zip(self.strips, self.scores, strict=True):
            self._draw_strip(page, columns, y, strip, scores)
            y += self._row(scores)

    def _draw_strip(
        self,
        page: Page,
        columns: list[float],
        y: float,
        strip: Strip,
        scores: list[list[tuple[str, str, str]]],
    ) -> None:
        box = (self.cell, self.cell * self.ratio)
        beside, middle = columns[0] - BESIDE_LABEL, y + box[1] / 2
        page.rotated(beside, middle, strip.label, size=TEXT_SIZE, color=INK)
        if strip.images[0] is not None:
            page.picture(columns[0], y, box, strip.images[0], **REFERENCE_FRAME)
        for turn, lines in enumerate(scores):
            x = columns[turn + 1]
            frame = strip.frame(turn, self.success_at)
            image = strip.images[turn + 1]
            assert image is not None
            page.picture(x, y, box, image, **frame)
            for i, (name, value, color) in enumerate(lines):
                below = y + box[1] + OVER_SCORES + i * line_height(SCORE_SIZE)
                page.text(x, below, [name], size=SCORE_SIZE, color=SOFT)
                right = x + self.cell
                page.text(right, below, [value], size=SCORE_SIZE, color=color, ha="right")


def _lay_out(blocks: list[_Block], title: str, legend: str) -> Figure:
    """Put blocks on a page, in two columns where they have room, under a title."""
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
    """A score in words, and the color of these."""
    if (row, turn) in scores.lost:
        return f"lost: {scores.lost[row, turn].fault.value}", BAD
    score = float(scores.score[row, turn])
    if score != score:
        return "not measured", SOFT
    return f"{score:.0f}" if score == round(score) else f"{score:.3f}", INK


def line_height(size: float) -> float:
    """From one line of text to the next, in inches."""
    return LEADING * size / POINTS


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width of a line as it will be drawn, in inches; call it in ``house_style``."""
    font = font_manager.FontProperties(size=size, weight=weight)
    width, *_ = _renderer().get_text_width_height_descent(text, font, ismath=False)
    return float(width) / DPI


@lru_cache
def _renderer() -> Any:
    return FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()


def wrap(text: str, width: float, size: float, *, most: int = 12) -> list[str]:
    """Break text into lines of at most ``width`` inches; what is beyond ``most`` lines is cut.

    A word that is wider than a line is broken, so text without spaces is too.
    """
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and text_width(lines[-1] + letter, size) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and text_width(f"{last} …", size) > width:
        last = last[:-1]
    return [*lines[: most - 1], f"{last} …"]


class Page:
    """A figure of a size in inches; x goes right and y down from the top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")

    def text(self, x: float, y: float, lines: Sequence[str], *, size: float, **style: Any) -> None:
        """Write lines whose top is at y."""
        for i, line in enumerate(lines):
            base = y + line_height(size) * i + BASELINE * size / POINTS
            self.figure.text(x / self.width, 1 - base / self.height, line, fontsize=size, **style)

    def rotated(self, x: float, y: float, text: str, *, size: float, color: str) -> None:
        """Write upwards, around a point."""
        place = x / self.width, 1 - y / self.height
        self.figure.text(*place, text, fontsize=size, color=color, **UPWARDS)

    def picture(
        self, x: float, y: float, size: tuple[float, float], image: Image.Image, **frame: Any
    ) -> None:
        """Show an image, enlarged without blur if it is small, in a frame."""
        width, height = size
        box = (
            x / self.width,
            1 - (y + height) / self.height,
            width / self.width,
            height / self.height,
        )
        axes = self.figure.add_axes(box)
        axes.imshow(np.asarray(image.convert("RGB")), interpolation="auto")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(visible=True, **frame)
