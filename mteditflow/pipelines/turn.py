"""One pipeline call under observation: what it must keep, and the proof that a replay is faithful.

The first step is recognised, which reads values off the device. All others are compared with it on
the device, and the answers are read once, at the end of the turn.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mteditflow.pipelines.conditioning import (
    Branch,
    Conditioning,
    Recipe,
    Rows,
    leaves,
    map_leaves,
    map_tensors,
)
from mteditflow.pipelines.recognise import (
    Call,
    Guidance,
    Layout,
    ReplayError,
    find_clock,
    find_guidance,
    find_sample,
    find_time,
    mismatch,
)
from mteditflow.pipelines.scheduler import Step


@dataclass(frozen=True)
class Pattern:
    """What the first step of a turn shows of all its steps.

    Attributes:
        sample_name: the argument that holds the noisy sample.
        dtype: its dtype.
        layout: where in that argument.
        time_name: the argument that tells the flow time.
        constants: per branch, all other arguments.
        rests: per branch, what the sample's argument holds besides the sample.
    """

    sample_name: str
    dtype: torch.dtype
    layout: Layout
    time_name: str
    constants: list[dict[str, Any]]
    rests: list[Tensor | None]

    @classmethod
    def of(cls, calls: Sequence[Call], sample: Tensor, timestep: Tensor) -> Pattern:
        """Recognise the calls of a first step."""
        if len(calls) not in (1, 2):
            raise ReplayError(
                "expected one call of the transformer per step, or two under classifier-free "
                f"guidance, got {len(calls)}"
            )
        sample_name, layout = find_sample(calls[0].arguments, sample)
        time_name = find_time(calls[0].arguments, timestep)
        named = (sample_name, time_name)
        held = [call.arguments.get(sample_name, sample) for call in calls]
        parts = {id(argument): layout.split(argument, sample) for argument in held}
        rests = [parts[id(argument)] for argument in held]  # one object where branches share it
        return cls(
            sample_name,
            calls[0].arguments[sample_name].dtype,
            layout,
            time_name,
            [{k: v for k, v in call.arguments.items() if k not in named} for call in calls],
            [None if parts is None else parts[1] for parts in rests],
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
        versions: the tensors kept without a copy, by argument, with their versions.
    """

    conditioning: Conditioning
    latents: Tensor
    sigmas: Tensor
    log_prob: Tensor
    stochastic: Tensor
    versions: list[tuple[str, Tensor, int]]

    def check_unchanged(self) -> None:
        """Raise if a kept tensor was changed in place since."""
        for name, tensor, version in self.versions:
            if tensor._version != version:
                raise ReplayError(
                    f"{name}: changed in place after it was recorded; pass a copy to the pipeline "
                    "or record with storage='cpu'"
                )


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
        self._sigmas, self._timesteps = sigmas, timesteps
        self._shared, self._storage = shared, storage
        self._pattern: Pattern | None = None
        self._guidance: Guidance | None = None
        self._steps: list[Step] = []
        self._times: list[Tensor] = []
        self._versions: list[tuple[str, Tensor, int]] = []
        self._doubts: list[tuple[str, Tensor]] = []

    def __str__(self) -> str:
        return f"{len(self._steps)} of {len(self._sigmas) - 1} steps"

    def add(
        self, step: Step, velocity: Tensor, timestep: Tensor, calls: Sequence[Call]
    ) -> Recorded | None:
        """Check a step and keep what varies; the finished turn after the last one."""
        pattern = self._pattern
        if pattern is None:
            pattern = self._pattern = Pattern.of(calls, step.x_t, timestep)
            self._versions = [v for constants in pattern.constants for v in _versions(constants)]
        if len(calls) != len(pattern.constants):
            raise ReplayError(
                f"step {len(self._steps)} called the transformer {len(calls)} times, step 0 "
                f"{len(pattern.constants)} times; the branches must be the same at every step"
            )
        outputs = [self._compare(pattern, i, call, step.x_t) for i, call in enumerate(calls)]
        self._combine(outputs, velocity)
        if self._steps and step.x_t is not self._steps[-1].next_x:
            returned = self._steps[-1].next_x.to(step.x_t.dtype)
            self._same(
                "the sample, from one step's end to the next one's start,", step.x_t, returned
            )
        self._steps.append(step)
        if len(self._steps) < len(self._sigmas) - 1:
            return None
        with torch.inference_mode(False), torch.no_grad():
            return self._finish(pattern)

    def _compare(self, pattern: Pattern, branch: int, call: Call, sample: Tensor) -> Tensor:
        """Compare one call with step 0's; its velocity."""
        arguments = dict(call.arguments)
        held, time = arguments.pop(pattern.sample_name), arguments.pop(pattern.time_name)
        parts = pattern.layout.split(held, sample) or (held, None)
        self._same(pattern.sample_name, parts[0], sample.to(parts[0].dtype))
        self._same(f"{pattern.sample_name} behind the sample", parts[1], pattern.rests[branch])
        self._same("the transformer's arguments", arguments, pattern.constants[branch])
        if branch == 0:
            self._times.append(time)
        self._same(pattern.time_name, time, self._times[-1])
        return pattern.layout.velocity(call.output, sample)

    def _combine(self, outputs: Sequence[Tensor], velocity: Tensor) -> None:
        """Prove that the branches make the scheduler's velocity; find the scale on the way."""
        if any(output.shape != velocity.shape for output in outputs):
            raise ReplayError(
                f"the scheduler was given a velocity {list(velocity.shape)}, the transformer "
                f"returned {[list(output.shape) for output in outputs]} for the sample"
            )
        if len(outputs) == 2 and self._guidance is None:
            self._guidance = find_guidance(outputs, velocity)
        if len(outputs) == 2 and self._guidance is None:  # equal branches: any scale gives either
            outputs = outputs[:1]
        self._doubts.append(
            (
                "the scheduler's velocity is not what the transformer's outputs make (it was "
                "changed in between, or is NaN)",
                mismatch(outputs, self._guidance, velocity),
            )
        )

    def _same(self, what: str, value: Any, first: Any) -> None:
        """Raise or note a doubt unless ``value`` is what it was at the first step."""
        if value is first:
            return
        same_kind = type(value) is type(first)
        if same_kind and isinstance(value, Tensor):
            if (value.shape, value.dtype) == (first.shape, first.dtype):
                self._doubts.append((f"{what} changes over the steps", (value != first).any()))
                return
        elif same_kind and isinstance(value, dict) and value.keys() == first.keys():
            for key in value:
                self._same(str(key), value[key], first[key])
            return
        elif same_kind and isinstance(value, (list, tuple)) and len(value) == len(first):
            for one, other in zip(value, first, strict=True):
                self._same(what, one, other)
            return
        elif same_kind and value == first:
            return
        raise ReplayError(f"step {len(self._steps)}: {what} changes over the steps")

    def _finish(self, pattern: Pattern) -> Recorded:
        """Read all answers at once; keep the turn, as tensors that autograd accepts."""
        device = self._steps[0].x_t.device
        flags = torch.stack([flag.to(device) for _, flag in self._doubts]).tolist()
        for (message, _), flag in zip(self._doubts, flags, strict=True):
            if flag:
                raise ReplayError(f"cannot replay this pipeline: {message}")
        if len(pattern.constants) == 2 and self._guidance is None:
            raise ReplayError(
                "both branches gave the same velocity at every step, which hides the guidance "
                "scale; use different prompts, or no guidance"
            )
        samples = [self._steps[0].x_t, *(step.next_x for step in self._steps)]
        recorded = Recorded(
            self._conditioning(pattern),
            self._keep(torch.stack(samples, dim=1)),
            self._sigmas.clone(),
            self._keep(torch.stack([step.log_prob for step in self._steps], dim=1)),
            torch.tensor([step.stochastic for step in self._steps]),
            self._versions,
        )
        recorded.check_unchanged()
        return recorded if self._storage is None else replace(recorded, versions=[])

    def _conditioning(self, pattern: Pattern) -> Conditioning:
        """The turn's constants as a record."""
        times = torch.stack(self._times).cpu()
        recipe = Recipe(
            sample_name=pattern.sample_name,
            sample_dtype=pattern.dtype,
            layout=pattern.layout,
            time_name=pattern.time_name,
            time_dtype=times.dtype,
            clock=find_clock(times, self._sigmas[:-1] * self._timesteps),
            timesteps=self._timesteps,
            guidance=self._guidance,
        )
        batch = len(self._steps[0].x_t)
        branches = tuple(
            Branch(
                {k: self._by_row(k, value, batch) for k, value in constants.items()},
                None if rest is None else Rows(rest),
            )
            for constants, rest in zip(pattern.constants, pattern.rests, strict=True)
        )
        return map_tensors([Conditioning(recipe, branches)], self._keep)[0]

    def _by_row(self, name: str, value: Any, batch: int) -> Any:
        """Wrap the tensors of an argument that have a row per trajectory."""
        if isinstance(value, (list, tuple)) and not all(isinstance(v, Tensor) for v in value):
            raise ReplayError(
                f"{name}: a {type(value).__name__} of plain values cannot be replayed, because it "
                f"does not show which of them belong to which trajectory: {value!r}"
            )

        def leaf(x: Any) -> Any:
            ids = isinstance(x, Tensor) and x.ndim == 2 and name.endswith("_ids")
            shared = not isinstance(x, Tensor) or ids or name in self._shared
            return x if shared or x.ndim == 0 or len(x) != batch else Rows(x)

        return map_leaves(leaf, value)

    def _keep(self, x: Tensor) -> Tensor:
        """The tensor as it is stored: on the storage device, no view of a larger one, no graph."""
        view = x.untyped_storage().nbytes() > x.numel() * x.element_size()
        moved = x if self._storage is None else x.to(self._storage)
        copied = moved.is_inference() or (moved is x and (view or self._storage is not None))
        return moved.clone() if copied else moved.detach()


def _versions(tree: Any) -> list[tuple[str, Tensor, int]]:
    """Every tensor of the arguments with its argument's name and its version."""
    return [
        (name, leaf, leaf._version)
        for name, value in tree.items()
        for leaf in leaves(value)
        if isinstance(leaf, Tensor) and not leaf.is_inference()
    ]
