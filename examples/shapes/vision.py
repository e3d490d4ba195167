"""Rule-based vision: find the things in a picture, and recover the state of a clean picture.

The inverse of drawing. The scripted judge reads reference pictures with it, and content consistency
uses it in place of a neural detector.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .rewards import read
from .world import (
    BACKGROUNDS,
    CELL,
    CELLS,
    COLORS,
    IMAGE_SIZE,
    MATERIALS,
    SHAPES,
    State,
    Thing,
    draw_index,
    thing_mask,
)

EXTENT = 5  # side of a thing within its cell, pixels
ALIKE = 0.9  # least share of these pixels that must match a drawing for a detection


def to_index(image: Tensor) -> np.ndarray:
    """Return the palette indices of an image of any size, int8 ``[12, 12]``; -1 for none.

    Args:
        image: uint8 ``[3, H, W]``.
    """
    middle = torch.arange(IMAGE_SIZE) + 0.5  # the center pixel of every block is read
    rows, columns = ((middle * side / IMAGE_SIZE).long() for side in image.shape[1:])
    return read(image[:, rows][:, :, columns] / 255).numpy()


def pixels_of(image: Image.Image) -> Tensor:
    """Turn a PIL image into uint8 ``[3, H, W]``."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def to_pil(image: Tensor) -> Image.Image:
    """Turn colors in [0, 1], ``[3, H, W]``, into a PIL image."""
    pixels = (255 * image.clamp(0, 1)).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def find_things(index: np.ndarray, names: Sequence[str] | None = None) -> list[Thing]:
    """Find the thing in each cell of a picture, even of a damaged one.

    Args:
        index: Palette indices, int8 ``[H, W]``.
        names: Names to look for, such as ``"red circle"``; None: all.

    Returns:
        At most one thing per cell, in reading order of the cells.
    """
    wanted = {f"{color} {shape}" for color in COLORS for shape in SHAPES}
    wanted &= set(wanted if names is None else names)
    found = []
    for cell in range(len(CELLS)):
        top, left = CELL * (cell // 2), CELL * (cell % 2)
        part = index[top : top + EXTENT, left : left + EXTENT]
        alike, thing = max(
            (
                (float(((part == COLORS.index(color)) == stencil).mean()), thing)
                for color in COLORS
                if np.any(part == COLORS.index(color))
                for thing, stencil in _stencils(color, cell)
            ),
            key=lambda item: item[0],
            default=(0.0, None),
        )
        if thing is not None and alike >= ALIKE and f"{thing.color} {thing.shape}" in wanted:
            found.append(thing)
    return found


def _stencils(color: str, cell: int) -> list[tuple[Thing, np.ndarray]]:
    top, left = CELL * (cell // 2), CELL * (cell % 2)
    things = [Thing(s, color, m, (cell,)) for s in SHAPES for m in MATERIALS]
    return [
        (thing, thing_mask(thing)[top : top + EXTENT, left : left + EXTENT]) for thing in things
    ]


def read_state(index: np.ndarray) -> State:
    """Return the state whose drawing equals this picture exactly.

    Raises:
        ValueError: If there is no such state.
    """
    cells: dict[tuple[str, str, str], list[int]] = {}
    for thing in find_things(index):
        cells.setdefault((thing.shape, thing.color, thing.material), []).extend(thing.cells)
    things = [Thing(*look, tuple(where)) for look, where in cells.items()]
    things.sort(key=lambda thing: SHAPES.index(thing.shape))
    for background in BACKGROUNDS:
        state = State(background, tuple(things))
        if np.array_equal(draw_index(state), index):
            return state
    raise ValueError("index: expected a picture of the shapes world, pixel for pixel")


class RuleDetector:
    """Rule-based ``Detector`` and ``ScoredDetector`` for names such as ``"red circle"``."""

    def __call__(self, images: Sequence[Tensor], names: Sequence[Sequence[str]]) -> list[Tensor]:
        """Return the boxes of the things found in each picture, uint8 ``[3, H, W]`` of any size."""
        return [
            _boxes(image, find_things(to_index(image), wanted))
            for image, wanted in zip(images, names, strict=True)
        ]

    def detect(
        self, images: Sequence[Tensor], names: Sequence[Sequence[str]], *, threshold: float
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the same boxes with scores, all 1; ``threshold`` has no effect."""
        found = self(images, names)
        return [(boxes, torch.ones(len(boxes), dtype=torch.float32)) for boxes in found]


def _boxes(image: Tensor, things: Sequence[Thing]) -> Tensor:
    """Return boxes (x1, y1, x2, y2) in pixels of the image, float32 ``[K, 4]``."""
    scale = torch.tensor(image.shape[1:]).flip(0) / IMAGE_SIZE
    corners = [divmod(thing.cells[0], 2) for thing in things]
    boxes = [
        [(column * CELL, row * CELL), (column * CELL + EXTENT, row * CELL + EXTENT)]
        for row, column in corners
    ]
    return (torch.tensor(boxes).reshape(-1, 2, 2) * scale).reshape(-1, 4)
