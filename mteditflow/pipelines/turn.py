"""Record of one pipeline call, with the checks that make a replay faithful.

The first step is recognized, which transfers values to the host. All others are compared with it on
the device, and the results are transferred once, at the end of the turn.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mteditflow.pipelines.conditioning import (
    CallRecord,
    Conditioning,
    Recipe,
    Rows,
    Stage,
    leaves,
    map_kinds,
    map_tensors,
    readings,
)
from mteditflow.pipelines.flow_times import find_grid, find_time
from mteditflow.pipelines.guidance import Combination
from mteditflow.pipelines.loop import Step
from mteditflow.pipelines.patterns import (
    PROOF_ROWS,
    CallPattern,
    Pattern,
    Row,
    Version,
    link_outputs,
    versions_of,
)
from mteditflow.pipelines.recognize import Call, ReplayError, repeat_rows

Choice = Mapping[str, int]  # argument name -> index among its readings, where it is not 0
# Types of argument values that hold no state between calls.
_CONSTANT = (
    *(Tensor, np.ndarray, np.generic, torch.dtype, torch.device),
    *(int, float, complex, str, bytes, slice, range, tuple, frozenset, Enum, type(None)),
)


@dataclass(frozen=True)
class Recorded:
    """One finished turn of B trajectories, in S steps.

    Attributes:
        conditioning: constant arguments of the transformer, for a replay.
        latents: [B, S + 1, ...], from noise to clean.
        sigmas: flow times of the grid, [S + 1].
        log_prob: log-prob of each step, [B, S]; 0 where it is deterministic.
        stochastic: whether a step drew noise, boolean [S].
        ends: whether S is 1 because only the first and the last latents are kept.
    """

    conditioning: Conditioning
    latents: Tensor
    sigmas: Tensor
    log_prob: Tensor
    stochastic: Tensor
    ends: bool

    def first_and_last(self) -> Recorded:
        """Return the turn as one step from the first latents to the last.

        Such a turn has no stochastic steps, so that the last log-prob, 0, stands for the turn's.
        """
        return replace(
            self,
            latents=self.latents[:, [0, -1]],
            sigmas=self.sigmas[[0, -1]],
            log_prob=self.log_prob[:, -1:],
            stochastic=self.stochastic[-1:],
            ends=True,
        )


class Turn:
    """Steps of one pipeline call, each checked when it is added.

    Args:
        sigmas: flow times of the call's grid, [S + 1], on the CPU.
        timesteps: the scheduler's timesteps of the steps, [S], on the CPU.
        most: the timestep of sigma = 1.
        guiders: guiders of the pipeline, one of which may combine the branches.
        has_solver: whether a solver takes the steps. Without one, the pipeline may change latents
            between steps, as by a mask.
        ends: whether to keep only the first and the last latents, because another sampler or a
            cache took the steps. Changed latents also set it.
        shared: names of arguments without a row per trajectory, whatever their shape.
        storage: device to keep tensors on; None leaves them where they are.
    """

    def __init__(
        self,
        sigmas: Tensor,
        timesteps: Tensor,
        *,
        most: int,
        guiders: Sequence[Any],
        has_solver: bool,
        ends: bool,
        shared: Collection[str],
        storage: torch.device | None,
    ) -> None:
        self.steps: list[Step] = []
        self.patterns: list[Pattern] = []
        self._sigmas, self._timesteps, self._most = sigmas, timesteps, most
        self._guiders = guiders
        self.ends = ends
        self._has_solver, self._shared, self._storage = has_solver, shared, storage
        self._started = self._clean = sigmas  # placeholders until the first step and the end
        self._dtype = torch.float32
        self._constants: list[Version] = []
        self._states: list[Version] = []
        # Messages with booleans on the device, which ``check`` reads all at once.
        self._doubts: list[tuple[str, Tensor]] = []
        self._changes: list[Tensor] = []

    def __str__(self) -> str:
        return f"{len(self.steps)} of {len(self._timesteps)} steps"

    @property
    def complete(self) -> bool:
        """Whether the grid's last step has been taken."""
        return len(self.steps) == len(self._timesteps)

    def add(self, step: Step, velocity: Tensor, timestep: Tensor, calls: Sequence[Call]) -> None:
        """Check a step, and keep what varies over the steps.

        Raises:
            ReplayError: the step cannot be recognized, or an argument changes. Comparisons on the
                device raise in ``check`` instead.
        """
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
        calls = link_outputs(calls)
        pattern = self.patterns[-1] if self.patterns else None
        if pattern is None or not pattern.fits(calls, step.x_t):
            pattern = Pattern.of(
                number, calls, Combination(self._guiders), step.x_t, timestep, velocity
            )
            self.patterns.append(pattern)
            self._constants += versions_of([call.constants for call in pattern.calls])
        outputs: list[Tensor] = []
        for one, call in zip(pattern.calls, calls, strict=True):
            rows = repeat_rows(step.x_t, one.place.copies)
            self._compare(one, call, rows)
            if one.module is None:
                outputs += one.place.velocity(call.output[0], rows).chunk(one.place.copies)
        self._combine(pattern, outputs, velocity)
        if self.steps:
            returned = self.steps[-1].next_x
            if step.x_t is not returned:  # the usual case is the same tensor, at no cost
                changed = (step.x_t != returned.to(step.x_t.dtype)).any()
                self._changes.append(changed)
        self._states += versions_of([{"latents": step.next_x}])
        for _ in range(1 if pattern.rows else PROOF_ROWS):
            row = -(len(pattern.rows) + 1) % len(velocity)  # cycles over the trajectories
            # Copies, because pipelines may write what a step returns into what it was given.
            own = (step.x_t[row].clone(), step.sigma[row], velocity[row].clone())
            pattern.rows.append(Row(row, *own))

    def _compare(self, one: CallPattern, call: Call, rows: Tensor) -> None:
        """Compare a call with that of the pattern's first step."""
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
        """Check that the branches give the scheduler's velocity; a mismatch is noted as a doubt."""
        if any(output.shape != velocity.shape for output in outputs):
            raise ReplayError(
                f"the scheduler was given a velocity {list(velocity.shape)}, the transformer "
                f"returned {[list(output.shape) for output in outputs]} for the sample"
            )
        guided = ""
        if self._guiders:
            guided = " (by a guider that depends on the step, or on those before)"
        elif pattern.rows and len(outputs) == 2:
            guided = ", has another guidance scale than at the steps before"
        changed = (
            f"step {len(self.steps)}: the velocity was changed between transformer and scheduler"
            f"{guided}, or is NaN"
        )
        self._doubts.append((changed, pattern.combination.mismatch(outputs, velocity)))

    def _same(self, otherwise: str, value: Any, first: Any) -> None:
        """Compare two values; ``otherwise`` is the message for a difference.

        Tensors of one shape and dtype are compared on the device, and a difference is noted as a
        doubt for ``check``. Any other difference raises ``ReplayError``.
        """
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
                otherwise += (
                    f" from {first.dtype} to {value.dtype}, as by autocast over float32; cast the "
                    "pipeline instead"
                )
        raise ReplayError(otherwise)

    def check(self) -> None:
        """Transfer the results of all comparisons at once, and raise for a difference.

        Raises:
            ReplayError: an argument or the velocity changed, a tensor was changed in place, equal
                branches hide the guidance scale, or latents changed under a solver.
        """
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
        """Set the latents that the pipeline holds after its last step, at the end of its loop.

        Raises:
            ReplayError: a solver took the steps, and these are not what the last step returned.
        """
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
        """Return the whole turn, with its arguments read as in ``choice``."""
        states = [self._started, *(step.next_x for step in self.steps[:-1]), self._clean]
        stochastic = [step.stochastic for step in self.steps]
        whole = Recorded(
            conditioning=self.conditioning(choice),
            latents=self._keep(torch.stack(states, dim=1)),
            sigmas=self._sigmas.clone(),
            log_prob=self._keep(torch.stack([step.log_prob for step in self.steps], dim=1)),
            stochastic=torch.tensor(stochastic, dtype=torch.bool, device="cpu"),
            ends=False,
        )
        return whole.first_and_last() if self.ends else whole

    def choices(self) -> Iterator[Choice]:
        """Yield other readings of the arguments than the likeliest: of one of them, then of two.

        Few arguments have several readings, so that these are few.
        """
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
        """Return the kinds of the readings of all arguments; turns of equal kinds share a proof."""
        return tuple(
            tuple((name, map_kinds(self._readings(call, name, value))) for name, value in held)
            for pattern in self.patterns
            for call in pattern.calls
            for held in [call.constants.items()]
        )

    def conditioning(self, choice: Choice) -> Conditioning:
        """Return the turn's constants as a record, each argument read as in ``choice``."""
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
        """Return the record of a call, from which a replay makes it."""
        times, rows = [], len(self.steps[0].x_t) * call.place.copies
        for name in call.time_names():
            held = torch.stack(call.times[name]).cpu()
            steps = self._timesteps[first : first + len(held)]
            times.append(find_time(name, held, steps, rows))
        arguments = {}
        for name in call.constants.keys() - {time.name for time in times}:
            read = self._readings(call, name, call.constants[name])
            # The choice may be that of an earlier turn, whose argument had more readings.
            arguments[name] = read[min(choice.get(name, 0), len(read) - 1)]
        rest = None if call.rest is None else Rows(call.rest)
        return CallRecord(call.module, call.place, tuple(times), arguments, rest)

    def _keep(self, x: Tensor) -> Tensor:
        """Return a tensor as it is stored: a copy that the pipeline cannot change, no graph."""
        moved = x if self._storage is None else x.to(self._storage)
        # Inference tensors cannot enter autograd; a clone outside inference mode can.
        return moved.clone() if moved is x or moved.is_inference() else moved.detach()
