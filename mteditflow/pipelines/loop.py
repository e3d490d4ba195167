"""Detect the end of a pipeline's loop over its timesteps, and find the latents it ends with."""

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
    """One denoising step, with everything that a replay needs.

    Shapes: ``B`` trajectories of one pipeline call, then any latent axes.

    Attributes:
        x_t: the sample before the step, [B, ...], in the pipeline's dtype.
        next_x: the sample after it, [B, ...], in the dtype with which the pipeline continues.
        sigma: flow time before the step, float32 [B].
        next_sigma: flow time after it, float32 [B].
        log_prob: log-prob of the rounded ``next_x``, float32 [B]; 0 if deterministic.
        stochastic: whether noise was drawn.
    """

    x_t: Tensor
    next_x: Tensor
    sigma: Tensor
    next_sigma: Tensor
    log_prob: Tensor
    stochastic: bool


class Timesteps(Tensor):
    """Timesteps tensor that reports the end of each loop over it.

    At that moment the pipeline has completed the loop body after its last step.
    """

    # Results of operations are plain tensors, which report nothing.
    __torch_function__ = cast(Any, torch._C._disabled_torch_function_impl)
    ended: Callable[[int, FrameType], None]

    @classmethod
    def of(cls, timesteps: Tensor, ended: Callable[[int, FrameType], None]) -> Timesteps:
        """Return a view of ``timesteps`` that calls ``ended`` with the length and the frame."""
        watched = timesteps.as_subclass(cls)
        watched.ended = ended
        return watched

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.as_subclass(Tensor)
        # Reached when the loop asks for one item more; frame 1 is that loop's, as it resumes this.
        self.ended(len(self), sys._getframe(1))

    def __getitem__(self, index: Any) -> Tensor:
        part = self.as_subclass(Tensor)[index]
        return Timesteps.of(part, self.ended) if isinstance(index, slice) else part

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the timesteps on another device or in another dtype, which report as well."""
        return Timesteps.of(self.as_subclass(Tensor).to(*args, **kwargs), self.ended)


class Loop:
    """Loop that is running when the last step of a pipeline call is taken.

    It refers to frames of the call stack, and so keeps all their variables alive: drop it soon.

    Args:
        last: the last step.
    """

    def __init__(self, last: Step) -> None:
        self._last, self._stack = last, list(_frames())
        holders = ((frame, _names_of(last.x_t, frame)) for frame in self._stack)
        self._holder = next((found for found in holders if found[1]), None)

    def runs_in(self, frame: FrameType | None) -> bool:
        """Return whether a frame belongs to this loop, rather than to one in a callback."""
        while frame is not None and frame.f_code.co_flags & inspect.CO_GENERATOR:
            frame = frame.f_back  # a progress bar, or an iterator around the timesteps
        return frame in self._stack

    def final_latents(self) -> Tensor:
        """Return the latents with which the pipeline continues after its last step.

        They are in the variables that held the last step's sample, if that frame is still active.
        Otherwise, as in modular pipelines, some variable on the stack, or an attribute of one, must
        hold the step's result, whole or as a part.

        Raises:
            ReplayError: no variable holds the step's result, or a single changed tensor.
        """
        last, frames = self._last, list(_frames())
        frame, names = self._holder or (None, [])
        named = (
            [frame.f_locals.get(n) for n in names] if frame is not None and frame in frames else []
        )
        for x in named or (x for each in frames for x in _tensors(each)):
            if x is last.next_x or _holds(x, last.next_x):
                return last.next_x
        # By id, since several variables may hold the one tensor that was changed.
        changed = {
            id(x): x
            for x in named
            if isinstance(x, Tensor) and x is not last.x_t and x.shape == last.next_x.shape
        }
        if len(changed) == 1:
            return next(iter(changed.values()))
        raise ReplayError(
            "cannot replay this pipeline: after its loop it does not hold the result of its last "
            "step, so its images may not be those of the recorded latents"
        )


def _frames() -> Iterator[FrameType]:
    """Yield the frames of the call stack outside of this package, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    here = __name__.rpartition(".")[0]
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith(here):
            yield frame
        frame = frame.f_back


def _names_of(x: Tensor, frame: FrameType) -> list[str]:
    """Return the names of the local variables that are this very tensor."""
    return [name for name, value in frame.f_locals.items() if value is x]


def _tensors(frame: FrameType) -> Iterator[Tensor]:
    """Yield the tensors among a frame's local variables, their attributes and dict values."""
    for value in list(frame.f_locals.values()):
        held = value if type(value) is dict else getattr(value, "__dict__", {})
        for x in (value, *held.values()):
            if isinstance(x, Tensor):
                yield x


def _holds(x: Any, sought: Tensor) -> bool:
    """Return whether ``x`` equals a tensor, in the dtype of ``x``, or has it as a part."""
    fits = isinstance(x, Tensor) and x.ndim == sought.ndim and x.is_floating_point()
    return fits and next(parts_equal(x, sought), None) is not None
