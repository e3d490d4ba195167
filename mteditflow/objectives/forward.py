"""Objectives of the forward process: they re-noise clean latents from any sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from mteditflow._checks import check_choice, check_count, check_number
from mteditflow.flow.path import interpolate, shift_sigmas, velocity_target
from mteditflow.flow.sampling import batched_noise
from mteditflow.losses.nft import velocity_kl
from mteditflow.losses.norm_guard import velocity_norm_hinge
from mteditflow.objectives.base import Metrics, Objective, Output, Sampling, Velocity, masked_output
from mteditflow.objectives.keys import Key, RoundKey, round_key
from mteditflow.objectives.kl_share import check_kl_share, share_kl, weighted_kl
from mteditflow.objectives.samples import Samples, turn_values
from mteditflow.objectives.units import (
    Units,
    at_rows,
    check_units,
    draw_units,
    member_mask,
    member_mean,
    member_rows,
)
from mteditflow.objectives.velocities import Velocities
from mteditflow.old_policy import old_policy_decay

DISTRIBUTIONS = ("uniform", "logit_normal", "grid")


@dataclass(frozen=True, kw_only=True)
class Renoise:
    r"""Flow times and noise at which clean latents are trained.

    Args:
        distribution: "uniform" in [0, 1]; "logit_normal", the sigmoid of a Gaussian; "grid", the
            flow times that the sampler itself visited, each equally likely.
        levels: number of noise levels per clean latent of a turn in a pass, >= 1.
        shift: shift s > 0 of flow times toward noise, :math:`s\sigma / (1 + (s - 1)\sigma)`; must
            be 1 for "grid", which is already shifted.
        mean: mean of the Gaussian of "logit_normal".
        std: standard deviation of the Gaussian of "logit_normal", > 0.
        stratified: whether the ``levels`` of a turn are drawn from equal quantile ranges of the
            distribution, one from each: less variance at the same cost. Needs 2 levels or more.
        shared: whether the members of a group get the same flow times and noise at a turn, so that
            their losses differ only through their latents.

    Raises:
        ValueError: a number is out of range, or an option does not apply to the distribution.
        TypeError: an argument has the wrong type.

    Source: shifted and logit-normal flow times, Stable Diffusion 3 (arXiv 2403.03206).

    Example:
        >>> Renoise(shift=3.0).flow_time(torch.tensor([0.5]))
        tensor([0.7500])
    """

    distribution: Literal["uniform", "logit_normal", "grid"] = "uniform"
    """Distribution of flow times: uniform, logit_normal, or the sampler's own grid."""
    levels: int = 1
    """Number of noise levels per clean latent of a turn in a pass over a round."""
    shift: float = 1.0
    """Shift of flow times toward noise (uniform, logit_normal); 1: none."""
    mean: float = 0.0
    """Mean of the Gaussian of logit_normal."""
    std: float = 1.0
    """Standard deviation of the Gaussian of logit_normal."""
    stratified: bool = False
    """Stratify the levels of a turn over the distribution; needs levels >= 2."""
    shared: bool = False
    """Give the members of a group the same flow times and noise at each turn."""

    def __post_init__(self) -> None:
        check_choice("distribution", self.distribution, DISTRIBUTIONS)
        check_count("levels", self.levels)
        for name in ("stratified", "shared"):
            if not isinstance(getattr(self, name), bool):
                kind = type(getattr(self, name)).__name__
                raise TypeError(f"{name}: expected True or False, got {kind}")
        check_number("shift", self.shift, low=0.0, open_low=True)
        check_number("mean", self.mean)
        check_number("std", self.std, low=0.0, open_low=True)
        if self.distribution != "logit_normal" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError(
                f"mean, std: expected 0.0 and 1.0 for {self.distribution!r}, which has none, got "
                f"{self.mean} and {self.std}"
            )
        if self.distribution == "grid" and self.shift != 1:
            raise ValueError(f"shift: expected 1.0 for 'grid', got {self.shift}")
        if self.stratified and self.levels < 2:
            raise ValueError(f"levels: expected 2 or more where stratified, got {self.levels}")

    def flow_time(self, quantile: Tensor) -> Tensor:
        """Map quantiles in [0, 1] to flow times, [M]; not for "grid"."""
        if self.distribution == "logit_normal":
            quantile = torch.sigmoid(self.mean + self.std * torch.special.ndtri(quantile))
        return shift_sigmas(quantile, self.shift)


