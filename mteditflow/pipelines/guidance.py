"""How the branches of one step become one velocity, recovered from the tensors of a step.

Classifier-free guidance is ``negative + scale * (positive - negative)``. Some pipelines then change
the length of that velocity, never its direction: a ``Rescaling``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mteditflow.pipelines.recognize import ReplayError


class Rescaling(Protocol):
    """Changes the length of a combined velocity [B, ...], in groups of its elements."""

    def __call__(self, combined: Tensor, positive: Tensor) -> Tensor:
        """Rescale; ``positive`` is the velocity of the positive branch."""


@dataclass(frozen=True)
class TokenNorm:
    """Every token as long as the positive branch's: Qwen-Image, Lumina 2."""

    def __call__(self, combined: Tensor, positive: Tensor) -> Tensor:
        """See ``Rescaling``."""
        return combined * (_token_norms(positive) / _token_norms(combined))


@dataclass(frozen=True)
class TokenLimit:
    """No token longer than the positive branch's, none shrunk below ``least`` of it: LongCat."""

    least: float

    def __call__(self, combined: Tensor, positive: Tensor) -> Tensor:
        """See ``Rescaling``."""
        ratio = _token_norms(positive) / (_token_norms(combined) + 1e-8)
        return combined * ratio.clamp(min=self.least, max=1.0)


@dataclass(frozen=True)
class NormLimit:
    """No sample longer than ``limit`` times the positive branch's: Z-Image's normalization."""

    limit: float

    def __call__(self, combined: Tensor, positive: Tensor) -> Tensor:
        """See ``Rescaling``."""
        longest, norm = self.limit * _norms(positive), _norms(combined)
        return torch.where(norm > longest, combined * (longest / norm), combined)


@dataclass(frozen=True)
class StdMix:
    """A share ``mix`` of it with the positive branch's standard deviation: LTX-Video.

    Source: arXiv 2305.08891, section 3.4.
    """

    mix: float

    def __call__(self, combined: Tensor, positive: Tensor) -> Tensor:
        """See ``Rescaling``."""
        axes = list(range(1, combined.ndim))
        wanted, std = (x.std(dim=axes, keepdim=True) for x in (positive, combined))
        return self.mix * (combined * (wanted / std)) + (1 - self.mix) * combined


def rescalings(combined: Tensor, positive: Tensor, velocity: Tensor) -> Iterator[Rescaling]:
    """Rescalings that might make the velocity, with settings of few decimals, as people give."""
    yield TokenNorm()
    shrunk = (_token_norms(velocity) / _token_norms(combined)).min().item()
    yield from map(TokenLimit, [0.0, *rounded(shrunk, 4)])
    yield from map(NormLimit, rounded(norm_ratio(velocity, positive).item(), 4))
    mixed = StdMix(1.0)(combined, positive) - combined
    yield from map(StdMix, rounded(share(velocity - combined, mixed), 4))


def share(x: Tensor, of: Tensor) -> float:
    """The factor of ``of`` that comes nearest to ``x``."""
    return ((x * of).sum() / of.square().sum()).item()


def rounded(x: float, digits: int) -> list[float]:
    """A number to none, one, two ... decimals."""
    return [round(x, decimals) for decimals in range(digits + 1)]


def norm_ratio(x: Tensor, to: Tensor) -> Tensor:
    """The largest ratio between the norms of two rows, a 0-d tensor."""
    return (_norms(x) / _norms(to)).max()


def _norms(x: Tensor) -> Tensor:
    """Norm of each row [B, ...], with as many axes; row by row, for the bits of Z-Image."""
    norms = torch.stack([torch.linalg.vector_norm(row) for row in x])
    return norms.reshape(-1, *[1] * (x.ndim - 1))


def _token_norms(x: Tensor) -> Tensor:
    """Norm along the last axis, which stays."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norms


class Guidance(NamedTuple):
    """How the branches of one step combine: ``negative + scale * (positive - negative)``.

    Attributes:
        positive: index of the positive branch among the step's.
        scale: the guidance scale, as it is given to the pipeline.
        from_positive: whether it starts at the positive branch, as Z-Image's does.
        rescaling: what then changes the length; None if nothing does.
    """

    positive: int
    scale: float
    from_positive: bool = False
    rescaling: Rescaling | None = None

    def __call__(self, velocities: Sequence[Tensor]) -> Tensor:
        """Combine the two branches, in the pipelines' own order of operations."""
        positive, negative = velocities[self.positive], velocities[1 - self.positive]
        start = positive if self.from_positive else negative
        combined = start + self.scale * (positive - negative)
        return combined if self.rescaling is None else self.rescaling(combined, positive)


