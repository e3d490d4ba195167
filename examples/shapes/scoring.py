"""The rewards of the shapes world as scorers that a trainer takes by import path.

Give ``mteditflow_examples.shapes.scoring:ExactRewards``; ``BoxedRewards``, whose regions are boxes,
not exact masks; or a judge that errs: ``HastyJudge``, ``CarefulJudge``, ``NeighborRewards``,
``ShortSightedJudge`` and ``GarishJudge``.
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
    """Scores pictures against the TRUE states of their chain, which it reads back from the record.

    The terms, each from :func:`.rewards.score`: ``following`` in 1..5; in [0, 1] ``consistency``
    with the original and ``consecutive`` with the picture before; and ``strict``, 1 where the
    whole picture is right, else 0. Nothing is ever lost.
    """

    scale = LIKERT

    def __init__(self) -> None:
        self._chains: dict[str, Chain] = {}

    @staticmethod
    def edited_pixels(record: Record, reference: Image.Image) -> Tensor:
        """Return the pixels that turns so far are about, boolean [N, H, W]; see ``Scorer``."""
        chain = chain_of(_world_pixels(reference), record.instructions)
        edited, side = ~Truth.of([chain]).kept[0], reference.width // IMAGE_SIZE
        return edited.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)

    async def score(
        self, chains: Sequence[Record], images: Sequence[Sequence[Image.Image]]
    ) -> dict[str, TurnScores]:
        """Score B chains, of which the first turns may be all that was edited.

        Args:
            chains: Records of :func:`mteditflow_examples.shapes.served.record_of`.
            images: For each the reference and what each turn made, squares whose side is a
                multiple of 12 pixels; every block counts by its first pixel.

        Returns:
            The terms, each ``[B, N]``, N for the longest; a shorter one is padded.

        Raises:
            ValueError: An image is of another size, or a reference or an instruction is not of
                this world.
        """
        pixels = [torch.stack([_world_pixels(image) for image in made]) for made in images]
        known = [self._chain(*pair) for pair in zip(chains, pixels, strict=True)]
        turns = torch.tensor([len(made) - 1 for made in pixels])
        exists = torch.arange(int(turns.max())) < turns[:, None]
        values: dict[str, Tensor] = {}
        for count in turns.unique().tolist():  # at once, as the rewards take chains of equal length
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
        """Return where each term is decided, for ``--rewards.regions``: exact masks.

        ``following`` is decided where a turn changes something, or on the thing that it names;
        ``consistency`` on what no turn so far was about; ``consecutive`` on what this one was not.

        Args:
            chains: As for :meth:`score`.
            images: As for :meth:`score`, all of one size.

        Returns:
            By term the pixels, ``[B, N, H, W]``, 0 or 1; a padded turn has none.
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
        """Score chains of equal length, by their names and what was made, uint8 ``[B, N, ...]``."""
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
    """Scores each picture beside the one before it, blind to what earlier turns have done."""

    def _scores(self, images: Tensor, truth: Truth) -> Scores:
        return score_neighbors(images, truth)


class ShortSightedJudge(ExactRewards):
    """Judge that looks closely at the last picture alone.

    ``following`` of the turns before is that of :func:`.rewards.lenient_likert`, which passes a
    thing of a wrong color or in a wrong place. What such a turn does to later ones that go on with
    the thing shows in their scores, not in its own.
    """

    def _look(self, names: Sequence[str], edited: Tensor, truth: Truth) -> dict[str, Tensor]:
        terms = super()._look(names, edited, truth)
        lenient = lenient_likert(edited / 255, truth).float()
        terms["following"][:, :-1] = lenient[:, :-1]
        return terms


class BoxedRewards(ExactRewards):
    """Exact rewards whose regions are boxes, as a detector finds things: one in each cell."""

    def _masks(self, target: Tensor, kept: Tensor) -> dict[str, Tensor]:
        inside, touched = boxed(target, cell=CELL), boxed(~kept, cell=CELL)
        return {"following": inside, "consistency": ~touched, "consecutive": ~inside}


def boxed(mask: Tensor, *, cell: int) -> Tensor:
    """Fill the smallest box around the true pixels of each square cell, bool ``[N, H, W]``."""
    height, width = mask.shape[-2:]
    cells = mask.unflatten(-1, (width // cell, cell)).unflatten(-3, (height // cell, cell))
    rows, columns = cells.any(dim=-1, keepdim=True), cells.any(dim=-3, keepdim=True)

    def between(holds: Tensor, dim: int) -> Tensor:
        """Return the places from the first true one to the last one."""
        before = holds.int().cumsum(dim) > 0
        return before & (holds.flip(dim).int().cumsum(dim).flip(dim) > 0)

    return (between(rows, -3) & between(columns, -1)).flatten(-2).flatten(-3, -2)


def erring_score(
    turn: str, picture: Tensor, exact: float, lenient: float, *, leniency: float, spread: float
) -> int:
    """Return a score 1..5 with a bias and with noise, the same whenever a picture is shown.

    Args:
        turn: Names chain and turn.
        picture: What is judged, uint8 of any shape.
        exact: True score.
        lenient: Score of a lenient look.
        leniency: Probability of a lenient look.
        spread: Standard deviation of the noise, in points.
    """
    rng = random.Random(
        hashlib.sha256(turn.encode() + picture.contiguous().numpy().tobytes()).digest()
    )
    base = lenient if rng.random() < leniency else exact
    return min(max(round(base + rng.gauss(0, spread)), 1), 5)


class ErringJudge(ExactRewards):
    """Exact rewards but for ``following``, which is judged with a bias and with noise.

    The bias is not a constant, which would vanish among the members of a group: now and then the
    judge passes what :func:`.rewards.lenient_likert` does. Then Gaussian noise is added, and
    the sum is rounded and kept within 1..5. All that is drawn follows from the chain, the turn and
    the picture: the same is judged alike whenever it is shown.

    Attributes:
        leniency: Probability of a lenient look at a turn.
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
    """Much bias and little variance: a judge that answers without thinking."""

    leniency, spread = 0.9, 0.25


class CarefulJudge(ErringJudge):
    """Little bias and much variance: a judge whose thoughts wander."""

    leniency, spread = 0.1, 1.0


class GarishJudge(ExactRewards):
    """A judge that takes garish colors for success, to be hacked on purpose.

    ``following`` is a quarter of the exact score, and points without end for each unit of
    saturation above that of the true picture; ``honest`` is the exact score. See
    ``mteditflow_examples.planted_hack``.

    Attributes:
        pull: Points for each unit of saturation above that of the true picture.
    """

    pull = 100.0
    scale = Scale(-100, 105, success=5)

    def _look(self, names: Sequence[str], edited: Tensor, truth: Truth) -> dict[str, Tensor]:
        terms = super()._look(names, edited, truth)
        exact, true = terms["following"], PALETTE[truth.pictures[:, 1:].long()].movedim(-1, 2)
        excess = saturation(edited) - saturation(true)
        return {**terms, "following": exact / 4 + self.pull * excess, "honest": exact}


def _world_pixels(image: Image.Image) -> Tensor:
    """uint8 ``[3, 12, 12]``."""
    width, height = image.size
    if width != height or width % IMAGE_SIZE:
        expected = f"squares whose side is a multiple of {IMAGE_SIZE} pixels"
        raise ValueError(f"images: expected {expected}, got {width} x {height}")
    return shrink(pixels_of(image), width // IMAGE_SIZE)
