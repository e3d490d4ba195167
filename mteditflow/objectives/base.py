"""Interfaces of objectives: samples, one callable for velocities, units of training, outputs.

An objective turns a rollout with advantages into a loss and metrics. The loop is the same for all::

    objective = NFT(nft_beta=1.0)                                    # or GRPO(...), DPO(...), ...
    for units in objective.units(samples, advantage, valid, key=key, minibatches=2):
        optimizer.zero_grad()
        for part in units.split(4):                                  # micro-batches
            output = objective(velocity, samples, part)
            (output.loss.sum() / part.count).backward()
        optimizer.step()

``samples`` are a ``Trajectory``, a recorded ``Rollout``, ``CleanSamples``, ``Buckets`` of several
of them, or anything with the members of ``Samples``. Only ``velocity`` depends on the model. All
random numbers are fixed in ``units``, so that a loss is reproducible and does not depend on
micro-batches or ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from mteditflow.flow.solvers import Solver
from mteditflow.objectives.keys import Key
from mteditflow.objectives.samples import Buckets, Samples
from mteditflow.objectives.units import Units, member_rows

Policy = Literal["current", "old", "reference", "teacher"]
Metrics = dict[str, Tensor]


class Velocity(Protocol):
    """Velocity of a policy at noisy latents: the only interface to the user's model.

    The velocity points from clean latents to noise, ``noise - clean``, as FLUX and SD3 predict it;
    ``x_t = (1 - sigma) * clean + sigma * noise``. Negate the output of a model that predicts
    ``clean - noise`` and give it ``1 - sigma`` if its time runs from noise (0) to clean (1): no
    check can detect the wrong sign, and training diverges.

    Example:
        With diffusers' ``FluxTransformer2DModel``, whose timestep is sigma itself; that of
        ``SD3Transformer2DModel`` is ``1000 * sigma``::

            def velocity(policy, x_t, sigma, at):
                model = models[policy]
                inputs = conditioning(at[:, 0])  # of each row's trajectory
                x_t, sigma = x_t.to(model.dtype), sigma.to(model.dtype)
                return model(x_t, timestep=sigma, **inputs, return_dict=False)[0]
    """

    def __call__(self, policy: Policy, x_t: Tensor, sigma: Tensor, at: Tensor) -> Tensor:
        """Return the velocity of M rows, [M, ...].

        Args:
            policy: "current" (the policy being trained, with gradient), "old" (the policy that
                NFT-type objectives mix with), "reference" (the base model), or "teacher". All but
                "current" are called under ``torch.no_grad``. An objective requests only the
                policies that it needs.
            x_t: noisy latents, [M, ...]: float32 where clean latents are re-noised (NFT, AWM,
                FlowAWR, DPO, DGPO, CRD), whatever the dtype of ``clean``; in the dtype of the
                stored states where steps are replayed (GRPO, Guard, DPPO, Distillation, MTOPSD).
                Cast them to the model's dtype.
            sigma: flow time of each row, [M], in [0, 1]; 1 is pure noise. Not in thousandths.
            at: trajectory and turn of each row, int64 [M, 2] on the CPU; selects the conditioning.

        Returns:
            A floating-point tensor of the shape of ``x_t``, on any device: not the tuple or the
            output object of a diffusers model, and without the tokens of reference images.
            Objectives raise ``TypeError`` or ``ValueError`` for anything else.
        """
        ...


class Sampling(NamedTuple):
    """Sampling settings that an objective requires of rollouts.

    Attributes:
        solver: solver of the stochastic steps; ``None``: any sampler can be used.
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
        title: common name in the literature.
        papers: arXiv numbers.
        losses: names of the public functions that it uses.
        needs: requirements in addition to the current policy's velocity.
        passes: forward passes per row in an update, with gradient plus without; in parentheses
            the number without gradient if the old policy is the current one.
        rewarded: whether it uses advantages.
        old_kl: whether it reports the metric "old_kl", its distance to the old policy.
        whole_groups: whether all members of a group must be among the samples of one call.
        tokens: whether it accepts advantages per latent token, as ``region_advantage`` returns
            them.
    """

    title: str
    papers: tuple[str, ...]
    losses: tuple[str, ...]
    needs: str
    passes: str
    rewarded: bool = True
    old_kl: bool = True
    whole_groups: bool = False
    tokens: bool = False


class Objective(ABC):
    """Base class: maps samples with advantages to loss and metrics.

    Subclasses are frozen dataclasses. Their fields are hyperparameters under the names of the pure
    functions' arguments, and nothing else, because command lines are built from them. The
    ``__call__`` of a subclass handles samples of one latent shape; for ``Buckets`` it is called
    once per part.
    """

    card: ClassVar[Card]
    samples_with: ClassVar[Policy] = "current"
    whole_kl: ClassVar[str] = ""  # why ``kl_share`` has to be 1; empty where it may be below

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # Wrapped here rather than in a base method, so that a subclass needs no call to super.
        if "__call__" in vars(cls):
            cls.__call__ = _bucket_by_bucket(cls.__call__)  # type: ignore[method-assign]

    @abstractmethod
    def sampling(self, round: int, *, steps: int) -> Sampling:  # noqa: A002
        """Return the sampling settings for rollouts of a round.

        Args:
            round: index of the round, from 0.
            steps: denoising steps S of a turn.
        """

    def old_decay(self, round: int) -> float:  # noqa: A002
        """Return the EMA decay of the old policy after a round, in [0, 1]; 0 copies the current."""
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
                Where ``card.tokens`` also [B, N, ...] for one per latent token, laid out so that
                it broadcasts over latents.
            valid: boolean, [B] or [B, N] as ``advantage``; ``None`` means all. Other advantages
                are never read.
            key: source of the random numbers; a generator advances by one draw per pass.
            minibatches: optimizer steps of the pass; divides B.

        Returns:
            Units of each minibatch. A minibatch may be empty; skip its optimizer step.

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
            samples: the samples that the units were drawn from. Units of several buckets take one
                forward pass per bucket.
            units: units returned by ``units``, or a part of them.
            old_is_current: whether the old policy has the current weights, as after a sync. Its
                forward pass is then skipped.

        Returns:
            Output of U entries on the device of the velocity. Gradient flows through the current
            policy's velocity alone.

        Raises:
            ValueError: there are no units, or one has members in several buckets.
        """


