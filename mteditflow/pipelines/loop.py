"""The loop of a pipeline over its timesteps: that it ended, and with which latents."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from mteditflow.pipelines.recognize import ReplayError, parts_equal


class Step(NamedTuple):
    """One denoising step as it was taken, with all that a replay needs.

    Shapes: ``B`` trajectories of one pipeline call, any latent axes behind.

    Attributes:
        x_t: the sample that the pipeline gave, [B, ...], in the pipeline's dtype.
        next_x: the sample that it got back, [B, ...], in the dtype it goes on with.
        sigma: flow time before the step, float32 [B].
        next_sigma: flow time after it, float32 [B].
        log_prob: log-prob of ``next_x`` as rounded to that dtype, float32 [B]; 0 if deterministic.
        stochastic: whether noise was drawn.
    """

    x_t: Tensor
    next_x: Tensor
    sigma: Tensor
    next_sigma: Tensor
    log_prob: Tensor
    stochastic: bool


class Timesteps(Tensor):
    """The timesteps that a pipeline loops over; reports the end of each loop.

    At that moment the pipeline has done all that it does within the loop after its last step.
    """

    __torch_function__ = cast(Any, torch._C._disabled_torch_function_impl)
    ended: Callable[[int, FrameType], None]

    @classmethod
    def of(cls, timesteps: Tensor, ended: Callable[[int, FrameType], None]) -> Timesteps:
        """The same tensor, watched."""
        watched = timesteps.as_subclass(cls)
        watched.ended = ended
        return watched

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.as_subclass(Tensor)
        self.ended(len(self), sys._getframe(1))

    def __getitem__(self, index: Any) -> Tensor:
        part = self.as_subclass(Tensor)[index]
        return Timesteps.of(part, self.ended) if isinstance(index, slice) else part

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """The same on another device or in another dtype, watched as well."""
        return Timesteps.of(self.as_subclass(Tensor).to(*args, **kwargs), self.ended)


class Loop:
    """The loop that is running when the last step of a pipeline call is taken.

    It keeps frames of the call stack, and with them all of their variables: let it go soon.

    Args:
        last: that step.
    """

    def __init__(self, last: Step) -> None:
        self._last, self._stack = last, list(_frames())
        holders = ((frame, _names_of(last.x_t, frame)) for frame in self._stack)
        self._holder = next((found for found in holders if found[1]), None)

    def runs_in(self, frame: FrameType | None) -> bool:
        """Whether a loop, by the frame that asks for its next item, is this and no callback's."""
        while frame is not None and frame.f_code.co_flags & inspect.CO_GENERATOR:
            frame = frame.f_back  # a progress bar, or an iterator around the timesteps
        return frame in self._stack

    def final_latents(self) -> Tensor:
        """Return the latents with which the pipeline goes on after its last step.

        They are in the variables that held the last step's sample, if that frame is still active.
        Otherwise, as in modular pipelines, any variable of the loop must hold the step's result:
        itself, in an attribute or as a part.
        """
        last, frames = self._last, list(_frames())
        frame, names = self._holder or (None, [])
        named = (
            [frame.f_locals.get(n) for n in names] if frame is not None and frame in frames else []
        )
        for x in named or (x for each in frames for x in _tensors(each)):
            if x is last.next_x or _holds(x, last.next_x):
                return last.next_x
        changed = {
            id(x): x
            for x in named
            if isinstance(x, Tensor) and x is not last.x_t and x.shape == last.next_x.shape
        }
        if len(changed) == 1:
            return next(iter(changed.values()))
        raise ReplayError(
            "cannot replay this pipeline: after its last step it does not hold what that returned, "
            "so that its images may not be those of the recorded latents"
        )


def _frames() -> Iterator[FrameType]:
    """The frames of the call stack outside of this wing, from the innermost on."""
    frame: FrameType | None = sys._getframe(1)
    here = __name__.rpartition(".")[0]
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith(here):
            yield frame
        frame = frame.f_back


def _names_of(x: Tensor, frame: FrameType) -> list[str]:
    """The local variables that are a tensor."""
    return [name for name, value in frame.f_locals.items() if value is x]


def _tensors(frame: FrameType) -> Iterator[Tensor]:
    """The tensors among a frame's local variables, and among their attributes."""
    for value in list(frame.f_locals.values()):
        held = value if type(value) is dict else getattr(value, "__dict__", {})
        for x in (value, *held.values()):
            if isinstance(x, Tensor):
                yield x


def _holds(x: Any, sought: Tensor) -> bool:
    """Whether a tensor is another one in any dtype, or has it as a part."""
    fits = isinstance(x, Tensor) and x.ndim == sought.ndim and x.is_floating_point()
    return fits and next(parts_equal(x, sought), None) is not None
