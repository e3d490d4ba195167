"""Regions to compare: searches and crops of a batch of pairs, and the background around boxes.

Images are identified by their index in ``Pictures.pixels``, so that an image shared by many pairs
and chains is searched and encoded once. Boxes are [K, 4], absolute (x1, y1, x2, y2) in pixels; the
top left corner of the image is (0, 0).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mteditflow._checks import check_floating
from mteditflow.rewards.consistency.pairs import Pair
from mteditflow.rewards.consistency.similarity import Strict

SIZE = 512  # images are compared at this height and width
WHOLE = (0, 0, SIZE, SIZE)

Names = tuple[str, ...]
Box = tuple[int, ...]  # (x1, y1, x2, y2) in whole pixels
Search = tuple[int, Names]  # a picture, and the names to find in it
Crop = tuple[int, Box]  # a picture, and a box in it


class Task(NamedTuple):
    """Two pictures, and the names of each term; empty if there is no such term."""

    source: int
    edited: int
    unchanged: Names
    everything: Names


class Regions(NamedTuple):
    """Two pictures, and the regions to compare in both; ``None`` if there is no such term."""

    source: int
    edited: int
    crops: list[Box] | None
    mask: Tensor | None  # boolean [SIZE, SIZE], true on the background


class Pictures:
    """Images resized for comparison, stored without duplicates.

    Example:
        >>> pictures = Pictures()
        >>> [pictures.add(Image.new("RGB", (8, 8), color)) for color in ("red", "blue", "red")]
        [0, 1, 0]
        >>> pictures.pixels[0].shape
        torch.Size([3, 512, 512])
    """

    def __init__(self) -> None:
        self.pixels: list[Tensor] = []  # uint8 [3, SIZE, SIZE]
        self._index: dict[bytes, int] = {}

    def add(self, image: Image.Image) -> int:
        """Add an image of any mode and size; return its index."""
        data = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS).tobytes()
        digest = hashlib.sha256(data).digest()
        if digest not in self._index:
            self._index[digest] = len(self.pixels)
            pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            self.pixels.append(pixels.view(SIZE, SIZE, 3).permute(2, 0, 1))
        return self._index[digest]

    def crop(self, picture: int, box: Box) -> Tensor:
        """Cut a box out of a picture, uint8 [3, h, w]."""
        left, top, right, bottom = box
        return self.pixels[picture][:, top:bottom, left:right]


def clean_names(names: Iterable[str]) -> Names:
    """Normalize names for a detector: lower case, no full stops, none empty or repeated.

    Example:
        >>> clean_names(["A Cat.", "a cat", " . ", "traffic  light"])
        ('a cat', 'traffic light')
    """
    cleaned = (" ".join(name.lower().replace(".", "").split()) for name in names)
    return tuple(dict.fromkeys(name for name in cleaned if name))


def tasks_of(
    pictures: Pictures, images: Sequence[Image.Image], pairs: Sequence[Pair], rules: Strict
) -> list[Task]:
    """Add the images of a chain's pairs to ``pictures``; return the task of each pair.

    Raises:
        ValueError: a pair names an image that does not exist.
    """
    used = sorted({index for pair in pairs for index in (pair.source, pair.edited)})
    if used and used[-1] >= len(images):
        raise ValueError(f"pairs: expected images 0..{len(images) - 1}, got image {used[-1]}")
    picture = {index: pictures.add(images[index]) for index in used}
    return [
        Task(
            picture[pair.source],
            picture[pair.edited],
            clean_names(pair.unchanged_objects if rules.has_objects(pair.background) else ()),
            clean_names(pair.all_objects if pair.background else ()),
        )
        for pair in pairs
    ]


def searches_of(tasks: Sequence[Task]) -> list[Search]:
    """List the detections needed: unchanged objects in the source, all objects in both."""
    searches: dict[Search, None] = {}  # an ordered set: equal searches of many tasks run once
    for task in tasks:
        searches[task.source, task.unchanged] = None
        searches[task.source, task.everything] = searches[task.edited, task.everything] = None
    return [search for search in searches if search[1]]


def regions_of(task: Task, boxes: Mapping[Search, Tensor], rules: Strict) -> Regions:
    """Convert boxes to the regions to compare: crops by the source's boxes, and a mask."""
    crops = mask = None
    if task.unchanged:
        crops = [tuple(box) for box in with_area(boxes[task.source, task.unchanged]).tolist()]
    if task.everything:
        both = torch.cat([boxes[p, task.everything] for p in (task.source, task.edited)])
        mask = background_mask(both, (SIZE, SIZE), border=rules.border)
    return Regions(task.source, task.edited, crops, mask)


def crops_of(regions: Sequence[Regions]) -> dict[Crop, dict[int, Tensor]]:
    """List the crops whose features are needed, each with the background masks by region."""
    crops: dict[Crop, dict[int, Tensor]] = {}
    for n, (source, edited, boxes, mask) in enumerate(regions):
        for picture in (source, edited):
            for box in boxes or ():
                crops.setdefault((picture, box), {})
            if mask is not None:
                crops.setdefault((picture, WHOLE), {})[n] = mask
    return crops


def pixel_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Clip boxes to whole pixels of the image, rounded toward zero; drop non-finite boxes.

    Args:
        boxes: boxes [K, 4], floating point; they may reach beyond the image.
        size: height and width of the image.

    Returns:
        Boxes of whole pixels, int64 [K', 4] on the CPU; those without area are kept.

    Raises:
        ValueError: the shape is not [K, 4].
        TypeError: the boxes are not floating point.

    Example:
        >>> pixel_boxes(torch.tensor([[-3.0, 1.9, 9.9, 70.0]]), (64, 64))
        tensor([[ 0,  1,  9, 64]])
    """
    check_floating(boxes=boxes)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes: expected shape [K, 4], got {list(boxes.shape)}")
    height, width = size
    boxes = boxes.detach().double().cpu()
    boxes = boxes[boxes.isfinite().all(dim=1)]
    limit = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit).long()


def with_area(boxes: Tensor) -> Tensor:
    """Return the boxes that contain at least one pixel.

    Example:
        >>> with_area(torch.tensor([[0, 1, 9, 64], [5, 5, 5, 9]]))
        tensor([[ 0,  1,  9, 64]])
    """
    return boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]


def background_mask(boxes: Tensor, size: tuple[int, int], *, border: int = 0) -> Tensor:
    """Return the mask of the pixels that are in none of the boxes.

    Args:
        boxes: boxes of whole pixels, int64 [K, 4].
        size: height and width of the image.
        border: pixels by which each box extends beyond its right and lower edge.

    Returns:
        Mask, boolean [height, width]; all True if there is no box.

    Example:
        >>> background_mask(torch.tensor([[0, 0, 2, 1]]), (2, 3))
        tensor([[False, False,  True],
                [ True,  True,  True]])
    """
    mask = torch.ones(size, dtype=torch.bool, device="cpu")
    for left, top, right, bottom in boxes.tolist():
        mask[top : bottom + border, left : right + border] = False
    return mask
