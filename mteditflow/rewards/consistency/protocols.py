"""What content consistency asks of a detector and of features: any such callables will do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from mteditflow.rewards.consistency.similarity import Features


class Detector(Protocol):
    """Finds objects by name."""

    def __call__(
        self, images: Sequence[Tensor], names: Sequence[Sequence[str]]
    ) -> Sequence[Tensor]:
        """Find objects; what is found in one image must not depend on the others.

        Args:
            images: RGB, uint8 [3, H, W], all of one size.
            names: what to look for in each image: lower case, without full stops, at least one,
                none twice.

        Returns:
            Per image the boxes of all objects found, [K, 4], floating point, absolute
            (x1, y1, x2, y2) in pixels.
        """
        ...


class FeatureExtractor(Protocol):
    """Turns images into tokens."""

    def __call__(self, images: Sequence[Tensor]) -> Features:
        """Compute the tokens of images, RGB, uint8 [3, H, W], of any sizes."""
        ...
