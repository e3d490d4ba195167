"""Teach FLUX.1-Kontext or FLUX.2-klein to make several edits in a row, by reinforcement learning.

    python examples/train_flux.py shapes-nft
    accelerate launch --config_file examples/flux/launch/ddp.yaml examples/train_flux.py \
        kontext-nft --data.chains chains.jsonl --rewards.judge http://judge:8000/v1 ...

This file is the method: sample chains, score every turn, fuse, broadcast, loss, step. What keeps a
run of days alive (checkpoints, evaluation, log) is in ``flux/run.py``, what it can be told in
``flux/config.py``; everything mathematical is a call of the library. Every random number comes from
a key such as (seed, "noise", round, trajectory): a round that is done again, or on other ranks, or
in other batches, draws the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from flux.config import Config
from flux.rewards import advantages_of, rewards_of
from flux.run import Run, main
from torch import Tensor

import mteditflow as mt
from mteditflow.pipelines import Rollout
from mteditflow.rewards import TurnScores
from mteditflow.training import (
    Updater,
    gather_scores,
    keyed_generator,
    training_rows,
)

SOLVERS = {"flow": mt.FlowSDE, "dance": mt.DanceSDE, "cps": mt.CPS}


def train(run: Run) -> None:
    """Sample, score, fuse, broadcast, loss, step: until the last round."""
    config = run.config
    updater = Updater(
        run.optimizer, run.policies.parameters, max_grad_norm=config.training.max_grad_norm
    )
    for number in run.rounds():
        rollout, terms, first = sample(run, number)
        advantage, valid = advantages(run, terms, rollout.trajectory.group)
        batch = Batch(run, number, rollout, advantage, valid, first)
        if config.stochastic and number == run.first_round:
            batch.check_ratio()
        with run.log.stopwatch.phase("updating"):
            for parts in batch.minibatches():
                run.updated(updater.step(parts, batch.losses))
        decay = mt.old_policy_decay(
            number, slope=config.nft.old_slope, maximum=config.nft.old_maximum
        )
        run.policies.update_old(decay=decay)


def sample(run: Run, number: int) -> tuple[Rollout, dict[str, TurnScores], int]:
    """Roll out this rank's chains; each part is scored while the next one is sampled."""
    config = run.config
    chains, references, group, first = run.next_chains()
    parts, waiting, images = [], [], []
    with (
        run.log.stopwatch.phase("sampling"),
        run.policies.use("current" if config.stochastic else "old"),
        run.log.bar("rollout", len(chains), unit="chains") as bar,
    ):
        for part in run.editor.roll_out(
            references,
            [chain.instructions for chain in chains],
            generators=[
                keyed_generator(config.training.seed, "noise", number, first + b)
                for b in range(len(chains))
            ],
            group=group,
            batch=config.sampling.batch,
            solver=solver_of(config),
            stochastic_steps=stochastic_steps(config, number),
            verify=number == run.first_round,
        ):
            made = [[r, *m] for r, m in zip(references[part.rows], part.images, strict=True)]
            waiting.append(run.submit(chains[part.rows], made))
            parts.append(part.rollout)
            images += made
            bar.advance(len(made))
            run.stop_if_asked()
    terms = run.collect(waiting)
    run.show(chains, images, terms)
    return Rollout.concatenate(parts), terms, first


