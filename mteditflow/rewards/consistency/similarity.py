"""Similarity of images: reduction of features to vectors whose cosine is content consistency.

Shapes: ``K`` images or crops, ``R`` register tokens, ``P`` patches, ``C`` channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mteditflow._checks import check_full_precision, check_mask, check_shape, check_values

MIN_WEIGHT = 0.5  # share of background below which a patch has no weight


class Features(NamedTuple):
    """Tokens of K images from a vision transformer; float32 or float64."""

    cls: Tensor  # [K, C]
    registers: Tensor  # [K, R, C], R may be 0
    patches: Tensor  # [K, P, C], row by row
    grid: tuple[int, int]  # rows and columns of the patches
    size: tuple[int, int]  # height and width of the model's input


class Strict:
    """Default rules: register tokens are not patches, and a term without a measure is left out."""

    unmeasured: float | None = None  # value of a term that cannot be measured
    border = 0  # pixels by which a box extends in the mask beyond its right and lower edge
    eps = 0.0  # added to the sum of weights; changes no cosine

    def has_objects(self, background: bool) -> bool:
        """Return whether a pair has an object term, given whether its background must stay."""
        return True

    def tokens(self, features: Features) -> Tensor:
        """Return the tokens that are averaged, [K, P, C]."""
        return features.patches

    def weights(self, mask: Tensor, features: Features) -> Tensor:
        """Return the weight of each of these tokens in the background, [P]."""
        return patch_weights(mask, features.grid)


class Compat(Strict):
    """Rules of EdiVal-Bench's public scorer, for comparison with published numbers.

    Register tokens count as patches, and the grid is the factor pair of their number that is
    nearest to the aspect ratio of the image, so that the mask is misplaced. Boxes cover their last
    row and column in the mask, as PIL draws them. The mask is resized to the model's input by PIL's
    NEAREST, then to the grid by area average. A term that cannot be measured scores 0.

    Source: EdiVal-Bench (arXiv 2509.13399), its public implementation.
    """

    unmeasured = 0.0
    border = 1
    eps = 1e-6

    def has_objects(self, background: bool) -> bool:
        """Return ``background``: a pair whose background may change has no term at all."""
        return background

    def tokens(self, features: Features) -> Tensor:
        """Return registers and patches, [K, R + P, C]."""
        return torch.cat([features.registers, features.patches], dim=1)

    def weights(self, mask: Tensor, features: Features) -> Tensor:
        """Return the weight of each of these tokens in the background, [R + P]."""
        height, width = features.size
        grid = nearest_grid(self.tokens(features).shape[1], height / width)
        scaled = _nearest(mask, (height, width)).double()
        return soft(functional.interpolate(scaled[None, None], grid, mode="area"))


def _nearest(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a boolean mask [H, W] to ``size`` by PIL's NEAREST.

    PIL accumulates its steps, so where the center of a target pixel falls on an edge between two
    pixels, it takes the former. torch's "nearest-exact" differs in 25 of 224 rows from 512.
    """
    from PIL import Image  # imported here: ``Features`` needs torch alone

    pixels = Image.fromarray(mask.to(torch.uint8).cpu().numpy())
    scaled = pixels.resize((size[1], size[0]), Image.Resampling.NEAREST)
    return torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.bool).view(size)


TOKENS: Mapping[str, Strict] = {"strict": Strict(), "compat": Compat()}


