"""Patterns of calls over consecutive denoising steps, recognized at the first step of each.

Where guidance is active in only some steps, each run of steps with the same calls has a pattern of
its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mteditflow.pipelines.conditioning import OutputOf, leaves, map_leaves
from mteditflow.pipelines.flow_times import find_times, named_time
from mteditflow.pipelines.guidance import Combination
from mteditflow.pipelines.recognize import Call, Place, ReplayError, find_sample, repeat_rows

PROOF_ROWS = 3  # most rows of a pattern that are replayed as a proof


@dataclass
class CallPattern:
    """Call that every step of a pattern makes, with its arguments at the first step.

    Attributes:
        module: the module that is called; None: the transformer.
        place: position of the noisy sample among its arguments.
        constants: all other arguments by name.
        rest: the rest of the argument that holds the sample; None if there is none.
        times: by name, the values per step of the arguments that may hold the flow time.
    """

    module: nn.Module | None
    place: Place
    constants: dict[str, Any]
    rest: Tensor | None
    times: dict[str, list[Tensor]]

    @classmethod
    def of(
        cls,
        call: Call,
        sample: Tensor,
        timestep: Tensor,
        velocity: Tensor,
        *,
        outputs: Sequence[Any],
    ) -> CallPattern:
        """Recognize a call of a pattern's first step.

        Args:
            call: the call.
            sample: noisy sample of the step, [B, ...].
            timestep: the scheduler's timestep, 0-d.
            velocity: the velocity that the scheduler receives, [B, ...].
            outputs: what the transformer returned in all calls of the step.

        Raises:
            ReplayError: not exactly one argument holds the sample, or none holds the timestep.
        """
        place = find_sample(call.arguments, sample)
        rows = repeat_rows(sample, place.copies)
        parts = place.split(call.arguments[place.name], rows)
        assert parts is not None
        if call.module is None:
            place = place.with_output(call.output[0], rows, velocity, outputs)
        constants = {k: v for k, v in call.arguments.items() if k != place.name}
        times = find_times(call.arguments, timestep)
        return cls(call.module, place, constants, parts[1], {name: [] for name in times})

    def fits(self, call: Call, sample: Tensor) -> bool:
        """Return whether a later call has the same arguments, in the same forms."""
        rows, given = repeat_rows(sample, self.place.copies), call.arguments
        return (
            call.module is self.module
            and given.keys() == {*self.constants, self.place.name}
            and self.place.split(given[self.place.name], rows) is not None
            and all(getattr(given[n], "shape", 0) == self.constants[n].shape for n in self.times)
        )

    def time_names(self) -> list[str]:
        """Return the names of the arguments that hold the flow time: those that change by step.

        For a single step: those that are named like a time, or the only candidate.

        Raises:
            ReplayError: no argument changes, or a single step has several candidates.
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
    """One row of a step: index of the trajectory, x_t, sigma (0-d) and velocity."""

    trajectory: int
    x_t: Tensor
    sigma: Tensor
    velocity: Tensor


@dataclass
class Pattern:
    """Calls of consecutive steps, recognized at the first of them.

    Attributes:
        first: index of that step.
        calls: calls of the transformer and of modules that give it arguments, in order.
        combination: formula from the transformer's outputs to the scheduler's velocity.
        rows: rows to replay as a proof: ``PROOF_ROWS`` of the first step, one of each later step.
    """

    first: int
    calls: list[CallPattern]
    combination: Combination
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def of(
        cls, first: int, calls: Sequence[Call], combination: Combination, *step: Tensor
    ) -> Pattern:
        """Recognize the calls of a first step; ``step`` is its sample, timestep and velocity.

        Raises:
            ReplayError: the transformer is not called once or twice, or its two calls hold the
                sample in different ways.
        """
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
        outputs = [call.output[0] for call in own]
        found = [CallPattern.of(call, *step, outputs=outputs) for call in calls]
        pattern = cls(first, found, combination)
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
        """Return the calls of the transformer: one, or two under classifier-free guidance."""
        return [call for call in self.calls if call.module is None]

    def fits(self, calls: Sequence[Call], sample: Tensor) -> bool:
        """Return whether a step's calls have the arguments of this pattern, in the same forms."""
        return len(calls) == len(self.calls) and all(
            one.fits(call, sample) for one, call in zip(self.calls, calls, strict=True)
        )


def link_outputs(calls: Sequence[Call]) -> list[Call]:
    """Return the calls of a step that produce its velocity.

    Where the transformer takes a tensor that another call returned, an ``OutputOf`` replaces it.
    Calls of other modules, such as an encoder within the loop, are left out.
    """
    # By id, which is unique, since ``calls`` keep all of these tensors alive.
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


class Version(NamedTuple):
    """Tensor of an argument, with its version, by which a change in place is detected.

    Attributes:
        name: name of the argument.
        tensor: the tensor itself.
        version: autograd's count of in-place changes; for inference tensors, which have no such
            count, a copy.
    """

    name: str
    tensor: Tensor
    version: int | Tensor

    @property
    def changed(self) -> bool:
        """Return whether the tensor was changed in place since."""
        if isinstance(self.version, Tensor):
            return not torch.equal(self.version, self.tensor)
        return self.tensor._version != self.version

    @staticmethod
    def check(versions: Sequence[Version]) -> None:
        """Raise ``ReplayError`` if one of the tensors was changed in place since."""
        for each in versions:
            if each.changed:
                name = each.name
                raise ReplayError(
                    f"{name}: changed in place while the pipeline was called; give it a copy"
                )


def versions_of(arguments: Sequence[dict[str, Any]]) -> list[Version]:
    """Return a ``Version`` for every tensor in these arguments."""
    return [
        Version(name, leaf, leaf.clone() if leaf.is_inference() else leaf._version)
        for named in arguments
        for name, value in named.items()
        for leaf in leaves(value)
        if isinstance(leaf, Tensor)
    ]
