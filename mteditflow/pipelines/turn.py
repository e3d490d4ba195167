"""One pipeline call under observation: what it must keep, and the proof that a replay is faithful.

The first step is recognized, which reads values off the device. All others are compared with it on
the device, and the results are read once, at the end of the turn. Where guidance comes and goes,
each run of steps with the same calls is a pattern of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import product
from typing import Any, NamedTuple

import numpy as np
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
    Time,
    find_grid,
    find_sample,
    find_time,
    find_times,
    named_time,
    repeat_rows,
)
from mteditflow.pipelines.scheduler import Step

Choice = Mapping[str, int]  # of an argument's readings, where it is not the first
_CONSTANT = (
    *(Tensor, np.ndarray, np.generic, torch.dtype, torch.device),
    *(int, float, complex, str, bytes, slice, Enum, type(None)),
)


@dataclass
class Pattern:
    """Pattern of consecutive steps, taken from the first of them, and what varies over them.

    Attributes:
        first: number of that step.
        place: where the calls hold the noisy sample.
        constants: per call, all other arguments.
        rests: per call, what the sample's argument holds besides the sample.
        times: by name what the arguments that may hold the flow time held, per step and call.
        combination: how the outputs make the scheduler's velocity.
        ends: the first and the last step with the scheduler's velocity.
    """

    first: int
    place: Place
    constants: list[dict[str, Any]]
    rests: list[Tensor | None]
    times: dict[str, list[list[Tensor]]]
    combination: Combination = field(default_factory=Combination)
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
        times = find_times(calls[0].arguments, timestep)
        shapes = [[getattr(call.arguments.get(n), "shape", None) for call in calls] for n in times]
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
            [{k: v for k, v in call.arguments.items() if k != place.name} for call in calls],
            [None if parts is None else parts[1] for parts in rests],
            {n: [] for n, of in zip(times, shapes, strict=True) if of == of[:1] * len(calls)},
        )

    def fits(self, calls: Sequence[Call], rows: Tensor) -> bool:
        """Whether a step's calls have the arguments of this pattern, and in its forms."""
        names = [{*constants, self.place.name} for constants in self.constants]
        return [call.arguments.keys() for call in calls] == names and all(
            self.place.split(call.arguments[self.place.name], rows) is not None
            and all(
                getattr(call.arguments[name], "shape", None) == constants[name].shape
                for name in self.times
            )
            for call, constants in zip(calls, self.constants, strict=True)
        )

    def moving(self) -> list[str]:
        """Names of the arguments that hold the flow time: those that change with the steps.

        Of a single step, those that are named like a time, or the only one there is.
        """
        steps = {name: [torch.stack(calls) for calls in held] for name, held in self.times.items()}
        moving = [n for n, held in steps.items() if any(not torch.equal(x, held[0]) for x in held)]
        if any(len(held) == 1 for held in steps.values()):
            moving = [name for name in steps if named_time(name)] or [*steps]
            moving = moving if len(moving) == 1 or all(map(named_time, moving)) else []
        if not moving:
            raise ReplayError(
                f"which argument of the transformer holds the flow time is unclear among "
                f"{[*self.times]}"
            )
        return moving


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
        ends: whether S is 1 because only the first and the last latents are kept.
        versions: of the tensors that are kept without a copy.
    """

    conditioning: Conditioning
    latents: Tensor
    sigmas: Tensor
    log_prob: Tensor
    stochastic: Tensor
    ends: bool
    versions: list[Version]

    def first_and_last(self) -> Recorded:
        """The turn without the latents between; it has no stochastic steps."""
        return replace(
            self,
            latents=self.latents[:, [0, -1]],
            sigmas=self.sigmas[[0, -1]],
            log_prob=self.log_prob[:, -1:],
            stochastic=self.stochastic[-1:],
            ends=True,
        )


class Turn:
    """The steps of one pipeline call, checked as they come.

    Args:
        sigmas: the call's grid, [S + 1], on the CPU.
        timesteps: the scheduler's timesteps of its steps, [S], on the CPU.
        most: the timestep of sigma = 1.
        solved: whether a solver may have taken its steps, so that all latents are kept as they
            are; without one the pipeline may change them between its steps, as by a mask.
        ends: whether only the first and the last latents are kept, because the steps between are
            not those of a flow's solver, or because the pipeline has changed them.
        shared: names of arguments without a row per trajectory, whatever their shape.
        storage: device to keep tensors on; None leaves them where they are.
    """

    def __init__(
        self,
        sigmas: Tensor,
        timesteps: Tensor,
        *,
        most: int,
        solved: bool,
        ends: bool,
        shared: Collection[str],
        storage: torch.device | None,
    ) -> None:
        self.steps: list[Step] = []
        self.patterns: list[Pattern] = []
        self._sigmas, self._timesteps, self._most = sigmas, timesteps, most
        self.ends = ends
        self._solved, self._shared, self._storage = solved, shared, storage
        self._started, self._clean = torch.empty(0), torch.empty(0)
        self._dtype = torch.float32
        self._constants: list[Version] = []
        self._states: list[Version] = []
        self._doubts: list[tuple[str, Tensor]] = []
        self._changes: list[Tensor] = []

    def __str__(self) -> str:
        return f"{len(self.steps)} of {len(self._timesteps)} steps"

    @property
    def complete(self) -> bool:
        """Whether the grid's last step has been taken."""
        return len(self.steps) == len(self._timesteps)

    def add(self, step: Step, velocity: Tensor, timestep: Tensor, calls: Sequence[Call]) -> None:
        """Check a step and keep what varies."""
        number = len(self.steps)
        if number == 0:
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
            if step.x_t is not returned:
                changed = (step.x_t != returned.to(step.x_t.dtype)).any()
                self._changes.append(changed)
        self._states += _versions([{"latents": step.next_x}])
        pattern.ends = [*pattern.ends[:1], (step, velocity)]

    def _compare(self, pattern: Pattern, number: int, call: Call, rows: Tensor) -> Tensor:
        """Compare one call with the pattern's; its velocity."""
        constants, name, place = dict(call.arguments), pattern.place.name, pattern.place
        parts = place.split(constants.pop(name), rows)
        assert parts is not None
        self._same(f"{name} does not hold the sample", parts[0], rows.to(parts[0].dtype))
        self._same(f"{name} changes beside the sample", parts[1], pattern.rests[number])
        for name, value in constants.items():
            first = pattern.constants[number][name]
            if name not in pattern.times:
                self._same(f"{name} changes over the steps", value, first)
                continue
            if value.dtype != first.dtype:
                self._same(f"{name} changes", value, first)
            if number == 0:
                pattern.times[name].append([])
            pattern.times[name][-1].append(value)
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
        doubts = [flag.to(device) for _, flag in self._doubts]
        changes = [flag.to(device) for flag in self._changes]
        flags = torch.stack(doubts + changes).tolist()
        self._note_change(any(flags[len(doubts) :]), "latents changed between two steps")
        flags = flags[: len(doubts)]
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
        Version.check(self._constants)
        in_place = any(x.version != x.tensor._version for x in self._states)
        self._note_change(in_place, "latents changed in place")

    def hold(self, clean: Tensor) -> None:
        """Keep what the pipeline holds after its last step, at the end of its loop."""
        last = self.steps[-1].next_x
        changed = clean is not last and not torch.equal(clean, last.to(clean.dtype))
        self._note_change(changed, "latents changed after the last step")
        self._clean = clean.to(last.dtype) if changed else last

    def _note_change(self, changed: bool, what: str) -> None:
        if changed and self._solved:
            raise ReplayError(
                f"cannot replay this pipeline: {what}, as by a callback or a mask, so that no step "
                "leads from one to the next; without a solver the first and the last are recorded"
            )
        self.ends |= changed

    def recorded(self, choice: Choice) -> Recorded:
        """The whole turn, its arguments as the choice reads them."""
        states = [self._started, *(step.next_x for step in self.steps[:-1]), self._clean]
        stochastic = [step.stochastic for step in self.steps]
        whole = Recorded(
            conditioning=self.conditioning(choice),
            latents=self._keep(torch.stack(states, dim=1)),
            sigmas=self._sigmas.clone(),
            log_prob=self._keep(torch.stack([step.log_prob for step in self.steps], dim=1)),
            stochastic=torch.tensor(stochastic, dtype=torch.bool, device="cpu"),
            ends=False,
            versions=self._constants if self._storage is None else [],
        )
        return whole.first_and_last() if self.ends else whole

    def _moving(self, pattern: Pattern) -> tuple[Time, ...]:
        """The arguments that hold the flow time, equal in all branches."""
        found = []
        for name in pattern.moving():
            held = pattern.times[name]
            if any(not torch.equal(time, calls[0]) for calls in held for time in calls[1:]):
                raise ReplayError(f"cannot replay this pipeline: {name} differs between branches")
            times = torch.stack([calls[0] for calls in held]).cpu()
            steps = self._timesteps[pattern.first : pattern.first + len(held)]
            found.append(find_time(name, times, steps))
        return tuple(found)

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
        for leaf in leaves(value):
            if not isinstance(leaf, _CONSTANT):
                raise ReplayError(
                    f"cannot replay this pipeline: {name} holds a {type(leaf).__name__}, which may "
                    "keep a state between calls; name it in `shared` if it does not"
                )
        return readings(name, value, batch, pattern.place.form.listed)

    def conditioning(self, choice: Choice) -> Conditioning:
        """The turn's constants as a record, each argument as the choice reads it."""
        stages = tuple(self._stage(pattern, choice) for pattern in self.patterns)
        return map_tensors([Conditioning(stages)], self._keep)[0]

    def _stage(self, pattern: Pattern, choice: Choice) -> Stage:
        sigmas, timesteps, copies = self._sigmas[:-1], self._timesteps, pattern.place.copies
        recipe = Recipe(
            place=pattern.place,
            times=self._moving(pattern),
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
                if name not in {time.name for time in recipe.times}
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
