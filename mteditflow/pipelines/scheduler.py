"""Schedulers with SDE steps or an observer, which unpatched pipelines accept as their own.

Class (or a subclass), attributes and ``set_timesteps`` are those of the pipeline's scheduler. Only
the step differs: a ``mteditflow.Solver`` takes it, its noise comes from one generator per
trajectory, and an observer receives it. Unsupported options raise an error with the reason.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Collection, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol, cast

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from torch import Tensor

from mteditflow._checks import REDUCTIONS, check_choice
from mteditflow.flow.sampling import batched_noise
from mteditflow.flow.solvers import ODE, Solver, gaussian_log_prob
from mteditflow.pipelines.loop import Step, Timesteps

_UNSUPPORTED: dict[str, tuple[float | None, str]] = {
    "s_churn": (0.0, "flow-matching steps do not churn"),
    "s_tmin": (0.0, "flow-matching steps do not churn"),
    "s_tmax": (float("inf"), "flow-matching steps do not churn"),
    "s_noise": (1.0, "the solver decides how much noise a step adds"),
}


class Observer(Protocol):
    """Receives grids and steps of a scheduler; a ``Recorder`` is one."""

    def started(self, sigmas: Tensor, timesteps: Tensor) -> None:
        """Receive the grid [S + 1] and its timesteps [S], on the CPU, before the first step."""

    def stepped(self, step: Step, velocity: Tensor, timestep: Tensor) -> None:
        """Receive a step that was taken, its velocity [B, ...] and the grid's timestep (0-d)."""

    def ended(self, steps: int, frame: FrameType) -> None:
        """Receive the end of a loop over this number of timesteps, with the loop's frame."""


