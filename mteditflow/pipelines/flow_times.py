"""Which arguments of a transformer hold the flow time, in what unit, and on which grid.

A clock is the function from the scheduler's timestep to such an argument, order of operations and
dtype included; a ``Grid`` is the one from flow times to the scheduler's timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mteditflow.pipelines.recognize import ReplayError

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


def in_units_from_one(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in another order of operations: Lumina."""
    return (1 - timestep / 1000).to(dtype)


def in_steps_from_zero(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """The timestep less 1, so that the last of a thousand is 999: GLM-Image."""
    return (timestep - 1).to(dtype)


CLOCKS: tuple[Clock, ...] = (
    in_units,
    in_steps,
    in_units_rounded_last,
    in_units_from_noise,
    in_units_from_one,
    in_steps_from_zero,
)


def find_times(arguments: Mapping[str, Any], timestep: Tensor) -> list[str]:
    """Names of the arguments that some clock makes of the scheduler's ``timestep`` (0-d).

    A guidance scale of 1 may be among them; it does not change with the steps.
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
    """Whether an argument is named like a flow time."""
    return "time" in name or name in ("t", "sigma", "sigmas")


class Time(NamedTuple):
    """An argument that holds the flow time of each row.

    Attributes:
        name: of the argument.
        dtype: its dtype.
        axes: its shape behind the batch, such as (tokens,) for one time per token.
        clock: the function from the scheduler's timestep to it.
        single: whether one time served all rows of a call, which it then does in a replay too.
    """

    name: str
    dtype: torch.dtype
    axes: tuple[int, ...]
    clock: Clock
    single: bool = False

    def argument(self, timestep: Tensor) -> Tensor:
        """The argument of rows with these timesteps, [M]."""
        if self.single and bool((timestep == timestep[0]).all()):
            timestep = timestep[:1]
        time = self.clock(timestep, self.dtype)
        return time.reshape(-1, *[1] * len(self.axes)).expand(-1, *self.axes)


class Grid(NamedTuple):
    r"""The scheduler's timesteps of flow times.

    They are ``sigma * timesteps`` but where a pipeline shifts its sigmas and not its timesteps
    (CogView4): there ``sigma = shift * u / (1 + (shift - 1) * u)`` for
    ``u = timestep / timesteps``; or where it counts them from data (Mochi):
    ``(1 - sigma) * timesteps``. Both keep the timesteps of the recorded sigmas as they are.

    Attributes:
        timesteps: the timestep of sigma = 1, 1000 in nearly all pipelines.
        shift: of sigmas against timesteps; 1 where they are the same.
        from_data: whether timesteps rise with the steps.
        known: pairs of sigma and timestep that differ from the formula's, by rounding.
    """

    timesteps: int
    shift: float = 1.0
    from_data: bool = False
    known: tuple[tuple[float, float], ...] = ()

    def timestep(self, sigma: Tensor) -> Tensor:
        """Timesteps of flow times, float32."""
        sigma = sigma.float()
        share = sigma / (self.shift - (self.shift - 1) * sigma)
        timestep = (1 - share if self.from_data else share) * self.timesteps
        for at, exact in self.known:
            timestep = torch.where(sigma == at, exact, timestep)
        return timestep


def find_grid(sigmas: Tensor, timesteps: Tensor, most: int) -> Grid:
    """The grid of a turn's steps, [S] each, on the CPU; ``most`` is the timestep of sigma 1."""
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
    """The time whose clock makes what an argument held, [S, ...], of the timesteps [S], exactly."""
    single = times.ndim > 1 and times.shape[1] == 1 < rows
    expected = timesteps.reshape(-1, *[1] * (times.ndim - 1))
    for clock in CLOCKS:
        if bool((clock(expected, times.dtype) == times).all()):
            return Time(name, times.dtype, tuple(times.shape[2:]), clock, single)
    raise ReplayError(
        f"{name} is not a known function of sigma: at timesteps {timesteps.tolist()} it was given "
        f"{times.reshape(len(times), -1)[:, 0].tolist()}"
    )