@dataclass(frozen=True)
class ByGuider:
    """Guidance by a copy of a pipeline's own guider, called again: modular pipelines.

    Attributes:
        positive: index of the positive branch among the step's.
        settings: the guider's class and attributes; equal ones are the same guidance.
        guider: the copy, as it was at the step.
    """

    positive: int
    settings: Hashable
    guider: Any = field(compare=False)

    def __call__(self, velocities: Sequence[Tensor]) -> Tensor:
        """Combine the two branches."""
        pair = velocities[self.positive], velocities[1 - self.positive]
        combined: Tensor = self.guider.forward(*pair).pred
        return combined


def find_guider(
    guiders: Sequence[Any], velocities: Sequence[Tensor], velocity: Tensor
) -> ByGuider | None:
    """The guider that makes exactly the velocity, and again when called again; None without one.

    None, too, where equal branches hide which of them is the positive one.
    """
    if torch.equal(*velocities):
        return None
    for guider, positive in product(guiders, (0, 1)):
        found = ByGuider(positive, _settings(guider), copy.deepcopy(guider))
        try:
            makes = all(torch.equal(found(velocities), velocity) for _ in range(2))
        except TypeError:  # it misses a third branch, as that of skipped layers
            continue
        if makes:
            return found
    return None


def _settings(guider: Any) -> Hashable:
    """Class and attributes of a guider, by which rows of several calls may share one batch.

    Its configuration stays what it was made with where somebody sets an attribute later.
    """
    changing = ("_timestep", "_count_prepared", "_internal_dict")
    own = {name: value for name, value in vars(guider).items() if name not in changing}
    try:
        return type(guider), json.dumps(own, sort_keys=True)
    except TypeError:  # objects, which nobody can compare
        return type(guider), object()


class Combination:
    """How outputs make velocities over the steps of a turn: found on the way, proved at each.

    Args:
        guiders: of the pipeline; one that makes the velocities is called again in a replay.

    Attributes:
        sign: -1 where the scheduler is given the opposite of what the branches make, else 1.
        guidance: how two branches combine; None for one, and while equal branches hide it.
    """

    def __init__(self, guiders: Sequence[Any] = ()) -> None:
        self.sign = 0
        self.guidance: Guidance | ByGuider | None = None
        self._guiders = guiders
        self._longest: Tensor | None = None

    def mismatch(self, outputs: Sequence[Tensor], velocity: Tensor) -> Tensor:
        """Whether a step's outputs do not make its velocity, as a boolean on its device."""
        outputs = [output.to(velocity.dtype) for output in outputs]
        self.sign = self.sign or find_sign(outputs, velocity)
        velocity = velocity if self.sign > 0 else -velocity
        if len(outputs) == 2 and self.guidance is None:
            by_guider = find_guider(self._guiders, outputs, velocity)
            self.guidance = by_guider or find_guidance(outputs, velocity)
        if self.guidance is None:  # equal branches: either is the velocity, at any scale
            return mismatch(outputs[:1], None, velocity)
        if isinstance(self.guidance, ByGuider):
            return (self.guidance(outputs) != velocity).any()
        if self.guidance.from_positive and self.guidance.rescaling is None:
            return self._unlimited(outputs, velocity, self.guidance)
        return mismatch(outputs, self.guidance, velocity)

    def _unlimited(self, outputs: Sequence[Tensor], velocity: Tensor, guidance: Guidance) -> Tensor:
        """The same, where the first steps of Z-Image may have stayed below its limit on norms."""
        changed = mismatch(outputs, guidance, velocity)
        if bool(changed):
            found = find_guidance(outputs, velocity) or guidance
            limit, plain = found.rescaling, found._replace(rescaling=None)
            if plain == guidance and isinstance(limit, NormLimit) and self._longest is not None:
                self.guidance = found
                return self._longest > limit.limit
        ratio = norm_ratio(guidance(outputs), outputs[guidance.positive])
        self._longest = ratio if self._longest is None else torch.maximum(self._longest, ratio)
        return changed


