"""What an objective takes and returns: samples, units of training, one callable for velocities.

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
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from mteditflow._checks import (
    check_count,
    check_floating,
    check_full_precision,
    check_mask,
    check_rank,
    check_shape,
    check_values,
)
from mteditflow.flow.solvers import Solver
from mteditflow.flow.trajectory import Steps
from mteditflow.objectives.keys import Key, RoundKey
from mteditflow.objectives.rows import training_rows

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


@runtime_checkable
class Samples(Protocol):
    """What an objective reads of a rollout of B trajectories, N turns and S denoising steps."""

    @property
    def group(self) -> Tensor:
        """Integer group id of each trajectory, [B]."""

    @property
    def turn_mask(self) -> Tensor:
        """Turns that exist, boolean [B, N]."""

    @property
    def step_mask(self) -> Tensor:
        """Steps that exist and have a density, boolean [B, N, S]."""

    @property
    def reduction(self) -> str:
        """How the stored log-probs were reduced over elements, "mean" or "sum"."""

    def clean_at(self, at: Tensor) -> Tensor:
        """Return the final latents of (trajectory, turn) rows: int64 [M, 2] -> [M, ...]."""
        ...

    def steps_at(self, rows: Tensor) -> Steps:
        """Return stored steps of (trajectory, turn, step) rows: int64 [M, 3] -> M steps."""
        ...


@dataclass(frozen=True, eq=False)
class CleanSamples:
    """Final latents and nothing else: what NFT, AWM and DPO need, whatever sampler made them.

    Args:
        clean: final latent of every turn, [B, N, ...]; [B, 1, ...] for one turn.
        group: integer group id of each trajectory, [B].
        turn_mask: turns that exist, boolean [B, N]; ``None`` means all.

    Raises:
        ValueError: shapes do not match, or a latent of an existing turn is not finite.
        TypeError: a dtype is not the one stated.

    Example:
        >>> samples = CleanSamples(torch.randn(4, 1, 8), torch.tensor([0, 0, 1, 1]))
        >>> samples.clean_at(torch.tensor([[3, 0]])).shape
        torch.Size([1, 8])
    """

    clean: Tensor
    group: Tensor
    turn_mask: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_floating(clean=self.clean)
        check_rank("clean", self.clean, 3, "[B, N, ...]")
        if self.turn_mask is None:
            mask = torch.ones(self.clean.shape[:2], dtype=torch.bool, device=self.clean.device)
            object.__setattr__(self, "turn_mask", mask)
        check_mask("turn_mask", self.turn_mask, self.clean.shape[:2], "[B, N]")
        check_shape("group", self.group, self.clean.shape[:1], "[B]")
        if self.group.is_floating_point() or self.group.dtype == torch.bool:
            raise TypeError(f"group: expected integer ids, got {self.group.dtype}")
        absent = ~self.turn_mask.reshape(self.turn_mask.shape + (1,) * (self.clean.ndim - 2))
        finite = self.clean.isfinite() | absent
        check_values("clean", self.clean, finite, "finite latents in existing turns")

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def step_mask(self) -> Tensor:
        """No steps are stored: [B, N, 0]."""
        return self.turn_mask[..., None].expand(-1, -1, 0)

    @property
    def reduction(self) -> str:
        """No log-prob is stored; "mean"."""
        return "mean"

    def clean_at(self, at: Tensor) -> Tensor:
        """Return the final latents of (trajectory, turn) rows."""
        return self.clean[at[:, 0], at[:, 1]]

    def steps_at(self, rows: Tensor) -> Steps:
        """Raise ``ValueError``: no steps are stored."""
        raise ValueError("samples: expected stored steps, got CleanSamples, which have none")


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


@dataclass(frozen=True, eq=False)
class Units:
    """Units of training, one loss entry each: a row (K = 1), a pair (2) or a group (G, padded).

    Attributes:
        rows: (trajectory, turn, k) of each member, int64 [U, K, 3] on the CPU; k is the denoising
            step of an objective that replays steps, else the noise level.
        mask: members that exist, boolean [U, K]; a unit without any is idle: its loss is 0.
        advantage: [U, K], float32 or float64; ``None`` for objectives without a reward.
        seed: seed of each member's random numbers, int64 [U, K]; ``None`` where none are drawn.
        count: number of valid units of the minibatch, those that were left out because they cannot
            change the gradient included. Divide the summed loss by it.
        spare: trajectory and turn that exist, for idle units.
    """

    rows: Tensor
    mask: Tensor
    advantage: Tensor | None
    seed: Tensor | None
    count: int
    spare: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.rows)

    def split(self, size: int, *, parts: int | None = None) -> list[Units]:
        """Cut into micro-batches of at most ``size`` units, each with the ``count`` of the whole.

        Args:
            size: most units of a part.
            parts: number of parts, at least as many as needed; the rest are one idle unit each.
                Ranks with sharded weights agree on the largest number, since every forward pass is
                a collective call there.

        Returns:
            The parts; none where there are no units and no ``parts`` are asked for.

        Raises:
            ValueError: more parts are needed than ``parts``, or ``size`` is below 1.
        """
        check_count("size", size)
        needed = -(-len(self) // size)
        if parts is not None and parts < needed:
            expected = f"{needed} or more for {len(self)} units, {size} in each"
            raise ValueError(f"parts: expected {expected}, got {parts}")
        cut = [self[start : start + size] for start in range(0, len(self), size)]
        return cut + [self.idle()] * ((needed if parts is None else parts) - needed)

    def __getitem__(self, index: slice | Tensor) -> Units:
        """Return some units with the ``count`` of all: a slice, a mask [U] or indices.

        Samples of several latent shapes are trained so, the units of one shape at a time.
        """
        if not isinstance(index, slice | Tensor):
            raise TypeError(f"index: expected a slice or a tensor, got {type(index).__name__}")
        advantage, seed = (None if x is None else x[index] for x in (self.advantage, self.seed))
        rows, mask = self.rows[index], self.mask[index]
        return replace(self, rows=rows, mask=mask, advantage=advantage, seed=seed)

    def idle(self) -> Units:
        """Return one unit that is masked: a forward pass without effect on any gradient."""
        width = self.rows.shape[1]
        zeros = self.rows.new_zeros(1, width)
        return replace(
            self,
            rows=self.rows.new_tensor([*self.spare, 0]).expand(1, width, 3),
            mask=zeros.bool(),
            advantage=None if self.advantage is None else zeros.to(self.advantage),
            seed=None if self.seed is None else zeros.to(self.seed),
        )


@dataclass(frozen=True)
class Card:
    """What a table of objectives says of one.

    Attributes:
        title: name by which the field knows it.
        papers: arXiv numbers.
        losses: public functions that it is made of.
        needs: what it needs beside the current policy's velocity.
        passes: forward passes of a row in an update, with gradient, then without.
        rewarded: whether it learns from advantages.
    """

    title: str
    papers: tuple[str, ...]
    losses: tuple[str, ...]
    needs: str
    passes: str
    rewarded: bool = True


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
        velocity, exists = self._velocity(policy, *self._states), self._units.mask.T.flatten()
        if bool(exists.all()):
            return velocity
        exists = exists.reshape(-1, *[1] * (velocity.ndim - 1)).to(velocity.device)
        return torch.where(exists, velocity, 0)


def member_rows(units: Units) -> Tensor:
    """Return the rows of all members, int64 [K * U, 3]: the first member of every unit first.

    Raises:
        ValueError: there are no units.
    """
    if not len(units):
        raise ValueError("units: expected at least one, got none; skip an empty minibatch")
    return units.rows.transpose(0, 1).flatten(0, 1)


def member_advantages(units: Units, like: Tensor) -> Tensor:
    """Return the members' advantages, [K * U], in the order of ``member_rows`` and as ``like``."""
    if units.advantage is None:
        raise TypeError("units: expected units with advantages, got None")
    return units.advantage.T.flatten().to(like)


