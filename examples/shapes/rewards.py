"""Exact rewards of the shapes world: pixels compared with the TRUE picture after every turn.

A judge that compares only neighboring pictures can approve a ruined chain. Here picture n is
compared with the result of n perfect edits of the initial one, so a turn that builds on an earlier
failure fails, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .world import COLORS, PALETTE, Chain, draw_index, thing_mask

TOLERANCE = 0.25  # largest distance in RGB at which a pixel counts as a palette color
LIKERT_STEPS = (0.3, 0.5, 0.7, 0.9)  # least shares of the target for scores 2, 3, 4, 5
STRICT_TARGET, STRICT_REST = 0.95, 0.98  # a square in place of a circle must not pass
ENOUGH = 0.9  # least share of a color's pixels for a lenient pass


@dataclass(frozen=True)
class Truth:
    """Truth of B chains of N turns; all masks are bool ``[B, N, H, W]``.

    Attributes:
        pictures: Palette indices of the true pictures, int8 ``[B, N + 1, H, W]``.
        changed: Pixels that turn n changes.
        target: Changed pixels, and those of the edited thing after turn n.
        kept: Pixels outside all edits up to turn n, before and after each.
    """

    pictures: Tensor
    changed: Tensor
    target: Tensor
    kept: Tensor

    @classmethod
    def of(cls, chains: Sequence[Chain]) -> Truth:
        """Compute the truth of chains of equal length."""
        pictures = np.stack([[draw_index(state) for state in chain.states] for chain in chains])
        changed = pictures[:, 1:] != pictures[:, :-1]
        before, after = np.zeros_like(changed), np.zeros_like(changed)
        for b, chain in enumerate(chains):
            for n, edit in enumerate(chain.edits):
                for mask, state in ((before, chain.states[n]), (after, chain.states[n + 1])):
                    for thing in state.things:
                        if thing.shape in (edit.shape, edit.value):  # value: the replacing shape
                            mask[b, n] |= thing_mask(thing)
        touched = np.logical_or.accumulate(changed | before | after, axis=1)
        arrays = (pictures, changed, changed | after, ~touched)
        return cls(*(torch.from_numpy(array) for array in arrays))

    def select(self, rows: Tensor) -> Truth:
        """Return the truth of some chains, by index; an index may repeat."""
        return Truth(self.pictures[rows], self.changed[rows], self.target[rows], self.kept[rows])


@dataclass(frozen=True)
class Scores:
    """Rewards per turn, each ``[B, N]``.

    Attributes:
        likert: Instruction following, 1..5 by the share of the target that is right.
        success: Whether the instruction was followed: the Likert score is 5.
        consistency: Share of right pixels among those outside all edits so far, in [0, 1].
        consecutive: Share of pixels outside this edit that equal the previous picture, in [0, 1],
            whether that was right or wrong.
        strict: Whether the whole picture is right: 95% of the target and 98% of all other pixels.
    """

    likert: Tensor
    success: Tensor
    consistency: Tensor
    consecutive: Tensor
    strict: Tensor


def score(images: Tensor, truth: Truth) -> Scores:
    """Score B chains of N pictures at once.

    Args:
        images: An editor's results, colors in [0, 1], ``[B, N, 3, H, W]``.
        truth: Truth of the same chains in the same order.

    Returns:
        The rewards, without gradient.

    Raises:
        ValueError: If images and truth differ in shape.
    """
    expected = (*truth.changed.shape[:2], 3, *truth.changed.shape[2:])
    if images.shape != expected:
        raise ValueError(f"images: expected shape {tuple(expected)}, got {tuple(images.shape)}")
    seen = read(images)
    right = seen == truth.pictures[:, 1:]
    before = torch.cat([truth.pictures[:, :1], seen[:, :-1]], dim=1)
    target, likert = target_share(right, truth), likert_of(right, truth)
    return Scores(
        likert=likert,
        success=likert == 5,
        consistency=_share(right, truth.kept),
        consecutive=_share(seen == before, ~truth.target),
        strict=(target >= STRICT_TARGET) & (_share(right, ~truth.target) >= STRICT_REST),
    )


def score_neighbors(images: Tensor, truth: Truth) -> Scores:
    """Score like a judge that compares each picture with the previous one.

    A pixel of the target passes if it equals the true picture, or if the turn does not change it
    and it equals the previous picture. Consistency compares the other pixels with the previous
    picture. So damage by an earlier turn costs nothing later, unless the turn edits those pixels.

    Args:
        images: As for :func:`score`.
        truth: As for :func:`score`.
    """
    exact, seen = score(images, truth), read(images)
    before = torch.cat([truth.pictures[:, :1], seen[:, :-1]], dim=1)
    passes = (seen == truth.pictures[:, 1:]) | ((seen == before) & ~truth.changed)
    likert = likert_of(passes, truth)
    return replace(exact, likert=likert, success=likert == 5, consistency=exact.consecutive)


def target_share(right: Tensor, truth: Truth) -> Tensor:
    """Return the smaller share of right pixels, ``[B, N]``: among the changed, or in the target."""
    return torch.minimum(_share(right, truth.changed), _share(right, truth.target))


def likert_of(right: Tensor, truth: Truth) -> Tensor:
    """Return the score 1..5 of every turn, ``[B, N]``, given right pixels, ``[B, N, H, W]``."""
    target = target_share(right, truth)
    return 1 + sum((target >= step).long() for step in LIKERT_STEPS)


def lenient_likert(images: Tensor, truth: Truth) -> Tensor:
    """Return the score 1..5 of every turn, ``[B, N]``, by a lenient judge.

    A pixel passes if its place is right (thing or background, in any color), or if its true color
    occurs often enough anywhere in the picture. So a thing in a wrong color passes, and one that
    was not moved.

    Args:
        images: As for :func:`score`.
        truth: As for :func:`score`.
    """
    seen, true = read(images), truth.pictures[:, 1:]
    place = ((seen >= 0) & (seen < len(COLORS))) == (true < len(COLORS))
    enough = _counts(seen) >= ENOUGH * _counts(true)
    color = enough.gather(-1, true.flatten(2).long()).reshape(true.shape)
    return likert_of(place | color, truth)


def read(images: Tensor) -> Tensor:
    """Return every pixel's nearest palette index, or -1 if none is within ``TOLERANCE``.

    Args:
        images: Colors in [0, 1], ``[..., 3, H, W]``.

    Returns:
        int8 ``[..., H, W]``.
    """
    pixels = images.detach().float().movedim(-3, -1)
    distance = torch.cdist(pixels.reshape(-1, 3), PALETTE)
    nearest, index = distance.min(dim=-1)
    index = torch.where(nearest <= TOLERANCE, index, -1)
    return index.reshape(pixels.shape[:-1]).to(torch.int8)


def _counts(index: Tensor) -> Tensor:
    """Count the pixels of each palette color, ``[B, N, H, W] -> [B, N, colors]``."""
    return torch.stack([(index == c).sum((-2, -1)) for c in range(len(PALETTE))], dim=-1)


def _share(right: Tensor, where: Tensor) -> Tensor:
    """Return the share of right pixels in ``where``; 1 if it is empty."""
    total = where.sum(dim=(-2, -1))
    return torch.where(total > 0, (right & where).sum(dim=(-2, -1)) / total.clamp(min=1), 1.0)
