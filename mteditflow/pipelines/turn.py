"""One pipeline call under observation: what it must keep, and the proof that a replay is faithful.

The first step is recognized, which reads values off the device. All others are compared with it on
the device, and the results are read once, at the end of the turn.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mteditflow.pipelines.conditioning import (
    Branch,
    Conditioning,
    Recipe,
    Rows,
    branch_of,
    by_row,
    leaves,
    map_tensors,
)
from mteditflow.pipelines.guidance import Combination
from mteditflow.pipelines.recognize import (
    Call,
    Frames,
    Place,
    ReplayError,
    find_clock,
    find_sample,
    find_time,
    repeat_rows,
)
from mteditflow.pipelines.scheduler import Step


@dataclass(frozen=True)
class Pattern:
    """Pattern of all steps of a turn, taken from the first one.

    Attributes:
        place: where they hold the noisy sample.
        time_name: the argument that holds the flow time.
        constants: per call, all other arguments.
        rests: per call, what the sample's argument holds besides the sample.
    """

    place: Place
    time_name: str
    constants: list[dict[str, Any]]
    rests: list[Tensor | None]

    @classmethod
    def of(cls, calls: Sequence[Call], sample: Tensor, timestep: Tensor) -> Pattern:
        """Recognise the calls of a first step."""
        if len(calls) not in (1, 2):
            raise ReplayError(
                "expected one call of the transformer per step, or two under classifier-free "
                f"guidance, got {len(calls)}; `model` chooses which module is recorded"
            )
        place = find_sample(calls[0].arguments, sample)
        time_name = find_time(calls[0].arguments, timestep)
        named = (place.name, time_name)
        rows = repeat_rows(sample, place.copies)
        held = [call.arguments.get(place.name, rows) for call in calls]
        parts = {id(argument): place.layout.split(argument, rows) for argument in held}
        rests = [parts[id(argument)] for argument in held]  # one object where branches share it
        return cls(
            place,
            time_name,
            [{k: v for k, v in call.arguments.items() if k not in named} for call in calls],
            [None if parts is None else parts[1] for parts in rests],
        )


class Version(NamedTuple):
    """A tensor by its argument's name, with autograd's count of its changes in place."""

    name: str
    tensor: Tensor
    version: int

    @staticmethod
    def check(versions: Sequence[Version]) -> None:
        """Raise if one of the tensors was changed in place since."""
        for name, tensor, version in versions:
            if tensor._version != version:
                raise ReplayError(
                    f"{name}: changed in place after it was recorded; give the pipeline a copy, or "
                    "record with storage='cpu' if the change comes after the call"
                )


@dataclass(frozen=True)
class Recorded:
    """One finished turn of B trajectories, in S steps.

    Attributes:
        conditioning: what a replay calls the transformer with.
        latents: [B, S + 1, ...], from noise to clean.
        sigmas: [S + 1].
        log_prob: [B, S].
        stochastic: boolean [S].
        versions: of the tensors that are kept without a copy.
    """

    conditioning: Conditioning
    latents: Tensor
    sigmas: Tensor
    log_prob: Tensor
    stochastic: Tensor
    versions: list[Version]


class Turn:
    """The steps of one pipeline call, checked as they come.

    Args:
        sigmas: the call's grid, [S + 1], on the CPU.
        timesteps: the scheduler's timestep of sigma = 1.
        shared: names of arguments without a row per trajectory, whatever their shape.
        storage: device to keep tensors on; None leaves them where they are.
    """

    def __init__(
        self,
        sigmas: Tensor,
        timesteps: int,
        shared: Collection[str],
        storage: torch.device | None,
    ) -> None:
        self.steps: list[Step] = []
        self._sigmas, self._timesteps = sigmas, timesteps
        self._shared, self._storage = shared, storage
        self._pattern: Pattern | None = None
        self._combination = Combination()
        self._times: list[Tensor] = []
        self._constants: list[Version] = []
        self._states: list[Version] = []
        self._doubts: list[tuple[str, Tensor]] = []

    def __str__(self) -> str:
        return f"{len(self.steps)} of {len(self._sigmas) - 1} steps"

    def add(
        self, step: Step, velocity: Tensor, timestep: Tensor, calls: Sequence[Call]
    ) -> Recorded | None:
        """Check a step and keep what varies; the finished turn after the last one."""
        pattern = self._pattern
        if pattern is None:
            pattern = self._pattern = Pattern.of(calls, step.x_t, timestep)
            self._constants = _versions(pattern.constants)
        if len(calls) != len(pattern.constants):
            raise ReplayError(
                f"step {len(self.steps)} called the transformer {len(calls)} times, step 0 "
                f"{len(pattern.constants)} times; the branches must be the same at every step, and "
                "guidance that comes and goes over the steps is not supported"
            )
        rows = repeat_rows(step.x_t, pattern.place.copies)
        outputs = [self._compare(pattern, i, call, rows) for i, call in enumerate(calls)]
        self._combine([x for out in outputs for x in out.chunk(pattern.place.copies)], velocity)
        if self.steps:
            returned = self.steps[-1].next_x
            same = step.x_t if step.x_t is returned else returned.to(step.x_t.dtype)
            self._same("latents changed between two steps, as by a callback", step.x_t, same)
        self._states += _versions([{"latents": step.next_x}])
        self.steps.append(step)
        if len(self.steps) < len(self._sigmas) - 1:
            return None
        with torch.inference_mode(False), torch.no_grad():
            return self._finish(pattern)

    def _compare(self, pattern: Pattern, number: int, call: Call, rows: Tensor) -> Tensor:
        """Compare one call with step 0's; its velocity."""
        constants = dict(call.arguments)
        name, layout = pattern.place.name, pattern.place.layout
        held, time = constants.pop(name, None), constants.pop(pattern.time_name, None)
        parts = layout.split(held, rows)
        if parts is None or not isinstance(time, Tensor):
            raise ReplayError(
                f"{name}, {pattern.time_name}: step {len(self.steps)}, call {number} does not hold "
                "sample and time as step 0 did; guidance that comes and goes over the steps is not "
                "supported"
            )
        self._same(f"{name} does not hold the sample", parts[0], rows.to(parts[0].dtype))
        self._same(f"{name} changes behind the sample", parts[1], pattern.rests[number])
        if number == 0:
            self._times.append(time)
            first = time if time.dtype == self._times[0].dtype else self._times[0]
            self._same(f"{pattern.time_name} changes", time, first)
        self._same(f"{pattern.time_name} differs between branches", time, self._times[-1])
        if constants.keys() != pattern.constants[number].keys():
            raise ReplayError(f"step {len(self.steps)}: other arguments than at step 0")
        for name, value in constants.items():
            self._same(f"{name} changes over the steps", value, pattern.constants[number][name])
        return layout.velocity(call.output, rows)

    def _combine(self, outputs: Sequence[Tensor], velocity: Tensor) -> None:
        """Prove that the branches make the scheduler's velocity."""
        if any(output.shape != velocity.shape for output in outputs):
            raise ReplayError(
                f"the scheduler was given a velocity {list(velocity.shape)}, the transformer "
                f"returned {[list(output.shape) for output in outputs]} for the sample"
            )
        changed = "the velocity was changed between transformer and scheduler, or is NaN"
        self._doubts.append((changed, self._combination.mismatch(outputs, velocity)))

    def _same(self, otherwise: str, value: Any, first: Any) -> None:
        """Raise or note the doubt ``otherwise`` unless two values are the same."""
        if value is first:
            return
        if type(value) is type(first):
            if isinstance(value, Tensor) and (value.shape, value.dtype) == (
                first.shape,
                first.dtype,
            ):
                self._doubts.append((otherwise, (value != first).any()))
                return
            if isinstance(value, dict) and value.keys() == first.keys():
                value, first = list(value.values()), list(first.values())
            if isinstance(value, (list, tuple)) and len(value) == len(first):
                for one, other in zip(value, first, strict=True):
                    self._same(otherwise, one, other)
                return
            if not isinstance(value, Tensor) and value == first:
                return
            if isinstance(value, Tensor) and value.dtype != first.dtype:
                otherwise += f" from {first.dtype} to {value.dtype}, as by autocast over float32"
        raise ReplayError(f"cannot replay this pipeline: {otherwise}")

    def _finish(self, pattern: Pattern) -> Recorded:
        """Read all answers at once; keep the turn, as tensors that autograd accepts."""
        device = self.steps[0].x_t.device
        flags = torch.stack([flag.to(device) for _, flag in self._doubts]).tolist()
        for (otherwise, _), flag in zip(self._doubts, flags, strict=True):
            if flag:
                raise ReplayError(f"cannot replay this pipeline: {otherwise}")
        branches = len(pattern.constants) * pattern.place.copies
        if branches == 2 and self._combination.guidance is None:
            raise ReplayError(
                "both branches gave the same velocity at every step, which hides the guidance "
                "scale; use different prompts, or no guidance"
            )
        samples = [self.steps[0].x_t, *(step.next_x for step in self.steps)]
        recorded = Recorded(
            conditioning=self._conditioning(pattern),
            latents=self._keep(torch.stack(samples, dim=1)),
            sigmas=self._sigmas.clone(),
            log_prob=self._keep(torch.stack([step.log_prob for step in self.steps], dim=1)),
            stochastic=torch.tensor(
                [step.stochastic for step in self.steps], dtype=torch.bool, device="cpu"
            ),
            versions=self._constants if self._storage is None else [],
        )
        Version.check([*self._states, *self._constants])
        return recorded

    def _conditioning(self, pattern: Pattern) -> Conditioning:
        """The turn's constants as a record."""
        times = torch.stack(self._times).cpu()
        recipe = Recipe(
            place=pattern.place,
            time_name=pattern.time_name,
            time_dtype=times.dtype,
            clock=find_clock(times, self._sigmas[:-1] * self._timesteps),
            timesteps=self._timesteps,
            time_axes=tuple(times.shape[2:]),
            velocity_dtype=self.steps[0].next_x.dtype,
            guidance=self._combination.guidance,
            sign=self._combination.sign,
        )
        batch, copies = len(self.steps[0].x_t) * pattern.place.copies, pattern.place.copies
        listed = isinstance(pattern.place.layout, Frames)
        branches = []
        for constants, rest in zip(pattern.constants, pattern.rests, strict=True):
            arguments = {
                name: by_row(name, value, batch, self._shared, listed)
                for name, value in constants.items()
            }
            behind = None if rest is None else Rows(rest)
            for index in range(copies):
                parts = (branch_of(tree, index, copies) for tree in (arguments, behind))
                branches.append(Branch(*parts))
        return map_tensors([Conditioning(recipe, tuple(branches))], self._keep)[0]

    def _keep(self, x: Tensor) -> Tensor:
        """The tensor as it is stored: on the storage device, no view of a larger one, no graph."""
        view = x.untyped_storage().nbytes() > x.numel() * x.element_size()
        moved = x if self._storage is None else x.to(self._storage)
        copied = moved.is_inference() or (moved is x and (view or self._storage is not None))
        return moved.clone() if copied else moved.detach()


def _versions(arguments: Sequence[dict[str, Any]]) -> list[Version]:
    """Every tensor with its argument's name and its version; inference tensors have none."""
    return [
        Version(name, leaf, leaf._version)
        for named in arguments
        for name, value in named.items()
        for leaf in leaves(value)
        if isinstance(leaf, Tensor) and not leaf.is_inference()
    ]
