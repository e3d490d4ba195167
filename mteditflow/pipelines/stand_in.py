"""Stand-ins for the scheduler of a pipeline while it is recorded."""

from __future__ import annotations

import copy
import functools
from collections.abc import Hashable
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mteditflow.flow.solvers import ODE
from mteditflow.pipelines.loop import Step
from mteditflow.pipelines.scheduler import FlowMatchSDEScheduler, Observer, announce, copied


def stand_in(scheduler: Any, observer: Observer | None = None, **options: Any) -> Any:
    """Return a scheduler with the attributes of a pipeline's own, of its class or a subclass.

    Args:
        scheduler: the pipeline's scheduler: a subclass of ``FlowMatchEulerDiscreteScheduler``,
            which gets SDE steps, or another one that samples a flow, whose steps are only reported.
        observer: receives grids and steps; None: nothing is reported.
        options: options of ``FlowMatchSDEScheduler.sample_with``.

    Raises:
        ValueError: a solver's steps would replace a ``step`` that the user's subclass or another
            scheduler defines, or the subclass has a name that the stand-in would overwrite.
    """
    kind, solver = type(scheduler), options.get("solver")
    plain = solver is None or isinstance(solver, ODE)
    known = (FlowMatchEulerDiscreteScheduler.step, FlowMatchSDEScheduler.step)
    if kind.step not in known and not plain:
        raise ValueError(
            f"solver: expected None, because {kind.__name__} has a `step` of its own, which a "
            f"solver's steps would replace; its final latents are recorded without one (as NFT "
            "needs them), or set pipe.scheduler = FlowMatchEulerDiscreteScheduler(...) first"
        )
    standing = copy.copy(scheduler)
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        standing.__class__ = _observed(cast(Hashable, kind))
    else:
        if kind is FlowMatchEulerDiscreteScheduler:
            standing.__class__ = FlowMatchSDEScheduler
        elif not issubclass(kind, FlowMatchSDEScheduler):
            _check_names(scheduler)
            standing.__class__ = type(kind.__name__, (FlowMatchSDEScheduler, kind), {})
        standing.sample_with(**options)
    standing.observer = observer
    return standing


def _check_names(scheduler: Any) -> None:
    """Raise ``ValueError`` if a user's subclass has a name that the stand-in would overwrite."""
    kind, bases = type(scheduler), FlowMatchEulerDiscreteScheduler.__mro__
    inherited = {name for base in bases for name in vars(base)}
    defined = vars(FlowMatchSDEScheduler).keys() - inherited
    ours = {name for name in defined if not name.startswith("__")}
    own = {name for base in kind.__mro__ if base not in bases for name in vars(base)}
    clash = sorted(ours & (own | vars(scheduler).keys()))
    if clash:
        raise ValueError(
            f"pipeline.scheduler: expected a {kind.__name__} without the names {clash}, which "
            "FlowMatchSDEScheduler has for its own; rename them"
        )


@functools.cache
def _observed(kind: Any) -> Any:
    """Return a subclass of a scheduler's class that reports its steps to an observer.

    Flow times are the timesteps over ``num_train_timesteps``; some schedulers round timesteps.
    """

    class Observed(kind):
        observer: Observer | None = None
        timesteps: Tensor
        _first = 0

        @functools.wraps(kind.set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self._begin(0)

        def set_begin_index(self, begin_index: int = 0) -> None:
            super().set_begin_index(begin_index)
            self._begin(begin_index)

        @functools.wraps(kind.step)
        def step(
            self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            # The first step of a call may start within the grid, which only its timestep shows.
            if self.step_index is None and self.begin_index is None:
                first = self.index_for_timestep(timestep)
                if first != self._first:
                    self._begin(first)
            result = super().step(model_output, timestep, sample, *args, **kwargs)
            zero = torch.zeros(len(sample), dtype=torch.float32, device=sample.device)
            timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device)
            sigma = zero + timestep / self.config.num_train_timesteps
            step = Step(sample, result[0], sigma, zero, zero, False)
            if self.observer is not None:
                self.observer.stepped(step, model_output, timestep)
            return result

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return copied(self, memo, self.observer, self.timesteps)

        def _begin(self, first: int) -> None:
            self._first = first
            timesteps = self.timesteps.cpu().as_subclass(Tensor)[first:]
            sigmas = timesteps.float() / self.config.num_train_timesteps
            announce(self, torch.cat([sigmas, sigmas.new_zeros(1)]), first)

    Observed.__name__ = Observed.__qualname__ = kind.__name__
    return Observed


def check_pipeline(pipeline: Any) -> Any:
    """Return the scheduler of a pipeline that samples a flow with one transformer.

    Raises:
        ValueError: the scheduler samples no flow, or a second transformer takes some steps.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    config = getattr(scheduler, "config", {})
    flow = config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    if not (flow or type(scheduler).__name__.startswith("FlowMatch")) and not isinstance(
        scheduler, FlowMatchEulerDiscreteScheduler
    ):
        raise ValueError(
            "pipeline: expected one with a FlowMatchEulerDiscreteScheduler, or another scheduler "
            "with use_flow_sigmas=True and prediction_type='flow_prediction', got "
            f"{type(pipeline).__name__} with {type(scheduler).__name__}"
        )
    boundary = pipeline.config.get("boundary_ratio")
    if boundary is not None:
        raise ValueError(
            "pipeline: expected one transformer for all steps, but boundary_ratio="
            f"{boundary} hands those below sigma {boundary} to transformer_2 (Wan 2.2 A14B); a "
            "replay calls one model"
        )
    return scheduler
