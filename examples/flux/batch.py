"""One rank's part of a round, and the three things that objectives do with its rows.

A row is (trajectory, turn, k). Objectives of the forward process noise the turn's clean latent anew
(k counts noise levels); those of the sampler replay a step that was taken (k is the step). Every
random number comes from a key such as (seed, "renoise", round, trajectory, turn, k).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

import mteditflow as mt
from mteditflow.pipelines import Rollout
from mteditflow.training import keyed_generator, training_rows

from .config import Config
from .run import Run

SOLVERS = {"flow": mt.FlowSDE, "dance": mt.DanceSDE, "cps": mt.CPS}


class Renoised(NamedTuple):
    """Clean latents of M rows, noised anew.

    Attributes:
        x_t: [M, ...].
        sigma: flow time, [M].
        target: velocity from clean latent to noise, [M, ...].
        forward: computes the velocity there, of the policy that the model is then.
    """

    x_t: Tensor
    sigma: Tensor
    target: Tensor
    forward: Callable[[], Tensor]


class Replayed(NamedTuple):
    """Steps of M rows as they were taken.

    Attributes:
        steps: states, times and log-probs, [M, ...] and [M].
        forward: computes the velocity there, of the policy that the model is then.
    """

    steps: mt.Steps
    forward: Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class Batch:
    """B trajectories of N turns with their advantages.

    Attributes:
        run: whose policies, device and configuration they are.
        number: of the round.
        rollout: of the trajectories.
        advantage: of each turn, [B, N].
        valid: turns that take part, [B, N]; rows of the others weigh nothing.
        first: place of these trajectories among those of all ranks.
    """

    run: Run
    number: int
    rollout: Rollout
    advantage: Tensor
    valid: Tensor
    first: int

    def minibatches(self) -> Iterator[tuple[Tensor, ...]]:
        """Rows of every optimiser step, in parts that fit into memory."""
        config, trajectory = self.run.config, self.rollout.trajectory
        exists, share = trajectory.step_mask, config.grpo.share
        if not config.stochastic:
            turns = self.paired if config.objective == "dpo" else trajectory.turn_mask
            exists, share = turns[..., None].expand(-1, -1, config.nft.noise_levels), 1.0
        rows = training_rows(
            exists,
            generators=[self.generator("rows", b) for b in range(len(self.rollout))],
            share=share,
            minibatches=config.training.minibatches,
        )
        idle = torch.nn.functional.pad((self.weight == 0).nonzero()[:1], (0, 1))
        for minibatch in rows:  # where there is no pair: a row that weighs nothing
            yield (minibatch if len(minibatch) else idle).split(config.training.batch)

    @cached_property
    def losers(self) -> Tensor:
        """The trajectory that each turn is preferred to, [B, N]; its own where it is to none."""
        group = self.rollout.trajectory.group.cpu()
        losers = torch.arange(len(group))[:, None].repeat(1, self.advantage.shape[1])
        for turn, (advantage, valid) in enumerate(zip(self.advantage.T, self.valid.T, strict=True)):
            pairs = mt.group_pairs(advantage.cpu(), group, valid=valid.cpu())
            losers[pairs.winner, turn] = pairs.loser
        return losers

    @property
    def paired(self) -> Tensor:
        """Turns that are preferred to another trajectory's, [B, N]."""
        return self.losers != torch.arange(len(self.losers))[:, None]

    @property
    def weight(self) -> Tensor:
        """1 for turns that the objective learns from, else 0, [B, N]."""
        paired = self.run.config.objective == "dpo"
        return (self.paired if paired else self.valid).float()

    def renoised(self, rows: Tensor, noise_of: Tensor | None = None) -> Renoised:
        """Noise what the rows' turns made, by the noise and flow time of other rows if given."""
        trajectory, turn, _ = rows.unbind(dim=1)
        clean = self.rollout.trajectory.clean[trajectory, turn].float()
        keys = (rows if noise_of is None else noise_of).tolist()
        generators = [self.generator("renoise", *key) for key in keys]
        uniform = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        sigma = mt.shift_sigmas(uniform, self.run.config.nft.sigma_shift)
        noise = mt.batched_noise(clean.shape[1:], generators)
        clean, noise, sigma = (x.to(self.run.device) for x in (clean, noise, sigma))
        x_t, model = mt.interpolate(clean, noise, sigma), self.run.policies.model
        return Renoised(
            x_t,
            sigma,
            mt.velocity_target(clean, noise),
            lambda: self.rollout.velocity(model, x_t, sigma, trajectory, turn),
        )

    def replayed(self, rows: Tensor) -> Replayed:
        """Look the rows' steps up."""
        steps = mt.Steps(*(x.to(self.run.device) for x in self.rollout.trajectory.steps(*rows.T)))
        trajectory, turn, _ = rows.unbind(dim=1)
        model, states = self.run.policies.model, (steps.x_t, steps.sigma)
        return Replayed(steps, lambda: self.rollout.velocity(model, *states, trajectory, turn))

    @property
    def solver(self) -> mt.Solver:
        """Of the stochastic steps."""
        return solver_of(self.run.config)

    def transition(self, steps: mt.Steps, velocity: Tensor) -> mt.Transition:
        """Density of the steps' next states."""
        return self.solver(steps.x_t, velocity, steps.sigma, steps.next_sigma)

    def of_turns(self, values: Tensor, rows: Tensor) -> Tensor:
        """Values [B, N] of the turns that rows belong to, on the device."""
        return values[rows[:, 0], rows[:, 1]].to(self.run.device)

    def reference(self, forward: Callable[[], Tensor]) -> Tensor:
        """Velocity of the model as it came."""
        with torch.no_grad(), self.run.policies.use("reference"):
            return forward()

    def generator(self, purpose: str, trajectory: int, *rest: int) -> torch.Generator:
        """Of a trajectory by its place among those of all ranks."""
        seed, place = self.run.config.training.seed, self.first + trajectory
        return keyed_generator(seed, purpose, self.number, place, *rest)


@torch.no_grad()
def check_first_ratios(batch: Batch) -> None:
    """Before the first update every ratio must be 1: compare, say so, stop if it is not.

    Raises:
        ReplayError: ratios deviate, and ``safety.ratio`` is not "warn".
    """
    config, trajectory = batch.run.config, batch.rollout.trajectory
    rows = trajectory.step_mask[: config.sampling.batch].nonzero()
    log_prob = torch.zeros_like(trajectory.log_prob)
    for part in rows.split(config.training.batch):
        steps, forward = batch.replayed(part)
        transition = batch.transition(steps, forward())
        found = mt.gaussian_log_prob(steps.next_x, *transition, reduction="mean")
        log_prob[part.unbind(dim=1)] = found.cpu()
    valid = torch.zeros_like(trajectory.step_mask)
    valid[rows.unbind(dim=1)] = True
    batch.run.ratio_checked(
        mt.check_ratio(
            log_prob,
            trajectory.log_prob,
            clip=config.grpo.clip,
            valid=valid,
            share=config.safety.ratio_share,
        )
    )


def solver_of(config: Config) -> mt.Solver | None:
    """How stochastic steps are taken; None without them."""
    kind = SOLVERS[config.sampling.solver]
    return kind(config.sampling.noise_level) if config.stochastic else None


def stochastic_steps(config: Config, number: int) -> range | None:
    """Which steps draw noise in a round; None without them."""
    size, interval = config.sampling.stochastic_steps, config.sampling.window_interval
    if not config.stochastic:
        return None
    if interval == 0:
        return range(size)
    return mt.sliding_window(number, size=size, steps=config.sampling.steps, interval=interval)