def check_units(units: Units, *, members: int, drawn: bool) -> None:
    """Raise unless units fit an objective.

    Args:
        units: what an objective was called with.
        members: members of a unit, K.
        drawn: whether members have random numbers.

    Raises:
        ValueError: they are of another objective.
    """
    if units.rows.shape[1] != members or (units.seed is not None) != drawn:
        numbers = {True: "with", False: "without"}
        raise ValueError(
            f"units: expected those of this objective, K = {members} {numbers[drawn]} seeds, got "
            f"K = {units.rows.shape[1]} {numbers[units.seed is not None]} seeds"
        )


def masked_output(units: Units, loss: Tensor, metrics: Metrics) -> Output:
    """Return loss and metrics, each [U], with 0 for idle units and no gradient in the metrics."""
    exists = units.mask.any(dim=1).to(loss.device)
    kept = {name: torch.where(exists, x.detach(), 0) for name, x in metrics.items()}
    return Output(torch.where(exists, loss, 0), kept)


def draw_units(
    samples: Samples,
    exists: Tensor,
    advantage: Tensor | None,
    valid: Tensor,
    *,
    key: RoundKey,
    share: float,
    minibatches: int,
    zero_matters: bool,
) -> list[Units]:
    """Draw single rows as units; see ``Objective.units``.

    Args:
        samples: B trajectories.
        exists: what can be trained, boolean [B, N, K].
        advantage: [B, N], or ``None``.
        valid: turns that take part, boolean [B, N].
        key: source of the random numbers.
        share: share of the K entries of a turn that is drawn.
        minibatches: optimizer steps.
        zero_matters: whether a unit of advantage 0 can change the gradient.
    """
    drawn = training_rows(
        exists,
        generators=[key.generator("rows", b) for b in range(len(exists))],
        share=share,
        minibatches=minibatches,
    )
    trajectory, turn = (samples.turn_mask.cpu().nonzero().tolist() or [[0, 0]])[0]
    found = []
    for rows in drawn:
        counts = valid[rows[:, 0], rows[:, 1]]
        kept = counts
        if advantage is not None and not zero_matters:
            kept = counts & (advantage[rows[:, 0], rows[:, 1]] != 0)
        own = rows[kept]
        found.append(
            Units(
                rows=own[:, None],
                mask=torch.ones_like(own[:, :1], dtype=torch.bool),
                advantage=None if advantage is None else advantage[own[:, 0], own[:, 1]][:, None],
                seed=None,
                count=int(counts.sum()),
                spare=(trajectory, turn),
            )
        )
    return found


