"""Rewards of the world of pictures as scorers, for ``--rewards.scorer``.

``mteditflow_examples.pictures.scoring:ExactRewards`` compares with the true pictures,
``NeighborRewards`` with the previous picture. ``BoxedRewards`` has boxes for regions.
``HastyJudge`` and ``CarefulJudge`` have errors like those of the shapes world.
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

SAME = 0.01  # largest mean difference between a reference and its drawn scene, in [0, 1]
TERMS = ("following", "consistency", "consecutive", "strict", "wear")


def record_of(chain: Chain) -> Record:
    """Return a chain as the library's record, with its scene as an additional field."""
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
    """Return the names of things that stay unchanged in all later scenes."""
    stay = [thing for thing in before.things if all(thing in scene.things for scene in after)]
    return tuple(thing.name for thing in stay)


class ExactRewards:
    """Scorer that compares with the true pictures, drawn from the scene in the record.

    The terms are those of :class:`.rewards.Scores`: ``following`` in 1..5, ``consistency``,
    ``consecutive`` and ``strict`` in [0, 1], and ``wear``, lower is better. No score is ever lost.
    """

    scale, terms = LIKERT, TERMS

    def __init__(self) -> None:
        self._truths: dict[str, Truth] = {}

    async def score(
        self, chains: Sequence[Record], images: Sequence[Sequence[Image.Image]]
    ) -> dict[str, TurnScores]:
        """Score B chains; images may end before the last turn of a chain.

        Args:
            chains: records from ``record_of``.
            images: reference and result of each turn, 64 x 64 pixels.

        Returns:
            The terms, each ``[B, N]``, padded to the N turns of the longest chain.

        Raises:
            ValueError: a record has no scene, or its picture shows another; an instruction is not
                possible; or an image has another size.
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
        """Return the region of each term, for ``--rewards.regions``: exact masks.

        ``following``: pixels that the turn changes, and those of the thing that it names;
        ``consistency``: pixels outside all edits so far; ``consecutive``: outside this edit.

        Args:
            chains: as for ``score``.
            images: as for ``score``.

        Returns:
            Masks by term, float32 ``[B, N, 64, 64]``, 0 or 1; all 0 in padded turns.
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
        """Return the pixels of all edits up to each turn, boolean [N, H, W]; see ``Scorer``."""
        return ~_truth_of(record).kept

    def _truth(self, record: Record) -> Truth:
        if record.id not in self._truths:
            self._truths[record.id] = _truth_of(record)
        return self._truths[record.id]

    def _check_reference(self, record: Record, reference: Tensor) -> None:
        """Refuse a reference that does not show the record's scene."""
        true = self._truth(record).pictures[0]
        # A wrong size is reported by the comparison of the edited images.
        if reference.shape == true.shape and (reference - true).abs().mean() > SAME:
            raise ValueError(f"chain {record.id}: expected the picture of its scene, got another")


class BoxedRewards(ExactRewards):
    """Exact rewards with boxes for regions, like a detector's: one box around each turn's edit.

    ``consistency`` has the region outside the box around all edits so far.
    """

    def _masks(self, target: Tensor, kept: Tensor) -> dict[str, Tensor]:
        inside, touched = (boxed(mask, cell=mask.shape[-1]) for mask in (target, ~kept))
        return {"following": inside, "consistency": ~touched, "consecutive": ~inside}


def _truth_of(record: Record) -> Truth:
    """Return the truth of a record.

    Raises:
        ValueError: the record has no scene, or an instruction is not possible.
    """
    scene = (record.model_extra or {}).get("scene")
    if scene is None:
        raise ValueError(f"chain {record.id}: expected the field 'scene', got none")
    try:
        return Truth.of(chain_of(Scene.from_record(scene), record.instructions))
    except ValueError as error:
        raise ValueError(f"chain {record.id}: {error}") from error


class NeighborRewards(ExactRewards):
    """Scorer that compares each picture with the previous one only, not with the true ones."""

    def _scores(self, record: Record, images: Tensor) -> Scores:
        return score_neighbors(images, self._truth(record))


class ErringJudge(ExactRewards):
    """Exact rewards except ``following``, which has bias and noise.

    See ``mteditflow_examples.shapes.scoring.ErringJudge``; lenient scores are those of
    :func:`.rewards.lenient_following`.

    Attributes:
        leniency: probability of a lenient score.
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
    """Much bias and little variance, like a judge that answers without thinking."""

    leniency, spread = 0.9, 0.25


class CarefulJudge(ErringJudge):
    """Little bias and much variance, like a judge with inconsistent reasoning."""

    leniency, spread = 0.1, 1.0