def mismatch(velocities: Sequence[Tensor], guidance: Guidance | None, velocity: Tensor) -> Tensor:
    """Whether the branches do not make the scheduler's velocity, as a boolean on its device.

    They must make it exactly; only two branches in full precision may differ by the roundings that
    another order of the same operations causes.
    """
    if guidance is None:
        return (velocities[0] != velocity).any()
    made, epsilon = guidance(velocities), torch.finfo(velocity.dtype).eps
    if epsilon > torch.finfo(torch.float32).eps:
        return (made != velocity).any()
    size = velocities[0].abs() + velocities[1].abs()
    if guidance.rescaling is not None:
        plain = guidance._replace(rescaling=None)(velocities)
        size = 2 * size * made.abs().sum(-1, keepdim=True) / plain.abs().sum(-1, keepdim=True)
    return ~((made - velocity).abs() <= 2 * epsilon * (1 + abs(guidance.scale)) * size).all()


def find_guidance(velocities: Sequence[Tensor], velocity: Tensor) -> Guidance | None:
    """Recover scale and rescaling from the tensors; None where equal branches hide them.

    The first suggestion of ``_candidates`` that makes exactly the velocity, else the nearest if it
    makes the velocity up to rounding.
    """
    if torch.equal(*velocities):
        return None
    nearest, least = None, float("inf")
    for guidance in _candidates(velocities, velocity):
        error = (guidance(velocities) - velocity).abs().max().item()
        if error == 0:
            return guidance
        if error < least:
            nearest, least = guidance, error
    if nearest is None or mismatch(velocities, nearest, velocity):
        raise ReplayError(
            "the scheduler's velocity is not negative + scale * (positive - negative) of the "
            "transformer's two outputs, nor that with a norm rescaled as by Qwen-Image, Z-Image, "
            "LongCat or LTX-Video: a rescaled or otherwise modified guidance, such as one of some "
            "channels or with a momentum over the steps, cannot be replayed"
        )
    return nearest


def find_sign(velocities: Sequence[Tensor], velocity: Tensor) -> int:
    """-1 where the pipeline turns its velocity round, as Z-Image does, else 1.

    Whatever the guidance, each token of the velocity is a multiple of mean + s * difference of the
    branches, so its part at right angles to the difference points where the mean's does.
    """
    one, other = velocities[0].double(), velocities[-1].double()
    level = _across(one + other, one - other)
    return -1 if bool((level * velocity.double()).sum() < 0) else 1


def _candidates(velocities: Sequence[Tensor], velocity: Tensor) -> Iterator[Guidance]:
    """Guidances that might make the velocity, the simplest first.

    The scale is that of the velocity itself, or under a rescaling, which keeps the direction of
    every token, that which leaves nothing at right angles to the velocity. Where either branch
    could be the positive one, it is the one with the larger scale.
    """
    for rescaled in (False, True):
        scales = [_scale(velocities, positive, velocity, rescaled) for positive in (0, 1)]
        order = sorted((0, 1), key=scales.__getitem__, reverse=True)
        for positive, from_positive in product(order, (False, True)):
            scale = scales[positive] - from_positive
            for candidate in (*rounded(scale, 6), scale):
                plain = Guidance(positive, candidate, from_positive)
                if not rescaled:
                    yield plain
                    continue
                for rescaling in rescalings(plain(velocities), velocities[positive], velocity):
                    yield plain._replace(rescaling=rescaling)


def _scale(velocities: Sequence[Tensor], positive: int, velocity: Tensor, rescaled: bool) -> float:
    """The scale by least squares in float64."""
    wanted, negative = velocity.double(), velocities[1 - positive].double()
    difference = velocities[positive].double() - negative
    if rescaled:
        return share(-_across(negative, wanted), _across(difference, wanted))
    return share(wanted - negative, difference)


def _across(x: Tensor, direction: Tensor) -> Tensor:
    """Component of each token of ``x`` at right angles to ``direction``."""
    power = direction.square().sum(-1, keepdim=True)
    along = (x * direction).sum(-1, keepdim=True) / power.clamp_min(torch.finfo(x.dtype).tiny)
    return x - along * direction
