"""One pipeline call under observation: what it must keep, and the proof that a replay is faithful.

The first step is recognized, which reads values off the device. All others are compared with it on
the device, and the results are read once, at the end of the turn. Where guidance is active in
only some steps, each run of steps with the same calls is a pattern of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mteditflow.pipelines.conditioning import (
    CallRecord,
    Conditioning,
    OutputOf,
    Recipe,
    Rows,
    Stage,
    leaves,
    map_kinds,
    map_leaves,
    map_tensors,
    readings,
)
from mteditflow.pipelines.guidance import Combination
from mteditflow.pipelines.recognize import (
    Call,
    Place,
    ReplayError,
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
    *(int, float, complex, str, bytes, slice, range, tuple, frozenset, Enum, type(None)),
)


@dataclass
class CallPattern:
    """One call of every step of a pattern, as it was at the first of them.

    Attributes:
        module: what was called; None for the transformer.
        place: where it holds the noisy sample.
        constants: all other arguments.
        rest: what the sample's argument holds besides the sample.
        times: by name what the arguments that may hold the flow time held, per step.
    """

    module: nn.Module | None
    place: Place
    constants: dict[str, Any]
    rest: Tensor | None
    times: dict[str, list[Tensor]]

    @classmethod
    def of(cls, call: Call, sample: Tensor, timestep: Tensor, velocity: Tensor) -> CallPattern:
        """Recognize a call of a first step."""
        place = find_sample(call.arguments, sample)
        rows = repeat_rows(sample, place.copies)
        parts = place.split(call.arguments[place.name], rows)
        assert parts is not None
        if call.module is None:
            place = place.with_output(call.output[0], rows, velocity)
        constants = {k: v for k, v in call.arguments.items() if k != place.name}
        times = find_times(call.arguments, timestep)
        return cls(call.module, place, constants, parts[1], {name: [] for name in times})

    def fits(self, call: Call, sample: Tensor) -> bool:
        """Whether a later call has the same arguments, in the same forms."""
        rows, given = repeat_rows(sample, self.place.copies), call.arguments
        return (
            call.module is self.module
            and given.keys() == {*self.constants, self.place.name}
            and self.place.split(given[self.place.name], rows) is not None
            and all(getattr(given[n], "shape", 0) == self.constants[n].shape for n in self.times)
        )

    def time_names(self) -> list[str]:
        """Names of the arguments that hold the flow time: those that change with the steps.

        Of a single step, those that are named like a time, or the only one there is.
        """
        steps = self.times.items()
        found = [name for name, held in steps if any(not torch.equal(x, held[0]) for x in held)]
        if any(len(held) == 1 for _, held in steps):
            named = [name for name in self.times if named_time(name)]
            found = named or ([*self.times] if len(self.times) == 1 else [])
        if not found:
            raise ReplayError(
                "which argument of the transformer holds the flow time is unclear among "
                f"{[*self.times]}"
            )
        return found


class Row(NamedTuple):
    """One trajectory's share of a step: its number, x_t, sigma (0-d) and the velocity."""

    trajectory: int
    x_t: Tensor
    sigma: Tensor
    velocity: Tensor


PROOF_ROWS = 3  # of a pattern at most


@dataclass
class Pattern:
    """Pattern of consecutive steps, taken from the first of them, and what varies over them.

    Attributes:
        first: number of that step.
        calls: of the transformer and of modules that give it arguments, in order.
        combination: how the transformer's outputs make the scheduler's velocity.
        rows: single rows of its steps to be proved: several of the first step, one of each other.
    """

    first: int
    calls: list[CallPattern]
    combination: Combination = field(default_factory=Combination)
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def of(cls, first: int, calls: Sequence[Call], *step: Tensor) -> Pattern:
        """Recognize the calls of a first step, by its sample, timestep and velocity."""
        own = [call for call in calls if call.module is None]
        if not own:
            raise ReplayError(
                "the scheduler takes a step without a call of the transformer: a second sample, "
                "such as sound, is denoised beside the one that is recorded, or another model "
                "makes its velocity; `model` chooses which module is recorded"
            )
        if len(own) > 2:
            raise ReplayError(
                "expected one call of the transformer per step, or two under classifier-free "
                f"guidance, got {len(own)}; `model` chooses which module is recorded"
            )
        pattern = cls(first, [CallPattern.of(call, *step) for call in calls])
        one, other = pattern.branches[0], pattern.branches[-1]
        if other.place != one.place:
            raise ReplayError(
                f"the transformer's calls hold the sample in different ways ({one.place}; "
                f"{other.place}), so that they are no branches of classifier-free guidance "
                "(skipped layers, perturbed attention)"
            )
        if own[-1].arguments[one.place.name] is own[0].arguments[one.place.name]:
            other.rest = one.rest  # one object where branches share it
        return pattern

    @property
    def branches(self) -> list[CallPattern]:
        """The calls of the transformer."""
        return [call for call in self.calls if call.module is None]

    def fits(self, calls: Sequence[Call], sample: Tensor) -> bool:
        """Whether a step's calls have the arguments of this pattern, and in its forms."""
        return len(calls) == len(self.calls) and all(
            one.fits(call, sample) for one, call in zip(self.calls, calls, strict=True)
        )


