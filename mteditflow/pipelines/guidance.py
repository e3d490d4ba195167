"""Recover from the tensors of one step how its guidance branches become one velocity.

Classifier-free guidance is ``negative + scale * (positive - negative)`` (arXiv 2207.12598). Some
pipelines then change the norm of that velocity, but not its direction: a ``Rescaling``.
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
    """Rescaling of a combined velocity [B, ...]: one factor >= 0 per token or per sample."""

    def __call__(self, combined: Tensor, positive: Tensor) -> Tensor:
        """Return the rescaled velocity; ``positive`` is that of the positive branch, [B, ...]."""


@dataclass(frozen=True)
class TokenNorm:
    """Give every token the norm that it has in the positive branch: Qwen-Image, Lumina 2."""

    def __call__(self, combined: Tensor, positive: Tensor) -> Tensor:
        """See ``Rescaling``."""
        return combined * (_token_norms(positive) / _token_norms(combined))


@dataclass(frozen=True)
class TokenLimit:
    """Limit the norm of each token to its norm in the positive branch: LongCat.

    No token is multiplied by less than ``least``.
    """

    least: float

    def __call__(self, combined: Tensor, positive: Tensor) -> Tensor:
        """See ``Rescaling``."""
        ratio = _token_norms(positive) / (_token_norms(combined) + 1e-8)
        return combined * ratio.clamp(min=self.least, max=1.0)


@dataclass(frozen=True)
class NormLimit:
    """Limit the norm of each sample to ``limit`` times the positive branch's: Z-Image."""

    limit: float

    def __call__(self, combined: Tensor, positive: Tensor) -> Tensor:
        """See ``Rescaling``."""
        longest, norm = self.limit * _norms(positive), _norms(combined)
        return torch.where(norm > longest, combined * (longest / norm), combined)


@dataclass(frozen=True)
class StdMix:
    """Mix the velocity with itself at the positive branch's standard deviation: LTX-Video.

    ``mix``, in [0, 1], is the weight of the rescaled one.

    Source: arXiv 2305.08891, section 3.4.
    """

    mix: float

    def __call__(self, combined: Tensor, positive: Tensor) -> Tensor:
        """See ``Rescaling``."""
        axes = list(range(1, combined.ndim))
        wanted, std = (x.std(dim=axes, keepdim=True) for x in (positive, combined))
        return self.mix * (combined * (wanted / std)) + (1 - self.mix) * combined


def rescalings(combined: Tensor, positive: Tensor, velocity: Tensor) -> Iterator[Rescaling]:
    """Yield rescalings that may give the velocity, with settings rounded to a few decimals.

    Users write such settings with few decimals, and the rounded one reproduces the bits.
    """
    yield TokenNorm()
    shrunk = (_token_norms(velocity) / _token_norms(combined)).min().item()
    yield from map(TokenLimit, [0.0, *rounded(shrunk, 4)])
    yield from map(NormLimit, rounded(norm_ratio(velocity, positive).item(), 4))
    mixed = StdMix(1.0)(combined, positive) - combined
    yield from map(StdMix, rounded(share(velocity - combined, mixed), 4))


def share(x: Tensor, of: Tensor) -> float:
    """Return the factor c that minimizes ``|x - c * of|``."""
    return ((x * of).sum() / of.square().sum()).item()


def rounded(x: float, digits: int) -> list[float]:
    """Return a number rounded to 0, 1, ..., ``digits`` decimals."""
    return [round(x, decimals) for decimals in range(digits + 1)]


def norm_ratio(x: Tensor, to: Tensor) -> Tensor:
    """Return the largest ratio of the norms of corresponding rows, a 0-d tensor."""
    return (_norms(x) / _norms(to)).max()


def _norms(x: Tensor) -> Tensor:
    """Return the norm of each row of ``x``, [B, 1, ...]."""
    # Row by row, as Z-Image does: a batched norm sums in another order and has other bits.
    norms = torch.stack([torch.linalg.vector_norm(row) for row in x])
    return norms.reshape(-1, *[1] * (x.ndim - 1))