class Renoised(NamedTuple):
    """Re-noised clean latents of M rows.

    Attributes:
        x_t: [M, ...].
        sigma: flow time, [M].
        target: velocity target ``noise - clean``, [M, ...].
    """

    x_t: Tensor
    sigma: Tensor
    target: Tensor


def renoise(samples: Samples, units: Units, how: Renoise) -> Renoised:
    """Re-noise the clean latents of the units' members with the seeds of the units.

    Args:
        samples: the samples that the units were drawn from.
        units: U units of K members, with seeds.
        how: distribution of flow times.

    Returns:
        Renoised, M = K * U rows in the order of ``member_rows``, float32.

    Raises:
        ValueError: the units have no seeds, or "grid" is used on samples without stored steps.
    """
    if units.seed is None:
        raise ValueError("units: expected members with seeds, got None")
    rows, seeds = member_rows(units), units.seed.T.flatten().tolist()
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    clean = samples.clean_at(rows[:, :2]).detach().float()
    # Time before noise: both come from the row's generator, so the order fixes the numbers.
    sigma = _flow_times(samples, rows, generators, how).to(clean.device)
    noise = batched_noise(clean.shape[1:], generators).to(clean.device)
    x_t = interpolate(clean, noise, sigma)
    return Renoised(x_t, sigma, velocity_target(clean, noise))


def _flow_times(
    samples: Samples, rows: Tensor, generators: Sequence[torch.Generator], how: Renoise
) -> Tensor:
    """Draw one flow time per row from the row's own generator."""
    uniform = torch.cat(
        [torch.rand(1, generator=g, dtype=torch.float32, device="cpu") for g in generators]
    )
    if how.stratified:
        uniform = (rows[:, 2] + uniform) / how.levels  # rows[:, 2] is the noise level, 0..levels-1
    if how.distribution != "grid":
        return how.flow_time(uniform)
    steps = samples.step_mask.shape[2]
    if steps == 0:
        raise ValueError("renoise: expected samples with stored steps for the 'grid' distribution")
    step = (uniform * steps).long().clamp(max=steps - 1)
    return samples.steps_at(torch.stack([rows[:, 0], rows[:, 1], step], dim=1)).sigma.float()


def noise_seeds(samples: Samples, rows: Tensor, key: RoundKey, *, shared: bool) -> Tensor:
    """Return one seed per row of (trajectory, turn, level), int64 [M, 3] -> [M].

    If ``shared``, seeds depend on the group id in place of the trajectory.
    """
    # As int64: unsigned ids do not promote. An id above its range wraps, and stays distinct.
    owner = samples.group.cpu().long()[rows[:, 0]] if shared else rows[:, 0]
    place = torch.stack([owner, rows[:, 1], rows[:, 2]], dim=1)
    purpose, first = ("renoise of a group", 0) if shared else ("renoise", key.first)
    numbers = [key.number(purpose, first + o, n, k) for o, n, k in place.tolist()]
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


