"""Damage that accumulates over many turns: collapse of the image, and wear outside the edits.

Shapes: ``C`` or ``B`` chains (one image each), ``N`` turns. SR@k of long-chain benchmarks, the
share of chains whose turns 1 to k all succeed, is ``instruction_following``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_mask,
    as_numbers,
    as_real,
    check_floating,
    check_mask,
    check_rank,
    check_shape,
    check_values,
    first_tensor,
)
from mteditflow._reduce import promote
from mteditflow.metrics.shares import mean_over_chains, success_and_mask


def collapse_rate(destroyed: Numbers, *, valid: Numbers | None = None) -> Tensor:
    """CR@k: share of chains that have collapsed by turn k.

    A chain collapses at turn t if the images of turns t and t + 1 are both destroyed, and it stays
    collapsed. CR@k therefore looks one turn ahead: destroyed turns 3 and 4 count in CR@3. A single
    destroyed turn is not a collapse. A collapse thus cannot start at turn N, and CR@N is CR@(N - 1)
    over the same chains.

    Args:
        destroyed: 0 or 1 per turn, [C, N]; boolean, integer or floating point.
        valid: boolean, [C, N]: turns whose flag is known. CR@k needs the flags of turns 1 to k + 1
            (to N for the last turn). A chain that lacks one of them leaves the denominator, even if
            it collapsed before or turn k is not destroyed: keeping only chains whose outcome is
            known from the remaining flags would bias the share. A chain shorter than N thus counts
            up to its second-to-last turn.

    Returns:
        [N] in [0, 1], float32 (float64 if given, as lists of floats are), non-decreasing where all
        turns are valid; NaN for a turn without such chains.

    Raises:
        ValueError: wrong shape, or a value other than 0 and 1.
        TypeError: ``valid`` is not boolean.

    Source: LME-Bench of MT-OPSD (arXiv 2609.35611).

    Example:
        >>> collapse_rate(torch.tensor([[0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]))
        tensor([0.0000, 0.0000, 0.5000, 0.5000, 0.5000])
    """
    return mean_over_chains(*collapsed(*success_and_mask("destroyed", destroyed, valid)))


def collapsed(destroyed: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether each chain has collapsed by each turn, and where that is known, [C, N]."""
    flags = torch.where(mask, destroyed, torch.zeros_like(destroyed))
    # A collapse begins where a turn and the next are destroyed; none can begin at turn N.
    begins = flags * torch.cat([flags[:, 1:], torch.zeros_like(flags[:, :1])], dim=1)
    known = mask.long().cumprod(dim=1).bool()
    return begins.cummax(dim=1).values, torch.cat([known[:, 1:], known[:, -1:]], dim=1)


def wear(
    images: Numbers,
    original: Numbers,
    *,
    edited: Numbers | None = None,
    valid: Numbers | None = None,
) -> Tensor:
    r"""Wear per turn: mean absolute difference to the original outside all edits so far.

    .. math:: \text{wear}_n = \operatorname{mean}_{p \notin E_1 \cup \dots \cup E_n}
        |x_n(p) - x_0(p)|

    No mask is needed for chains whose every instruction asks for no change: any difference from the
    original is damage.

    Args:
        images: image after each turn, [B, N, channels, height, width], in [0, 1].
        original: reference image, [B, channels, height, width], in [0, 1].
        edited: boolean, [B, N, height, width]: pixels that each turn was allowed to change. None:
            no pixels.
        valid: boolean, [B, N]: turns whose image counts. The edit mask of an invalid turn still
            applies to later turns.

    Returns:
        [B, N] in [0, 1], float32 (float64 if given): 0 where nothing outside the edits has changed;
        NaN where ``valid`` is false or the edits so far cover the whole image. Gradient flows to
        ``images`` and ``original``.

    Raises:
        ValueError: wrong shape, or a counted value outside [0, 1] (divide bytes by 255).
        TypeError: a mask is not boolean, or the images are not real.

    Example:
        >>> original = torch.zeros(1, 3, 2, 2)
        >>> images = torch.stack([original + 0.1, original + 0.3], dim=1)
        >>> wear(images, original)
        tensor([[0.1000, 0.3000]])
        >>> everywhere = torch.ones(1, 2, 2, 2, dtype=torch.bool)
        >>> everywhere[:, 0] = False  # turn 2 may change all of it
        >>> wear(images, original, edited=everywhere)
        tensor([[0.1000,    nan]])
    """
    like = first_tensor(images, original)
    images = as_real("images", images, like=like)
    original = as_real("original", original, like=images if like is None else like)
    check_floating(images=images, original=original)
    check_rank("images", images, 5, "[B, N, channels, height, width]", maximum=5)
    axes = "[B, channels, height, width]"
    check_shape("original", original, (len(images), *images.shape[2:]), axes)
    images, original = promote(images, original)
    turns, pixels = images[:, :, 0, 0, 0], images[:, :, 0]
    mask = as_mask("valid", valid, turns, "[B, N]")
    counted = mask[:, :, None, None].expand_as(pixels)
    if edited is not None:
        allowed = as_numbers("edited", edited, device=images.device)
        check_mask("edited", allowed, pixels.shape, "[B, N, height, width]")
        counted = counted & (allowed.cumsum(dim=1, dtype=torch.int32) == 0)
    outside, expected = ~counted[:, :, None], "values in [0, 1]"
    check_values("images", images, outside | ((images >= 0) & (images <= 1)), expected)
    unused = outside.all(dim=1)
    check_values("original", original, unused | ((original >= 0) & (original <= 1)), expected)
    kept = (torch.where(outside, 0, x) for x in (images, original[:, None]))
    distance = torch.sub(*kept).abs().mean(dim=2)
    return distance.sum(dim=(2, 3)) / counted.sum(dim=(2, 3))