def patch_weights(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the exact share of background in each patch, even if patches cut pixels.

    Args:
        mask: mask of the background, boolean [H, W].
        grid: rows and columns of the patches that tile the image.

    Returns:
        Shares, float64 [rows * columns]; 0 where the share is below one half.

    Example:
        >>> mask = torch.arange(8).expand(2, 8) >= 3
        >>> patch_weights(mask, (1, 4))
        tensor([0.0000, 0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """
    check_mask("mask", mask, mask.shape[:2], "[H, W]")
    rows, columns = (_overlap(*axis) for axis in zip(mask.shape, grid, strict=True))
    # In units of 1/(rows * columns) pixel each patch has the area H * W, and all numbers are whole
    # until the division, so that a share of exactly one half is found as such.
    share = rows @ mask.double() @ columns.T / mask.numel()
    return soft(share)


def soft(share: Tensor) -> Tensor:
    """Set shares below one half to 0 and flatten."""
    return torch.where(share < MIN_WEIGHT, 0, share).flatten()


def _overlap(pixels: int, cells: int) -> Tensor:
    """Return the overlap of cells and pixels on an axis, in 1/cells of a pixel: [cells, pixels]."""
    cell = torch.arange(cells, dtype=torch.float64, device="cpu")[:, None] * pixels
    pixel = torch.arange(pixels, dtype=torch.float64, device="cpu") * cells
    end = torch.minimum(cell + pixels, pixel + cells)
    return (end - torch.maximum(cell, pixel)).clamp(min=0)


def nearest_grid(count: int, aspect: float) -> tuple[int, int]:
    """Return the factorization into rows and columns whose ratio is nearest to an aspect ratio.

    Args:
        count: number of tokens.
        aspect: height over width.

    Example:
        >>> nearest_grid(200, 1.0)
        (10, 20)
    """
    divisors = [d for d in range(1, count + 1) if d * d <= count and count % d == 0]
    grids = [grid for d in divisors for grid in ((count // d, d), (d, count // d))]
    return min(grids, key=lambda grid: abs(grid[0] / grid[1] - aspect))


def object_summary(features: Features, rules: Strict) -> Tensor:
    """Return the CLS and the mean token of each crop, [K, 2, C]."""
    return torch.stack([features.cls, rules.tokens(features).mean(dim=1)], dim=1)


def background_summary(tokens: Tensor, weights: Tensor, rules: Strict) -> Tensor:
    """Return the weighted mean of the normalized tokens of one image, [1, C].

    Args:
        tokens: tokens of the image, [P, C], as ``rules.tokens`` returns them.
        weights: weights of these tokens, [P].
        rules: rules whose ``eps`` is added to the sum of weights.
    """
    weights = weights.to(tokens)
    mean = weights @ functional.normalize(tokens, dim=-1) / (weights.sum() + rules.eps)
    return mean[None]


def similarity(source: Tensor, edited: Tensor) -> Tensor:
    """Return the mean cosine of the V vectors of two summaries, [..., V, C] -> [...]; unclamped.

    Example:
        >>> source = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]])
        >>> edited = torch.tensor([[[0.0, 2.0], [6.0, 8.0]]])
        >>> similarity(source, edited)
        tensor([0.5000])
    """
    return functional.cosine_similarity(source, edited, dim=-1).mean(dim=-1)


def pixel_similarity(source: Tensor, edited: Tensor, mask: Tensor | None = None) -> float:
    """Return 1 - mean absolute difference of pixels scaled to [0, 1].

    Args:
        source: image, uint8 [3, H, W].
        edited: image, uint8 [3, H, W].
        mask: pixels to compare, boolean [H, W], at least one True; ``None`` for all.

    Example:
        >>> black = torch.zeros(3, 2, 2, dtype=torch.uint8)
        >>> pixel_similarity(black, black + 51)
        0.8
    """
    # The difference stays uint8 without wrapping, and its sum is an exact integer.
    difference = torch.maximum(source, edited) - torch.minimum(source, edited)
    count = difference[0].numel()
    if mask is not None:
        difference, count = difference * mask, int(mask.sum())
    return 1 - int(difference.sum()) / (255 * len(difference) * count)


def check_features(features: Features, count: int) -> None:
    """Check that tokens of ``count`` images have the right shapes and are finite.

    Raises:
        ValueError: a shape is wrong, or a token is not finite.
        TypeError: a dtype is not float32 or float64.
    """
    check_full_precision(cls=features.cls, registers=features.registers, patches=features.patches)
    channels, (rows, columns) = features.cls.shape[-1], features.grid
    registers = features.registers.shape[1]
    check_shape("cls", features.cls, (count, channels), "[K, C]")
    check_shape("registers", features.registers, (count, registers, channels), "[K, R, C]")
    check_shape("patches", features.patches, (count, rows * columns, channels), "[K, P, C]")
    for name, tokens in zip(features._fields[:3], features[:3], strict=True):
        check_values(name, tokens, tokens.isfinite(), "finite tokens")
