"""Content consistency: what no instruction touched must look the same.

A detector finds the objects, features compare them and the background. Both are plain callables;
``mteditflow.rewards.models`` has the published ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from mteditflow._checks import check_choice, check_count
from mteditflow.chains import Chain
from mteditflow.rewards.pairs import (
    PAIRINGS,
    ConsistencyScores,
    Pair,
    PairScores,
    image_pairs,
    pairs_of,
)
from mteditflow.rewards.regions import background_mask, pixel_boxes, with_area
from mteditflow.rewards.similarity import (
    TOKENS,
    Features,
    background_summary,
    check_features,
    object_summary,
    pixel_similarity,
    similarity,
)

__all__ = [
    "Consistency",
    "ConsistencyScorer",
    "ConsistencyScores",
    "Detector",
    "FeatureExtractor",
    "Features",
    "Pair",
    "PairScores",
    "clean_names",
    "pairs_of",
]

SIZE = 512  # images are compared at this height and width

Names = tuple[str, ...]
Box = tuple[int, int, int, int]
WHOLE: Box = (0, 0, SIZE, SIZE)


class Detector(Protocol):
    """Finds objects by name."""

    def __call__(
        self, images: Sequence[Tensor], names: Sequence[Sequence[str]]
    ) -> Sequence[Tensor]:
        """Find objects.

        Args:
            images: RGB, uint8 [3, H, W], all of one size.
            names: what to look for in each image: lower case, without full stops, at least one,
                none twice.

        Returns:
            Per image the boxes of all objects found, [K, 4], floating point, absolute
            (x1, y1, x2, y2) in pixels. What is found in an image must not depend on the others.
        """
        ...


class FeatureExtractor(Protocol):
    """Turns images into tokens."""

    def __call__(self, images: Sequence[Tensor]) -> Features:
        """Compute the tokens of images of any sizes, RGB, uint8 [3, H, W]."""
        ...


class _Look(NamedTuple):
    """One pair, and where to look in its two pictures; ``None`` where no term is asked for."""

    source: int
    edited: int
    crops: list[Box] | None
    mask: Tensor | None


def clean_names(names: Iterable[str]) -> Names:
    """Write names as a detector wants them: lower case, no full stops, none empty or twice.

    Example:
        >>> clean_names(["A Cat.", "a cat", " . ", "traffic  light"])
        ('a cat', 'traffic light')
    """
    cleaned = (" ".join(name.lower().replace(".", "").split()) for name in names)
    return tuple(dict.fromkeys(name for name in cleaned if name))


class ConsistencyScorer:
    """Scores pairs of images; holds no state but its models, so that threads may share it.

    Args:
        detector: finds the objects.
        features: of crops and images; ``None`` leaves the feature terms out, so that only the L1
            terms are scored.
        tokens: "strict", or "compat" to do as EdiVal-Bench's public scorer does.
        batch_size: most images that go through a model at once.

    Raises:
        ValueError: there is no such choice of tokens, or the batch size is not positive.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 13 to 16; EdiVal-Bench (arXiv 2509.13399).

    Example:
        >>> def everywhere(images, names):  # a detector that always finds the upper left quarter
        ...     return [torch.tensor([[0.0, 0.0, 256.0, 256.0]]) for _ in images]
        >>> scorer = ConsistencyScorer(everywhere)
        >>> images = [Image.new("RGB", (64, 64), color) for color in ("white", "black")]
        >>> pair = Pair(source=0, edited=1, unchanged_objects=("cat",), all_objects=("cat",))
        >>> scorer.score_pairs(images, [pair])[0].object_l1
        0.0
    """

    def __init__(
        self,
        detector: Detector,
        features: FeatureExtractor | None = None,
        *,
        tokens: str = "strict",
        batch_size: int = 16,
    ) -> None:
        check_choice("tokens", tokens, tuple(TOKENS))
        check_count("batch_size", batch_size)
        self.detector, self.features = detector, features
        self.tokens, self.batch_size = tokens, batch_size
        self._rules = TOKENS[tokens]

    def score_pairs(self, images: Sequence[Image.Image], pairs: Sequence[Pair]) -> list[PairScores]:
        """Score pairs of images of one chain, in order; as ``score_many``."""
        return self.score_many([(images, pairs)])[0]

    @torch.inference_mode()
    def score_many(
        self, work: Sequence[tuple[Sequence[Image.Image], Sequence[Pair]]]
    ) -> list[list[PairScores]]:
        """Score pairs of images of many chains, in few calls of the models.

        Each picture is searched once for each set of names, however many pairs or chains it is in.

        Args:
            work: images of any mode and size, and the pairs to score among them, per chain.

        Raises:
            ValueError: a pair names an image that is not there, or a model's answer has the wrong
                shape or is not finite.
        """
        raise NotImplementedError


class Consistency:
    """Content consistency in this process.

    Args:
        scorer: scores pairs of images.
        pairing: "reference" or "consecutive", as in ``pairs_of``.

    Raises:
        ValueError: there is no such pairing.
    """

    def __init__(self, scorer: ConsistencyScorer, *, pairing: str = "reference") -> None:
        check_choice("pairing", pairing, PAIRINGS)
        self.scorer, self.pairing = scorer, pairing

    def score(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image.Image]]
    ) -> ConsistencyScores:
        """Score every turn of B chains.

        Args:
            chains: B chains with the names of their objects; N may differ.
            images: per chain N + 1 images, the reference first, then what each turn made.

        Raises:
            ValueError: a number of images does not fit, or a chain names no objects.
        """
        answers = self.scorer.score_many(image_pairs(chains, images, pairing=self.pairing))
        return ConsistencyScores.collect(answers, [chain.turns for chain in chains])
