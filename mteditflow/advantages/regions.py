r"""Advantages per latent token: a reward counts only in its region of the image.

Instruction following is decided inside the edited region, consistency outside it. There are three
steps. ``mask_coverage`` or ``box_coverage`` gives the share of each token that a region covers.
``token_weights`` turns these shares into weights in the layout of the latents. ``region_advantage``
sums the rewards' advantages, each times its weights. ``nft_loss``, ``adaptive_nft_loss``,
``flow_awr_loss``, ``exact_flow_awr_loss`` and ``matching_surrogate_loss`` accept per-token
advantages (for NFT, r) in place of one per row.

A token is a square of ``tile`` x ``tile`` pixels: the autoencoder's downsampling factor, times 2 if
latents are packed in squares of 2 x 2, such as 8 * 2 = 16 for FLUX. Tokens are numbered row by row
from the top left. If a side is not a multiple of the tile, the last tokens extend past the edge,
and only their part inside the image counts.

Source: advantages at the latent positions of a region, SpatialFlow-GRPO (arXiv 2606.26872) and
Edit-GRPO (arXiv 2605.16951), both known by their abstracts. Weights, normalization and layouts are
this library's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_real,
    check_choice,
    check_count,
    check_full_precision,
    check_kind,
    check_named,
    check_number,
    check_rank,
    check_shape,
    check_values,
    is_sequence,
)
from mteditflow._reduce import in_float64

Normalization = Literal["mean", "rms", "none"]
NORMALIZATIONS = ("mean", "rms", "none")


def token_tile(latent: Sequence[int], size: tuple[int, int]) -> int:
    """Side length in pixels of the square that each token covers.

    Args:
        latent: shape of one sample's latents: (L, C) if packed, else (C, ..., h, w).
        size: height and width of the image, pixels.

    Returns:
        The tile, for ``mask_coverage`` and ``box_coverage``.

    Raises:
        ValueError: the tokens are not whole squares that fill the image. The tile must then be
            given by hand: the autoencoder's factor times the side of a packed square.

    Example:
        >>> token_tile((1024, 64), (512, 512)), token_tile((16, 64, 32), (512, 256))
        (16, 8)
    """
    latent, (height, width) = _latent(latent), _size(size)
    rows = latent[-2]
    if len(latent) == 2:  # L = height * width / tile^2
        tile = math.isqrt(height * width // latent[0])
        fits = tile > 0 and latent[0] * tile**2 == height * width
        fits = fits and height % tile == width % tile == 0
    else:
        tile = height // rows
        fits = (rows * tile, latent[-1] * tile) == (height, width) and tile > 0
    if not fits:
        raise ValueError(
            f"latent: expected tokens that are whole squares of a picture of {height} x {width} "
            f"pixels, got {list(latent)}"
        )
    return tile


def mask_coverage(mask: Numbers, tile: int) -> Tensor:
    """Share of each token that a region covers, from the region's pixel mask.

    Args:
        mask: membership of each pixel in the region, boolean or in [0, 1], [..., H, W].
        tile: side of a token in pixels, >= 1.

    Returns:
        [..., h, w] in [0, 1], with h = ceil(H / tile) and w = ceil(W / tile): the mean over the
        pixels of each token that lie inside the image. float32, or float64 if given.

    Raises:
        ValueError: there are no two axes, or a value is out of range.
        TypeError: the mask is half precision, or the tile is no integer.

    Example:
        >>> mask = torch.zeros(4, 6)
        >>> mask[0, 1:6] = 1
        >>> mask_coverage(mask, 2)
        tensor([[0.2500, 0.5000, 0.5000],
                [0.0000, 0.0000, 0.0000]])
        >>> mask_coverage(mask, 4)  # the second token is half outside of the picture
        tensor([[0.1875, 0.2500]])
    """
    given = as_real("mask", mask)
    check_full_precision(mask=given)
    check_rank("mask", given, 2, "[..., H, W]")
    check_values("mask", given, (given >= 0) & (given <= 1), "values in [0, 1]")
    check_count("tile", tile)
    (exact,) = in_float64(given)
    # Area pooling as two matrix products, because the last tokens may be partial.
    down, across = (_membership(side, tile, exact) for side in exact.shape[-2:])
    pixels = down.sum(dim=1)[:, None] * across.sum(dim=1)
    return (down @ exact @ across.T / pixels).to(given)


def box_coverage(boxes: Numbers, size: tuple[int, int], tile: int) -> Tensor:
    """Share of each token that the union of boxes covers, exact for fractional box edges.

    The overlap of boxes counts once.

    Args:
        boxes: boxes of one image, for example from a detector: (x1, y1, x2, y2) in pixels, [K, 4];
            the top left corner of the image is (0, 0). Parts outside the image are cut off. K may
            be 0.
        size: height and width of the image, pixels.
        tile: side of a token in pixels, >= 1.

    Returns:
        [h, w] in [0, 1], as from ``mask_coverage``.

    Raises:
        ValueError: the shape differs, a number is not finite, or a box ends before it begins.
        TypeError: the boxes are half precision, or a side is no integer.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 3.0, 1.0], [2.0, 0.5, 3.0, 2.0]])
        >>> box_coverage(boxes, (4, 4), 2)
        tensor([[0.5000, 0.5000],
                [0.0000, 0.0000]])
    """
    given = as_real("boxes", boxes)
    check_full_precision(boxes=given)
    given = given.reshape(0, 4) if given.numel() == 0 else given
    if given.ndim != 2 or given.shape[1] != 4:
        raise ValueError(f"boxes: expected shape [K, 4], got {list(given.shape)}")
    height, width = _size(size)
    check_count("tile", tile)
    check_values("boxes", given, given.isfinite(), "finite numbers")
    ordered = (given[:, 2:] >= given[:, :2]).repeat(1, 2)
    check_values("boxes", given, ordered, "x1 <= x2 and y1 <= y2")
    (exact,) = in_float64(given)
    # Token and box edges cut the image into rectangles, each wholly inside or outside the union.
    left, top, right, bottom = exact.unbind(dim=1)
    x, own_width, across = _cuts(torch.cat([left, right]), width, tile)
    y, own_height, down = _cuts(torch.cat([top, bottom]), height, tile)
    inside_x = (left[:, None] <= x) & (x < right[:, None])
    inside_y = (top[:, None] <= y) & (y < bottom[:, None])
    covered = (inside_y[:, :, None] & inside_x[:, None, :]).any(dim=0).to(exact)
    down, across = down * own_height, across * own_width
    area = down.sum(dim=1)[:, None] * across.sum(dim=1)
    return (down @ covered @ across.T / area).to(given)


def token_weights(
    coverage: Numbers,
    latent: Sequence[int],
    *,
    outside: float = 0.0,
    normalization: Normalization = "mean",
) -> Tensor:
    r"""Per-token weights of a region's reward, in the layout of the latents.

    A token of which the region covers the share c has the raw weight :math:`o + (1 - o)\,c`, with
    the outside weight o. Raw weights are normalized over the image:

    - "mean" divides by their mean, so that the weights have mean 1;
    - "rms" divides by their root mean square, so that the summed gradient of tokens with
      independent directions is as large as for a reward of the whole image;
    - "none" keeps them, so that no token counts more than 1.

    A region that covers the whole image gives 1 everywhere: the reward is broadcast. So does an
    empty region, except that "none" keeps its outside weight if that is above 0.

    Args:
        coverage: share of each token that the region covers, in [0, 1], [..., h, w].
        latent: shape of one sample's latents: (L, C) if packed, with L >= h * w, else
            (C, ..., h, w). Tokens after the first h * w are padding and get 1.
        outside: weight o in [0, 1] of a token outside the region, relative to one inside.
        normalization: "mean", "rms" or "none".

    Returns:
        [..., L, 1] or [..., 1, ..., h, w], which broadcasts over latents; dtype of ``coverage``.

    Raises:
        ValueError: a value is out of range, or coverage and latents differ in their tokens.
        TypeError: the coverage is half precision.

    Example:
        >>> coverage = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
        >>> token_weights(coverage, (16, 2, 2), outside=0.5)[0]
        tensor([[1.3333, 0.6667],
                [1.0000, 1.0000]])
        >>> token_weights(coverage, (5, 64)).T  # with a token of padding
        tensor([[2., 0., 1., 1., 1.]])
    """
    given = as_real("coverage", coverage)
    check_full_precision(coverage=given)
    check_rank("coverage", given, 2, "[..., h, w]")
    check_values("coverage", given, (given >= 0) & (given <= 1), "values in [0, 1]")
    check_number("outside", outside, low=0.0, high=1.0)
    check_choice("normalization", normalization, NORMALIZATIONS)
    latent, (rows, columns) = _latent(latent), given.shape[-2:]
    tokens = rows * columns
    if not (latent[0] >= tokens if len(latent) == 2 else latent[-2:] == (rows, columns)):
        raise ValueError(
            f"latent: expected the {rows} x {columns} tokens of coverage, got {list(latent)}"
        )
    share = outside + (1 - outside) * in_float64(given)[0]
    weight = _normalized(share, normalization)
    # An empty region (o = 0) has no weights to normalize; all 0 would delete its reward.
    weight = torch.where((share == 0).all(dim=(-2, -1), keepdim=True), 1, weight).to(given)
    if len(latent) == 2:
        padding = weight.new_ones(*weight.shape[:-2], latent[0] - tokens)
        return torch.cat([weight.flatten(-2), padding], dim=-1)[..., None]
    ones = (1,) * (len(latent) - 2)
    return weight.reshape(*weight.shape[:-2], *ones, rows, columns)


def region_advantage(advantages: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    r"""Advantage of each token, :math:`A(p) = \sum_r A_r\,w_r(p)`.

    Args:
        advantages: name of a reward to its advantage, already times the reward's fusion weight,
            [B, N]; float32 or float64.
        weights: name to per-token weights [B, N, ...], as ``token_weights`` returns them for
            coverages [B, N, h, w]. Rewards without an entry are broadcast over the tokens.

    Returns:
        [B, N, ...], the ``advantage`` of ``NFT``, ``FlowAWR`` and ``AWM``. An advantage that is
        equal over tokens trains like its [B, N] value. Advantages are detached.

    Raises:
        ValueError: there are no weights, a name has no advantage, or shapes do not match.
        TypeError: half precision.

    Example:
        >>> advantages = {"following": torch.tensor([[2.0]]), "consistency": torch.tensor([[-0.5]])}
        >>> inside = token_weights(torch.tensor([[[[1.0, 0.0]]]]), (2, 64))
        >>> outside = token_weights(torch.tensor([[[[0.0, 1.0]]]]), (2, 64))
        >>> region_advantage(advantages, {"following": inside, "consistency": outside})[0, 0].T
        tensor([[ 4., -1.]])
    """
    check_named("advantages", advantages, "tensors [B, N]")
    check_named("weights", weights, "tensors [B, N, ...]")
    if not advantages or not weights or not set(weights) <= set(advantages):
        raise ValueError(
            f"weights: expected names among {sorted(advantages)}, at least one, got "
            f"{sorted(weights)}"
        )
    check_full_precision(**{f"advantages[{name!r}]": x for name, x in advantages.items()})
    check_full_precision(**{f"weights[{name!r}]": x for name, x in weights.items()})
    first, like = next(iter(advantages.items()))
    tokens = next(iter(weights.values())).shape[2:]
    check_rank(f"advantages[{first!r}]", like, 2, "[B, N]", maximum=2)
    for name, own in advantages.items():
        check_shape(f"advantages[{name!r}]", own, like.shape, f"of {first!r}")
    for name, own in weights.items():
        check_shape(f"weights[{name!r}]", own, (*like.shape, *tokens), "[B, N, ...]")
    ones = (1,) * len(tokens)
    total = like.new_zeros(*like.shape, *tokens)
    for name, own in advantages.items():
        spread = own.detach().reshape(*own.shape, *ones)
        total = total + (spread * weights[name].to(own) if name in weights else spread)
    return total


def _normalized(share: Tensor, normalization: str) -> Tensor:
    """Return normalized shares [..., h, w]; 0 where all shares are 0."""
    if normalization == "none":
        return share
    peak = share.amax(dim=(-2, -1), keepdim=True)
    relative = share / torch.where(peak == 0, 1, peak)  # squares of tiny shares leave float64
    power = 2 if normalization == "rms" else 1
    mean = relative.pow(power).mean(dim=(-2, -1), keepdim=True).pow(1 / power)
    return relative / torch.where(mean == 0, 1, mean)


def _membership(side: int, tile: int, like: Tensor) -> Tensor:
    """Return the pixels of a side that each token holds, [tokens, side], 0 or 1."""
    pixels = torch.arange(side, device=like.device, dtype=torch.int64) // tile
    tokens = torch.arange(-(-side // tile), device=like.device, dtype=torch.int64)
    return (tokens[:, None] == pixels).to(like)


def _cuts(edges: Tensor, side: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a side at the given edges and between tokens.

    Returns:
        Middle and length of each piece, [P], and its membership in tokens, [tokens, P].
    """
    tokens = torch.arange(-(-side // tile), device=edges.device, dtype=torch.int64)
    grid = torch.cat([tokens * tile, tokens.new_tensor([side])]).to(edges)
    cuts = torch.unique(torch.cat([edges.clamp(0, side), grid]))
    # No piece crosses a cut, so its middle decides for the whole piece.
    middle = (cuts[1:] + cuts[:-1]) / 2
    return middle, cuts.diff(), (tokens[:, None] == (middle // tile)).to(edges)


def _latent(latent: Sequence[int]) -> tuple[int, ...]:
    """Return a shape of latents, checked."""
    if not is_sequence(latent):
        raise TypeError(f"latent: expected a shape, got {type(latent).__name__}")
    shape = tuple(latent)
    for axis, side in enumerate(shape):
        check_count(f"latent[{axis}]", side)
    if len(shape) < 2:
        raise ValueError(f"latent: expected (L, C) or (C, ..., h, w), got {list(shape)}")
    return shape


def _size(size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width, checked."""
    check_kind("size", size, Sequence, "height and width")
    if len(size) != 2:
        raise ValueError(f"size: expected height and width, got {len(size)} numbers")
    for axis, side in enumerate(size):
        check_count(f"size[{axis}]", side)
    return size[0], size[1]