def advantages(
    run: Run, own_terms: dict[str, TurnScores], own_group: Tensor
) -> tuple[Tensor, Tensor]:
    """Advantages of this rank's turns, from the scores of all ranks."""
    terms, own = gather_scores(own_terms, device=run.device)
    (group,), _ = mt.gather_ranks(own_group.to(run.device))
    group = group.cpu()
    run.scored(terms, rewards_of(run.config.rewards, terms), group)
    advantage, valid = advantages_of(run.config.rewards, terms, group)
    return advantage[own], valid[own]


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's part of a round: B trajectories of N turns, their advantages and losses."""

    run: Run
    number: int  # of the round
    rollout: Rollout
    advantage: Tensor  # [B, N]
    valid: Tensor  # [B, N]: False for turns that take no part; such rows weigh nothing
    first: int  # of these trajectories among those of all ranks

    def losses(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Quantities of rows (trajectory, turn, step), "loss" among them, and their weights."""
        stochastic = self.run.config.stochastic
        quantities, kl_coef = self.grpo(rows) if stochastic else self.nft(rows)
        quantities["loss"] = quantities["policy_loss"]
        if kl_coef > 0:
            quantities["loss"] = quantities["policy_loss"] + kl_coef * quantities["kl"]
        return quantities, self.of_turns(self.valid, rows).float()

    def minibatches(self) -> Iterator[tuple[Tensor, ...]]:
        """Rows of every optimiser step, in parts that fit into memory."""
        config, trajectory = self.run.config, self.rollout.trajectory
        exists, share = trajectory.step_mask, config.grpo.share
        if not config.stochastic:
            levels = config.nft.noise_levels
            exists, share = trajectory.turn_mask[..., None].expand(-1, -1, levels), 1.0
        rows = training_rows(
            exists,
            generators=[self.generator("rows", b) for b in range(len(self.rollout))],
            share=share,
            minibatches=config.training.minibatches,
        )
        for minibatch in rows:
            yield minibatch.split(config.training.batch)

    def nft(self, rows: Tensor) -> tuple[dict[str, Tensor], float]:
        """DiffusionNFT: noise what was made anew, and move toward it or away from it."""
        run, options = self.run, self.run.config.nft
        trajectory, turn, _ = rows.unbind(dim=1)
        clean = self.rollout.trajectory.clean[trajectory, turn].float()
        generators = [self.generator("renoise", *row) for row in rows.tolist()]
        uniform = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        sigma = mt.shift_sigmas(uniform, options.sigma_shift)
        noise = mt.batched_noise(clean.shape[1:], generators)
        clean, noise, sigma = (x.to(run.device) for x in (clean, noise, sigma))
        x_t = mt.interpolate(clean, noise, sigma)

        def forward() -> Tensor:
            return self.rollout.velocity(run.policies.model, x_t, sigma, trajectory, turn)

        velocity = forward()
        old_velocity = run.policies.old_velocity(velocity, forward)
        target = mt.velocity_target(clean, noise)
        maximum = run.config.rewards.advantage_max
        advantage = self.of_turns(self.advantage, rows)
        r = mt.optimality_probability(advantage, advantage_max=maximum)
        if options.loss == "adaptive":
            loss = mt.adaptive_nft_loss(
                velocity, old_velocity, target, r, sigma,
                nft_beta=options.beta, advantage_max=maximum,
            )  # fmt: skip
        else:
            loss = mt.nft_loss(velocity, old_velocity, target, r, nft_beta=options.beta)
        quantities = {"policy_loss": loss}
        if options.kl_coef > 0:
            quantities["kl"] = mt.velocity_kl(velocity, self.reference(forward))
        return quantities, options.kl_coef

    def grpo(self, rows: Tensor) -> tuple[dict[str, Tensor], float]:
        """Flow-GRPO: replay stochastic steps, and make good ones likelier."""
        options = self.run.config.grpo
        steps, forward = self.replay(rows)
        transition = self.transition(steps, forward())
        log_prob = mt.gaussian_log_prob(steps.next_x, *transition, reduction="mean")
        loss = mt.clipped_surrogate_loss(
            log_prob,
            steps.log_prob,
            self.of_turns(self.advantage, rows),
            clip_low=options.clip,
            clip_high=options.clip,
        )
        ratio = (log_prob.detach() - steps.log_prob).exp()
        clipped = ((ratio - 1).abs() > options.clip).float()
        quantities = {"policy_loss": loss, "ratio": ratio, "clip_fraction": clipped}
        if options.kl_coef > 0:
            reference = self.transition(steps, self.reference(forward))
            quantities["kl"] = mt.gaussian_kl(
                transition.mean, reference.mean, transition.std, reduction="mean"
            )
        return quantities, options.kl_coef

    def replay(self, rows: Tensor) -> tuple[mt.Steps, Callable[[], Tensor]]:
        """Stored steps on the device, and what computes their velocity again."""
        steps = mt.Steps(*(x.to(self.run.device) for x in self.rollout.trajectory.steps(*rows.T)))
        trajectory, turn, _ = rows.unbind(dim=1)
        model, states = self.run.policies.model, (steps.x_t, steps.sigma)
        return steps, lambda: self.rollout.velocity(model, *states, trajectory, turn)

    def transition(self, steps: mt.Steps, velocity: Tensor) -> mt.Transition:
        """Density of the next states."""
        solver = solver_of(self.run.config)
        return solver(steps.x_t, velocity, steps.sigma, steps.next_sigma)

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
    def check_ratio(self) -> None:
        """Before the first update every ratio must be 1: compare, say so, stop if it is not.

        Raises:
            ReplayError: ratios deviate, and ``safety.ratio`` is not "warn".
        """
        config, trajectory = self.run.config, self.rollout.trajectory
        rows = trajectory.step_mask[: config.sampling.batch].nonzero()
        log_prob = torch.zeros_like(trajectory.log_prob)
        for part in rows.split(config.training.batch):
            steps, forward = self.replay(part)
            transition = self.transition(steps, forward())
            found = mt.gaussian_log_prob(steps.next_x, *transition, reduction="mean")
            log_prob[part.unbind(dim=1)] = found.cpu()
        valid = torch.zeros_like(trajectory.step_mask)
        valid[rows.unbind(dim=1)] = True
        self.run.ratio_checked(
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


if __name__ == "__main__":
    main(train)
