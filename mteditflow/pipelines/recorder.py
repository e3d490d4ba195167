"""Record the calls of an unchanged pipeline, and prove that a replay reproduces them."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Hashable, Sequence
from itertools import chain
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.guiders import BaseGuidance
from torch import Tensor, nn

from mteditflow.flow.solvers import ODE, Solver
from mteditflow.flow.trajectory import Trajectory
from mteditflow.pipelines.conditioning import (
    Conditioning,
    check_groups,
    map_leaves,
    replay_rows,
    share_equal_tensors,
)
from mteditflow.pipelines.loop import Loop, Step
from mteditflow.pipelines.model_state import (
    attention_modules,
    caches,
    check_repeatable,
    fresh_cache,
)
from mteditflow.pipelines.patterns import PROOF_ROWS
from mteditflow.pipelines.recognize import Call, ReplayError
from mteditflow.pipelines.rollout import Rollout
from mteditflow.pipelines.scheduler import FlowMatchSDEScheduler
from mteditflow.pipelines.stand_in import check_pipeline, stand_in
from mteditflow.pipelines.turn import Choice, Recorded, Turn


class Recorder:
    """Context in which every call of a pipeline is recorded as one turn of its trajectories.

    Inside the context, a copy of the pipeline's scheduler, of a subclass of its class, replaces the
    scheduler, and forward hooks are on the pipeline's modules. Both are undone on exit, also after
    an exception. Calls in one context are the turns of one chain, in order. After an exception make
    a new recorder.

    While it records, the recorder proves that its record suffices for a replay. At every step the
    transformer's outputs must give exactly the velocity that the scheduler receives, the sample
    must be the one that the scheduler returned before, and all other arguments must be constant.
    When the loop over the timesteps ends, the pipeline must still hold the result of the last step.
    Anything else raises. Sample in eval mode, and replay under the same autocast.

    Without a solver, a pipeline may also change its latents between steps or after the last one
    (inpainting masks, callbacks), use another scheduler for flows (DPMSolver++, UniPC, Heun) or
    have a cache on its transformer. The rollout then has only the first and the last latents, in
    one deterministic step per turn. The last latents are those that the pipeline decodes, on which
    NFT and similar objectives train.

    Args:
        pipeline: any diffusers pipeline with a ``FlowMatchEulerDiscreteScheduler`` or a subclass of
            it, or with another scheduler that samples a flow. docs/support.md lists tested and
            refused pipelines.
        solver: solver of the stochastic steps; None and ``ODE()`` sample like the pipeline's own
            scheduler, bit for bit.
        generators: generators of the step noise, one per trajectory of a call; later turns continue
            their streams.
        stochastic_steps: indices of the steps that may draw noise, counted from the first step that
            is taken; None allows all.
        reduction: reduction of log-probs over elements, "mean" or "sum".
        model: the module to record; None: ``pipeline.transformer``.
        shared: names of transformer arguments that have no row or entry per trajectory, needed
            where ``verify`` is off or does not detect it. Two-axis ``..._ids``, lists of numbers
            and tensors without an axis as long as the batch are taken as shared.
        storage: device on which to keep the recording, such as "cpu"; None keeps each tensor on its
            device. The recording is a copy either way.
        verify: replay a few rows of the first turn's first, middle and last step in a batch of
            another size, and compare; this costs one more forward pass. Later turns and steps are
            replayed too if their arguments are of other kinds. Where the comparison fails, other
            readings of the arguments (rows along another axis, an entry per trajectory) are tried.

    Raises:
        ValueError: the pipeline is no flow pipeline, or already being recorded; a solver is given
            where steps are not those of ``FlowMatchEulerDiscreteScheduler``, or under a cache.
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
        recorded = getattr(scheduler, "observer", None) is not None  # ``__enter__`` raises for it
        if isinstance(scheduler, FlowMatchSDEScheduler) and solver is None and not recorded:
            raise ValueError(
                "solver: expected one, because the pipeline has a FlowMatchSDEScheduler, which the "
                "recorder replaces by its own; give solver, generators and the rest to the recorder"
            )
        self._chosen = model
        model = getattr(pipeline, "transformer", None) if model is None else model
        if not isinstance(model, nn.Module):
            raise ValueError("model: expected a module, because the pipeline has no transformer")
        self._pipeline, self._model, self._shared = pipeline, model, frozenset(shared)
        self._verify = verify
        self._storage = None if storage is None else torch.device(storage)
        self._options: dict[str, Any] = {
            "solver": solver,
            "generators": None if generators is None else list(generators),
            "stochastic_steps": None if stochastic_steps is None else list(stochastic_steps),
            "reduction": reduction,
        }
        # Only to refuse bad options here already; ``__enter__`` makes the one that is used.
        self._scheduler = stand_in(scheduler, **self._options)
        self._ends = False
        self._plain = solver is None or isinstance(solver, ODE)
        self._reduction = reduction
        self._own_scheduler: Any = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._calls: list[Call] = []
        self._turn: Turn | None = None
        self._turns: list[Recorded] = []
        self._choice: Choice = {}
        self._loop: Loop | None = None
        self._attention: list[Any] = []
        self._processors: list[Any] = []
        self._proven: set[Hashable] = set()
        self._failed: BaseException | None = None

    def __enter__(self) -> Recorder:
        """Swap the scheduler and hook the transformer."""
        current = check_pipeline(self._pipeline)
        if getattr(current, "observer", None) is not None:
            raise ValueError("pipeline: it is already being recorded")
        if self._turns or self._failed is not None:
            raise ValueError("recorder: it has recorded already; make a new one for each rollout")
        self._ends = not isinstance(current, FlowMatchEulerDiscreteScheduler)
        if self._chosen is None:
            self._model = self._pipeline.transformer
        if caches(self._model):
            if not self._plain:
                raise ValueError(
                    "solver: expected None, because the model has an enabled cache, whose outputs "
                    "depend on the calls before; without a solver final latents are recorded, or "
                    "call disable_cache() first"
                )
            self._ends = True
        self._attention = attention_modules(self._model)
        self._own_scheduler = current
        self._scheduler = stand_in(current, self, **self._options)
        self._pipeline.scheduler = self._scheduler
        parts = [x for x in vars(self._pipeline).values() if isinstance(x, nn.Module)]
        # The model may be an attribute, too; two hooks on a module would record each call twice.
        self._hooks = [
            part.register_forward_hook(self._on_forward, with_kwargs=True)
            for part in dict.fromkeys([self._model, *parts])
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Restore the pipeline; raise on an unfinished turn unless there is an error already."""
        for hook in self._hooks:
            hook.remove()
        replaced = self._pipeline.scheduler is not self._scheduler
        self._pipeline.scheduler = self._own_scheduler
        self._scheduler.observer, self._scheduler.steps = None, ()
        self._scheduler.timesteps = None  # they refer to this recorder: a cycle with all tensors
        self._calls, self._loop = [], None
        self._failed = error
        if error is None:
            self._check_finished()
            self._failed = self._fault(replaced)
            if self._failed is not None:
                raise self._failed

    def _fault(self, replaced: bool) -> ReplayError | None:
        """Return a fault of the recording as a whole; None if there is none."""
        if replaced:
            return ReplayError(
                "pipeline.scheduler was replaced during the recording, so calls may be missing; "
                "set it before, and make a new recorder"
            )
        if self._turns and [part.processor for part in self._attention] != self._processors:
            return ReplayError(
                "model: its attention processors during the call were not those that it has "
                "afterwards (perturbed attention), so that a replay would call another model"
            )
        return None

    def rollout(self, *, group: Tensor | Sequence[int]) -> Rollout:
        """Return the recorded chain of turns.

        Args:
            group: integer group id of each trajectory, [B]; trajectories that share reference and
                instructions share it.

        Returns:
            Rollout of B trajectories with one turn per pipeline call.

        Raises:
            ValueError: nothing was recorded, recording failed, turns differ in the shape of their
                latents or in their number of steps, or members of a group differ in what the first
                turn was conditioned on (by more than a tenth, as the sampling of a VAE may).
        """
        if self._failed is not None:
            raise ValueError(f"recorder: recording failed: {self._failed}") from self._failed
        self._check_finished()
        if not self._turns:
            raise ValueError(
                "recorder: expected at least one recorded pipeline call, got none; a pipeline that "
                "samples by one of its own (VisualCloze) is recorded by that one"
            )
        # One rollout has one number of steps: if one turn has only its ends, so have all.
        if any(turn.ends for turn in self._turns):
            self._turns = [turn.first_and_last() for turn in self._turns]
        shapes = [list(turn.latents.shape) for turn in self._turns]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"turns: expected latents [B, S + 1, ...] of one shape, got {shapes}")
        with torch.inference_mode(False), torch.no_grad():
            ids = torch.as_tensor(group, device="cpu")
            rollout = self._joined(ids)
            check_groups(self._turns[0].conditioning, ids)
        return rollout

    def _joined(self, group: Tensor) -> Rollout:
        """Return all turns as one rollout, of tensors that autograd accepts."""
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
            reduction=self._reduction,
        )
        return Rollout(
            trajectory,
            share_equal_tensors([turn.conditioning for turn in self._turns]),
            torch.stack([numbers, rows], dim=-1),
        )

    def started(self, sigmas: Tensor, timesteps: Tensor) -> None:
        """Begin a turn; the scheduler calls this when a pipeline call sets its timesteps."""
        # A call may announce its grid again before its first step, as by ``set_begin_index``.
        begun = self._turn is not None and not self._turn.steps
        self._check_finished()
        if not begun:
            check_repeatable(self._model)
            self._calls = []
        self._turn = Turn(
            sigmas,
            timesteps,
            most=self._scheduler.config.num_train_timesteps,
            guiders=[x for x in vars(self._pipeline).values() if isinstance(x, BaseGuidance)],
            has_solver=not self._plain,
            ends=self._ends,
            shared=self._shared,
            storage=self._storage,
        )

    def stepped(self, step: Step, velocity: Tensor, timestep: Tensor) -> None:
        """Record a step; the scheduler calls this after it has taken it."""
        if self._turn is None or self._turn.complete:
            raise ReplayError("the scheduler takes a step before set_timesteps or after the last")
        calls, self._calls = self._calls, []
        self._turn.add(step, velocity, timestep, calls)
        if self._turn.complete:
            self._processors = [part.processor for part in self._attention]
            self._loop = Loop(step)

    def ended(self, steps: int, frame: FrameType) -> None:
        """Finish a turn; the scheduler calls this when a loop over its timesteps ends.

        Args:
            steps: length of the loop.
            frame: frame of the loop; other loops over the timesteps are ignored.
        """
        turn, loop = self._turn, self._loop
        if turn is None or loop is None or steps != len(turn.steps) or not loop.runs_in(frame):
            return
        # The record must enter autograd later, even if the pipeline runs in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            turn.check()
            turn.set_clean(loop.final_latents())
            loop = self._loop = None
            self._prove(turn)
            self._turns.append(turn.recorded(self._choice))
        self._turn = None

    def _prove(self, turn: Turn) -> None:
        """Prove that a turn can be replayed, and find the reading of its arguments.

        Skipped where an earlier turn had arguments of the same kinds.
        """
        if not self._verify or (kinds := turn.kinds()) in self._proven:
            return
        self._proven.add(kinds)
        first_error = ""
        likeliest = [self._choice, {}] if self._choice else [{}]
        for choice in chain(likeliest, turn.choices()):
            error = self._error(turn, turn.conditioning(choice))
            if error is None:
                self._choice = choice
                return
            first_error = first_error or error
        raise ReplayError(
            f"replayed from its record, the transformer {first_error}: look for a state that it "
            "keeps between calls, random numbers, or an argument without a row per trajectory that "
            "is not named in `shared`"
        )

    def _error(self, turn: Turn, conditioning: Conditioning) -> str | None:
        """Replay a few rows of every pattern from the record alone; return the error, or None.

        The rows are of the first, a middle and the last step. Their number always differs from that
        of the recording, so that a wrong reading of an argument is detected. Under a cache they are
        all of the first step, which no cache skips.
        """
        for pattern, stage in zip(turn.patterns, conditioning.stages, strict=True):
            rows = pattern.rows[:PROOF_ROWS] if caches(self._model) else pattern.rows
            steps = len(rows) - PROOF_ROWS + 1
            middle = 1 if steps == 1 else PROOF_ROWS - 1 + steps // 2
            rows = [rows[0], rows[middle], rows[-1]]
            rows = rows[: 2 if stage.batch in (1, 3) else 3]
            x_t, sigma, given = map(torch.stack, list(zip(*rows, strict=True))[1:])
            numbers = [row.trajectory for row in rows]
            try:
                with fresh_cache(self._model):
                    again = replay_rows(self._model, [stage] * len(rows), numbers, x_t, sigma)
            except torch.OutOfMemoryError:
                raise  # no fault of the record
            except Exception as error:
                return f"raised {type(error).__name__}: {error}"
            # A batch of another size may take other kernels: allow their rounding, per dtype.
            exact = given.dtype in (torch.float32, torch.float64)
            difference = (again - given.to(again.dtype)).flatten(1).norm(dim=1)
            size = given.to(again.dtype).flatten(1).norm(dim=1).clamp_min(1e-12)
            apart = (difference / size).max().item()
            if not apart <= (1e-3 if exact else 0.05):  # ``not <=``: NaN fails too
                return f"gave a velocity {apart:.1e} away"
        return None

    def _on_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Store a call; forward hook of the transformer and of other modules, as ControlNets."""
        if self._turn is not None and not self._turn.complete:
            names = _names(module) if args else []
            if len(args) > len(names):
                raise ReplayError(
                    f"model: expected arguments by name, because {type(module).__name__}.forward "
                    f"has no names for {len(args)} positional ones"
                )
            arguments = dict(zip(names, args, strict=False)) | kwargs
            # Copy containers and arrays, not tensors: pipelines change them between branches.
            arguments = map_leaves(_copy_array, arguments)
            part = None if module is self._model else module
            self._calls.append(Call(part, arguments, output))

    def _check_finished(self) -> None:
        """Raise ``ReplayError`` if a turn is unfinished; a grid without any step is dropped."""
        turn = self._turn
        if turn is None or not turn.steps:
            self._turn = None
            return
        if turn.complete:
            raise ReplayError(
                "the end of the pipeline's loop over scheduler.timesteps was not observed, so its "
                "latents after the last step are unknown; loop by: for t in scheduler.timesteps"
            )
        raise ReplayError(
            f"turn {len(self._turns)} ended after {turn}; only whole turns are recorded"
        )


def _names(module: nn.Module) -> list[str]:
    """Return the names of a module's arguments that may be given by position."""
    bare = getattr(module, "_orig_mod", module)  # torch.compile's wrapper has ``*args`` only
    parameters = inspect.signature(bare.forward).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _copy_array(leaf: Any) -> Any:
    """Copy an array, since numpy counts no in-place changes; return all else unchanged."""
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