def _bucket_by_bucket(call: Callable[..., Output]) -> Callable[..., Output]:
    """Wrap a ``__call__`` for samples of one latent shape so that it handles ``Buckets``."""

    @wraps(call)
    def each_bucket(
        self: Objective, velocity: Velocity, samples: Samples, units: Units, **options: Any
    ) -> Output:
        if not isinstance(samples, Buckets):
            return call(self, velocity, samples, units, **options)
        member_rows(units)  # raises where there are none
        units = replace(units, starts=samples.starts)  # checks that no unit spans buckets
        names: list[str] = []

        def read(part: int, here: Tensor, _: Tensor) -> Sequence[Tensor]:
            start = samples.starts[part]
            shifted, own = _counted_from(start, velocity), units[here].within(start)
            output = call(self, shifted, samples.parts[part], own, **options)
            # ``gather`` joins tensors by position: fix the order of metrics by the first part.
            names.extend([] if names else output.metrics)
            return output.loss, *(output.metrics[name] for name in names)

        loss, *metrics = samples.gather(units.lead, read)
        return Output(loss, dict(zip(names, metrics, strict=True)))

    return each_bucket


def _counted_from(start: int, velocity: Velocity) -> Velocity:
    """Return a velocity that counts trajectories from ``start``, the first one of a part."""
    shift = torch.tensor([start, 0], dtype=torch.int64, device="cpu")
    return lambda policy, x_t, sigma, at: velocity(policy, x_t, sigma, at + shift.to(at.device))


def masked_output(units: Units, loss: Tensor, metrics: Metrics) -> Output:
    """Return loss and metrics, each [U], with 0 for idle units and no gradient in the metrics."""
    exists = units.mask.any(dim=1).to(loss.device)
    kept = {name: torch.where(exists, x.detach(), 0) for name, x in metrics.items()}
    return Output(torch.where(exists, loss, 0), kept)