@dataclass(frozen=True, kw_only=True)
class ForwardObjective(Objective):
    """Fields and units of every objective that re-noises clean latents."""

    samples_with = "old"
    members: ClassVar[int | None] = 1  # None: groups of any size

    renoise: Renoise = field(default_factory=Renoise)
    """Flow times and noise of the training states."""
    kl_coef: float = 0.0
    """Weight of the velocity KL to the reference; above 0 it costs a forward pass."""
    kl_share: float = 1.0
    """Share of the rows whose KL is computed, at weight 1 / share: unbiased, fewer passes."""
    norm_coef: float = 0.0
    """Weight of the hinge on the velocity's norm above the reference's (NormGuard); above 0 it
    costs a forward pass."""
    old_slope: float = 0.001
    """Increase per round of the old policy's EMA decay; 0: it is the current policy."""
    old_maximum: float = 0.5
    """Largest EMA decay of the old policy."""

    def __post_init__(self) -> None:
        if not isinstance(self.renoise, Renoise):
            raise TypeError(f"renoise: expected Renoise, got {type(self.renoise).__name__}")
        for name in ("kl_coef", "norm_coef", "old_slope"):
            check_number(name, getattr(self, name), low=0.0)
        check_number("old_maximum", self.old_maximum, low=0.0, high=1.0)
        check_kl_share(self.kl_share, self.kl_coef)
        if self.kl_share < 1 and self.whole_kl:
            raise ValueError(
                f"kl_share: expected 1 for {type(self).__name__}, {self.whole_kl}, got "
                f"{self.kl_share}"
            )
        if self.kl_share < 1 and self.norm_coef > 0:
            raise ValueError(
                f"kl_share: expected 1 where norm_coef > 0, whose hinge evaluates the reference "
                f"everywhere, got {self.kl_share}"
            )

    def sampling(self, round: int, *, steps: int) -> Sampling:  # noqa: A002
        """See ``Objective``; any sampler can be used."""
        return Sampling()

    def old_decay(self, round: int) -> float:  # noqa: A002
        """See ``Objective``."""
        return old_policy_decay(round, slope=self.old_slope, maximum=self.old_maximum)

    @property
    def zero_matters(self) -> bool:
        """Whether a unit of advantage 0 can change the gradient."""
        return self.kl_coef > 0 or self.norm_coef > 0

    def units(
        self,
        samples: Samples,
        advantage: Tensor | None,
        valid: Tensor | None = None,
        *,
        key: Key,
        minibatches: int = 1,
    ) -> list[Units]:
        """See ``Objective``: one row for each noise level of each turn."""
        if advantage is None:
            raise TypeError(f"advantage: expected a tensor for {type(self).__name__}, got None")
        values, own = turn_values(samples, advantage, valid, tokens=self.card.tokens)
        exists = samples.turn_mask.cpu()[..., None].expand(-1, -1, self.renoise.levels)
        key = round_key(key)
        drawn = draw_units(
            samples,
            exists,
            values,
            own,
            key=key,
            share=1.0,
            minibatches=minibatches,
            zero_matters=self.zero_matters,
        )
        seeded = [self._seeded(samples, units, units.rows, key) for units in drawn]
        return [share_kl(units, self.kl_share, key) for units in seeded]

    def _seeded(self, samples: Samples, units: Units, noise_rows: Tensor, key: RoundKey) -> Units:
        """Give every member the seed that belongs to its row of ``noise_rows``, [U, K, 3]."""
        flat = noise_rows.flatten(0, 1)
        seeds = noise_seeds(samples, flat, key, shared=self.renoise.shared)
        return replace(units, seed=seeds.view(noise_rows.shape[:2]))

    def states(
        self, velocity: Velocity, samples: Samples, units: Units, *, old_is_current: bool
    ) -> tuple[Renoised, Velocities]:
        """Re-noise the units' latents; return them and the velocities there, on one device."""
        check_units(units, members=self.members, drawn=True)
        renoised = renoise(samples, units, self.renoise)
        velocities = Velocities(
            velocity, renoised.x_t, renoised.sigma, units, old_is_current=old_is_current
        )
        device = velocities.current.device
        return renoised._replace(
            target=renoised.target.to(device), sigma=renoised.sigma.to(device)
        ), velocities

    def output(
        self,
        units: Units,
        loss: Tensor,
        velocities: Velocities,
        metrics: Metrics,
        *,
        kl_scale: Tensor | None = None,
    ) -> Output:
        """Add the regularizers, averaged over the members of each unit.

        ``kl_scale`` multiplies the KL of each member, [K * U]; ``None`` means 1.
        """
        found: Metrics = {"policy_loss": loss, **metrics}
        exists = member_mask(units, loss)
        if self.kl_coef > 0:
            current = velocities.current
            found["kl"] = weighted_kl(
                units,
                lambda rows: (
                    velocity_kl(
                        at_rows(current, rows),
                        velocities.reference_at(rows),
                        valid=at_rows(exists, rows),
                    )
                    * (1 if kl_scale is None else at_rows(kl_scale, rows))
                ),
            )
            loss = loss + self.kl_coef * found["kl"]
        if self.norm_coef > 0:
            hinge = velocity_norm_hinge(velocities.current, velocities.reference, valid=exists)
            found["norm_hinge"] = member_mean(units, hinge)
            loss = loss + self.norm_coef * found["norm_hinge"]
        return masked_output(units, loss, found)
