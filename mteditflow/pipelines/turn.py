"""One pipeline call under observation: what it must keep, and the proof that a replay is faithful.

The first step is recognized, which reads values off the device. All others are compared with it on
the device, and the results are read once, at the end of the turn. Where guidance comes and goes,
each run of steps with the same calls is a pattern of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mteditflow.pipelines.conditioning import (
    Branch,
    Conditioning,
    Recipe,
    Rows,
    Stage,
    branch_of,
    leaves,
    map_tensors,
    readings,
)
from mteditflow.pipelines.guidance import Combination
from mteditflow.pipelines.recognize import (
    Call,
    Place,
    ReplayError,
    find_clock,
    find_grid,
    find_sample,
    find_time,
    repeat_rows,
)
from mteditflow.pipelines.scheduler import Step

Choice = Mapping[str, int]  # of an argument's readings, where it is not the first


@dataclass
class Pattern:
    """Pattern of consecutive steps, taken from the first of them, and what varies over them.

    Attributes:
        first: number of that step.
        place: where the calls hold the noisy sample.
        time_name: the argument that holds the flow time.
        constants: per call, all other arguments.
        rests: per call, what the sample's argument holds besides the sample.
        combination: how the outputs make the scheduler's velocity.
        times: what the time's argument held, per step.
        ends: the first and the last step with the scheduler's velocity.
    """

    first: int
    place: Place
    time_name: str
    constants: list[dict[str, Any]]
    rests: list[Tensor | None]
    combination: Combination = field(default_factory=Combination)
    times: list[Tensor] = field(default_factory=list)
    ends: list[tuple[Step, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, first: int, calls: Sequence[Call], sample: Tensor, timestep: Tensor) -> Pattern:
        """Recognise the calls of a first step."""
        if not calls:
            raise ReplayError(
                "the scheduler takes a step without a call of the transformer: a second sample, "
                "such as sound, is denoised beside the one that is recorded, or another model "
                "makes its velocity; `model` chooses which module is recorded"
            )
        if len(calls) > 2:
            raise ReplayError(
                "expected one call of the transformer per step, or two under classifier-free "
                f"guidance, got {len(calls)}; `model` chooses which module is recorded"
            )
        place = find_sample(calls[0].arguments, sample)
        time_name = find_time(calls[0].arguments, timestep)
        named = (place.name, time_name)
        rows = repeat_rows(sample, place.copies)
        held = [call.arguments.get(place.name, rows) for call in calls]
        parts = {id(argument): place.split(argument, rows) for argument in held}
        for number, argument in enumerate(held):
            if parts[id(argument)] is None:
                raise ReplayError(
                    f"call {number} does not hold the sample in {place.name} as call 0 does, so it "
                    "is no branch of classifier-free guidance (skipped layers, perturbed attention)"
                )
        rests = [parts[id(argument)] for argument in held]  # one object where branches share it
        return cls(
            first,
            place,
            time_name,
            [{k: v for k, v in call.arguments.items() if k not in named} for call in calls],
            [None if parts is None else parts[1] for parts in rests],
        )

    def fits(self, calls: Sequence[Call], rows: Tensor) -> bool:
        """Whether a step's calls have the arguments of this pattern, and in its forms."""
        names = [{*constants, self.place.name, self.time_name} for constants in self.constants]
        return [call.arguments.keys() for call in calls] == names and all(
            getattr(call.arguments[self.time_name], "shape", None) == self.times[0].shape
            and self.place.split(call.arguments[self.place.name], rows) is not None
            for call in calls
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
        timesteps: the scheduler's timesteps of its steps, [S], on the CPU.
        most: the timestep of sigma = 1.
        ends: whether only the first and the last latents are kept, because the steps between are
            not those of a flow's solver.
        shared: names of arguments without a row per trajectory, whatever their shape.
        storage: device to keep tensors on; None leaves them where they are.
    """

    def __init__(
        self,
        sigmas: Tensor,
        timesteps: Tensor,
        *,
        most: int,
        ends: bool,
        shared: Collection[str],
        storage: torch.device | None,
    ) -> None:
        self.steps: list[Step] = []
        self.patterns: list[Pattern] = []
        self._sigmas, self._timesteps, self._most = sigmas, timesteps, most
        self._ends, self._shared, self._storage = ends, shared, storage
        self._started: Tensor | None = None
        self._dtype = torch.float32
        self._constants: list[Version] = []
        self._states: list[Version] = []
        self._doubts: list[tuple[str, Tensor]] = []

    def __str__(self) -> str:
        return f"{len(self.steps)} of {len(self._timesteps)} steps"

    @property
    def complete(self) -> bool:
        """Whether the grid's last step has been taken."""
        return len(self.steps) == len(self._timesteps)

    def add(self, step: Step, velocity: Tensor, timestep: Tensor, calls: Sequence[Call]) -> None:
        """Check a step and keep what varies."""
        number = len(self.steps)
        if self._started is None:
            self._started, self._dtype = step.x_t.clone(), velocity.dtype
        try:
            self._add(number, step, velocity, timestep, calls)
        except ReplayError as error:
            raise ReplayError(f"cannot replay this pipeline: step {number}: {error}") from error
        self.steps.append(step)

    def _add(
        self,
        number: int,
        step: Step,
        velocity: Tensor,
        timestep: Tensor,
        calls: Sequence[Call],
    ) -> None:
        pattern = self.patterns[-1] if self.patterns else None
        if pattern is None or not pattern.fits(calls, repeat_rows(step.x_t, pattern.place.copies)):
            pattern = Pattern.of(number, calls, step.x_t, timestep)
            self.patterns.append(pattern)
            self._constants += _versions(pattern.constants)
        rows = repeat_rows(step.x_t, pattern.place.copies)
        outputs = [self._compare(pattern, i, call, rows) for i, call in enumerate(calls)]
        branches = [x for out in outputs for x in out.chunk(pattern.place.copies)]
        self._combine(pattern, branches, velocity)
        if self.steps:
            returned = self.steps[-1].next_x
            same = step.x_t if step.x_t is returned else returned.to(step.x_t.dtype)
            self._same("latents changed between two steps, as by a callback", step.x_t, same)
        self._states += _versions([{"latents": step.next_x}])
        pattern.ends = [*pattern.ends[:1], (step, velocity)]

    def _compare(self, pattern: Pattern, number: int, call: Call, rows: Tensor) -> Tensor:
        """Compare one call with the pattern's; its velocity."""
        constants, name, place = dict(call.arguments), pattern.place.name, pattern.place
        held, time = constants.pop(name), constants.pop(pattern.time_name)
        parts = place.split(held, rows)
        assert parts is not None
        self._same(f"{name} does not hold the sample", parts[0], rows.to(parts[0].dtype))
        self._same(f"{name} changes beside the sample", parts[1], pattern.rests[number])
        if number == 0:
            pattern.times.append(time)
            first = time if time.dtype == pattern.times[0].dtype else pattern.times[0]
            self._same(f"{pattern.time_name} changes", time, first)
        self._same(f"{pattern.time_name} differs between branches", time, pattern.times[-1])
        for name, value in constants.items():
            self._same(f"{name} changes over the steps", value, pattern.constants[number][name])
        return place.velocity(call.output, rows)

    def _combine(self, pattern: Pattern, outputs: Sequence[Tensor], velocity: Tensor) -> None:
        """Prove that the branches make the scheduler's velocity."""
        if any(output.shape != velocity.shape for output in outputs):
            raise ReplayError(
                f"the scheduler was given a velocity {list(velocity.shape)}, the transformer "
                f"returned {[list(output.shape) for output in outputs]} for the sample"
            )
        changed = (
            f"step {len(self.steps)}: the velocity was changed between transformer and scheduler, "
            "or is NaN"
        )
        self._doubts.append((changed, pattern.combination.mismatch(outputs, velocity)))

    def _same(self, otherwise: str, value: Any, first: Any) -> None:
        """Raise or note the doubt ``otherwise`` unless two values are the same."""
        if value is first:
            return
        if type(value) is type(first):
            if isinstance(value, Tensor) and (value.shape, value.dtype) == (
                first.shape,
                first.dtype,
            ):
                doubt = f"step {len(self.steps)}: {otherwise}"
                self._doubts.append((doubt, (value != first).any()))
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
        raise ReplayError(otherwise)

    def check(self) -> None:
        """Read all answers at once, and raise where one is that the call cannot be replayed."""
        device = self.steps[0].x_t.device
        flags = torch.stack([flag.to(device) for _, flag in self._doubts]).tolist()
        for (otherwise, _), flag in zip(self._doubts, flags, strict=True):
            if flag:
                raise ReplayError(f"cannot replay this pipeline: {otherwise}")
        for pattern in self.patterns:
            branches = len(pattern.constants) * pattern.place.copies
            if branches == 2 and pattern.combination.guidance is None:
                raise ReplayError(
                    "both branches gave the same velocity at every step, which hides the guidance "
                    "scale; use different prompts, or no guidance"
                )
        Version.check([*self._states, *self._constants])

    def recorded(self, choice: Choice) -> Recorded:
        """The whole turn, its arguments as the choice reads them."""
        assert self._started is not None
        states = [step.next_x for step in self.steps]
        log_prob = torch.stack([step.log_prob for step in self.steps], dim=1)
        kept = [-1] if self._ends else range(len(states))
        return Recorded(
            conditioning=self.conditioning(choice),
            latents=self._keep(torch.stack([self._started, *(states[s] for s in kept)], dim=1)),
            sigmas=self._sigmas[[0, -1]] if self._ends else self._sigmas.clone(),
            log_prob=self._keep(log_prob[:, kept]),
            stochastic=torch.tensor(
                [self.steps[s].stochastic for s in kept], dtype=torch.bool, device="cpu"
            ),
            versions=self._constants if self._storage is None else [],
        )

    def choices(self) -> Iterator[Choice]:
        """All ways to read the arguments, the likeliest first; few arguments have several."""
        counts: dict[str, int] = {}
        for pattern in self.patterns:
            for constants in pattern.constants:
                for name, value in constants.items():
                    counts[name] = len(self._readings(pattern, name, value))
        several = {name: count for name, count in counts.items() if count > 1}
        yield {}
        for name, count in several.items():
            yield from ({name: number} for number in range(1, count))
        for one, other in product(several, several):
            if one < other:
                numbers = product(range(1, several[one]), range(1, several[other]))
                yield from ({one: first, other: second} for first, second in numbers)

    def _readings(self, pattern: Pattern, name: str, value: Any) -> list[Any]:
        batch = len(self.steps[0].x_t) * pattern.place.copies
        if name in self._shared:
            return [value]
        return readings(name, value, batch, pattern.place.form.listed)

    def conditioning(self, choice: Choice) -> Conditioning:
        """The turn's constants as a record, each argument as the choice reads it."""
        stages = tuple(self._stage(pattern, choice) for pattern in self.patterns)
        return map_tensors([Conditioning(stages)], self._keep)[0]

    def _stage(self, pattern: Pattern, choice: Choice) -> Stage:
        times, copies = torch.stack(pattern.times).cpu(), pattern.place.copies
        steps = slice(pattern.first, pattern.first + len(times))
        sigmas, timesteps = self._sigmas[:-1], self._timesteps
        recipe = Recipe(
            place=pattern.place,
            time_name=pattern.time_name,
            time_dtype=times.dtype,
            time_axes=tuple(times.shape[2:]),
            clock=find_clock(times, timesteps[steps]),
            grid=find_grid(sigmas, timesteps, self._most),
            velocity_dtype=self._dtype,
            guidance=pattern.combination.guidance,
            sign=pattern.combination.sign,
        )
        branches = []
        for constants, rest in zip(pattern.constants, pattern.rests, strict=True):
            arguments = {
                name: self._readings(pattern, name, value)[choice.get(name, 0)]
                for name, value in constants.items()
            }
            beside = None if rest is None else Rows(rest)
            for index in range(copies):
                parts = (branch_of(tree, index, copies) for tree in (arguments, beside))
                branches.append(Branch(*parts))
        return Stage(sigmas[pattern.first].item(), recipe, tuple(branches))

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
