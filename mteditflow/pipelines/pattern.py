"""What the first step of a turn shows, and what is left of a turn when it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from mteditflow.pipelines.conditioning import Conditioning
from mteditflow.pipelines.layouts import repeat_rows
from mteditflow.pipelines.recognise import Call, Place, ReplayError, find_sample, find_time


@dataclass(frozen=True)
class Pattern:
    """What the first step of a turn shows of all its steps.

    Attributes:
        place: where they hold the noisy sample.
        time_name: the argument that tells the flow time.
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
