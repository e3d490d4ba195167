"""Page of images and text, with positions in inches from the top left corner."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from mteditflow.evaluation.figures import DPI

POINTS = 72  # points per inch
LEADING = 1.32  # distance between lines, in font sizes
BASELINE = 1.02  # distance of the baseline from the top of a line, in font sizes
UPWARDS: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "center"}


def line_height(size: float) -> float:
    """Return the distance between lines of text, in inches."""
    return LEADING * size / POINTS


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Return the width of a line of text, in inches; call it inside ``house_style``."""
    font = font_manager.FontProperties(size=size, weight=weight)
    width, *_ = _renderer().get_text_width_height_descent(text, font, ismath=False)
    return float(width) / DPI


@lru_cache
def _renderer() -> Any:
    return FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()


def wrap(text: str, width: float, size: float, *, most: int = 12) -> list[str]:
    """Break text into lines of at most ``width`` inches; text beyond ``most`` lines is cut off.

    A word that is wider than a line is broken between letters.
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
    """Figure with a size in inches; x goes right and y goes down from the top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")

    def text(self, x: float, y: float, lines: Sequence[str], *, size: float, **style: Any) -> None:
        """Draw lines of text whose top is at y."""
        for i, line in enumerate(lines):
            base = y + line_height(size) * i + BASELINE * size / POINTS
            self.figure.text(x / self.width, 1 - base / self.height, line, fontsize=size, **style)

    def rotated(self, x: float, y: float, text: str, *, size: float, color: str) -> None:
        """Draw text that runs upwards, centered at a point."""
        place = x / self.width, 1 - y / self.height
        self.figure.text(*place, text, fontsize=size, color=color, **UPWARDS)

    def picture(
        self, x: float, y: float, size: tuple[float, float], image: Image.Image, **frame: Any
    ) -> None:
        """Draw an image in a frame, enlarged without blur if it is small.

        ``size`` is width and height in inches.
        """
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
