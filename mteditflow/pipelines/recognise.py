"""How a pipeline talks to its transformer, read off the tensors of one denoising step.

Nothing is known of the pipeline's class. Three things are recognised by equality: which argument
holds the noisy sample and where in it (``Layout``), which one tells the flow time and in what unit
(a clock), and how the outputs of one step's calls become the scheduler's velocity (``Guidance``).
A new family of pipelines is one more entry in ``LAYOUTS`` or ``CLOCKS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class ReplayError(ValueError):
    """A recorded call that could not be replayed faithfully; the message says why."""


class Call(NamedTuple):
    """One call of the transformer: its arguments by name, and the tensor it returned."""

    arguments: dict[str, Any]
    output: Tensor


class Layout(Protocol):
    """Where an argument holds the noisy sample; ``rest`` is what it holds besides."""

    def split(self, argument: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """The part that should be the sample, and the rest; None if the shapes rule it out."""

    def join(self, sample: Tensor, rest: Tensor | None) -> Tensor:
        """The argument that holds this sample and this rest."""

    def velocity(self, output: Tensor, sample: Tensor) -> Tensor:
        """The part of the transformer's output that belongs to the sample."""


@dataclass(frozen=True)
class Whole:
    """The argument is the sample: FLUX.1, SD3 and Wan without guidance."""

    def split(self, argument: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """See ``Layout``."""
        return (argument, None) if argument.shape == sample.shape else None

    def join(self, sample: Tensor, rest: Tensor | None) -> Tensor:
        """See ``Layout``."""
        return sample

    def velocity(self, output: Tensor, sample: Tensor) -> Tensor:
        """See ``Layout``."""
        return output


@dataclass(frozen=True)
class Prefix:
    """The sample comes first along axis 1, reference tokens follow: Kontext, klein, Qwen-Edit."""

    def split(self, argument: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """See ``Layout``."""
        if argument.ndim != sample.ndim or argument.ndim < 2:
            return None
        length = sample.shape[1]
        head = argument[:, :length]
        longer = argument.shape[1] > length and head.shape == sample.shape
        return (head, argument[:, length:]) if longer else None

    def join(self, sample: Tensor, rest: Tensor | None) -> Tensor:
        """See ``Layout``."""
        return sample if rest is None else torch.cat([sample, rest], dim=1)

    def velocity(self, output: Tensor, sample: Tensor) -> Tensor:
        """See ``Layout``."""
        return output[:, : sample.shape[1]]


LAYOUTS: tuple[Layout, ...] = (Whole(), Prefix())


def find_sample(arguments: Mapping[str, Any], sample: Tensor) -> tuple[str, Layout]:
    """Name and layout of the argument that holds ``sample``, compared in the argument's dtype."""
    found = []
    for name, argument in arguments.items():
        for layout in LAYOUTS if isinstance(argument, Tensor) else ():
            parts = layout.split(argument, sample)
            if parts is not None and torch.equal(parts[0], sample.to(argument.dtype)):
                found.append((name, layout))
    if len(found) != 1:
        held = {n: list(a.shape) for n, a in arguments.items() if isinstance(a, Tensor)}
        where = f"several do: {[name for name, _ in found]}" if found else "none does"
        raise ReplayError(
            "exactly one argument of the transformer should hold the scheduler's sample "
            f"{list(sample.shape)}, whole or as a prefix of axis 1, but {where}; "
            f"its tensors are {held}"
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
        if isinstance(argument, Tensor) and argument.ndim < 2 and argument.is_floating_point()
        if any(bool((clock(timestep, argument.dtype) == argument).all()) for clock in CLOCKS)
    ]
    if "timestep" in found:
        return "timestep"
    if len(found) != 1:
        raise ReplayError(
            "one argument of the transformer should tell the scheduler's timestep "
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


class Guidance(NamedTuple):
    """How the branches of one step combine: ``negative + scale * (positive - negative)``.

    Attributes:
        positive: index of the positive branch among the step's calls.
        scale: the guidance scale.
    """

    positive: int
    scale: float

    def __call__(self, velocities: Sequence[Tensor]) -> Tensor:
        """Combine the two branches, in the pipelines' own order of operations."""
        positive, negative = velocities[self.positive], velocities[1 - self.positive]
        return negative + self.scale * (positive - negative)


def mismatch(velocities: Sequence[Tensor], guidance: Guidance | None, velocity: Tensor) -> Tensor:
    """Whether the branches do not make the scheduler's velocity, as a boolean on its device.

    They must make it exactly; only two branches in full precision may differ by the roundings that
    another order of the same operations causes.
    """
    if guidance is None:
        return (velocities[0] != velocity).any()
    combined, epsilon = guidance(velocities), torch.finfo(velocity.dtype).eps
    if epsilon > torch.finfo(torch.float32).eps:
        return (combined != velocity).any()
    size = velocities[0].abs() + velocities[1].abs()
    return ~((combined - velocity).abs() <= 2 * epsilon * (1 + abs(guidance.scale)) * size).all()


def find_guidance(velocities: Sequence[Tensor], velocity: Tensor) -> Guidance | None:
    """Recover the scale from the tensors; None where equal branches hide it.

    Least squares in float64, then the roundest decimal near it that makes exactly the velocity,
    else the scale as found if it makes the velocity up to rounding.
    """
    found = []
    for positive in (0, 1):
        negative = velocities[1 - positive].double()
        difference = velocities[positive].double() - negative
        power = difference.square().sum().item()
        if power == 0:
            return None
        scale = ((velocity.double() - negative) * difference).sum().item() / power
        found += [Guidance(positive, round(scale, digits)) for digits in range(7)]
        found.append(Guidance(positive, scale))
    for guidance in found:
        if torch.equal(guidance(velocities), velocity):
            return guidance
    nearest = found[7]
    if mismatch(velocities, nearest, velocity):
        raise ReplayError(
            "the scheduler's velocity is not negative + scale * (positive - negative) of the "
            "transformer's two outputs: a rescaled or otherwise modified guidance cannot be "
            "replayed"
        )
    return nearest
