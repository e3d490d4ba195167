"""Recognize the arguments of a transformer that hold the flow time, with their units and grid.

A clock is the function from the scheduler's timestep to such an argument, including its order of
operations and dtype. A ``Grid`` is the function from flow times to the scheduler's timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mteditflow.pipelines.recognize import ReplayError

Clock = Callable[[Tensor, torch.dtype], Tensor]


def in_steps(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scheduler's timestep itself."""
    return timestep.to(dtype)


def in_units(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """Return timestep / 1000, divided in the model's dtype: FLUX."""
    return timestep.to(dtype) / 1000


def in_units_rounded_last(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """Return timestep / 1000, divided before the cast to the model's dtype."""
    return (timestep / 1000).to(dtype)


def in_units_from_noise(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (1000 - timestep) / 1000, which is 1 at data: Z-Image."""
    return ((1000 - timestep) / 1000).to(dtype)


def in_units_from_one(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1 - timestep / 1000, another rounding of (1000 - timestep) / 1000: Lumina."""
    return (1 - timestep / 1000).to(dtype)


def in_steps_from_zero(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """Return timestep - 1, so that the largest of 1,000 is 999: GLM-Image."""
    return (timestep - 1).to(dtype)


# In order of preference where several clocks agree on a timestep.
CLOCKS: tuple[Clock, ...] = (
    in_units,
    in_steps,
    in_units_rounded_last,
    in_units_from_noise,
    in_units_from_one,
    in_steps_from_zero,
)


def find_times(arguments: Mapping[str, Any], timestep: Tensor) -> list[str]:
    """Return the names of the arguments that equal some clock of the scheduler's timestep (0-d).

    A guidance scale of 1 may be among them; ``CallPattern.time_names`` drops it, since it does not
    change over the steps.

    Raises:
        ReplayError: no argument does.
    """
    found = [
        name
        for name, x in arguments.items()
        if isinstance(x, Tensor) and x.numel() and (x.is_floating_point() or named_time(name))
        if x.ndim < 2 or named_time(name)  # a time per token in Wan 2.2, per frame in Cosmos 2.5
        if any(bool((clock(timestep, x.dtype) == x).all()) for clock in CLOCKS)
    ]
    if not found:
        raise ReplayError(
            "one argument of the transformer should hold the scheduler's timestep "
            f"{timestep.item():g}, as it is, over 1000 or as 1 minus that, but none of "
            f"{sorted(arguments)} does"
        )
    return found


def named_time(name: str) -> bool:
    """Return whether an argument is named like a flow time."""
    return "time" in name or name in ("t", "sigma", "sigmas")


class Time(NamedTuple):
    """Argument that holds the flow time of each row.

    Attributes:
        name: name of the argument.
        dtype: dtype of the argument.
        axes: its shape after the batch axis, such as (tokens,) for one time per token.
        clock: function from the scheduler's timestep to the argument.
        single: whether the recorded call had one time for all rows; a replay whose rows have equal
            times then does so too.
    """

    name: str
    dtype: torch.dtype
    axes: tuple[int, ...]
    clock: Clock
    single: bool = False

    def argument(self, timestep: Tensor) -> Tensor:
        """Return the argument for rows with these timesteps [M], of shape [M or 1, *axes]."""
        if self.single and bool((timestep == timestep[0]).all()):
            timestep = timestep[:1]
        time = self.clock(timestep, self.dtype)
        return time.reshape(-1, *[1] * len(self.axes)).expand(-1, *self.axes)


class Grid(NamedTuple):
    r"""Map from flow times to the scheduler's timesteps.

    A timestep is ``sigma * timesteps``, with two exceptions. A pipeline that shifts its sigmas and
    not its timesteps (CogView4) has ``sigma = shift * u / (1 + (shift - 1) * u)`` for
    ``u = timestep / timesteps``. One that counts timesteps from data (Mochi) has
    ``(1 - sigma) * timesteps``. In both cases recorded sigmas map to their recorded timesteps.

    Attributes:
        timesteps: the timestep of sigma = 1; 1,000 in nearly all pipelines.
        shift: shift of sigmas against timesteps; 1: none.
        from_data: whether timesteps rise over the steps.
        known: recorded pairs of sigma and timestep, which may differ from the formula by rounding.
    """

    timesteps: int
    shift: float = 1.0
    from_data: bool = False
    known: tuple[tuple[float, float], ...] = ()

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return the timesteps of flow times, float32, of the same shape."""
        sigma = sigma.float()
        # The shift sigma = shift * u / (1 + (shift - 1) * u), solved for u.
        share = sigma / (self.shift - (self.shift - 1) * sigma)
        timestep = (1 - share if self.from_data else share) * self.timesteps
        for at, exact in self.known:
            timestep = torch.where(sigma == at, exact, timestep)
        return timestep


def find_grid(sigmas: Tensor, timesteps: Tensor, most: int) -> Grid:
    """Return the grid of a turn's steps.

    Args:
        sigmas: flow times of the steps, [S], on the CPU.
        timesteps: the scheduler's timesteps, [S], on the CPU.
        most: the timestep of sigma = 1.

    Raises:
        ReplayError: the timesteps are none of the functions of sigma that ``Grid`` describes, or
            the steps are too few to decide.
    """
    if torch.equal(sigmas * most, timesteps):
        return Grid(most)
    known = tuple(zip(sigmas.tolist(), timesteps.tolist(), strict=True))
    sigma, u = sigmas.double(), timesteps.double() / most
    if (1 - u - sigma).abs().max() <= 1e-6:
        return Grid(most, from_data=True, known=known)
    if int(((sigma > 0) & (sigma < 1)).sum()) < 2:
        raise ReplayError(
            "the scheduler's timesteps are not its sigmas times "
            f"{most}, and {len(sigmas)} steps are too few to tell what they are instead"
        )
    # One inner point determines the shift; the one next to 1/2 loses the least to rounding.
    inner = int((sigma - 0.5).abs().argmin())
    s, t = sigma[inner].item(), u[inner].item()
    shift = s * (1 - t) / (t * (1 - s)) if 0 < s < 1 and t > 0 else 1.0
    if (shift * u / (1 + (shift - 1) * u) - sigma).abs().max() > 1e-5:
        raise ReplayError(
            "the scheduler's timesteps are no known function of its sigmas: at sigmas "
            f"{sigmas.tolist()} they are {timesteps.tolist()}"
        )
    return Grid(most, shift, known=known)


def find_time(name: str, times: Tensor, timesteps: Tensor, rows: int) -> Time:
    """Return the time whose clock maps the timesteps exactly to the values of an argument.

    Args:
        name: name of the argument.
        times: its values, [S, ...].
        timesteps: the scheduler's timesteps, [S].
        rows: rows of each call.

    Raises:
        ReplayError: no clock does.
    """
    single = times.ndim > 1 and times.shape[1] == 1 < rows
    expected = timesteps.reshape(-1, *[1] * (times.ndim - 1))
    for clock in CLOCKS:
        if bool((clock(expected, times.dtype) == times).all()):
            return Time(name, times.dtype, tuple(times.shape[2:]), clock, single)
    raise ReplayError(
        f"{name} is not a known function of sigma: at timesteps {timesteps.tolist()} it was given "
        f"{times.reshape(len(times), -1)[:, 0].tolist()}"
    )
