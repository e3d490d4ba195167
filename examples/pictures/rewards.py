"""Rewards of the world of pictures, from pixels.

The exact ones compare picture n with what n perfect edits would have made of the reference. A judge
who sees neighbors alone compares it with picture n - 1, as real judges do: she passes what agrees
with the instruction, whatever earlier turns have done to the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from .chains import Chain
from .drawing import draw, thing_mask

CHANGED = 0.03  # difference in [0, 1] from which a pixel counts as changed
LIKERT_STEPS = (0.95, 0.85, 0.7, 0.6)  # errors relative to doing nothing that earn 2, 3, 4, 5
NOTHING = 0.15  # largest error of doing nothing that counts: obvious edits must be precise, too
RIGHT = 0.09  # error of a followed instruction, at most
CONSISTENT = 0.15  # error that makes consistency 0
BLOCK = 8  # side of the blocks, pixels, each of which must be right for the whole to be
LOOK = 9  # side of the square, pixels, whose mean color a lenient look sees
STRICT = 0.1  # largest mean error of such a block


@dataclass(frozen=True)
class Truth:
    """True pictures of a chain of N turns, H x W pixels, and the masks of its turns.

    Attributes:
        pictures: true pictures, the reference first, in [0, 1], float32 [N + 1, 3, H, W].
        changed: pixels that turn n changes, bool [N, H, W]; all where it asks for no change.
        target: pixels that turn n is about: changed, or of a thing that it names.
        kept: pixels that no turn up to n is about, bool [N, H, W].
    """

    pictures: Tensor
    changed: Tensor
    target: Tensor
    kept: Tensor

    @classmethod
    def of(cls, chain: Chain) -> Truth:
        """Draw the truth of a chain."""
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
    """Add the pixels beside a mask [N, H, W]: an autoencoder cannot keep an edge to a pixel."""
    grown = mask.copy()
    for axis in (-2, -1):
        whole = grown.copy()
        for step in (-1, 1):
            moved = np.roll(whole, step, axis=axis)
            edge = 0 if step == 1 else -1
            moved[(..., edge) if axis == -1 else (..., edge, slice(None))] = False
            grown |= moved
    return grown


@dataclass(frozen=True)
class Scores:
    """Rewards per turn, each float32 [N].

    Attributes:
        following: instruction following, 1..5; 5 is success.
        consistency: in [0, 1], of the pixels that must not change; NaN where there are none.
        consecutive: the same of the pixels that the turn is not about, with the picture before.
        strict: 1 where the instruction is followed and the rest of the picture is right, else 0.
        wear: mean absolute error of the pixels that must not change, in [0, 1]; NaN likewise.
    """

    following: Tensor
    consistency: Tensor
    consecutive: Tensor
    strict: Tensor
    wear: Tensor


def score(images: Tensor, truth: Truth) -> Scores:
    """Score the pictures of a chain against the true ones.

    Args:
        images: edited pictures in [0, 1], float32 [N, 3, H, W], N at most the truth's.
        truth: what they should be.

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
    """Score instruction following 1..5 as one sees it who does not look closely, [N].

    A pixel passes if its brightness alone is right, or the mean color around it: so a thing in a
    wrong color of equal brightness passes, or one that is blurred beyond recognition.

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
    weights = images.new_tensor([0.299, 0.587, 0.114])
    return (images * weights[:, None, None]).sum(dim=1, keepdim=True)


def _blurred(images: Tensor) -> Tensor:
    return avg_pool2d(images, LOOK, stride=1, padding=LOOK // 2, count_include_pad=False)


def score_neighbors(images: Tensor, truth: Truth) -> Scores:
    """Score the pictures of a chain as a judge does who compares each with the one before.

    A pixel of the target passes if it is as the true picture has it, or if it has changed as it
    should have from what the picture before shows. Consistency is that of the rest of the picture
    with the picture before, so that ``consecutive`` has nothing to measure apart.

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
    apart = torch.full_like(consistency, torch.nan)  # from the picture before: that is consistency
    return Scores(following, consistency, apart, strict.float(), change)


def _errors(images: Tensor, others: Tensor) -> Tensor:
    """Mean absolute difference over colors, [N, H, W]."""
    if images.shape != others.shape:
        raise ValueError(f"images: expected shape {tuple(others.shape)}, got {tuple(images.shape)}")
    return (images - others).abs().mean(dim=1)


def _likert(error: Tensor, truth: Truth, count: int) -> Tensor:
    """Score 1..5 by the error of what changes beside that of doing nothing, [N]."""
    changed = truth.changed[:count]
    idle = _mean(_errors(truth.pictures[1 : count + 1], truth.pictures[:count]), changed)
    idle = torch.where(idle > 0, idle.clamp(max=NOTHING), NOTHING)
    share = _mean(error, changed) / idle
    points = 1.0 + sum((share < step).float() for step in LIKERT_STEPS)
    return torch.where((points == 5) & (_mean(error, truth.target[:count]) > RIGHT), 4.0, points)


def _consistency(error: Tensor) -> Tensor:
    """Map an error to [0, 1]; NaN stays where there is nothing to keep."""
    return (1 - error / CONSISTENT).clamp(min=0)


def _worst(error: Tensor, where: Tensor) -> Tensor:
    """Mean error of the worst block, of the pixels of a mask, [N]."""
    return avg_pool2d(torch.where(where, error, 0.0)[:, None], BLOCK).flatten(1).amax(dim=1)


def _mean(error: Tensor, where: Tensor) -> Tensor:
    """Mean over the pixels of a mask, [N]; NaN where it has none."""
    total = (error * where).sum(dim=(-2, -1))
    return total / where.sum(dim=(-2, -1))
