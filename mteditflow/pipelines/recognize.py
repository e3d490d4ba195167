"""How a pipeline calls its transformer, recognized from the tensors of one denoising step.

The pipeline's class does not matter. Three things are recognized by equality: which argument holds
the noisy sample and where in it (``Layout``), which one holds the flow time and in what unit (a
clock), and how the outputs of one step's calls become the scheduler's velocity (``Guidance``).
A new family of pipelines is one more entry in ``LAYOUTS`` or ``CLOCKS``, or one more ``Rescaling``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor


class Layout(Protocol):
    """Where an argument holds the noisy sample; ``rest`` is the remainder of the argument."""

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


class ReplayError(ValueError):
    """A recorded call that could not be replayed faithfully; the message says why."""


class Call(NamedTuple):
    """One call of the transformer: its arguments by name, and what it returned first."""

    arguments: dict[str, Any]
    output: Any


class Place(NamedTuple):
    """Where a call holds the noisy sample.

    Attributes:
        name: the argument.
        dtype: its dtype.
        layout: where in that argument.
        copies: how often, along the batch: 2 where both branches of guidance share one call.
        axes: the sample's axes there from slowest to fastest in memory, which decides on kernels.
    """

    name: str
    dtype: torch.dtype
    layout: Layout
    copies: int
    axes: tuple[int, ...]


def find_sample(arguments: Mapping[str, Any], sample: Tensor) -> Place:
    """The one place that holds ``sample``, compared in the argument's dtype."""
    found = []
    for (name, argument), layout, copies in product(arguments.items(), LAYOUTS, (1, 2)):
        rows = repeat_rows(sample, copies)
        parts = layout.split(argument, rows)
        if parts is not None and torch.equal(parts[0], rows.to(parts[0].dtype)):
            found.append(Place(name, parts[0].dtype, layout, copies, memory_axes(parts[0])))
    if len(found) != 1:
        held = {n: list(a.shape) for n, a in arguments.items() if isinstance(a, Tensor)}
        where = f"several do: {[place.name for place in found]}" if found else "none does"
        raise ReplayError(
            "exactly one argument of the transformer should hold the scheduler's sample "
            f"{list(sample.shape)}, whole or as a prefix of axis 1, once or twice along the batch, "
            f"but {where}; its tensors are {held}. A pipeline that puts clean frames in the place "
            "of noisy ones, as Wan 2.2 with expand_timesteps and LTX-Video from an image, is not "
            "supported"
        )
    return found[0]


Clock = Callable[[Tensor, torch.dtype], Tensor]


def in_steps(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """The scheduler's timestep itself."""
    return timestep.to(dtype)


def in_units(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """A thousandth of it, divided in the model's dtype: FLUX."""
    return timestep.to(dtype) / 1000


def in_units_rounded_last(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """A thousandth of it, divided before the cast to the model's dtype."""
    return (timestep / 1000).to(dtype)


def in_units_from_noise(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """One minus a thousandth of it, so that data is at 1: Z-Image."""
    return ((1000 - timestep) / 1000).to(dtype)


CLOCKS: tuple[Clock, ...] = (in_units, in_steps, in_units_rounded_last, in_units_from_noise)


def find_time(arguments: Mapping[str, Any], timestep: Tensor) -> str:
    """Name of the argument that some clock makes of the scheduler's ``timestep`` (0-d)."""
    found = [
        name
        for name, argument in arguments.items()
        if isinstance(argument, Tensor) and argument.is_floating_point()
        if argument.ndim < (3 if name == "timestep" else 2)  # per token in Wan 2.2 text-to-video
        if any(bool((clock(timestep, argument.dtype) == argument).all()) for clock in CLOCKS)
    ]
    if "timestep" in found:
        return "timestep"
    if len(found) != 1:
        raise ReplayError(
            "one argument of the transformer should hold the scheduler's timestep "
            f"{timestep.item():g}, as it is, over 1000 or as 1 minus that, but "
            + (f"several do: {found}" if found else f"none of {sorted(arguments)} does")
        )
    return found[0]


def find_clock(times: Tensor, timesteps: Tensor) -> Clock:
    """The clock that makes every recorded time [S, ...] of the sigmas' timesteps [S], exactly."""
    rows = timesteps.reshape(-1, *[1] * (times.ndim - 1))
    for clock in CLOCKS:
        if bool((clock(rows, times.dtype) == times).all()):
            return clock
    raise ReplayError(
        "the transformer's time is not a known function of sigma: at timesteps "
        f"{timesteps.tolist()} it was given {times.flatten(1)[:, 0].tolist()}"
    )
