"""Content consistency: similarity of the parts of an image that no instruction touched.

A detector finds the objects; features compare them and the background. Both are plain callables;
``mteditflow.rewards.consistency.models`` has the published models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from mteditflow._checks import check_choice, check_count
from mteditflow.chains import Chain
from mteditflow.rewards.consistency.pairs import (
    PAIRINGS,
    ConsistencyScores,
    Pair,
    PairScores,
    image_pairs,
)
from mteditflow.rewards.consistency.regions import (
    SIZE,
    Box,
    Pictures,
    Regions,
    Search,
    crops_of,
    pixel_boxes,
    regions_of,
    searches_of,
    tasks_of,
)
from mteditflow.rewards.consistency.similarity import (
    TOKENS,
    Features,
    background_summary,
    check_features,
    object_summary,
    pixel_similarity,
    similarity,
)

# By picture and box of a crop, or by picture and index of the regions with a background.
Summaries = Mapping[tuple[int, Box | int], Tensor]
X = TypeVar("X")


class Detector(Protocol):
    """Detector of objects by name."""

    def __call__(
        self, images: Sequence[Tensor], names: Sequence[Sequence[str]]
    ) -> Sequence[Tensor]:
        """Find objects; boxes in one image must not depend on the others.

        Args:
            images: RGB, uint8 [3, H, W], all of one size.
            names: names to look for in each image: lower case, without full stops, at least one,
                no duplicates.

        Returns:
            For each image the boxes of all objects found, [K, 4], floating point, absolute
            (x1, y1, x2, y2) in pixels.
        """


class ScoredDetector(Protocol):
    """Detector of objects by name that returns a score of each box."""

    def detect(
        self, images: Sequence[Tensor], names: Sequence[Sequence[str]], *, threshold: float
    ) -> Sequence[tuple[Tensor, Tensor]]:
        """Find objects; boxes in one image must not depend on the others.

        Args:
            images: as in ``Detector``.
            names: as in ``Detector``.
            threshold: score above which boxes are kept, in [0, 1].

        Returns:
            For each image the boxes of all objects found, [K, 4], as in ``Detector``, and their
            scores, [K], in [0, 1].
        """


class FeatureExtractor(Protocol):
    """Extractor of tokens from images."""

    def __call__(self, images: Sequence[Tensor]) -> Features:
        """Compute the tokens of RGB images, uint8 [3, H, W] of any sizes."""


class ConsistencyScorer:
    """Scorer of pairs of images; its only state is its models, so that threads may share it.

    Args:
        detector: detector of the objects.
        features: extractor of features from crops and whole images; ``None`` leaves out the feature
            terms and keeps the L1 terms.
        tokens: "strict", or "compat" for the rules of EdiVal-Bench's public scorer.
        batch_size: maximum number of images in one call of a model, >= 1.

    Raises:
        ValueError: ``tokens`` is unknown, or ``batch_size`` is below 1.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 13 to 16; EdiVal-Bench (arXiv 2509.13399).

    Example:
        >>> from mteditflow.rewards import Pair
        >>> def corner(images, names):  # a detector that finds the upper left quarter
        ...     return [torch.tensor([[0.0, 0.0, 256.0, 256.0]]) for _ in images]
        >>> images = [Image.new("RGB", (64, 64), color) for color in ("white", "black")]
        >>> pair = Pair(source=0, edited=1, unchanged_objects=("cat",), all_objects=("cat",))
        >>> ConsistencyScorer(corner).score_pairs(images, [pair])
        [PairScores(object=None, background=None, object_l1=0.0, background_l1=0.0)]
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
        """Score pairs of images of one chain, in order; see ``score_many``."""
        return self.score_many([(images, pairs)])[0]

    @torch.inference_mode()
    def score_many(
        self, work: Sequence[tuple[Sequence[Image.Image], Sequence[Pair]]]
    ) -> list[list[PairScores]]:
        """Score pairs of images of many chains, in few calls of the models.

        An image is searched once for each set of names, and a crop is encoded once, even if many
        pairs and chains share it.

        Args:
            work: for each chain, images of any mode and size, and the pairs to score among them.

        Returns:
            For each chain the scores of its pairs in order.

        Raises:
            ValueError: a pair has an index without an image, or the output of a model has a wrong
                shape or is not finite.
            TypeError: the output of a model has a wrong dtype.
        """
        pictures = Pictures()
        tasks = [tasks_of(pictures, images, pairs, self._rules) for images, pairs in work]
        flat = [task for chain in tasks for task in chain]
        boxes = self._detect(pictures, searches_of(flat))
        regions = [regions_of(task, boxes, self._rules) for task in flat]
        summaries = self._summarize(pictures, regions)
        scores = (self._score(pictures, summaries, *each) for each in enumerate(regions))
        return [[next(scores) for _ in chain] for chain in tasks]

    def _detect(self, pictures: Pictures, searches: Sequence[Search]) -> dict[Search, Tensor]:
        whole_boxes: dict[Search, Tensor] = {}
        for batch in _batches(searches, self.batch_size):
            images = [pictures.pixels[picture] for picture, _ in batch]
            boxes = self.detector(images, [names for _, names in batch])
            if len(boxes) != len(batch):
                raise ValueError(
                    f"detector: expected boxes of {len(batch)} images, got {len(boxes)}"
                )
            cut = (pixel_boxes(each, (SIZE, SIZE)) for each in boxes)
            whole_boxes |= zip(batch, cut, strict=True)
        return whole_boxes

    def _summarize(self, pictures: Pictures, regions: Sequence[Regions]) -> Summaries:
        """Return the features of every crop, and of every background with a positive weight."""
        summaries: dict[tuple[int, Box | int], Tensor] = {}
        if self.features is None:
            return summaries
        crops = crops_of(regions)
        for batch in _batches(list(crops), self.batch_size):
            features = self.features([pictures.crop(*crop) for crop in batch])
            check_features(features, len(batch))
            summaries |= zip(batch, object_summary(features, self._rules), strict=True)
            for crop, tokens in zip(batch, self._rules.tokens(features), strict=True):
                for n, mask in crops[crop].items():
                    weights = self._rules.weights(mask, features)
                    if weights.any():  # else no patch is half background: nothing to measure
                        key = (crop[0], n)
                        summaries[key] = background_summary(tokens, weights, self._rules)
        return summaries

    def _score(self, pictures: Pictures, summaries: Summaries, n: int, own: Regions) -> PairScores:
        source, edited, crops, mask = own
        terms: dict[str, float | None] = {}
        if crops is not None:
            parts = [(pictures.crop(source, box), pictures.crop(edited, box)) for box in crops]
            # The boxes are those of the source: an object that moved or vanished loses similarity.
            values = [pixel_similarity(*part) for part in parts]
            terms["object_l1"] = fmean(values) if values else self._rules.unmeasured
            terms["object"] = self._cosine(summaries, source, edited, crops)
        if mask is not None:
            if mask.any():
                whole = pictures.pixels[source], pictures.pixels[edited]
                terms["background_l1"] = pixel_similarity(*whole, mask)
            terms["background"] = self._cosine(summaries, source, edited, [n])
        return PairScores(**terms)

    def _cosine(
        self, summaries: Summaries, source: int, edited: int, keys: Sequence[Box | int]
    ) -> float | None:
        if self.features is None:
            return None
        keys = [key for key in keys if (source, key) in summaries]
        if not keys:
            return self._rules.unmeasured
        pair = (torch.stack([summaries[p, key] for key in keys]) for p in (source, edited))
        return float(similarity(*pair).mean())


class Consistency:
    """Content consistency of chains, computed in this process.

    Args:
        scorer: scorer of pairs of images.
        pairing: "reference" or "consecutive", as in ``pairs_of``.

    Raises:
        ValueError: the pairing is unknown.
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
            images: for each chain N + 1 images: the reference, then the result of each turn.

        Returns:
            Scores [B, N], float32, in the order of ``chains``; N is that of the longest chain.

        Raises:
            ValueError: there is no chain, its images are too few or too many, or a chain has no
                names of objects.
        """
        answers = self.scorer.score_many(image_pairs(chains, images, pairing=self.pairing))
        return ConsistencyScores.collect(answers, [chain.turns for chain in chains])


def _batches(items: Sequence[X], size: int) -> Iterator[Sequence[X]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