def _token_norms(x: Tensor) -> Tensor:
    """Return the norm along the last axis, which is kept with size 1."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norms


class Guidance(NamedTuple):
    """Classifier-free guidance: ``negative + scale * (positive - negative)``.

    Attributes:
        positive: index of the positive branch among the step's two.
        scale: the guidance scale, in the pipeline's own convention.
        from_positive: whether the sum starts at the positive branch, as Z-Image's does.
        rescaling: rescaling that follows; None: there is none.
    """

    positive: int
    scale: float
    from_positive: bool = False
    rescaling: Rescaling | None = None

    def __call__(self, velocities: Sequence[Tensor]) -> Tensor:
        """Combine two branches [B, ...], in the order of operations of the pipelines."""
        positive, negative = velocities[self.positive], velocities[1 - self.positive]
        start = positive if self.from_positive else negative
        combined = start + self.scale * (positive - negative)
        return combined if self.rescaling is None else self.rescaling(combined, positive)


@dataclass(frozen=True)
class ByGuider:
    """Guidance by a copy of the guider of a modular pipeline.

    Attributes:
        positive: index of the positive branch among the step's two.
        settings: the guider's class and attributes; equal settings mean equal guidance.
        guider: copy of the guider, in its state at the step.
    """

    positive: int
    settings: Hashable
    guider: Any = field(compare=False)

    def __call__(self, velocities: Sequence[Tensor]) -> Tensor:
        """Combine two branches [B, ...]."""
        pair = velocities[self.positive], velocities[1 - self.positive]
        combined: Tensor = self.guider.forward(*pair).pred
        return combined


def find_guider(
    guiders: Sequence[Any], velocities: Sequence[Tensor], velocity: Tensor
) -> ByGuider | None:
    """Return the guider that reproduces the velocity exactly; None if none does.

    None, too, where both branches are equal, so that either could be the positive one.
    """
    if torch.equal(*velocities):
        return None
    for guider, positive in product(guiders, (0, 1)):
        found = ByGuider(positive, _settings(guider), copy.deepcopy(guider))
        try:
            # Twice: a guider with a state, such as a momentum, gives another result at the second.
            makes = all(torch.equal(found(velocities), velocity) for _ in range(2))
        except TypeError:  # it needs a third branch, such as one with skipped layers
            continue
        if makes:
            return found
    return None


def _settings(guider: Any) -> Hashable:
    """Return the class and attributes of a guider; rows of equal settings may share one batch.

    Attributes, not its configuration: an attribute that is set later does not change that.
    """
    # Without the state of the step, and without the configuration.
    changing = ("_timestep", "_count_prepared", "_internal_dict")
    own = {name: value for name, value in vars(guider).items() if name not in changing}
    try:
        return type(guider), json.dumps(own, sort_keys=True)
    except TypeError:  # attributes that cannot be compared: equal to no other guider
        return type(guider), object()


class Combination:
    """Formula from outputs to velocities over the steps of a turn, checked at every step.

    It is recovered at the first step whose two branches differ.

    Args:
        guiders: guiders of the pipeline; a replay calls the one that gives the velocities.

    Attributes:
        sign: -1 where the pipeline negates the velocity before the scheduler's step, else 1; 0
            before the first step.
        guidance: guidance of two branches; None for one branch, and as long as the two are equal.
    """

    def __init__(self, guiders: Sequence[Any] = ()) -> None:
        self.sign = 0
        self.guidance: Guidance | ByGuider | None = None
        self._guiders = guiders
        self._longest: Tensor | None = None

    def mismatch(self, outputs: Sequence[Tensor], velocity: Tensor) -> Tensor:
        """Return whether a step's outputs do not give its velocity, a boolean 0-d tensor.

        Raises:
            ReplayError: two branches differ, and no guidance is found that gives the velocity.
        """
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
        """Return the mismatch where a ``NormLimit`` of Z-Image may not have acted so far.

        At a first mismatch a limit is accepted if all earlier steps were below it.
        """
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
    """Return whether the branches do not give the scheduler's velocity, a boolean 0-d tensor.

    Equality is exact, except for two branches in float32 or float64: these may differ by the
    rounding that another order of the same operations causes.
    """
    if guidance is None:
        return (velocities[0] != velocity).any()
    made, epsilon = guidance(velocities), torch.finfo(velocity.dtype).eps
    if epsilon > torch.finfo(torch.float32).eps:
        return (made != velocity).any()  # in half precision a tolerance would hide real changes
    # |negative + scale * (positive - negative)| <= (1 + |scale|) * (|positive| + |negative|).
    size = velocities[0].abs() + velocities[1].abs()
    if guidance.rescaling is not None:
        plain = guidance._replace(rescaling=None)(velocities)
        size = 2 * size * made.abs().sum(-1, keepdim=True) / plain.abs().sum(-1, keepdim=True)
    # ``~(... <= ...)``: NaN is a mismatch.
    return ~((made - velocity).abs() <= 2 * epsilon * (1 + abs(guidance.scale)) * size).all()


def find_guidance(velocities: Sequence[Tensor], velocity: Tensor) -> Guidance | None:
    """Recover scale and rescaling from two branches and their velocity; None: they are equal.

    The first of ``_candidates`` that gives exactly the velocity is returned, else the nearest one
    if it agrees up to rounding.

    Raises:
        ReplayError: no candidate gives the velocity.
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
    """Return -1 where the pipeline negates its velocity, as Z-Image does, else 1.

    Under any guidance, each token of the velocity is a factor >= 0 times mean + s * difference
    of the branches. Its component orthogonal to the difference therefore has the direction of the
    mean's, or the opposite one where the velocity is negated.
    """
    one, other = velocities[0].double(), velocities[-1].double()
    level = _across(one + other, one - other)
    return -1 if bool((level * velocity.double()).sum() < 0) else 1


