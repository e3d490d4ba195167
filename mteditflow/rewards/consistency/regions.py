"""Boxes, masks and the grid of patches: where in an image content consistency looks.

Boxes are [K, 4], absolute (x1, y1, x2, y2) in pixels; the top left corner of the image is (0, 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mteditflow._checks import check_floating, check_mask

MIN_WEIGHT = 0.5  # a patch of which less is background counts as none


def pixel_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut boxes to whole pixels of the image, toward zero; one that is not finite is dropped.

    Args:
        boxes: [K, 4], floating point; they may reach beyond the image.
        size: height and width of the image.

    Returns:
        int64 [K', 4] on the CPU; x1 may equal x2, and y1 may equal y2, where a box has no area.

    Raises:
        ValueError: the shape is another one.
        TypeError: the boxes are not floating point.

    Example:
        >>> pixel_boxes(torch.tensor([[-3.0, 1.9, 9.9, 70.0]]), (64, 64))
        tensor([[ 0,  1,  9, 64]])
    """
    check_floating(boxes=boxes)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes: expected shape [K, 4], got {list(boxes.shape)}")
    height, width = size
    found = boxes.detach().double().cpu()
    found = found[found.isfinite().all(dim=1)]
    limit = found.new_tensor([width, height, width, height])
    return torch.minimum(found.clamp(min=0), limit).long()


def with_area(boxes: Tensor) -> Tensor:
    """Keep the boxes that hold at least one pixel.

    Example:
        >>> with_area(torch.tensor([[0, 1, 9, 64], [5, 5, 5, 9]]))
        tensor([[ 0,  1,  9, 64]])
    """
    return boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]


def background_mask(boxes: Tensor, size: tuple[int, int], *, border: int = 0) -> Tensor:
    """Mark what is in none of the boxes.

    Args:
        boxes: of whole pixels, int64 [K, 4].
        size: height and width of the image.
        border: pixels that each box takes beyond its right and lower end.

    Returns:
        Boolean [height, width]; all true where there is no box.

    Example:
        >>> background_mask(torch.tensor([[0, 0, 2, 1]]), (2, 3))
        tensor([[False, False,  True],
                [ True,  True,  True]])
    """
    mask = torch.ones(size, dtype=torch.bool)
    for left, top, right, bottom in boxes.tolist():
        mask[top : bottom + border, left : right + border] = False
    return mask


def patch_weights(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of each patch that is background, exactly, also where patches cut pixels.

    Args:
        mask: boolean [H, W], true on the background.
        grid: rows and columns of the patches that tile the image.

    Returns:
        float64 [rows * columns], 0 where the share is below one half.

    Example:
        >>> mask = background_mask(torch.tensor([[0, 0, 3, 2]]), (2, 8))
        >>> patch_weights(mask, (1, 4))
        tensor([0.0000, 0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """
    check_mask("mask", mask, mask.shape[:2], "[H, W]")
    rows, columns = (_overlap(*axis) for axis in zip(mask.shape, grid, strict=True))
    share = rows @ mask.double() @ columns.T / mask.numel()  # whole numbers until divided
    return soft(share)


def soft(share: Tensor) -> Tensor:
    """Set shares below one half to 0; flattened."""
    return torch.where(share < MIN_WEIGHT, 0, share).flatten()


def _overlap(pixels: int, cells: int) -> Tensor:
    """Overlap of each cell with each pixel of an axis, in 1/cells of a pixel: [cells, pixels]."""
    cell = torch.arange(cells, dtype=torch.float64)[:, None] * pixels
    pixel = torch.arange(pixels, dtype=torch.float64) * cells
    end = torch.minimum(cell + pixels, pixel + cells)
    return (end - torch.maximum(cell, pixel)).clamp(min=0)