class Version(NamedTuple):
    """A tensor by its argument's name, with what tells of changes in place.

    Attributes:
        name: of the argument.
        tensor: as it was given.
        version: autograd's count of its changes, or a copy of an inference tensor, which has none.
    """

    name: str
    tensor: Tensor
    version: int | Tensor

    @property
    def changed(self) -> bool:
        """Whether it was changed in place since."""
        if isinstance(self.version, Tensor):
            return not torch.equal(self.version, self.tensor)
        return self.tensor._version != self.version

    @staticmethod
    def check(versions: Sequence[Version]) -> None:
        """Raise if one of the tensors was changed in place since."""
        for each in versions:
            if each.changed:
                name = each.name
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
        has_solver: whether a solver takes the steps. Without one, the pipeline may change latents
            between steps, as by a mask.
        ends: whether only the first and the last latents are kept, because another sampler or a
            cache took the steps. Changed latents set it, too.
        shared: names of arguments without a row per trajectory, whatever their shape.
        storage: device to keep tensors on; None leaves them where they are.
    """

    def __init__(
        self,
        sigmas: Tensor,
        timesteps: Tensor,
        *,
        most: int,
        has_solver: bool,
        ends: bool,
        shared: Collection[str],
        storage: torch.device | None,
    ) -> None:
        self.steps: list[Step] = []
        self.patterns: list[Pattern] = []
        self._sigmas, self._timesteps, self._most = sigmas, timesteps, most
        self.ends = ends
        self._has_solver, self._shared, self._storage = has_solver, shared, storage
        self._started = self._clean = sigmas  # replaced at the first step and at the end
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
        calls = _link_outputs(calls)
        pattern = self.patterns[-1] if self.patterns else None
        if pattern is None or not pattern.fits(calls, step.x_t):
            pattern = Pattern.of(number, calls, step.x_t, timestep, velocity)
            self.patterns.append(pattern)
            self._constants += _versions([call.constants for call in pattern.calls])
        outputs: list[Tensor] = []
        for one, call in zip(pattern.calls, calls, strict=True):
            rows = repeat_rows(step.x_t, one.place.copies)
            self._compare(one, call, rows)
            if one.module is None:
                outputs += one.place.velocity(call.output[0], rows).chunk(one.place.copies)
        self._combine(pattern, outputs, velocity)
        if self.steps:
            returned = self.steps[-1].next_x
            if step.x_t is not returned:
                changed = (step.x_t != returned.to(step.x_t.dtype)).any()
                self._changes.append(changed)
        self._states += _versions([{"latents": step.next_x}])
        for _ in range(1 if pattern.rows else PROOF_ROWS):
            row = -(len(pattern.rows) + 1) % len(velocity)
            # Copies, because pipelines may write what a step returns into what it was given.
            own = (step.x_t[row].clone(), step.sigma[row], velocity[row].clone())
            pattern.rows.append(Row(row, *own))

    def _compare(self, one: CallPattern, call: Call, rows: Tensor) -> None:
        """Compare a call with the pattern's."""
        constants, name = dict(call.arguments), one.place.name
        parts = one.place.split(constants.pop(name), rows)
        assert parts is not None
        self._same(f"{name} does not hold the sample", parts[0], rows.to(parts[0].dtype))
        self._same(f"{name} changes beside the sample", parts[1], one.rest)
        for name, value in constants.items():
            first = one.constants[name]
            if name not in one.times:
                self._same(f"{name} changes over the steps", value, first)
                continue
            if value.dtype != first.dtype:
                self._same(f"{name} changes", value, first)
            one.times[name].append(value)

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
            if isinstance(value, np.ndarray) and np.array_equal(value, first):
                return
            if not isinstance(value, (Tensor, np.ndarray)) and value == first:
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
            branches = sum(call.place.copies for call in pattern.branches)
            if branches == 2 and pattern.combination.guidance is None:
                raise ReplayError(
                    "both branches gave the same velocity at every step, which hides the guidance "
                    "scale; use different prompts, or no guidance"
                )
        Version.check(self._constants)
        in_place = any(state.changed for state in self._states)
        self._note_change(in_place, "latents changed in place")

    def set_clean(self, clean: Tensor) -> None:
        """Keep what the pipeline holds after its last step, at the end of its loop."""
        last = self.steps[-1].next_x
        changed = clean is not last and not torch.equal(clean, last.to(clean.dtype))
        self._note_change(changed, "latents changed after the last step")
        self._clean = clean.to(last.dtype) if changed else last

    def _note_change(self, changed: bool, what: str) -> None:
        if changed and self._has_solver:
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
            versions=[
                x for x in self._constants if self._storage is None and isinstance(x.version, int)
            ],
        )
        return whole.first_and_last() if self.ends else whole

    def choices(self) -> Iterator[Choice]:
        """Other ways to read the arguments than the likeliest; few arguments have several."""
        counts = {
            name: len(self._readings(call, name, value))
            for pattern in self.patterns
            for call in pattern.calls
            for name, value in call.constants.items()
        }
        others = [(name, number) for name, count in counts.items() for number in range(1, count)]
        yield from ({name: number} for name, number in others)
        yield from (dict(pair) for pair in combinations(others, 2) if pair[0][0] != pair[1][0])

    def _readings(self, call: CallPattern, name: str, value: Any) -> list[Any]:
        if name in self._shared:
            return [value]
        for leaf in leaves(value):
            if not isinstance(leaf, _CONSTANT):
                raise ReplayError(
                    f"cannot replay this pipeline: {name} holds a {type(leaf).__name__}, which may "
                    "keep a state between calls; name it in `shared` if it does not"
                )
        batch = len(self.steps[0].x_t) * call.place.copies
        return readings(name, value, batch, call.place.form.listed)

    def kinds(self) -> Hashable:
        """How the arguments of every pattern can be read, equal where one proof is enough."""
        return tuple(
            tuple((name, map_kinds(self._readings(call, name, value))) for name, value in held)
            for pattern in self.patterns
            for call in pattern.calls
            for held in [call.constants.items()]
        )

    def conditioning(self, choice: Choice) -> Conditioning:
        """The turn's constants as a record, each argument as the choice reads it."""
        stages = tuple(self._stage(pattern, choice) for pattern in self.patterns)
        return map_tensors([Conditioning(stages)], self._keep)[0]

    def _stage(self, pattern: Pattern, choice: Choice) -> Stage:
        recipe = Recipe(
            grid=find_grid(self._sigmas[:-1], self._timesteps, self._most),
            velocity_dtype=self._dtype,
            guidance=pattern.combination.guidance,
            sign=pattern.combination.sign,
        )
        calls = tuple(self._call_record(pattern.first, call, choice) for call in pattern.calls)
        if len({call.times for call in calls if call.module is None}) > 1:
            raise ReplayError("cannot replay this pipeline: the time differs between branches")
        sigma = self._sigmas[pattern.first].item()
        return Stage(sigma, len(self.steps[0].x_t), recipe, calls)

    def _call_record(self, first: int, call: CallPattern, choice: Choice) -> CallRecord:
        """A call as a replay makes it."""
        times, rows = [], len(self.steps[0].x_t) * call.place.copies
        for name in call.time_names():
            held = torch.stack(call.times[name]).cpu()
            steps = self._timesteps[first : first + len(held)]
            times.append(find_time(name, held, steps, rows))
        arguments = {}
        for name in call.constants.keys() - {time.name for time in times}:
            read = self._readings(call, name, call.constants[name])
            arguments[name] = read[min(choice.get(name, 0), len(read) - 1)]
        rest = None if call.rest is None else Rows(call.rest)
        return CallRecord(call.module, call.place, tuple(times), arguments, rest)

    def _keep(self, x: Tensor) -> Tensor:
        """The tensor as it is stored: on the storage device, no view of a larger one, no graph."""
        view = x.untyped_storage().nbytes() > x.numel() * x.element_size()
        moved = x if self._storage is None else x.to(self._storage)
        copied = moved.is_inference() or (moved is x and (view or self._storage is not None))
        return moved.clone() if copied else moved.detach()


def _versions(arguments: Sequence[dict[str, Any]]) -> list[Version]:
    """Every tensor with its argument's name and its version."""
    return [
        Version(name, leaf, leaf.clone() if leaf.is_inference() else leaf._version)
        for named in arguments
        for name, value in named.items()
        for leaf in leaves(value)
        if isinstance(leaf, Tensor)
    ]


def _link_outputs(calls: Sequence[Call]) -> list[Call]:
    """The calls of a step that make its velocity, linked where one is given another's outputs.

    Modules whose outputs the transformer is not given, such as an encoder within the loop, are
    left out.
    """
    made: dict[int, tuple[int, int]] = {}
    used: list[int] = []

    def leaf(x: Any) -> Any:
        if id(x) not in made:
            return x
        call, number = made[id(x)]
        if call not in used:
            used.append(call)
        return OutputOf(used.index(call), number)

    found = []
    for index, call in enumerate(calls):
        if call.module is None:
            found.append(call._replace(arguments=map_leaves(leaf, call.arguments)))
            continue
        for number, x in enumerate(leaves(call.output)):
            if isinstance(x, Tensor):
                made[id(x)] = index, number
    return [*(calls[index] for index in used), *found]
