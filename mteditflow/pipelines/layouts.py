"""Where a transformer's argument holds the noisy sample, and where its output the velocity.

A new family of pipelines is one more entry in ``LAYOUTS``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor


class Layout(Protocol):
    """Where an argument holds the noisy sample; ``rest`` is what it holds besides."""

    def split(self, argument: Any, sample: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """The part that should be the sample, and the rest; None if the shapes rule it out."""

    def join(self, sample: Tensor, rest: Tensor | None) -> Any:
        """The argument that holds this sample and this rest."""

    def velocity(self, output: Any, sample: Tensor) -> Tensor:
        """The part of the transformer's output that belongs to the sample."""


@dataclass(frozen=True)
class Whole:
    """The argument is the sample: FLUX.1, SD3, Qwen-Image, Wan text-to-video, LTX-Video."""

    def split(self, argument: Any, sample: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """See ``Layout``."""
        fits = isinstance(argument, Tensor) and argument.shape == sample.shape
        return (argument, None) if fits else None

    def join(self, sample: Tensor, rest: Tensor | None) -> Any:
        """See ``Layout``."""
        return sample

    def velocity(self, output: Any, sample: Tensor) -> Tensor:
        """See ``Layout``."""
        return cast(Tensor, output)


@dataclass(frozen=True)
class Prefix:
    """The sample comes first along axis 1, references follow.

    Reference tokens in Kontext, klein and Qwen-Image-Edit; channels in Wan image-to-video.
    """

    def split(self, argument: Any, sample: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """See ``Layout``."""
        if not isinstance(argument, Tensor) or not argument.ndim == sample.ndim >= 2:
            return None
        length = sample.shape[1]
        head = argument[:, :length]
        longer = argument.shape[1] > length and head.shape == sample.shape
        return (head, argument[:, length:]) if longer else None

    def join(self, sample: Tensor, rest: Tensor | None) -> Any:
        """See ``Layout``."""
        return sample if rest is None else torch.cat([sample, rest], dim=1)

    def velocity(self, output: Any, sample: Tensor) -> Tensor:
        """See ``Layout``."""
        return cast(Tensor, output)[:, : sample.shape[1]]


@dataclass(frozen=True)
class Frames:
    """A list with one tensor per row, each an image [C, 1, H, W] of a single frame: Z-Image."""

    def split(self, argument: Any, sample: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """See ``Layout``."""
        if not isinstance(argument, list) or len(argument) != len(sample) or sample.ndim != 4:
            return None
        frame = sample[:1].transpose(0, 1).shape
        fits = all(isinstance(row, Tensor) and row.shape == frame for row in argument)
        return (self.velocity(argument, sample), None) if fits else None

    def join(self, sample: Tensor, rest: Tensor | None) -> Any:
        """See ``Layout``."""
        return list(sample.unsqueeze(2))

    def velocity(self, output: Any, sample: Tensor) -> Tensor:
        """See ``Layout``."""
        return torch.stack(list(output)).squeeze(2)


LAYOUTS: tuple[Layout, ...] = (Whole(), Prefix(), Frames())


def repeat_rows(x: Tensor, copies: int) -> Tensor:
    """All rows, ``copies`` times one after the other."""
    return x if copies == 1 else torch.cat([x] * copies)


def memory_axes(x: Tensor) -> tuple[int, ...]:
    """The axes of a tensor from slowest to fastest in memory; those of size 1 do not count."""
    axes = range(x.ndim)
    return tuple(axes if x.is_contiguous() else sorted(axes, key=x.stride, reverse=True))


def in_memory(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The same tensor with its axes from slowest to fastest in memory as given."""
    return x.permute(axes).contiguous().permute([axes.index(axis) for axis in range(x.ndim)])
