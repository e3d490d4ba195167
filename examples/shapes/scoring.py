"""The exact rewards of the shapes world as a trainer's scorer: ``shapes.scoring:ExactRewards``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from mteditflow.chains import Chain as Record
from mteditflow.rewards import TurnScores

from .editor import shrink
from .rewards import Truth, score
from .served import chain_of
from .vision import pixels_of
from .world import IMAGE_SIZE, Chain

TERMS = {"following": "likert", "consistency": "consistency", "strict": "strict"}


class ExactRewards:
    """Scores pictures against the TRUE states of their chain, which it reads back from the record.

    The terms, each from :func:`shapes.rewards.score`: ``following`` in 1..5, ``consistency`` in
    [0, 1], and ``strict``, 1 where the whole picture is right, else 0. Nothing is ever lost.
    """

    def __init__(self) -> None:
        self._chains: dict[str, Chain] = {}

    async def score(
        self, chains: Sequence[Record], images: Sequence[Sequence[Image.Image]]
    ) -> dict[str, TurnScores]:
        """Score B chains, of which the first turns may be all that was edited.

        Args:
            chains: Records of :func:`shapes.served.record_of`.
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
        values = {term: torch.full(exists.shape, torch.nan) for term in TERMS}
        for count in turns.unique().tolist():  # at once, as the rewards take chains of equal length
            rows = (turns == count).nonzero().flatten()
            truth = Truth.of([Chain(known[b].initial, known[b].edits[:count]) for b in rows])
            scores = score(torch.stack([pixels[b][1:] for b in rows]) / 255, truth)
            for term, name in TERMS.items():
                values[term][rows, :count] = getattr(scores, name).float()
        return {term: TurnScores(value, exists, {}) for term, value in values.items()}

    def _chain(self, record: Record, pixels: Tensor) -> Chain:
        if record.id not in self._chains:
            self._chains[record.id] = chain_of(pixels[0], record.instructions)
        return self._chains[record.id]


def _world_pixels(image: Image.Image) -> Tensor:
    """uint8 ``[3, 12, 12]``."""
    width, height = image.size
    if width != height or width % IMAGE_SIZE:
        expected = f"squares whose side is a multiple of {IMAGE_SIZE} pixels"
        raise ValueError(f"images: expected {expected}, got {width} x {height}")
    return shrink(pixels_of(image), width // IMAGE_SIZE)
