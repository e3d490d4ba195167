"""Boxes of a detector, and the relations between them that EdiVal-Bench's checks use.

Boxes are [K, 4]: (x1, y1, x2, y2) as shares of the image, in the detector's order. Thresholds are
compared strictly and in the dtype of the boxes, as in the public scorer, so that ties agree.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SIDES = {  # axis, and the sign of target minus reference along it
    "left": (0, -1),
    "right": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
}
ONE_OBJECT = 0.8  # IoU above which two boxes count as one object


class Boxes(NamedTuple):
    """Boxes found for a name in an image."""

    boxes: Tensor  # [K, 4]
    scores: Tensor  # [K]

    def keep(self, mask: Tensor) -> Boxes:
        """Return the boxes where a mask [K] is true."""
        return Boxes(self.boxes[mask], self.scores[mask])

    def above(self, threshold: float) -> Boxes:
        """Return the boxes whose score is strictly above a threshold."""
        return self.keep(self.scores > threshold)

    def best(self) -> Tensor:
        """Return the box of the highest score, the first of equal ones: [1, 4], or [0, 4].

        Example:
            >>> corners = torch.tensor([[0.0, 0, 1, 1], [0.5, 0, 1, 1], [0, 0.5, 1, 1]])
            >>> Boxes(corners, torch.tensor([0.4, 0.9, 0.9])).best()
            tensor([[0.5000, 0.0000, 1.0000, 1.0000]])
        """
        if not len(self.scores):
            return self.boxes
        return self.boxes[(self.scores == self.scores.amax()).nonzero()[0]]


def larger_than(boxes: Tensor, share: float) -> Tensor:
    """Return which boxes have both sides above a share of the image's sides, boolean [K]."""
    return ((boxes[:, 2:] - boxes[:, :2]).abs() > share).all(dim=1)


def iou(one: Tensor, other: Tensor) -> Tensor:
    """Return the intersection over union of boxes [K, 4] and [L, 4], [K, L]; 0 without any area.

    Example:
        >>> iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2], [2, 0, 3, 2]]))
        tensor([[0.3333, 0.0000]])
    """
    first, second = one[:, None], other[None]
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    common = (high - low).clamp(min=0).prod(dim=-1)
    union = _area(first) + _area(second) - common
    return torch.where(union == 0, 0, common / union)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)


def count_apart(boxes: Tensor) -> int:
    """Count objects: a box whose IoU with an earlier counted one is above 0.8 is the same object.

    Example:
        >>> count_apart(torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 0.9], [0, 0, 0.5, 1]]))
        2
    """
    same = iou(boxes, boxes) > ONE_OBJECT
    counted: list[int] = []
    for n in range(len(boxes)):
        if not same[counted, n].any():
            counted.append(n)
    return len(counted)


def centers(boxes: Tensor) -> Tensor:
    """Return the centers of boxes, (x, y), [K, 2]."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def lies(points: Tensor, position: str, references: Tensor, *, margin: float = 0.0) -> bool:
    """Return whether any point lies on a side of any reference point by more than a margin.

    Args:
        points: points (x, y), [K, 2].
        position: "left", "right", "above" or "below"; only its axis counts.
        references: reference points (x, y), [L, 2].
        margin: distance along that axis that must be exceeded, in the unit of the points.

    Example:
        >>> cup, plate = torch.tensor([[0.2, 0.5]]), torch.tensor([[0.5, 0.5]])
        >>> lies(cup, "left", plate), lies(cup, "below", plate), lies(cup[:0], "left", plate)
        (True, False, False)
    """
    axis, sign = SIDES[position]
    distance = sign * (points[:, None, axis] - references[:, axis])
    return bool((distance > margin).any())


def contains(one: Tensor, other: Tensor) -> bool:
    """Return whether a box [1, 4] contains another one [1, 4], equal sides included."""
    return bool((one[:, :2] <= other[:, :2]).all() and (one[:, 2:] >= other[:, 2:]).all())
