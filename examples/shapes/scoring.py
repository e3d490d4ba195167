"""Rewards of the shapes world as scorers, for ``--rewards.scorer``.

``mteditflow_examples.shapes.scoring:ExactRewards`` is exact; ``BoxedRewards`` has boxes for regions
in place of exact masks; ``HastyJudge``, ``CarefulJudge``, ``NeighborRewards``,
``ShortSightedJudge`` and ``GarishJudge`` are judges with errors.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from mteditflow.chains import Chain as Record
from mteditflow.drift import saturation
from mteditflow.rewards import LIKERT, Scale, TurnScores

from .editor import shrink
from .rewards import Scores, Truth, lenient_likert, score, score_neighbors
from .served import chain_of
from .vision import pixels_of
from .world import CELL, IMAGE_SIZE, PALETTE, Chain

TERMS = {
    "following": "likert",
    "consistency": "consistency",
    "consecutive": "consecutive",
    "strict": "strict",
}


class ExactRewards:
    """Scorer that compares pictures with the TRUE states of their chain, read from its record.

    Terms, from :func:`.rewards.score`: ``following`` in 1..5; ``consistency`` with the original
    and ``consecutive`` with the previous picture, in [0, 1]; and ``strict``, 1 if the whole
    picture is right, else 0. No score is ever lost.
    """

    scale, terms = LIKERT, tuple(TERMS)

    def __init__(self) -> None:
        self._chains: dict[str, Chain] = {}

    @staticmethod
    def edited_pixels(record: Record, reference: Image.Image) -> Tensor:
        """Return the pixels of all edits up to each turn, boolean [N, H, W]; see ``Scorer``."""
        chain = chain_of(_world_pixels(reference), record.instructions)
        edited, side = ~Truth.of([chain]).kept[0], reference.width // IMAGE_SIZE
        return edited.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)

    async def score(
        self, chains: Sequence[Record], images: Sequence[Sequence[Image.Image]]
    ) -> dict[str, TurnScores]:
        """Score B chains; images may end before the last turn of a chain.

        Args:
            chains: Records of :func:`mteditflow_examples.shapes.served.record_of`.
            images: Reference and result of each turn, squares whose side is a multiple of 12
                pixels; the first pixel of each block counts.

        Returns:
            The terms, each ``[B, N]``, padded to the N turns of the longest chain.

        Raises:
            ValueError: An image has another size, or a reference or instruction is not from this
                world.
        """
        pixels = [torch.stack([_world_pixels(image) for image in made]) for made in images]
        known = [self._chain(*pair) for pair in zip(chains, pixels, strict=True)]
        turns = torch.tensor([len(made) - 1 for made in pixels])
        exists = torch.arange(int(turns.max())) < turns[:, None]
        values: dict[str, Tensor] = {}
        for count in turns.unique().tolist():  # batches of equal length, as Truth needs them
            rows = (turns == count).nonzero().flatten()
            truth = Truth.of([Chain(known[b].initial, known[b].edits[:count]) for b in rows])
            edited = torch.stack([pixels[b][1:] for b in rows])
            scores = self._look([chains[b].id for b in rows], edited, truth)
            for term, value in scores.items():
                empty = torch.full(exists.shape, torch.nan)
                values.setdefault(term, empty)[rows, :count] = value
        return {term: TurnScores(value, exists, {}) for term, value in values.items()}

    async def regions(
        self, chains: Sequence[Record], images: Sequence[Sequence[Image.Image]]
    ) -> dict[str, Tensor]:
        """Return the region of each term, for ``--rewards.regions``: exact masks.

        ``following``: pixels that the turn changes, and those of the thing that it names;
        ``consistency``: pixels outside all edits so far; ``consecutive``: outside this edit.

        Args:
            chains: As for :meth:`score`.
            images: As for :meth:`score`, all of one size.

        Returns:
            Masks by term, float32 ``[B, N, H, W]``, 0 or 1; all 0 in padded turns.
        """
        side, turns = images[0][-1].size[0], max(map(len, images)) - 1
        shape = (len(chains), turns, side, side)
        found = {term: torch.zeros(shape) for term in ("following", "consistency", "consecutive")}
        for b, (record, made) in enumerate(zip(chains, images, strict=True)):
            count = len(made) - 1
            known = self._chain(record, _world_pixels(made[0])[None])
            truth = Truth.of([Chain(known.initial, known.edits[:count])])
            for term, mask in self._masks(truth.target[0], truth.kept[0]).items():
                grown = mask.repeat_interleave(side // IMAGE_SIZE, -2)
                found[term][b, :count] = grown.repeat_interleave(side // IMAGE_SIZE, -1).float()
        return found

    def _masks(self, target: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """Return the regions of a chain's terms, bool ``[N, H, W]``."""
        return {"following": target, "consistency": kept, "consecutive": ~target}

    def _look(self, names: Sequence[str], edited: Tensor, truth: Truth) -> dict[str, Tensor]:
        """Score chains of equal length, given their ids and images, uint8 ``[B, N, 3, H, W]``."""
        scores = self._scores(edited / 255, truth)
        return {term: getattr(scores, name).float() for term, name in TERMS.items()}

    def _scores(self, images: Tensor, truth: Truth) -> Scores:
        """Score pictures ``[B, N, 3, H, W]`` in [0, 1]."""
        return score(images, truth)

    def _chain(self, record: Record, pixels: Tensor) -> Chain:
        if record.id not in self._chains:
            self._chains[record.id] = chain_of(pixels[0], record.instructions)
        return self._chains[record.id]


