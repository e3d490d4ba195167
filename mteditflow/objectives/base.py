"""Interfaces of objectives: samples, one callable for velocities, units of training, outputs.

An objective turns a rollout with advantages into a loss and metrics. The loop is the same for all::

    objective = NFT(nft_beta=1.0)                                    # or GRPO(...), DPO(...), ...
    for units in objective.units(samples, advantage, valid, key=key, minibatches=2):
        optimizer.zero_grad()
        for part in units.split(4):                                  # micro-batches
            output = objective(velocity, samples, part)
            (output.loss.sum() / part.count).backward()
        optimizer.step()

``samples`` are a ``Trajectory``, a recorded ``Rollout``, ``CleanSamples`` or anything with the
members of ``Samples``. ``velocity`` is the only thing that knows the model. All random numbers are
fixed by ``units``, so a loss can be computed again, and does not depend on micro-batches or ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from mteditflow._reduce import valid_rows
from mteditflow.flow.solvers import Solver
from mteditflow.objectives.keys import Key
from mteditflow.objectives.samples import Samples
from mteditflow.objectives.units import Units, member_mask, member_rows

Policy = Literal["current", "old", "reference", "teacher"]
Metrics = dict[str, Tensor]


class Velocity(Protocol):
    """Velocity of a policy at any state of a sample: all that a user writes around a model."""

    def __call__(self, policy: Policy, x_t: Tensor, sigma: Tensor, at: Tensor) -> Tensor:
        """Return the velocity of M rows, [M, ...].

        Args:
            policy: "current" (in training, with gradient), "old" (the one that NFT-type objectives
                mix with), "reference" (the base model), or "teacher". All but "current" are called
                under ``torch.no_grad``. An objective only asks for what it needs.
            x_t: noisy latents, [M, ...]: float32 where latents are re-noised, in the dtype of the
                stored states where steps are replayed. Cast them to the model's dtype.
            sigma: flow time of each row, [M], in [0, 1].
            at: trajectory and turn of each row, int64 [M, 2] on the CPU: tells the conditioning.
        """
        ...


class Sampling(NamedTuple):
    """How an objective wants rollouts to be sampled.

    Attributes:
        solver: solver of the stochastic steps; ``None``: any sampler will do, as it is.
        stochastic_steps: steps of a turn that are sampled with noise and trained; ``None``: none.
    """

    solver: Solver | None = None
    stochastic_steps: range | None = None


class Output(NamedTuple):
    """Loss and metrics of U units, unreduced.

    Attributes:
        loss: [U], float32 at least; 0 with gradient 0 for a masked unit.
        metrics: name to [U], detached; 0 for a masked unit.
    """

    loss: Tensor
    metrics: Metrics


@dataclass(frozen=True)
class Card:
    """Entry of a table of objectives.

    Attributes:
        title: name by which the field knows it.
        papers: arXiv numbers.
        losses: public functions that it is made of.
        needs: what it needs beside the current policy's velocity.
        passes: forward passes of a row in an update, with gradient, then without.
        rewarded: whether it learns from advantages.
        old_kl: whether it reports the metric "old_kl", its distance to the policy that sampled.
        whole_groups: whether its units need all members of a group in one call.
    """

    title: str
    papers: tuple[str, ...]
    losses: tuple[str, ...]
    needs: str
    passes: str
    rewarded: bool = True
    old_kl: bool = True
    whole_groups: bool = False


class Objective(ABC):
    """From samples with advantages to loss and metrics; subclasses are frozen dataclasses.

    The fields of a subclass are its hyperparameters, under the names of the pure functions'
    arguments, and nothing else: a command line is built from them.
    """

    card: ClassVar[Card]
    samples_with: ClassVar[Policy] = "current"

    @abstractmethod
    def sampling(self, round: int, *, steps: int) -> Sampling:  # noqa: A002
        """Return how rollouts of a round are sampled.

        Args:
            round: number of the round, from 0.
            steps: denoising steps S of a turn.
        """

    def old_decay(self, round: int) -> float:  # noqa: A002
        """Return the share of the old policy that is kept after a round, in [0, 1]."""
        del round
        return 0.0

    @abstractmethod
    def units(
        self,
        samples: Samples,
        advantage: Tensor | None,
        valid: Tensor | None = None,
        *,
        key: Key,
        minibatches: int = 1,
    ) -> list[Units]:
        """Draw the units of every minibatch of a pass over the samples.

        Units that are invalid, or whose weight in the gradient is exactly 0, are left out.

        Args:
            samples: B trajectories.
            advantage: [B], or [B, N] for one per turn; float32 or float64, finite where valid.
            valid: boolean, shape of ``advantage``; ``None`` means all. The rest is never read.
            key: source of the random numbers; a generator advances by one number a pass.
            minibatches: optimizer steps of the pass; divides B.

        Returns:
            Units of each minibatch; one may be empty: then make no optimizer step.

        Raises:
            ValueError: shapes do not match, or a valid advantage is not finite.
            TypeError: a dtype is not the one stated, or the key is of another type.
        """

    @abstractmethod
    def __call__(
        self, velocity: Velocity, samples: Samples, units: Units, *, old_is_current: bool = False
    ) -> Output:
        """Compute the loss of units.

        Args:
            velocity: velocities of the policies; see ``Velocity``.
            samples: the samples that the units were drawn from.
            units: those that ``units`` returned, or a part of them.
            old_is_current: whether the old policy has the current weights, as after a sync: its
                forward pass is then saved.

        Returns:
            Output of U entries on the device of the velocity. Gradient flows through the current
            policy's velocity alone.

        Raises:
            ValueError: there are no units.
        """


class Velocities:
    """Velocities of the policies at the same M states, each computed when it is first read."""

    def __init__(
        self, velocity: Velocity, x_t: Tensor, sigma: Tensor, units: Units, *, old_is_current: bool
    ) -> None:
        self._velocity, self._units, self._old_is_current = velocity, units, old_is_current
        self._states = x_t, sigma, member_rows(units)[:, :2]

    @cached_property
    def current(self) -> Tensor:
        """With gradient."""
        return self._of("current")

    @cached_property
    def old(self) -> Tensor:
        """Detached; the current one where both have the same weights."""
        return self.current.detach() if self._old_is_current else self._constant("old")

    @cached_property
    def reference(self) -> Tensor:
        """Detached."""
        return self._constant("reference")

    @cached_property
    def teacher(self) -> Tensor:
        """Detached."""
        return self._constant("teacher")

    @torch.no_grad()
    def _constant(self, policy: Policy) -> Tensor:
        return self._of(policy).detach()

    def _of(self, policy: Policy) -> Tensor:
        """Velocities, 0 for members that do not exist: a NaN there would reach the gradient."""
        velocity = self._velocity(policy, *self._states)
        return valid_rows(member_mask(self._units, velocity), velocity)


def masked_output(units: Units, loss: Tensor, metrics: Metrics) -> Output:
    """Return loss and metrics, each [U], with 0 for idle units and no gradient in the metrics."""
    exists = units.mask.any(dim=1).to(loss.device)
    kept = {name: torch.where(exists, x.detach(), 0) for name, x in metrics.items()}
    return Output(torch.where(exists, loss, 0), kept)
