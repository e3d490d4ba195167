"""A scheduler that pipelines accept in place of their own, and that takes SDE steps.

The pipeline is not patched: same configuration, same shift, same ``set_timesteps``. What changes is
how a step is taken (by a ``mteditflow.Solver``), whose noise it uses (one generator per trajectory)
and that the step is kept for replay. Unsupported options raise with a reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from torch import Tensor

from mteditflow._checks import REDUCTIONS, check_choice
from mteditflow.flow.sampling import batched_noise
from mteditflow.flow.solvers import ODE, Solver, gaussian_log_prob

_UNSUPPORTED: dict[str, tuple[float | None, str]] = {
    "s_churn": (0.0, "flow-matching steps do not churn"),
    "s_tmin": (0.0, "flow-matching steps do not churn"),
    "s_tmax": (float("inf"), "flow-matching steps do not churn"),
    "s_noise": (1.0, "the solver decides how much noise a step adds"),
    "generator": (None, "noise comes from the scheduler's generators, one per trajectory"),
    "per_token_timesteps": (None, "a transition needs one flow time per sample"),
}


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


class Observer(Protocol):
    """Receives grids and steps of a scheduler; a ``Recorder`` is one."""

    def started(self, sigmas: Tensor) -> None:
        """Called when a pipeline has set its grid, ``sigmas`` [S + 1], on the CPU."""

    def stepped(self, step: Step, velocity: Tensor, timestep: Tensor) -> None:
        """Called after each step with the pipeline's velocity and the grid's timestep (0-d)."""


class FlowMatchSDEScheduler(FlowMatchEulerDiscreteScheduler):
    r"""``FlowMatchEulerDiscreteScheduler`` with stochastic steps, log-probs and own generators.

    A stochastic step draws :math:`x' = mean + std \cdot z` from the transition of ``solver``, with
    :math:`z` from the generator of the trajectory. All other steps, and all steps under ``ODE()``,
    are the parent's, bit for bit, and draw nothing. Pipelines go on with the step's result in the
    dtype of the velocity, so the result is rounded to it first and the log-prob (float32) is that
    of the rounded value: the one the next step really starts from.

    Options (``solver`` ... ``reduction`` below) are given to ``from_config`` or ``sample_with``;
    they are no part of the configuration, which stays the parent's.

    Args:
        solver: ``FlowSDE``, ``DanceSDE``, ``CPS``, ``ODE`` or any ``mteditflow.Solver``.
        generators: one ``torch.Generator`` per trajectory, in batch order. Each keeps its own
            stream over steps and turns, so that a trajectory does not depend on its batch.
        stochastic_steps: indices of the steps that may draw noise, such as the range given by
            ``sliding_window``; None allows all.
        reduction: "mean" or "sum" over the latent's elements, for the log-prob.

    Raises:
        ValueError: the configuration is no flow-matching Euler scheduler's, or asks for
            ``stochastic_sampling`` or ``invert_sigmas``; the number of generators is not the
            batch's; ``step`` gets an option that would be ignored.

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
    steps: tuple[Step, ...] = ()
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
        """Set how steps are taken from now on, all options at once, and return the scheduler."""
        check_choice("reduction", reduction, REDUCTIONS)
        self.solver = ODE() if solver is None else solver
        self.generators = None if generators is None else list(generators)
        self.stochastic_steps = stochastic_steps
        self.reduction = reduction
        self.steps = ()
        return self

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Set the grid as the parent does, and decide which of its steps are stochastic."""
        for option in ("stochastic_sampling", "invert_sigmas"):
            if self.config.get(option, False):
                raise ValueError(
                    f"config: {option}=True is not supported: its steps are not those of a solver"
                )
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        grid = self.sigmas.cpu()
        if not bool((grid[:-1] > grid[1:]).all()) or grid[0] > 1 or grid[-1] != 0:
            raise ValueError(
                f"sigmas: expected a grid that falls from at most 1 to 0, got {grid.tolist()}"
            )
        self._stochastic = self._draws_noise(grid)
        self.steps = ()
        if self.observer is not None:
            self.observer.started(grid)

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
        """Take one step and keep it in ``steps``; see the class for how.

        Args:
            model_output: velocity, [B, ...].
            timestep: one of ``timesteps``, as the pipeline's loop gives it.
            sample: :math:`x_t`, [B, ...].
            s_churn: left at its default, as are ``s_tmin``, ``s_tmax`` and ``s_noise``.
            s_tmin: see ``s_churn``.
            s_tmax: see ``s_churn``.
            s_noise: see ``s_churn``.
            generator: None; noise comes from ``generators``, one per trajectory.
            per_token_timesteps: None; all tokens of a sample share their flow time.
            return_dict: whether to return the parent's output class or a tuple.
        """
        _check_step_options(
            s_churn=s_churn,
            s_tmin=s_tmin,
            s_tmax=s_tmax,
            s_noise=s_noise,
            generator=generator,
            per_token_timesteps=per_token_timesteps,
        )
        if not self._stochastic:
            raise ValueError("step: expected set_timesteps to have been called before")
        if self.step_index is None:
            self._init_step_index(timestep)
        index = self.step_index
        sigma, next_sigma = (self.sigmas[i].expand(len(sample)) for i in (index, index + 1))
        if self._stochastic[index]:
            transition = self.solver(sample, model_output, sigma, next_sigma)
            next_x = transition.sample(self._noise(sample)).to(model_output.dtype)
            log_prob = gaussian_log_prob(next_x, *transition, reduction=self.reduction)
            self._step_index += 1
        else:
            next_x = super().step(model_output, timestep, sample, return_dict=False)[0]
            log_prob = torch.zeros(len(sample), dtype=torch.float32, device=sample.device)
        step = Step(sample, next_x, sigma, next_sigma, log_prob, self._stochastic[index])
        self.steps = (*self.steps, step)
        if self.observer is not None:
            self.observer.stepped(step, model_output, self.timesteps[index])
        return FlowMatchEulerDiscreteSchedulerOutput(next_x) if return_dict else (next_x,)

    def _draws_noise(self, sigmas: Tensor) -> list[bool]:
        """Whether each step of the grid [S + 1] is stochastic: allowed to be, and of std > 0."""
        steps = len(sigmas) - 1
        allowed = range(steps) if self.stochastic_steps is None else self.stochastic_steps
        if any(not 0 <= s < steps for s in allowed):
            raise ValueError(
                f"stochastic_steps: expected indices of the {steps} steps, got {list(allowed)}"
            )
        nothing = torch.zeros(steps, 1, dtype=torch.float32, device=sigmas.device)
        std = self.solver(nothing, nothing, sigmas[:-1], sigmas[1:]).std.flatten()
        return [s in allowed and bool(std[s] > 0) for s in range(steps)]

    def _noise(self, sample: Tensor) -> Tensor:
        """Standard Gaussian noise, float32 [B, ...]: row b from generator b alone."""
        given = 0 if self.generators is None else len(self.generators)
        if self.generators is None or given != len(sample):
            raise ValueError(
                "generators: expected one torch.Generator per trajectory, "
                f"{len(sample)} for this batch, got {given or None}"
            )
        return batched_noise(sample.shape[1:], self.generators, device=sample.device)


def check_pipeline(pipeline: Any) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a pipeline whose steps are those of one transformer along a flow."""
    scheduler = getattr(pipeline, "scheduler", None)
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        shift = getattr(scheduler, "config", {}).get("flow_shift", 1.0)
        raise ValueError(
            "pipeline: expected one with a FlowMatchEulerDiscreteScheduler, got "
            f"{type(pipeline).__name__} with {type(scheduler).__name__}; if its model is a flow, "
            "as Wan's is, set pipe.scheduler = FlowMatchEulerDiscreteScheduler("
            f"shift={shift}) first"
        )
    boundary = pipeline.config.get("boundary_ratio")
    if boundary is not None:
        raise ValueError(
            "pipeline: expected one transformer for all steps, but boundary_ratio="
            f"{boundary} hands those below sigma {boundary} to transformer_2 (Wan 2.2 A14B); a "
            "replay calls one model"
        )
    return scheduler


def _check_config_source(config: Mapping[str, Any]) -> None:
    """Refuse the configuration of a scheduler that does not integrate dx/dsigma = velocity."""
    ours = ("FlowMatchEulerDiscreteScheduler", "FlowMatchSDEScheduler")
    source = config.get("_class_name")
    if source is None:
        known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        foreign = sorted(key for key in config if key not in known and not key.startswith("_"))
        source = f"scheduler with {', '.join(foreign)}" if foreign else ours[0]
    if source not in ours:
        raise ValueError(
            f"config: expected that of a FlowMatchEulerDiscreteScheduler, got that of a {source}"
        )


def _check_step_options(**options: Any) -> None:
    """Refuse options of ``step`` that would be ignored."""
    for name, value in options.items():
        default, reason = _UNSUPPORTED[name]
        if value is not default and (default is None or value != default):
            raise ValueError(f"{name}: expected its default {default}, because {reason}")
