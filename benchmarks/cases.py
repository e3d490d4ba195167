"""Benchmark cases: each hot function beside its plain twin, and rollouts that grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mteditflow as mt
from benchmarks import plain

LATENTS = (8, 16, 128, 128)
SAMPLES, GROUPS = 20_000, 2_500
NOISE_LEVEL, NFT_BETA = 0.7, 0.1
COMPILED = (
    "SDE step with log-prob",
    "log-prob replay, forward and backward",
    "NFT loss, forward and backward",
)
COMPILED_LIMIT = 1.05


@dataclass(frozen=True)
class Case:
    """Two functions of the same inputs that must agree; where ``backward``, in the gradient of the
    first input too. Limits are for the ratio ours / plain."""

    name: str
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    backward: bool = False
    train: bool = True  # record a graph; sampling does not
    time_limit: float | None = None
    memory_limit: float | None = None
    plain_in_torch: bool = True  # else it neither compiles nor allocates through torch

    def run(self, function: Callable[..., Any]) -> Any:
        """Call once; return the outputs, or the gradient of the first input."""
        if not self.train:
            with torch.no_grad():
                return function(*self.inputs)
        leaf = self.inputs[0].detach().requires_grad_()
        outputs = function(leaf, *self.inputs[1:])
        if not self.backward:
            return outputs
        outputs.mean().backward()
        return leaf.grad


def sde_step(x_t, velocity, sigma, next_sigma, noise):
    transition = mt.FlowSDE(NOISE_LEVEL)(x_t, velocity, sigma, next_sigma)
    next_x = transition.sample(noise)
    return next_x, mt.gaussian_log_prob(next_x, *transition, reduction="mean")


def replay(velocity, x_t, next_x, sigma, next_sigma):
    transition = mt.FlowSDE(NOISE_LEVEL)(x_t, velocity, sigma, next_sigma)
    return mt.gaussian_log_prob(next_x, *transition, reduction="mean")


def adaptive_nft_loss(velocity, old_velocity, clean, noise, _x_t, r, sigma):
    target = mt.velocity_target(clean, noise)
    return mt.adaptive_nft_loss(velocity, old_velocity, target, r, sigma, nft_beta=NFT_BETA)


def plain_adaptive_nft_loss(velocity, old_velocity, clean, _noise, x_t, r, sigma):
    return plain.adaptive_nft_loss(velocity, old_velocity, clean, x_t, r, sigma, nft_beta=NFT_BETA)


def cases(
    device: str, *, latents: tuple[int, ...] = LATENTS, samples: int = SAMPLES, groups: int = GROUPS
) -> list[Case]:
    """All pairs, with inputs on ``device``."""
    generator = torch.Generator().manual_seed(0)
    x_t, velocity, noise, clean, drift = torch.randn(5, *latents, generator=generator).to(device)
    old_velocity = velocity + 0.1 * drift
    rows = latents[0]
    sigma = torch.linspace(0.95, 0.2, rows, device=device)
    next_sigma = sigma - 0.1
    r = torch.linspace(0, 1, rows, device=device)
    sampled = mt.FlowSDE(NOISE_LEVEL)(x_t, velocity, sigma, next_sigma).sample(noise)
    plain_step = partial(plain.sde_step, noise_level=NOISE_LEVEL)
    plain_replay = partial(plain.replay, noise_level=NOISE_LEVEL)
    stored = (old_velocity, x_t, sampled, sigma, next_sigma)
    renoised = mt.interpolate(clean, noise, sigma)

    group = torch.arange(groups).repeat_interleave(samples // groups)
    group = group[torch.randperm(len(group), generator=generator)]
    scattered = torch.randint(2**62, (groups,), generator=generator)[group].to(device)
    reward, group = torch.rand(len(group), generator=generator).to(device), group.to(device)
    advantages = partial(
        Case,
        ours=mt.group_advantage,
        plain=plain.group_advantage,
        train=False,
        plain_in_torch=False,
    )
    return [
        Case(
            "SDE step with log-prob",
            sde_step,
            plain_step,
            (x_t, velocity, sigma, next_sigma, noise),
            train=False,
            time_limit=0.5,
        ),
        Case("log-prob replay, forward", replay, plain_replay, stored, time_limit=0.5),
        Case("log-prob replay, forward and backward", replay, plain_replay, stored, backward=True),
        Case(
            "NFT loss, forward and backward",
            partial(mt.nft_loss, nft_beta=NFT_BETA),
            partial(plain.nft_loss, nft_beta=NFT_BETA),
            (velocity, old_velocity, noise - clean, r),
            backward=True,
            time_limit=0.5,
            memory_limit=0.6,
        ),
        Case(
            "adaptive NFT loss, forward and backward",
            adaptive_nft_loss,
            plain_adaptive_nft_loss,
            (velocity, old_velocity, clean, noise, renoised, r, sigma),
            backward=True,
            time_limit=0.5,
            memory_limit=0.6,
        ),
        advantages("group advantages", inputs=(reward, group), time_limit=0.01),
        advantages("group advantages, scattered 62-bit ids", inputs=(reward, scattered)),
    ]


def compiled_cases(device: str, *, latents: tuple[int, ...] = LATENTS) -> list[Case]:
    """Pairs to be compared compiled, with latents in float32 and in bfloat16."""
    by_name = {case.name: case for case in cases(device, latents=latents)}
    return [
        replace(
            in_dtype(case, dtype),
            name=f"{case.name}, {str(dtype).removeprefix('torch.')}",
            time_limit=COMPILED_LIMIT,
            memory_limit=None,
        )
        for case in (by_name[name] for name in COMPILED)
        for dtype in (torch.float32, torch.bfloat16)
    ]


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """A case with latents in a dtype; its plain formula computes in float32, as ours does."""
    inputs = tuple(x.to(dtype) if x.ndim > 1 else x for x in case.inputs)
    plain = partial(_in_float32, case.plain) if case.plain_in_torch else case.plain
    return replace(case, plain=plain, inputs=inputs)


def _in_float32(plain: Callable[..., Any], *inputs: Tensor) -> Any:
    """The plain formula in float32, which ours computes in whatever the dtype of its inputs."""
    return plain(*(x.float() for x in inputs))


def growths(device: str, *, base: int = 4, latent: tuple[int, ...] = (16, 32, 32)):
    """Axis of a rollout or a loss -> a function of its length; the other axes stay at ``base``."""

    def roll(turns: int = base, steps: int = base, group: int = base) -> object:
        return mt.rollout(
            lambda x_t, _sigma, **_: x_t,
            torch.ones(1, 1, *(1 for _ in latent), device=device).expand(group, turns, *latent),
            mt.uniform_sigmas(steps),
            solver=mt.DanceSDE(0.3),
            generators=mt.trajectory_generators(0, group, device=device),
            reduction="mean",
        )

    def surrogate(turns: int = base, steps: int = base, group: int = base) -> object:
        # As many elements as it takes for arithmetic to outweigh the fixed cost of a call.
        advantage = torch.ones(2**12 * group, device=device)
        advantage = mt.broadcast_to_steps(advantage, turns=turns, steps=steps)
        log_prob = torch.zeros(advantage.shape, device=device)
        loss = mt.clipped_surrogate_loss(
            log_prob, log_prob, advantage, clip_low=1e-4, clip_high=1e-4
        )
        return mt.masked_mean(loss)

    return {
        f"{name} over {axis}": (lambda length, f=function, axis=axis: f(**{axis: length}))
        for name, function in (("rollout", roll), ("broadcast and surrogate", surrogate))
        for axis in ("turns", "steps", "group")
    }
