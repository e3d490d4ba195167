"""Record what a pipeline does while it is called as usual, and prove that it can be replayed."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from mteditflow.flow.solvers import Solver
from mteditflow.flow.trajectory import Trajectory
from mteditflow.pipelines.conditioning import map_leaves, replay_rows, share_equal_tensors
from mteditflow.pipelines.recognize import Call, ReplayError
from mteditflow.pipelines.rollout import Rollout
from mteditflow.pipelines.scheduler import FlowMatchSDEScheduler, Step, check_pipeline
from mteditflow.pipelines.turn import Recorded, Turn, Version


class Recorder:
    """Context in which every call of a pipeline is recorded as one turn of its trajectories.

    Inside, the pipeline has a ``FlowMatchSDEScheduler`` of its own scheduler's configuration, and
    its transformer a forward hook; on exit, also by an exception, both are as before. Calls in one
    context are the turns of one chain, in order. While it records, the recorder proves that what it
    keeps suffices: at every step the transformer's outputs must make exactly the velocity that the
    scheduler is given, from the sample that it returned before, with arguments that do not change.
    Anything else raises. Sample in eval mode, and replay under the same autocast.

    Args:
        pipeline: any diffusers pipeline with a ``FlowMatchEulerDiscreteScheduler``; docs/support.md
            lists those that are tested, and what is refused.
        solver: how stochastic steps are taken; None and ``ODE()`` sample like the pipeline's own
            scheduler, bit for bit.
        generators: of the step noise, one per trajectory of a call; their streams go on over turns.
        stochastic_steps: indices of the steps that may draw noise; None allows all.
        reduction: of log-probs over elements, "mean" or "sum".
        model: the module to record; None is ``pipeline.transformer``.
        shared: names of transformer arguments that have no row or entry per trajectory. Two-axis
            ``..._ids``, tensors whose first axis is not the batch and lists of numbers are known to
            be shared.
        storage: device on which to keep the recording, such as "cpu"; None leaves it where it is.
        verify: after the first turn replay one of its rows in a batch of another size and compare,
            for one more forward pass.

    Raises:
        ValueError: the pipeline is no flow pipeline, or already being recorded.
        ReplayError: (a ValueError) inside the context, when a call could not be replayed.

    Example:
        A chain of edits of a batch of images, then the log-probs of all its steps again, with
        gradients::

            solver, generators = FlowSDE(0.7), trajectory_generators(0, len(images))
            with Recorder(pipe, solver, generators=generators) as recorder:
                for prompts in chain:
                    images = pipe(images, prompts, generator=generators).images
            rollout = recorder.rollout(group=group)

            trajectory, turn, step = rollout.trajectory.step_mask.nonzero(as_tuple=True)
            steps = rollout.trajectory.steps(trajectory, turn, step)
            velocity = rollout.velocity(
                pipe.transformer, steps.x_t, steps.sigma, trajectory, turn
            )
            transition = solver(steps.x_t, velocity, steps.sigma, steps.next_sigma)
            log_prob = gaussian_log_prob(steps.next_x, *transition, reduction="mean")
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        solver: Solver | None = None,
        *,
        generators: Sequence[torch.Generator] | None = None,
        stochastic_steps: Collection[int] | None = None,
        reduction: str = "mean",
        model: nn.Module | None = None,
        shared: Collection[str] = (),
        storage: torch.device | str | None = None,
        verify: bool = True,
    ) -> None:
        scheduler = check_pipeline(pipeline)
        if isinstance(scheduler, FlowMatchSDEScheduler) and solver is None:
            raise ValueError(
                "solver: expected one, because the pipeline has a FlowMatchSDEScheduler, which the "
                "recorder replaces by its own; give solver, generators and the rest to the recorder"
            )
        model = getattr(pipeline, "transformer", None) if model is None else model
        if not isinstance(model, nn.Module):
            raise ValueError("model: expected a module, because the pipeline has no transformer")
        self._pipeline, self._model, self._shared = pipeline, model, frozenset(shared)
        self._verify = verify
        self._storage = None if storage is None else torch.device(storage)
        self._scheduler = FlowMatchSDEScheduler.from_config(
            scheduler.config,
            solver=solver,
            generators=generators,
            stochastic_steps=stochastic_steps,
            reduction=reduction,
        )
        self._scheduler.set_shift(scheduler.shift)
        self._parameters = list(inspect.signature(model.forward).parameters)
        self._own_scheduler: FlowMatchEulerDiscreteScheduler | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._calls: list[Call] = []
        self._turn: Turn | None = None
        self._turns: list[Recorded] = []
        self._failed: BaseException | None = None

    def __enter__(self) -> Recorder:
        """Swap the scheduler and hook the transformer."""
        current = self._pipeline.scheduler
        if isinstance(current, FlowMatchSDEScheduler) and current.observer is not None:
            raise ValueError("pipeline: it is already being recorded")
        if self._turns or self._failed is not None:
            raise ValueError("recorder: it has recorded already; make a new one for each rollout")
        if getattr(self._model, "is_cache_enabled", False):
            raise ValueError(
                "model: expected one without an enabled cache, whose outputs depend on the calls "
                "before; call disable_cache() first"
            )
        self._own_scheduler = current
        self._scheduler.observer = self
        self._pipeline.scheduler = self._scheduler
        self._hook = self._model.register_forward_hook(self._on_forward, with_kwargs=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Restore the pipeline; raise on an unfinished turn unless there is an error already."""
        if self._hook is not None:
            self._hook.remove()
        self._pipeline.scheduler = self._own_scheduler
        self._scheduler.observer, self._scheduler.steps = None, ()
        self._calls = []
        self._failed = error
        if error is None:
            self._check_finished()

    def rollout(self, *, group: Tensor | Sequence[int]) -> Rollout:
        """The recorded chain of turns.

        Args:
            group: integer group id of each trajectory, [B]; trajectories that share reference and
                instructions share it.

        Returns:
            Rollout of B trajectories with one turn per pipeline call.

        Raises:
            ValueError: nothing was recorded, recording failed, or turns differ in the shape of
                their latents or in their number of steps.
            ReplayError: a recorded tensor was changed in place since.
        """
        if self._failed is not None:
            raise ValueError(f"recorder: recording failed: {self._failed}") from self._failed
        self._check_finished()
        if not self._turns:
            raise ValueError("recorder: expected at least one recorded pipeline call, got none")
        shapes = [list(turn.latents.shape) for turn in self._turns]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"turns: expected latents [B, S + 1, ...] of one shape, got {shapes}")
        for turn in self._turns:
            Version.check(turn.versions)
        with torch.inference_mode(False), torch.no_grad():
            return self._joined(torch.as_tensor(group, device="cpu"))

    def _joined(self, group: Tensor) -> Rollout:
        """All turns as one rollout, of tensors that autograd accepts."""
        latents = torch.stack([turn.latents for turn in self._turns], dim=1)
        device, (batch, turns) = latents.device, latents.shape[:2]
        numbers = torch.arange(turns, dtype=torch.int64, device="cpu").expand(batch, -1)
        rows = torch.arange(batch, dtype=torch.int64, device="cpu")[:, None].expand(-1, turns)
        trajectory = Trajectory(
            latents=latents,
            sigmas=torch.stack([turn.sigmas for turn in self._turns]).to(device),
            log_prob=torch.stack([turn.log_prob for turn in self._turns], dim=1),
            stochastic=torch.stack([turn.stochastic for turn in self._turns]).to(device),
            group=group.to(device),
            turn_mask=torch.ones(batch, turns, dtype=torch.bool, device=device),
            reduction=self._scheduler.reduction,
        )
        return Rollout(
            trajectory,
            share_equal_tensors([turn.conditioning for turn in self._turns]),
            torch.stack([numbers, rows], dim=-1),
        )

    def started(self, sigmas: Tensor) -> None:
        """Called by the scheduler: a pipeline call begins."""
        if self._turn is not None and self._turn.steps:
            self._check_finished()
        self._calls = []
        timesteps = self._scheduler.config.num_train_timesteps
        self._turn = Turn(sigmas, timesteps, self._shared, self._storage)

    def stepped(self, step: Step, velocity: Tensor, timestep: Tensor) -> None:
        """Called by the scheduler: a step has been taken."""
        if self._turn is None:
            raise ReplayError("the scheduler takes a step before set_timesteps or after the last")
        calls, self._calls = self._calls, []
        recorded = self._turn.add(step, velocity, timestep, calls)
        if recorded is not None:
            self._turn = None
            if self._verify and not self._turns:
                self._prove(recorded, step, velocity)
            self._turns.append(recorded)

    @torch.no_grad()
    def _prove(self, recorded: Recorded, step: Step, velocity: Tensor) -> None:
        """Call the transformer again for the last trajectory and step, from the record alone.

        A batch of one is doubled, so that the size always differs from that of the recording.
        """
        rows = [len(step.x_t) - 1] * (2 if len(step.x_t) == 1 else 1)
        records = [recorded.conditioning] * len(rows)
        again = replay_rows(self._model, records, rows, step.x_t[rows], step.sigma[rows])
        given = velocity[rows].to(again.dtype)
        error = ((again - given).norm() / given.norm()).item()
        if not error <= (1e-3 if velocity.dtype in (torch.float32, torch.float64) else 0.1):
            raise ReplayError(
                f"called again with what was recorded, the transformer gave a velocity {error:.1e} "
                "away (relative): look for dropout in training mode, a cache, or an argument "
                "without a row per trajectory that is not named in `shared`"
            )

    def _on_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook: keep a call that belongs to a step."""
        if self._turn is not None:
            arguments = dict(zip(self._parameters, args, strict=False)) | kwargs
            # New containers, same tensors: pipelines change their dicts between branches.
            self._calls.append(Call(map_leaves(lambda leaf: leaf, arguments), output[0]))

    def _check_finished(self) -> None:
        if self._turn is not None:
            raise ReplayError(
                f"turn {len(self._turns)} ended after {self._turn}; only whole turns are recorded"
            )
