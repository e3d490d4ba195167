"""Exact rewards of the shapes world, from pixels and against the TRUE picture after every turn.

A judge that sees only two neighboring pictures can call a ruined chain obedient. Here picture n
is compared with what n perfect edits would have made of the initial one, so a turn that works on
the wreck of an earlier one fails, as it should.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .world import COLORS, PALETTE, Chain, draw_index, thing_mask

TOLERANCE = 0.25  # distance in RGB up to which a pixel counts as having a color
LIKERT_STEPS = (0.3, 0.5, 0.7, 0.9)  # shares of the target that earn a score of 2, 3, 4, 5
STRICT_TARGET, STRICT_REST = 0.95, 0.98  # a square in a circle's place must not pass
ENOUGH = 0.9  # share of a colour's pixels that a lenient look asks for


@dataclass(frozen=True)
class Truth:
    """Truth of B chains of N turns; all masks are bool ``[B, N, H, W]``.

    Attributes:
        pictures: Palette indices of the true pictures, int8 ``[B, N + 1, H, W]``.
        changed: Pixels that turn n changes.
        target: Pixels that turn n is about: changed, or of the thing that it names.
        kept: Pixels that no turn up to n was about.
    """

    pictures: Tensor
    changed: Tensor
    target: Tensor
    kept: Tensor

    @classmethod
    def of(cls, chains: Sequence[Chain]) -> Truth:
        """Draw the truth of chains of equal length."""
        pictures = np.stack([[draw_index(state) for state in chain.states] for chain in chains])
        changed = pictures[:, 1:] != pictures[:, :-1]
        before, after = np.zeros_like(changed), np.zeros_like(changed)
        for b, chain in enumerate(chains):
            for n, edit in enumerate(chain.edits):
                for mask, state in ((before, chain.states[n]), (after, chain.states[n + 1])):
                    for thing in state.things:
                        if thing.shape in (edit.shape, edit.value):
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
        consistency: Share of what must not change that has not, in [0, 1].
        consecutive: Share of what the turn is not about that is as in the picture before, in
            [0, 1], right or wrong: what one sees who looks at neighbors alone.
        strict: Whether the whole picture is right: 95% of the target and 98% of everything else.
    """

    likert: Tensor
    success: Tensor
    consistency: Tensor
    consecutive: Tensor
    strict: Tensor


def score(images: Tensor, truth: Truth) -> Scores:
    """Score B chains of N pictures at once.

    Args:
        images: What an editor made at every turn, colors in [0, 1], ``[B, N, 3, H, W]``.
        truth: What it should have made, for the same chains in the same order.

    Returns:
        The rewards; without gradient.

    Raises:
        ValueError: If images and truth differ in shape.
    """
    expected = (*truth.changed.shape[:2], 3, *truth.changed.shape[2:])
    if images.shape != expected:
        raise ValueError(f"images must have shape {tuple(expected)}, got {tuple(images.shape)}")
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
    """Score as a judge does who compares each picture with the one before it.

    A pixel of the target passes if it is as the true picture has it, or if the turn does not change
    it and it is as in the picture before. Consistency is that of the rest with the picture before.
    So what an earlier turn spoiled costs nothing later, where the turn does not change it.

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
    """Share of the target that is right, ``[B, N]``: of what changed, or of the thing if less."""
    return torch.minimum(_share(right, truth.changed), _share(right, truth.target))


def likert_of(right: Tensor, truth: Truth) -> Tensor:
    """Score 1..5 of every turn, ``[B, N]``, by which pixels count as right, ``[B, N, H, W]``."""
    target = target_share(right, truth)
    return 1 + sum((target >= step).long() for step in LIKERT_STEPS)


def lenient_likert(images: Tensor, truth: Truth) -> Tensor:
    """Score 1..5 of every turn, ``[B, N]``, as one sees it who does not look closely.

    A pixel passes if only its place is right, something or background, in any color; or only its
    color, which need but occur often enough anywhere. So a thing in the wrong color passes, or
    one that was not moved.

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
    """Name every pixel's color: the nearest palette index, or -1 if none is near enough.

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
    """Pixels of each color of the palette, ``[B, N, H, W] -> [B, N, colors]``."""
    return torch.stack([(index == c).sum((-2, -1)) for c in range(len(PALETTE))], dim=-1)


def _share(right: Tensor, where: Tensor) -> Tensor:
    """Share of the pixels in ``where`` that are right; 1 where there are none to get wrong."""
    total = where.sum(dim=(-2, -1))
    return torch.where(total > 0, (right & where).sum(dim=(-2, -1)) / total.clamp(min=1), 1.0)
