"""Image statistics that no reward trains on: sharpness, color, edges, fine detail, diversity.

``...`` stands for any leading axes, such as ``B`` trajectories and ``N`` turns. Luma is
0.2126 R + 0.7152 G + 0.0722 B of the encoded values (the weights of Rec. 709). Pixels whose filter
would reach past the border are left out, so that padding creates no edges.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from mteditflow._checks import (
    Numbers,
    as_ids,
    check_count,
    check_floating,
    check_number,
    check_rank,
    check_tensor,
    check_values,
)

LUMA = (0.2126, 0.7152, 0.0722)
AXES = "[..., 3, height, width]"
NYQUIST = 0.5  # cycles a pixel
FLAT = 1e-10  # variance of luma up to which an image counts as flat: rounding noise only


@torch.no_grad()
def sharpness(images: Tensor) -> Tensor:
    r"""Variance of the Laplacian of luma, :math:`4 y_p - \sum_{q \sim p} y_q` inside the border.

    Blur lowers it, noise raises it. Adding a constant to all channels changes nothing.

    Args:
        images: [..., 3, H, W] with sides of at least 3 pixels; uint8, or floating point in [0, 1].

    Returns:
        [...] in [0, 16], float32 (float64 if given), detached.

    Raises:
        ValueError: wrong shape, or a value outside [0, 1] (divide bytes by 255).
        TypeError: neither uint8 nor floating point.

    Source: Pech-Pacheco et al. (ICPR 2000), as a measure of focus.

    Example:
        >>> board = (torch.arange(8)[:, None] + torch.arange(8)) % 2
        >>> sharpness(board.float().expand(3, 8, 8))  # the Laplacian is 4 or -4
        tensor(16.)
    """
    y = _luma(images, least=3)
    near = y[..., :-2, 1:-1] + y[..., 2:, 1:-1] + y[..., 1:-1, :-2] + y[..., 1:-1, 2:]
    return (4 * y[..., 1:-1, 1:-1] - near).var(dim=(-2, -1), correction=0)


@torch.no_grad()
def color_entropy(images: Tensor, *, bins: int = 8) -> Tensor:
    r"""Entropy of an image's colors in bits, :math:`-\sum_c p_c \log_2 p_c` over bins of RGB.

    Posterized images and blanked backgrounds lower it. It does not depend on where the pixels are.

    Args:
        images: [..., 3, H, W]; uint8, or floating point in [0, 1].
        bins: bins of each channel, of equal width, 1 to 64.

    Returns:
        [...] in [0, 3 log2 bins], float32 (float64 if given), detached: 0 for one color.

    Raises:
        ValueError: wrong shape, a value outside [0, 1], or a number out of range.
        TypeError: neither uint8 nor floating point.

    Example:
        >>> halves = torch.zeros(3, 4, 4)
        >>> halves[:, :2] = 1  # black and white, half each
        >>> color_entropy(halves)
        tensor(1.)
    """
    check_count("bins", bins, high=64)
    x = _pixels(images)
    # 1.0 belongs to the last bin.
    level = (x * bins).long().clamp(max=bins - 1).flatten(-2)
    color = (level[..., 0, :] * bins + level[..., 1, :]) * bins + level[..., 2, :]
    flat = color.reshape(-1, color.shape[-1])
    counts = torch.zeros(len(flat), bins**3, dtype=x.dtype, device=x.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=x.dtype))
    share = counts / flat.shape[1]
    entropy: Tensor = -torch.special.xlogy(share, share).sum(dim=1) / math.log(2)
    return entropy.reshape(color.shape[:-1])


@torch.no_grad()
def brightness(images: Tensor) -> Tensor:
    """Mean luma.

    Args:
        images: [..., 3, H, W]; uint8, or floating point in [0, 1].

    Returns:
        [...] in [0, 1], float32 (float64 if given), detached.

    Raises:
        ValueError: wrong shape, or a value outside [0, 1].
        TypeError: neither uint8 nor floating point.

    Example:
        >>> brightness(torch.full((3, 2, 2), 0.5))
        tensor(0.5000)
    """
    return _luma(images).mean(dim=(-2, -1))


@torch.no_grad()
def saturation(images: Tensor) -> Tensor:
    """Mean chroma, the largest channel minus the smallest.

    It is the numerator of HSV saturation. The division by the largest channel is left out, because
    it would count a trace of color in black as much as pure red. Adding a constant to all channels
    changes nothing.

    Args:
        images: [..., 3, H, W]; uint8, or floating point in [0, 1].

    Returns:
        [...] in [0, 1], float32 (float64 if given), detached: 0 for gray, 1 for pure colors.

    Raises:
        ValueError: wrong shape, or a value outside [0, 1].
        TypeError: neither uint8 nor floating point.

    Example:
        >>> saturation(torch.tensor([1.0, 0.25, 0.5]).reshape(3, 1, 1))
        tensor(0.7500)
    """
    x = _pixels(images)
    return (x.amax(dim=-3) - x.amin(dim=-3)).mean(dim=(-2, -1))


@torch.no_grad()
def edge_density(images: Tensor, *, threshold: float = 0.1) -> Tensor:
    """Share of pixels with an edge: a Sobel gradient of luma above a threshold.

    Args:
        images: [..., 3, H, W] with sides of at least 3 pixels; uint8, or floating point in [0, 1].
        threshold: smallest height of a straight step edge that counts, in units of luma, >= 0.

    Returns:
        [...] in [0, 1], over the pixels inside the border; float32 (float64 if given), detached.

    Raises:
        ValueError: wrong shape, a value outside [0, 1], or a negative threshold.
        TypeError: neither uint8 nor floating point.

    Example:
        >>> step = torch.zeros(3, 6, 6)
        >>> step[..., 3:] = 0.5  # seen from two of the four columns inside
        >>> edge_density(step)
        tensor(0.5000)
    """
    check_number("threshold", threshold, low=0.0)
    y = _luma(images, least=3)
    across, down = y[..., 2:] - y[..., :-2], y[..., 2:, :] - y[..., :-2, :]
    # Sobel over 4, so that a straight step of height h has gradient h.
    across = (across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]) / 4
    down = (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]) / 4
    edges = across.square() + down.square() > threshold**2
    return edges.to(y.dtype).mean(dim=(-2, -1))


@torch.no_grad()
def high_frequency_share(images: Tensor, *, cutoff: float = 0.25) -> Tensor:
    r"""Share of luma's energy about its mean that lies in fine detail.

    Fine detail consists of the coefficients of the orthonormal cosine transform whose frequency
    along either axis is at least the cutoff. Coefficient k of H rows has :math:`k / 2H` cycles per
    pixel. The transform preserves energy, so only the coarse coefficients are computed. It mirrors
    the image at its borders, so that different values at opposite borders add no fine detail.

    Args:
        images: [..., 3, H, W]; uint8, or floating point in [0, 1].
        cutoff: lowest frequency of fine detail, cycles per pixel, above 0 and at most 0.5.

    Returns:
        [...] in [0, 1], float32 (float64 if given), detached; 0 for a flat image.

    Raises:
        ValueError: wrong shape, a value outside [0, 1], or a number out of range.
        TypeError: neither uint8 nor floating point.

    Example:
        >>> wave = torch.cos(torch.pi * 6 * (torch.arange(8) + 0.5) / 8)  # 6 / 16 cycles a pixel
        >>> images = (wave / 2 + 0.5).expand(3, 8, 8)
        >>> [round(float(high_frequency_share(images, cutoff=c)), 4) for c in (0.25, 0.45)]
        [1.0, 0.0]
    """
    check_number("cutoff", cutoff, low=0.0, high=NYQUIST, open_low=True)
    y = _luma(images)
    y = y - y.mean(dim=(-2, -1), keepdim=True)
    rows, columns = (_cosines(size, cutoff, y) for size in y.shape[-2:])
    coarse = (rows @ y @ columns.mT).square().sum(dim=(-2, -1))
    total = y.square().sum(dim=(-2, -1))
    share = 1 - coarse / total.clamp(min=torch.finfo(y.dtype).tiny)
    # The share of rounding noise in a flat image would be arbitrary.
    flat = total <= FLAT * y.shape[-2] * y.shape[-1]
    return torch.where(flat, torch.zeros_like(share), share.clamp(0, 1))


@torch.no_grad()
def thumbnails(images: Tensor, *, side: int = 8) -> Tensor:
    """Average images over a grid of cells: cheap features, equal in number for any image size.

    Args:
        images: [..., 3, H, W]; uint8, or floating point in [0, 1].
        side: cells along each axis, at least 1; pixels are repeated if there are fewer than cells.

    Returns:
        [..., 3 side side] in [0, 1], float32 (float64 if given), detached.

    Raises:
        ValueError: wrong shape, a value outside [0, 1], or a number out of range.
        TypeError: neither uint8 nor floating point.

    Example:
        >>> thumbnails(torch.full((2, 3, 4, 6), 0.5), side=2).shape
        torch.Size([2, 12])
    """
    check_count("side", side)
    x = _pixels(images)
    cells: Tensor = adaptive_avg_pool2d(x.reshape(-1, *x.shape[-3:]), side)
    return cells.reshape(*x.shape[:-3], -1)


@torch.no_grad()
def group_distance(features: Tensor, group: Numbers) -> Tensor:
    r"""Mean distance of each sample to the others of its group, a measure of diversity.

    .. math:: d_i = \operatorname{mean}_{j \in g, j \neq i} \sqrt{\lVert f_i - f_j \rVert^2 / F}

    It is a root mean square over features, so thumbnails of two flat gray images of luma a and b
    are ``|a - b|`` apart. The mean over samples falls to 0 if a policy produces the same image from
    any noise. ``mteditflow.group_diversity`` uses the cosine distance to the nearest neighbor
    instead.

    Args:
        features: of each sample, [B, F], or [B, N, F] to compare each turn on its own; finite.
        group: integer group id of each sample, [B].

    Returns:
        [B] or [B, N], float32 (float64 if given), detached; NaN for a sample without others.

    Raises:
        ValueError: shapes do not match, or a feature is not finite.
        TypeError: features are not floating point, or ids not integers.

    Example:
        >>> flat = torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1).expand(3, 3, 2, 2)
        >>> group_distance(thumbnails(flat), torch.tensor([7, 7, 8]))
        tensor([0.5000, 0.5000,    nan])
    """
    check_floating(features=features)
    check_rank("features", features, 2, "[B, F] or [B, N, F]", maximum=3)
    check_values("features", features, features.isfinite(), "finite numbers")
    ids = as_ids(group, features.device)
    if ids.shape != features.shape[:1]:
        raise ValueError(
            f"group: expected one id for each of the {len(features)} samples, got {list(ids.shape)}"
        )
    x = features if features.dtype == torch.float64 else features.float()
    by_turn = x.reshape(len(x), -1, x.shape[-1]).transpose(0, 1)  # [N, B, F]
    # The matrix-product form of cdist rounds, and would not give 0 for duplicates.
    distance = torch.cdist(by_turn, by_turn, compute_mode="donot_use_mm_for_euclid_dist")
    others = (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool, device=x.device)
    total = torch.where(others, distance, 0).sum(dim=2).T / math.sqrt(x.shape[-1])
    return (total / others.sum(dim=1)[:, None]).reshape(features.shape[:-1])


def _pixels(images: Tensor) -> Tensor:
    """Check images; return them in [0, 1], float32 or float64."""
    check_tensor("images", images)
    check_rank("images", images, 3, AXES)
    if images.shape[-3] != 3:
        raise ValueError(f"images: expected shape {AXES}, got {list(images.shape)}")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise TypeError(f"images: expected uint8 or floating point, got {images.dtype}")
    check_values("images", images, (images >= 0) & (images <= 1), "values in [0, 1]")
    return images if images.dtype == torch.float64 else images.float()


def _luma(images: Tensor, *, least: int = 1) -> Tensor:
    """Return luma [..., H, W] of images whose sides have at least ``least`` pixels."""
    x = _pixels(images)
    if min(x.shape[-2:]) < least:
        raise ValueError(
            f"images: expected sides of at least {least} pixels, got {list(x.shape[-2:])}"
        )
    red, green, blue = x.unbind(dim=-3)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _cosines(size: int, cutoff: float, like: Tensor) -> Tensor:
    """Return the rows of the orthonormal DCT-II below the cutoff, [K, size]."""
    count = math.ceil(2 * size * cutoff)  # k / (2 size) < cutoff
    k = torch.arange(count, dtype=torch.float64, device="cpu")[:, None]
    place = torch.arange(size, dtype=torch.float64, device="cpu") + 0.5
    rows = torch.cos(torch.pi * k * place / size) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows.to(like)
