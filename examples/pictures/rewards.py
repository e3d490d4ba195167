"""Rewards of the world of pictures, from pixels.

The exact rewards compare picture n with the result of n perfect edits of the reference. A judge of
neighbors compares it with picture n - 1, as real judges do: it passes an edit that follows the
instruction, whatever earlier turns did to the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from .chains import Chain
from .drawing import draw, thing_mask

# Errors are mean absolute differences over colors, in [0, 1].
CHANGED = 0.03  # difference above which a pixel counts as changed
LIKERT_STEPS = (0.95, 0.85, 0.7, 0.6)  # errors below these shares of no edit's earn 2, 3, 4, 5
NOTHING = 0.15  # cap on the error of no edit, so that large edits must be precise, too
RIGHT = 0.09  # largest error in the target of a followed instruction
CONSISTENT = 0.15  # error at which consistency is 0
BLOCK = 8  # side of the blocks that must all be right in a strictly right picture, pixels
LOOK = 9  # side of the square whose mean color a lenient judge compares, pixels
STRICT = 0.1  # bound on the mean error of such a block


@dataclass(frozen=True)
class Truth:
    """True pictures of a chain of N turns, H x W pixels, and the masks of its turns.

    Attributes:
        pictures: true pictures, the reference first, in [0, 1], float32 [N + 1, 3, H, W].
        changed: pixels that turn n changes, bool [N, H, W]; all of them if it asks for no change.
        target: changed pixels, and those of the edited thing after turn n, bool [N, H, W].
        kept: pixels outside all edits up to turn n, bool [N, H, W].
    """

    pictures: Tensor
    changed: Tensor
    target: Tensor
    kept: Tensor

    @classmethod
    def of(cls, chain: Chain) -> Truth:
        """Compute the truth of a chain."""
        drawn = np.stack([draw(scene) for scene in chain.scenes]).transpose(0, 3, 1, 2) / 255.0
        changed = (np.abs(np.diff(drawn, axis=0)) > CHANGED).any(axis=1)
        touched, target = changed.copy(), changed.copy()
        for n, edit in enumerate(chain.edits):
            for scene, mask in ((chain.scenes[n], touched[n]), (edit.result, target[n])):
                for thing in scene.things:
                    if thing.kind in edit.kinds:
                        mask |= thing_mask(thing)
            touched[n] |= target[n]
            if edit.task_type == "no_change":
                changed[n] = target[n] = True
        kept = ~np.logical_or.accumulate(_grown(touched), axis=0)
        pictures = torch.from_numpy(drawn.astype(np.float32))
        return cls(pictures, *(torch.from_numpy(mask) for mask in (changed, target, kept)))


def _grown(mask: np.ndarray) -> np.ndarray:
    """Grow a mask [N, H, W] by one pixel, since the autoencoder blurs edges."""
    grown = mask.copy()
    for axis in (-2, -1):
        whole = grown.copy()
        for step in (-1, 1):
            moved = np.roll(whole, step, axis=axis)
            edge = 0 if step == 1 else -1  # the line that np.roll wrapped around
            moved[(..., edge) if axis == -1 else (..., edge, slice(None))] = False
            grown |= moved
    return grown


@dataclass(frozen=True)
class Scores:
    """Rewards per turn, each float32 [N].

    Attributes:
        following: instruction following, 1..5; 5 is success.
        consistency: consistency in [0, 1] of pixels outside all edits; NaN if there are none.
        consecutive: consistency with the previous picture, of pixels outside this edit.
        strict: 1 if the instruction is followed and the rest of the picture is right, else 0.
        wear: mean absolute error of pixels outside all edits, in [0, 1]; NaN if there are none.
    """

    following: Tensor
    consistency: Tensor
    consecutive: Tensor
    strict: Tensor
    wear: Tensor


def score(images: Tensor, truth: Truth) -> Scores:
    """Score the pictures of a chain against the true ones.

    Args:
        images: edited pictures in [0, 1], float32 [N, 3, H, W]; N may be below the truth's.
        truth: truth of the chain.

    Raises:
        ValueError: the shapes do not fit.
    """
    error = _errors(images, truth.pictures[1 : len(images) + 1])
    following = _likert(error, truth, len(images))
    rest, wear = ~truth.target[: len(images)], _mean(error, truth.kept[: len(images)])
    before = torch.cat([truth.pictures[:1], images[:-1]])
    consecutive = _consistency(_mean(_errors(images, before), rest))
    strict = (following == 5) & (_worst(error, rest) < STRICT)
    return Scores(following, _consistency(wear), consecutive, strict.float(), wear)


def lenient_following(images: Tensor, truth: Truth) -> Tensor:
    """Return the score of following, 1..5, [N], by a lenient judge.

    The error of a pixel is that of its brightness or of the mean color around it, whichever is
    smaller. So a thing in a wrong color of equal brightness passes, and a badly blurred one.

    Args:
        images: as for ``score``.
        truth: as for ``score``.

    Raises:
        ValueError: the shapes do not fit.
    """
    true = truth.pictures[1 : len(images) + 1]
    gray = _errors(_brightness(images), _brightness(true))
    blurred = _errors(_blurred(images), _blurred(true))
    return _likert(torch.minimum(gray, blurred), truth, len(images))


def _brightness(images: Tensor) -> Tensor:
    weights = images.new_tensor([0.299, 0.587, 0.114])  # luma of ITU-R BT.601
    return (images * weights[:, None, None]).sum(dim=1, keepdim=True)


def _blurred(images: Tensor) -> Tensor:
    return avg_pool2d(images, LOOK, stride=1, padding=LOOK // 2, count_include_pad=False)


def score_neighbors(images: Tensor, truth: Truth) -> Scores:
    """Score the pictures of a chain like a judge that compares each with the previous one.

    The error of a pixel in the target is that to the true picture, or that of its change from the
    previous picture, whichever is smaller. Consistency compares the rest of the picture with the
    previous one, so ``consecutive`` would be the same and is NaN.

    Args:
        images: as for ``score``.
        truth: as for ``score``.

    Raises:
        ValueError: the shapes do not fit.
    """
    count = len(images)
    true, before = truth.pictures, torch.cat([truth.pictures[:1], images[:-1]])
    wanted = true[1 : count + 1] - true[:count]
    error = torch.minimum(
        _errors(images, true[1 : count + 1]), (images - before - wanted).abs().mean(dim=1)
    )
    following = _likert(error, truth, count)
    rest, change = ~truth.target[:count], _errors(images, before)
    strict = (following == 5) & (_worst(change, rest) < STRICT)
    change = _mean(change, rest)
    consistency = _consistency(change)
    unmeasured = torch.full_like(consistency, torch.nan)
    return Scores(following, consistency, unmeasured, strict.float(), change)


def _errors(images: Tensor, others: Tensor) -> Tensor:
    """Return the mean absolute difference over colors, [N, H, W].

    Raises:
        ValueError: the shapes differ.
    """
    if images.shape != others.shape:
        raise ValueError(f"images: expected shape {tuple(others.shape)}, got {tuple(images.shape)}")
    return (images - others).abs().mean(dim=1)


def _likert(error: Tensor, truth: Truth, count: int) -> Tensor:
    """Return the score 1..5 by the error of changed pixels, relative to that of no edit, [N]."""
    changed = truth.changed[:count]
    idle = _mean(_errors(truth.pictures[1 : count + 1], truth.pictures[:count]), changed)
    # A turn that asks for no change has idle error 0, and is scored against NOTHING.
    idle = torch.where(idle > 0, idle.clamp(max=NOTHING), NOTHING)
    share = _mean(error, changed) / idle
    points = 1.0 + sum((share < step).float() for step in LIKERT_STEPS)
    return torch.where((points == 5) & (_mean(error, truth.target[:count]) > RIGHT), 4.0, points)


def _consistency(error: Tensor) -> Tensor:
    """Map an error to consistency in [0, 1]; NaN, of an empty mask, stays NaN."""
    return (1 - error / CONSISTENT).clamp(min=0)


def _worst(error: Tensor, where: Tensor) -> Tensor:
    """Return the largest block mean of the error within a mask, [N]; 0 counts outside it."""
    return avg_pool2d(torch.where(where, error, 0.0)[:, None], BLOCK).flatten(1).amax(dim=1)


def _mean(error: Tensor, where: Tensor) -> Tensor:
    """Return the mean over the pixels of a mask, [N]; NaN if it is empty."""
    total = (error * where).sum(dim=(-2, -1))
    return total / where.sum(dim=(-2, -1))
