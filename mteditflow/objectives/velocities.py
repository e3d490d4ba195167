"""Velocities of policies at the states of an objective: checked, and computed once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from mteditflow._checks import check_floating, check_kind
from mteditflow._reduce import valid_rows
from mteditflow.objectives.base import Policy, Velocity
from mteditflow.objectives.samples import Buckets
from mteditflow.objectives.units import Rows, Units, at_rows, member_mask, member_rows


class BucketVelocity:
    """Velocity for ``Buckets``, assembled from one velocity per part.

    Args:
        samples: the buckets.
        velocities: one for each of ``samples.parts``, such as ``RolloutVelocity(policies, part)``;
            each counts trajectories within its part.

    Raises:
        ValueError: the number of velocities differs from the number of parts.
        TypeError: ``samples`` are not ``Buckets``, or a velocity is not callable.

    Example:
        >>> from mteditflow.objectives import CleanSamples
        >>> group = torch.tensor([0, 0])
        >>> clean = torch.zeros(2, 1, 1)
        >>> samples = Buckets([CleanSamples(clean, group), CleanSamples(clean, group + 1)])
        >>> velocity = BucketVelocity(
        ...     samples,
        ...     [
        ...         lambda policy, x_t, sigma, at: x_t + at[:, :1],
        ...         lambda policy, x_t, sigma, at: x_t - at[:, :1],
        ...     ],
        ... )
        >>> at = torch.tensor([[3, 0], [1, 0]])  # the second trajectory of either part
        >>> velocity("current", torch.zeros(2, 1), torch.zeros(2), at)
        tensor([[-1.],
                [ 1.]])
    """

    def __init__(self, samples: Buckets, velocities: Sequence[Velocity]) -> None:
        check_kind("samples", samples, Buckets, "Buckets")
        check_kind("velocities", velocities, Sequence, "a sequence of callables")
        if len(velocities) != len(samples.parts):
            raise ValueError(
                f"velocities: expected one for each of the {len(samples.parts)} parts, got "
                f"{len(velocities)}"
            )
        for position, velocity in enumerate(velocities):
            if not callable(velocity):
                kind = type(velocity).__name__
                raise TypeError(f"velocities[{position}]: expected a callable, got {kind}")
        self._samples, self._velocities = samples, tuple(velocities)

    def __call__(self, policy: Policy, x_t: Tensor, sigma: Tensor, at: Tensor) -> Tensor:
        """See ``Velocity``; rows of several parts in one call must share one latent shape."""

        def read(part: int, here: Tensor, own: Tensor) -> tuple[Tensor]:
            states, times = x_t, sigma
            if len(here) < len(at):  # all rows are in one part in a micro-batch: copy nothing
                states, times = x_t[here.to(x_t.device)], sigma[here.to(sigma.device)]
            return (checked_velocity(self._velocities[part](policy, states, times, own), states),)

        (velocity,) = self._samples.gather(at, read)
        return velocity


class Velocities:
    """Velocities of the policies at the same M states, each computed when it is first read."""

    def __init__(
        self, velocity: Velocity, x_t: Tensor, sigma: Tensor, units: Units, *, old_is_current: bool
    ) -> None:
        self._velocity, self._units, self._old_is_current = velocity, units, old_is_current
        self._states = x_t, sigma, member_rows(units)[:, :2]

    @cached_property
    def current(self) -> Tensor:
        """Velocity of the current policy, [M, ...], with gradient."""
        return self._of("current")

    @cached_property
    def old(self) -> Tensor:
        """Velocity of the old policy, detached; the current one if both have the same weights."""
        return self.current.detach() if self._old_is_current else self._constant("old")

    @cached_property
    def reference(self) -> Tensor:
        """Velocity of the reference policy, detached."""
        return self._constant("reference")

    @cached_property
    def teacher(self) -> Tensor:
        """Velocity of the teacher, detached."""
        return self._constant("teacher")

    def reference_at(self, rows: Rows) -> Tensor:
        """Velocity of some of the M rows (int64 [R] on the CPU, or a slice of all), detached."""
        if isinstance(rows, slice):
            return self.reference
        with torch.no_grad():
            velocity = self._at("reference", *(at_rows(x, rows) for x in self._states))
        valid = at_rows(member_mask(self._units, velocity), rows)
        return valid_rows(valid, velocity).detach()

    @torch.no_grad()
    def _constant(self, policy: Policy) -> Tensor:
        return self._of(policy).detach()

    def _of(self, policy: Policy) -> Tensor:
        """Return velocities, 0 for absent members, because a NaN there would reach the gradient."""
        velocity = self._at(policy, *self._states)
        return valid_rows(member_mask(self._units, velocity), velocity)

    def _at(self, policy: Policy, x_t: Tensor, sigma: Tensor, at: Tensor) -> Tensor:
        return checked_velocity(self._velocity(policy, x_t, sigma, at), x_t)


def checked_velocity(velocity: object, x_t: Tensor) -> Tensor:
    """Return the output of a ``Velocity`` at ``x_t``; metadata is read, never values.

    Raises:
        TypeError: it is not a floating-point tensor.
        ValueError: its shape is not that of ``x_t``.
    """
    shape = list(x_t.shape)
    if not isinstance(velocity, Tensor):
        fix = ""
        if isinstance(getattr(velocity, "sample", None), Tensor):
            fix = "; return its .sample"
        elif isinstance(velocity, (tuple, list)):
            fix = "; return its tensor, [0] for a diffusers model with return_dict=False"
        raise TypeError(
            f"velocity: expected a tensor of the shape of x_t, {shape}, got "
            f"{type(velocity).__name__}{fix}"
        )
    check_floating(velocity=velocity)
    if velocity.shape != x_t.shape:
        raise ValueError(
            f"velocity: expected the shape of x_t, {shape}, got {list(velocity.shape)}"
            f"{_fix_of_shape(velocity.shape, x_t.shape)}"
        )
    return velocity


def _fix_of_shape(got: torch.Size, expected: torch.Size) -> str:
    """Return advice for a velocity of another shape, or nothing."""
    if len(got) > len(expected):
        return (
            "; samples are [B, N, ...] with an axis of turns, [B, 1, ...] for one turn, of which "
            "x_t holds rows [M, ...]"
        )
    longer = len(got) == len(expected) > 2 and got[1] > expected[1]
    if longer and (got[0], *got[2:]) == (expected[0], *expected[2:]):
        return f"; cut off the tokens of reference images, velocity[:, :{expected[1]}]"
    return ""
