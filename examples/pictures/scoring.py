"""Rewards of the world of pictures as scorers that a trainer takes by import path.

``mteditflow_examples.pictures.scoring:ExactRewards`` compares with the true pictures,
``NeighborRewards`` with the picture before, as a judge does who sees no more. ``HastyJudge`` and
``CarefulJudge`` err, as those of the shapes world do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain as joined

import numpy as np
import torch
from mteditflow_examples.shapes.scoring import boxed, erring_score
from PIL import Image
from torch import Tensor

from mteditflow.chains import Chain as Record
from mteditflow.rewards import LIKERT, TurnScores

from .chains import Chain, chain_of
from .rewards import Scores, Truth, lenient_following, score, score_neighbors
from .scene import Scene

SAME = 0.01  # mean difference of a reference to its scene, in [0, 1]
TERMS = ("following", "consistency", "consecutive", "strict", "wear")


def record_of(chain: Chain) -> Record:
    """Return a chain as the library's record, the scene beside it."""
    name = hashlib.sha256(repr((chain.initial, chain.instructions)).encode()).hexdigest()[:16]
    first, after = chain.initial, chain.scenes[1:]
    names = [[thing.name for thing in scene.things] for scene in chain.scenes]
    turns = range(len(after))
    return Record(
        id=name,
        image=f"images/{name}.png",
        instructions=chain.instructions,
        task_types=tuple(edit.task_type for edit in chain.edits),
        unchanged_objects=tuple(_unchanged(first, after[: n + 1]) for n in turns),
        turn_unchanged_objects=tuple(_unchanged(chain.scenes[n], after[n : n + 1]) for n in turns),
        all_objects=tuple(tuple(dict.fromkeys(joined(*names[: n + 2]))) for n in turns),
        available_objects=tuple(tuple(now) for now in names[1:]),
        background_consistency=tuple(
            all(scene.background == first.background for scene in after[: n + 1]) for n in turns
        ),
        scene=first.to_record(),
    )


def _unchanged(before: Scene, after: Sequence[Scene]) -> tuple[str, ...]:
    """Return the names of the things that stay as they are in all scenes after."""
    stay = [thing for thing in before.things if all(thing in scene.things for scene in after)]
    return tuple(thing.name for thing in stay)