def stored_steps(samples: Samples) -> Tensor:
    """Return the steps that exist and have a density, boolean [B, N, S] on the CPU.

    Raises:
        ValueError: there are none in the samples, S is 0.
    """
    if samples.step_mask.shape[2] == 0:
        raise ValueError("samples: expected stored steps, got samples without any")
    return samples.step_mask.cpu()


def turn_values(samples: Samples, advantage: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check advantages and validity and bring both to [B, N] on the CPU.

    Raises:
        ValueError: shapes do not match, or a valid advantage is not finite.
        TypeError: a dtype is not the one stated.
    """
    exists = samples.turn_mask.cpu()
    check_full_precision(advantage=advantage)
    shape = exists.shape if advantage.ndim == 2 else exists.shape[:1]
    check_shape("advantage", advantage, shape, "[B] or [B, N]")
    if valid is None:
        valid = torch.ones_like(advantage, dtype=torch.bool)
    check_mask("valid", valid, shape, "of advantage")
    values, own = advantage.detach().cpu(), valid.cpu()
    if values.ndim == 1:
        values, own = values[:, None].expand(exists.shape), own[:, None].expand(exists.shape)
    own = own & exists
    check_values("advantage", values, ~own | values.isfinite(), "finite values where valid")
    return torch.where(own, values, 0), own