def _candidates(velocities: Sequence[Tensor], velocity: Tensor) -> Iterator[Guidance]:
    """Yield guidances that may give the velocity, the simplest first.

    Without a rescaling the scale is a least-squares fit to the velocity. A rescaling keeps the
    direction of every token, so there the fit is to a zero component orthogonal to the velocity.
    Where either branch could be the positive one, the branch with the larger scale comes first.
    """
    for rescaled in (False, True):
        scales = [_scale(velocities, positive, velocity, rescaled) for positive in (0, 1)]
        order = sorted((0, 1), key=scales.__getitem__, reverse=True)
        for positive, from_positive in product(order, (False, True)):
            # positive + s * (positive - negative) = negative + (s + 1) * (positive - negative)
            scale = scales[positive] - from_positive
            for candidate in (*rounded(scale, 6), scale):
                plain = Guidance(positive, candidate, from_positive)
                if not rescaled:
                    yield plain
                    continue
                for rescaling in rescalings(plain(velocities), velocities[positive], velocity):
                    yield plain._replace(rescaling=rescaling)


def _scale(velocities: Sequence[Tensor], positive: int, velocity: Tensor, rescaled: bool) -> float:
    """Return the guidance scale by least squares in float64."""
    wanted, negative = velocity.double(), velocities[1 - positive].double()
    difference = velocities[positive].double() - negative
    if rescaled:  # negative + s * difference is parallel to the velocity: no component across it
        return share(-_across(negative, wanted), _across(difference, wanted))
    return share(wanted - negative, difference)


def _across(x: Tensor, direction: Tensor) -> Tensor:
    """Return the component of each token of ``x`` orthogonal to ``direction``."""
    power = direction.square().sum(-1, keepdim=True)
    along = (x * direction).sum(-1, keepdim=True) / power.clamp_min(torch.finfo(x.dtype).tiny)
    return x - along * direction