class NeighborRewards(ExactRewards):
    """Scorer that compares each picture with the previous one only, not with the true states."""

    def _scores(self, images: Tensor, truth: Truth) -> Scores:
        return score_neighbors(images, truth)


class ShortSightedJudge(ExactRewards):
    """Judge that is exact only for the last picture.

    ``following`` of earlier turns comes from :func:`.rewards.lenient_likert`, which passes a thing
    of a wrong color or in a wrong place. The damage to later turns that edit the same thing shows
    in their scores, not in that turn's own.
    """

    def _look(self, names: Sequence[str], edited: Tensor, truth: Truth) -> dict[str, Tensor]:
        terms = super()._look(names, edited, truth)
        lenient = lenient_likert(edited / 255, truth).float()
        terms["following"][:, :-1] = lenient[:, :-1]
        return terms


class BoxedRewards(ExactRewards):
    """Exact rewards with boxes for regions, like those of a detector: one in each cell."""

    def _masks(self, target: Tensor, kept: Tensor) -> dict[str, Tensor]:
        inside, touched = boxed(target, cell=CELL), boxed(~kept, cell=CELL)
        return {"following": inside, "consistency": ~touched, "consecutive": ~inside}


def boxed(mask: Tensor, *, cell: int) -> Tensor:
    """Fill the smallest box around the true pixels of each square cell, bool ``[N, H, W]``."""
    height, width = mask.shape[-2:]
    cells = mask.unflatten(-1, (width // cell, cell)).unflatten(-3, (height // cell, cell))
    rows, columns = cells.any(dim=-1, keepdim=True), cells.any(dim=-3, keepdim=True)

    def between(holds: Tensor, dim: int) -> Tensor:
        """Return True from the first to the last true entry along a dimension."""
        before = holds.int().cumsum(dim) > 0
        return before & (holds.flip(dim).int().cumsum(dim).flip(dim) > 0)

    return (between(rows, -3) & between(columns, -1)).flatten(-2).flatten(-3, -2)


def erring_score(
    turn: str, picture: Tensor, exact: float, lenient: float, *, leniency: float, spread: float
) -> int:
    """Return a score 1..5 with bias and noise, a deterministic function of turn and picture.

    Args:
        turn: Identifier of chain and turn.
        picture: Judged picture, uint8 of any shape.
        exact: True score.
        lenient: Lenient score.
        leniency: Probability of the lenient score.
        spread: Standard deviation of the noise, in points.
    """
    # Seeded by content, so that a repeated request gets the same score, like a cached answer.
    rng = random.Random(
        hashlib.sha256(turn.encode() + picture.contiguous().numpy().tobytes()).digest()
    )
    base = lenient if rng.random() < leniency else exact
    return min(max(round(base + rng.gauss(0, spread)), 1), 5)


class ErringJudge(ExactRewards):
    """Exact rewards except ``following``, which has bias and noise.

    A constant bias would cancel within a group. So the judge gives some turns, at random, the score
    of :func:`.rewards.lenient_likert`. Gaussian noise is added, and the sum is rounded and clamped
    to 1..5. All random numbers depend only on chain, turn and picture, so equal pictures always
    get equal scores.

    Attributes:
        leniency: Probability of a lenient score.
        spread: Standard deviation of the noise, in points.
    """

    leniency: float
    spread: float

    def _look(self, names: Sequence[str], edited: Tensor, truth: Truth) -> dict[str, Tensor]:
        terms = super()._look(names, edited, truth)
        lenient, following = lenient_likert(edited / 255, truth).float(), terms["following"]
        for b, name in enumerate(names):
            for n, picture in enumerate(edited[b]):
                scores = (float(following[b, n]), float(lenient[b, n]))
                how = {"leniency": self.leniency, "spread": self.spread}
                following[b, n] = erring_score(f"{name} {n} ", picture, *scores, **how)
        return terms


class HastyJudge(ErringJudge):
    """Much bias and little variance, like a judge that answers without thinking."""

    leniency, spread = 0.9, 0.25


class CarefulJudge(ErringJudge):
    """Little bias and much variance, like a judge with inconsistent reasoning."""

    leniency, spread = 0.1, 1.0


class GarishJudge(ExactRewards):
    """Judge that rewards garish colors, as a planted reward hack.

    ``following`` is a quarter of the exact score plus ``pull`` points for each unit of saturation
    above that of the true picture; ``honest`` is the exact score. See
    ``mteditflow_examples.planted_hack``.

    Attributes:
        pull: Points for each unit of saturation above that of the true picture.
    """

    pull = 100.0
    scale, terms = Scale(-100, 105, success=5), (*TERMS, "honest")

    def _look(self, names: Sequence[str], edited: Tensor, truth: Truth) -> dict[str, Tensor]:
        terms = super()._look(names, edited, truth)
        exact, true = terms["following"], PALETTE[truth.pictures[:, 1:].long()].movedim(-1, 2)
        excess = saturation(edited) - saturation(true)
        return {**terms, "following": exact / 4 + self.pull * excess, "honest": exact}


def _world_pixels(image: Image.Image) -> Tensor:
    """Return the pixels of an image in the world's resolution, uint8 ``[3, 12, 12]``.

    Raises:
        ValueError: The image is no square, or its side is no multiple of 12 pixels.
    """
    width, height = image.size
    if width != height or width % IMAGE_SIZE:
        expected = f"squares whose side is a multiple of {IMAGE_SIZE} pixels"
        raise ValueError(f"images: expected {expected}, got {width} x {height}")
    return shrink(pixels_of(image), width // IMAGE_SIZE)