class ExactRewards:
    """Scores against the true pictures, drawn from the scene that the record holds.

    The terms are those of :class:`.rewards.Scores`: ``following`` in 1..5, ``consistency``,
    ``consecutive`` and ``strict`` in [0, 1], and ``wear``, lower is better. Nothing is ever lost.
    """

    scale = LIKERT

    def __init__(self) -> None:
        self._truths: dict[str, Truth] = {}

    async def score(
        self, chains: Sequence[Record], images: Sequence[Sequence[Image.Image]]
    ) -> dict[str, TurnScores]:
        """Score B chains, of which the first turns may be all that was edited.

        Args:
            chains: records of ``record_of``.
            images: for each the reference and what each turn made, 64 x 64 pixels.

        Returns:
            The terms, each ``[B, N]``, N for the longest; a shorter one is padded.

        Raises:
            ValueError: a record has no scene, or one that is not in its picture, an instruction
                makes no sense there, or an image is of another size.
        """
        turns = torch.tensor([len(edited) - 1 for edited in images], device="cpu")
        exists = torch.arange(int(turns.max()), device="cpu") < turns[:, None]
        values = torch.full((len(TERMS), *exists.shape), torch.nan, dtype=torch.float32)
        for b, (record, edited) in enumerate(zip(chains, images, strict=True)):
            pixels = np.stack([np.asarray(image.convert("RGB")) for image in edited])
            reference, *made = torch.from_numpy(pixels).movedim(-1, 1).float() / 255
            self._check_reference(record, reference)
            scores = self._scores(record, torch.stack(made))
            values[:, b, : len(made)] = torch.stack([getattr(scores, term) for term in TERMS])
        named = zip(TERMS, values, strict=True)
        return {term: TurnScores(value, exists, {}) for term, value in named}

    async def regions(
        self, chains: Sequence[Record], images: Sequence[Sequence[Image.Image]]
    ) -> dict[str, Tensor]:
        """Return where each term is decided, for ``--rewards.regions``: exact masks.

        ``following`` is decided where a turn changes something, or on the thing that it names;
        ``consistency`` on what no turn so far was about; ``consecutive`` on what this one was not.

        Args:
            chains: as for ``score``.
            images: as for ``score``.

        Returns:
            By term the pixels, ``[B, N, 64, 64]``, 0 or 1; a padded turn has none.
        """
        width, height = images[0][-1].size
        shape = (len(chains), max(map(len, images)) - 1, height, width)
        terms = ("following", "consistency", "consecutive")
        found = {t: torch.zeros(shape, dtype=torch.float32, device="cpu") for t in terms}
        for b, (record, edited) in enumerate(zip(chains, images, strict=True)):
            truth, count = self._truth(record), len(edited) - 1
            for term, mask in self._masks(truth.target, truth.kept).items():
                found[term][b, :count] = mask[:count].float()
        return found

    def _masks(self, target: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """Return the regions of a chain's terms, bool [N, H, W]."""
        return {"following": target, "consistency": kept, "consecutive": ~target}

    def _scores(self, record: Record, images: Tensor) -> Scores:
        """Score the pictures of a chain, in [0, 1], float32 [N, 3, H, W]."""
        return score(images, self._truth(record))

    @staticmethod
    def edited_pixels(record: Record, reference: Image.Image) -> Tensor:  # noqa: ARG004
        """Return the pixels that turns so far are about, boolean [N, H, W]; see ``Scorer``."""
        return ~_truth_of(record).kept

    def _truth(self, record: Record) -> Truth:
        if record.id not in self._truths:
            self._truths[record.id] = _truth_of(record)
        return self._truths[record.id]

    def _check_reference(self, record: Record, reference: Tensor) -> None:
        """Refuse a reference that does not show the record's scene."""
        true = self._truth(record).pictures[0]
        if reference.shape == true.shape and (reference - true).abs().mean() > SAME:
            raise ValueError(f"chain {record.id}: expected the picture of its scene, got another")


class BoxedRewards(ExactRewards):
    """Exact rewards whose regions are boxes, as a detector's: one around all that a turn is about.

    ``consistency`` is decided outside the box around all that turns so far were about.
    """

    def _masks(self, target: Tensor, kept: Tensor) -> dict[str, Tensor]:
        inside, touched = (boxed(mask, cell=mask.shape[-1]) for mask in (target, ~kept))
        return {"following": inside, "consistency": ~touched, "consecutive": ~inside}


def _truth_of(record: Record) -> Truth:
    """Draw the true pictures of a record.

    Raises:
        ValueError: it has no scene, or an instruction makes no sense there.
    """
    scene = (record.model_extra or {}).get("scene")
    if scene is None:
        raise ValueError(f"chain {record.id}: expected the field 'scene', got none")
    try:
        return Truth.of(chain_of(Scene.from_record(scene), record.instructions))
    except ValueError as error:
        raise ValueError(f"chain {record.id}: {error}") from error


class NeighborRewards(ExactRewards):
    """Scores each picture beside the one before it, blind to what earlier turns have done."""

    def _scores(self, record: Record, images: Tensor) -> Scores:
        return score_neighbors(images, self._truth(record))


class ErringJudge(ExactRewards):
    """Exact rewards but for ``following``, which is judged with a bias and with noise.

    See ``mteditflow_examples.shapes.scoring.ErringJudge``; the lenient look is that of
    :func:`.rewards.lenient_following`.

    Attributes:
        leniency: probability of a lenient look at a turn.
        spread: standard deviation of the noise, in points.
    """

    leniency: float
    spread: float

    def _scores(self, record: Record, images: Tensor) -> Scores:
        truth = self._truth(record)
        scores, lenient = score(images, truth), lenient_following(images, truth)
        how = {"leniency": self.leniency, "spread": self.spread}
        pictures = (255 * images).round().to(torch.uint8)
        following = [
            erring_score(f"{record.id} {n} ", picture, float(exact), float(passed), **how)
            for n, (picture, exact, passed) in enumerate(
                zip(pictures, scores.following, lenient, strict=True)
            )
        ]
        return replace(scores, following=scores.following.new_tensor(following))


class HastyJudge(ErringJudge):
    """Much bias and little variance: a judge that answers without thinking."""

    leniency, spread = 0.9, 0.25


class CarefulJudge(ErringJudge):
    """Little bias and much variance: a judge whose thoughts wander."""

    leniency, spread = 0.1, 1.0