class FlowMatchSDEScheduler(FlowMatchEulerDiscreteScheduler):
    r"""``FlowMatchEulerDiscreteScheduler`` with stochastic steps, log-probs and own generators.

    A stochastic step draws :math:`x' = mean + std \cdot z` from the transition of ``solver``, with
    :math:`z` from the generator of the trajectory. All other steps, and all steps under ``ODE()``,
    are the parent's, bit for bit, and draw nothing. Pipelines continue with the step's result in
    the dtype of the velocity. The result is therefore rounded to that dtype first, and the log-prob
    (float32) is that of the rounded value, from which the next step starts.

    Options (``solver`` ... ``reduction`` below) go to ``from_config`` or ``sample_with``. They are
    not part of the configuration, which stays the parent's.

    Args:
        solver: ``FlowSDE``, ``DanceSDE``, ``CPS``, ``ODE`` or any ``mteditflow.Solver``.
        generators: one ``torch.Generator`` per trajectory, in batch order. Each keeps its own
            stream over steps and turns, so that a trajectory does not depend on its batch.
        stochastic_steps: indices of the steps that may draw noise, such as the range given by
            ``sliding_window``, counted from the first step that is taken; None allows all.
        reduction: "mean" or "sum" over the latent's elements, for the log-prob.

    Raises:
        ValueError: the configuration is no flow-matching Euler scheduler's, or asks for
            ``stochastic_sampling``; the number of generators is not the batch's; ``step`` gets an
            option that would be ignored.

    A copy (``copy.deepcopy``) draws from the same generators and reports to the same observer.

    Source: Flow-GRPO (arXiv 2505.05470) for the SDE; the windows are MixGRPO's (arXiv 2507.21802).

    Example:
        >>> from mteditflow import FlowSDE
        >>> scheduler = FlowMatchSDEScheduler.from_config(
        ...     FlowMatchEulerDiscreteScheduler(shift=3.0).config,
        ...     solver=FlowSDE(0.7), generators=[torch.Generator().manual_seed(0)])
        >>> scheduler.set_timesteps(2)
        >>> x = torch.zeros(1, 4)
        >>> for timestep in scheduler.timesteps:
        ...     x = scheduler.step(torch.ones(1, 4), timestep, x, return_dict=False)[0]
        >>> [step.stochastic for step in scheduler.steps], scheduler.steps[0].log_prob.shape
        ([True, True], torch.Size([1]))
    """

    solver: Solver = ODE()
    generators: Sequence[torch.Generator] | None = None
    stochastic_steps: Collection[int] | None = None
    reduction: str = "mean"
    observer: Observer | None = None
    timesteps: Tensor
    steps: tuple[Step, ...] = ()
    _first: int = 0
    _stochastic: Sequence[bool] = ()

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Build from any flow-matching Euler configuration; see the class for the options."""
        names = ("solver", "generators", "stochastic_steps", "reduction")
        options = {name: kwargs.pop(name) for name in names if name in kwargs}
        _check_config_source(config if isinstance(config, Mapping) else {})
        built = super().from_config(config, return_unused_kwargs, **kwargs)
        (built[0] if return_unused_kwargs else built).sample_with(**options)
        return built

    def sample_with(
        self,
        solver: Solver | None = None,
        *,
        generators: Sequence[torch.Generator] | None = None,
        stochastic_steps: Collection[int] | None = None,
        reduction: str = "mean",
    ) -> FlowMatchSDEScheduler:
        """Set all options of the steps at once, and return the scheduler.

        An option that is not given takes its default; ``solver=None`` is ``ODE()``.

        Raises:
            ValueError: there is no such reduction.
            TypeError: an entry of ``stochastic_steps`` is no integer.
        """
        check_choice("reduction", reduction, REDUCTIONS)
        self.solver = ODE() if solver is None else solver
        self.generators = None if generators is None else list(generators)
        self.stochastic_steps = None if stochastic_steps is None else list(stochastic_steps)
        for step in self.stochastic_steps or ():
            if isinstance(step, bool) or not isinstance(step, (int, np.integer)):
                raise TypeError(f"stochastic_steps: expected indices of steps, got {step!r}")
        self.reduction = reduction
        self.steps = ()
        return self

    @functools.wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Set the grid as the parent does, and decide which of its steps are stochastic.

        Raises:
            ValueError: the configuration has ``stochastic_sampling``, the grid does not decrease
                from at most 1 to 0, or ``stochastic_steps`` has an index out of range.
        """
        if self.config.get("stochastic_sampling", False):
            raise ValueError(
                "config: expected stochastic_sampling=False, because its steps draw clean samples "
                "anew, with noise of the pipeline's generator; a solver decides on noise here"
            )
        super().set_timesteps(*args, **kwargs)
        grid = self._flow_times().cpu()
        if not bool((grid[:-1] > grid[1:]).all()) or grid[0] > 1 or grid[-1] != 0:
            raise ValueError(
                f"sigmas: expected a grid that falls from at most 1 to 0, got {grid.tolist()}"
            )
        self._begin(0)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start within the grid, as image-to-image and inpainting at a strength below 1 do."""
        super().set_begin_index(begin_index)
        if self._stochastic:
            self._begin(begin_index)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample unchanged, since a flow model's input has no scale.

        Bria's pipelines call it for every scheduler but ``FlowMatchEulerDiscreteScheduler``.
        """
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """Take one step, and append it to ``steps``.

        Args:
            model_output: velocity, [B, ...].
            timestep: one of ``timesteps``, as the pipeline's loop gives it.
            sample: :math:`x_t`, [B, ...].
            s_churn: left at its default, as are ``s_tmin``, ``s_tmax`` and ``s_noise``.
            s_tmin: see ``s_churn``.
            s_tmax: see ``s_churn``.
            s_noise: see ``s_churn``.
            generator: accepted and not used; noise comes from ``generators``, one per trajectory.
            per_token_timesteps: None, or all equal to the timestep; the parent then takes
                ``model_output`` as the negative velocity: LTX-Video with conditions.
            return_dict: whether to return the parent's output class or a tuple.

        Raises:
            ValueError: an option would be ignored, tokens have different timesteps,
                ``set_timesteps`` was not called before, or a stochastic step has not one generator
                per trajectory.
        """
        _check_step_options(
            s_churn=s_churn,
            s_tmin=s_tmin,
            s_tmax=s_tmax,
            s_noise=s_noise,
        )
        if per_token_timesteps is not None and not bool((per_token_timesteps == timestep).all()):
            raise ValueError(
                "per_token_timesteps: expected them to equal the timestep, because a transition "
                "needs one flow time per sample"
            )
        if not self._stochastic:
            raise ValueError("step: expected set_timesteps to have been called before")
        if self.step_index is None:
            self._init_step_index(timestep)
        index = self.step_index
        # The first step may lie within the grid without ``set_begin_index``.
        if not self.steps and index != self._first:
            self._begin(index)
        stochastic = self._stochastic[index - self._first]
        sigmas = self._flow_times()
        sigma, next_sigma = (sigmas[i].expand(len(sample)) for i in (index, index + 1))
        # With inverted sigmas or per-token timesteps the parent steps along minus the velocity.
        opposite = self.config.get("invert_sigmas", False) or per_token_timesteps is not None
        velocity = -model_output if opposite else model_output
        if stochastic:
            transition = self.solver(sample, velocity, sigma, next_sigma)
            # Round first: the log-prob must be that of the sample from which the next step starts.
            next_x = transition.sample(self._noise(sample)).to(model_output.dtype)
            log_prob = gaussian_log_prob(next_x, *transition, reduction=self.reduction)
            self._step_index += 1
        else:
            options = {"per_token_timesteps": per_token_timesteps, "return_dict": False}
            next_x = super().step(model_output, timestep, sample, **options)[0]
            log_prob = torch.zeros(len(sample), dtype=torch.float32, device=sample.device)
        step = Step(sample, next_x, sigma, next_sigma, log_prob, stochastic)
        self.steps = (*self.steps, step)
        if self.observer is not None:
            self.observer.stepped(step, velocity, self.timesteps[index])
        return FlowMatchEulerDiscreteSchedulerOutput(next_x) if return_dict else (next_x,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return a copy that shares the observer, the generators and the timesteps."""
        return copied(self, memo, self.observer, self.generators, self.timesteps)

    def _flow_times(self) -> Tensor:
        """Return the grid from noise to data, [S + 1]; Mochi's sigmas count from data."""
        sigmas = cast(Tensor, self.sigmas)
        return 1 - sigmas if self.config.get("invert_sigmas", False) else sigmas

    def _begin(self, first: int) -> None:
        """Decide which steps from index ``first`` on are stochastic, and report the grid."""
        grid = self._flow_times().cpu()[first:]
        self._first, self._stochastic, self.steps = first, self._draws_noise(grid), ()
        announce(self, grid, first)

    def _draws_noise(self, sigmas: Tensor) -> list[bool]:
        """Return whether each step of the grid [S + 1] is stochastic: allowed, and of std > 0."""
        steps = len(sigmas) - 1
        allowed = range(steps) if self.stochastic_steps is None else self.stochastic_steps
        if any(not 0 <= s < steps for s in allowed):
            raise ValueError(
                f"stochastic_steps: expected indices of the {steps} steps, got {list(allowed)}"
            )
        # A transition's std depends on the grid alone, so one call at zeros gives all of them.
        nothing = torch.zeros(steps, 1, dtype=torch.float32, device=sigmas.device)
        std = self.solver(nothing, nothing, sigmas[:-1], sigmas[1:]).std.flatten()
        return [s in allowed and bool(std[s] > 0) for s in range(steps)]

    def _noise(self, sample: Tensor) -> Tensor:
        """Return standard Gaussian noise, float32 [B, ...]; row b is drawn from generator b."""
        given = 0 if self.generators is None else len(self.generators)
        if self.generators is None or given != len(sample):
            raise ValueError(
                "generators: expected one torch.Generator per trajectory, "
                f"{len(sample)} for this batch, got {given or None}"
            )
        return batched_noise(sample.shape[1:], self.generators, device=sample.device)


def announce(scheduler: Any, grid: Tensor, first: int) -> None:
    """Report a grid [S + 1] and its timesteps from index ``first`` on to the observer, if any.

    The scheduler's timesteps then report the end of every loop over them.
    """
    if scheduler.observer is not None:
        scheduler.timesteps = Timesteps.of(scheduler.timesteps, scheduler.observer.ended)
        timesteps = scheduler.timesteps.cpu().as_subclass(Tensor)[first:]
        scheduler.observer.started(grid, timesteps)


def copied(scheduler: Any, memo: dict[int, Any], *shared: Any) -> Any:
    """Return a deep copy of a scheduler, except for the attributes that are shared."""
    # ``deepcopy`` returns what its memo holds for an id: the shared objects themselves.
    memo |= {id(x): x for x in shared}
    made = copy.copy(scheduler)
    made.__dict__.update(copy.deepcopy(scheduler.__dict__, memo))
    return made


def _check_config_source(config: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for a scheduler that does not integrate dx/dsigma = velocity."""
    ours = ("FlowMatchEulerDiscreteScheduler", "FlowMatchSDEScheduler")
    source = config.get("_class_name")
    if source is None:  # without a class name, unknown options reveal another scheduler
        known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        foreign = sorted(key for key in config if key not in known and not key.startswith("_"))
        source = f"scheduler with {', '.join(foreign)}" if foreign else ours[0]
    if source not in ours:
        raise ValueError(
            f"config: expected that of a FlowMatchEulerDiscreteScheduler, got that of a {source}"
        )


def _check_step_options(**options: Any) -> None:
    """Raise ``ValueError`` for options of ``step`` that would be ignored."""
    for name, value in options.items():
        default, reason = _UNSUPPORTED[name]
        if value is not default and (default is None or value != default):
            raise ValueError(f"{name}: expected its default {default}, because {reason}")
