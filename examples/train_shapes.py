"""Teach a tiny FLUX.1-Kontext to make three edits in a row, by reinforcement learning.

    python examples/train_shapes.py --objective nft --seed 0 --output runs/demo

Left out, to keep the loop on one screen: several machines, checkpoints, mixed precision.
Everything mathematical is a call of the library; the world and its rewards are in ``shapes/``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig
from shapes.editor import load_editor
from shapes.evaluate import edit_chains, evaluate, takes_one
from shapes.report import Log, write_report
from shapes.rewards import Rewarder, exact_rewards
from shapes.served import served_rewards
from shapes.world import Chain, make_chains
from torch import Tensor

from mteditflow import (
    FlowSDE,
    Solver,
    adaptive_nft_loss,
    broadcast_to_steps,
    clamp_advantage,
    clipped_surrogate_loss,
    fuse_advantages,
    gaussian_kl,
    gaussian_log_prob,
    interpolate,
    likert_average,
    old_policy_decay,
    optimality_probability,
    shift_sigmas,
    trajectory_generators,
    turn_average,
    velocity_target,
)
from mteditflow.pipelines import LoraPolicies, Recorder, Rollout

TURNS = 3
LINKED = 1.0  # turns go on with what earlier turns have edited, where they can
SIGMA_SHIFT = 3.0  # NFT trains high noise levels more: what an edit will be is decided there
ADVANTAGE_MAX = 2.5  # NFT: where the optimality probability saturates
CLIP = 1e-3  # GRPO: of ratios of mean log-probs, which stay near 1
LOSS_ROWS = 96  # rows in one forward and backward pass; no matter for the result


class Objective(str, Enum):
    """What is minimised."""

    nft = "nft"
    grpo = "grpo"


class Rewards(str, Enum):
    """Who scores what the editor makes."""

    exact = "exact"  # from pixels, in process
    served = "served"  # a scripted judge and the consistency server, over HTTP


@dataclass(frozen=True)
class Recipe:
    """The few numbers of a run; ``RECIPES`` has those of both objectives."""

    updates: int
    learning_rate: float
    consistency_weight: float
    chains: int = 12
    group: int = 8
    steps: int = 4
    minibatches: int = 2
    rank: int = 16
    noise_level: float = 0.7
    stochastic_steps: int = 2
    kl_coef: float = 0.0


RECIPES = {
    Objective.nft: Recipe(updates=40, learning_rate=1e-3, consistency_weight=0.5),
    Objective.grpo: Recipe(updates=40, learning_rate=1e-3, consistency_weight=1.0, kl_coef=0.05),
}


def train(
    objective: Objective,
    recipe: Recipe,
    seed: int,
    pipeline: Any,
    log: Log,
    rewarder: Rewarder,
) -> None:
    """Sample, score, fuse, broadcast, loss, step."""
    nft = objective is Objective.nft
    chains = make_chains(
        recipe.chains * recipe.updates, turns=TURNS, seed=seed, split="train", linked=LINKED
    )
    group = torch.arange(recipe.chains).repeat_interleave(recipe.group)
    generator = torch.Generator().manual_seed(seed)
    lora = LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules="all-linear")
    policies = LoraPolicies(pipeline.transformer, lora)
    optimizer = torch.optim.AdamW(policies.parameters(), recipe.learning_rate, weight_decay=0.0)
    solver = None if nft else FlowSDE(recipe.noise_level)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, recipe.updates)

    for update in log.progress(recipe.updates):
        batch = [chains[update * recipe.chains + int(i)] for i in group]
        generators = trajectory_generators(
            (seed * recipe.updates + update) * len(batch), len(batch)
        )
        with policies.use("old" if nft else "current"):
            pictures, rollout = sample(
                pipeline, batch, group, recipe, solver, generator, generators
            )

        scores = rewarder(batch, pictures)
        following = scores.following.reward(likert_average)
        consistency = scores.consistency.reward(turn_average)
        valid = following.valid & consistency.valid
        rewards = {"following": following.value, "consistency": consistency.value}
        weights = {"following": 1.0, "consistency": recipe.consistency_weight}
        advantage = clamp_advantage(fuse_advantages(rewards, weights, group, valid=valid))
        advantages = broadcast_to_steps(advantage, turns=TURNS, steps=recipe.steps)

        exists = rollout.trajectory.turn_mask[..., None] if nft else rollout.trajectory.step_mask
        rows = (exists & valid[:, None, None]).nonzero()  # NFT: turns; GRPO: their noisy steps
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        for minibatch in shuffled.chunk(recipe.minibatches):
            for part in minibatch.split(LOSS_ROWS):
                index = part.unbind(dim=1)
                if nft:
                    loss = nft_rows(rollout, policies, index, advantages[index], generator)
                else:
                    loss = grpo_rows(rollout, policies, index, advantages[index], recipe)
                (loss.sum() / len(minibatch)).backward()
            torch.nn.utils.clip_grad_norm_(policies.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        policies.update_old(decay=old_policy_decay(update, slope=0.02, maximum=0.5))
        log.add(scores, rewards, valid)


def sample(
    pipeline: Any,
    chains: list[Chain],
    group: Tensor,
    recipe: Recipe,
    solver: Solver | None,
    generator: torch.Generator,
    generators: list[torch.Generator],
) -> tuple[Tensor, Rollout]:
    """Roll chains out while a recorder watches: Kontext all at once, klein one after the other."""
    size = 1 if takes_one(pipeline) else len(chains)
    pictures, rollouts = [], []
    for start in range(0, len(chains), size):
        part = slice(start, start + size)
        steps = range(recipe.stochastic_steps)
        recorder = Recorder(pipeline, solver, generators=generators[part], stochastic_steps=steps)
        with recorder:
            pictures.append(edit_chains(pipeline, chains[part], generator, steps=recipe.steps))
        rollouts.append(recorder.rollout(group=group[part]))
    return torch.cat(pictures), Rollout.concatenate(rollouts)


def nft_rows(
    rollout: Rollout,
    policies: LoraPolicies,
    index: tuple[Tensor, ...],
    advantage: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """DiffusionNFT: noise what was made anew, and move toward it or away from it."""
    trajectory, turn, _ = index
    clean = rollout.trajectory.clean[trajectory, turn]
    noise = torch.randn(clean.shape, generator=generator)
    sigma = shift_sigmas(torch.rand(len(clean), generator=generator), SIGMA_SHIFT)
    x_t = interpolate(clean, noise, sigma)

    def forward() -> Tensor:
        return rollout.velocity(policies.model, x_t, sigma, trajectory, turn)

    velocity = forward()
    old_velocity = policies.old_velocity(velocity, forward)
    target = velocity_target(clean, noise)
    r = optimality_probability(advantage, advantage_max=ADVANTAGE_MAX)
    return adaptive_nft_loss(
        velocity, old_velocity, target, r, sigma, nft_beta=1.0, advantage_max=ADVANTAGE_MAX
    )


def grpo_rows(
    rollout: Rollout,
    policies: LoraPolicies,
    index: tuple[Tensor, ...],
    advantage: Tensor,
    recipe: Recipe,
) -> Tensor:
    """Flow-GRPO: replay the stochastic steps, and make good ones likelier, near the reference."""
    trajectory, turn, _ = index
    steps = rollout.trajectory.steps(*index)
    solver = FlowSDE(recipe.noise_level)

    def forward() -> Tensor:
        return rollout.velocity(policies.model, steps.x_t, steps.sigma, trajectory, turn)

    transition = solver(steps.x_t, forward(), steps.sigma, steps.next_sigma)
    with torch.no_grad(), policies.use("reference"):
        reference = solver(steps.x_t, forward(), steps.sigma, steps.next_sigma)
    log_prob = gaussian_log_prob(steps.next_x, *transition, reduction="mean")
    loss = clipped_surrogate_loss(
        log_prob, steps.log_prob, advantage, clip_low=CLIP, clip_high=CLIP
    )
    kl = gaussian_kl(transition.mean, reference.mean, transition.std, reduction="mean")
    return loss + recipe.kl_coef * kl


def main(
    objective: Annotated[
        Objective, typer.Option(help="DiffusionNFT or Flow-GRPO.")
    ] = Objective.nft,
    seed: Annotated[int, typer.Option(help="Of chains and noise.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder of report.json and the pictures.")] = Path(
        "runs/demo"
    ),
    updates: Annotated[
        int | None, typer.Option(min=1, help="Rounds of RL; default: the recipe's.")
    ] = None,
    held_out: Annotated[
        int, typer.Option(min=2, help="Chains to evaluate on, none seen before.")
    ] = 512,
    rewards: Annotated[
        Rewards, typer.Option(help="From pixels, or from a judge and a server over HTTP.")
    ] = Rewards.exact,
    lost_answers: Annotated[
        float, typer.Option(min=0, max=1, help="Served: share of answers that the judge loses.")
    ] = 0.0,
    invent: Annotated[
        bool, typer.Option(help="Served: put 0.5 in place of a lost answer, as others do.")
    ] = False,
) -> None:
    """Train the shipped editor on three-turn chains, and report before and after."""
    if rewards is Rewards.exact and (lost_answers or invent):
        raise typer.BadParameter("--lost-answers and --invent: expected --rewards served with them")
    recipe = RECIPES[objective]
    recipe = replace(recipe, updates=recipe.updates if updates is None else updates)
    pipeline = load_editor()
    chains = make_chains(held_out, turns=TURNS, seed=seed, split="held_out", linked=LINKED)
    log = Log(objective.value, seed)
    before = evaluate(pipeline, chains, seed=seed, steps=recipe.steps)
    if rewards is Rewards.exact:
        train(objective, recipe, seed, pipeline, log, exact_rewards)
    else:
        with served_rewards(lost_answers=lost_answers, invent=invent) as rewarder:
            train(objective, recipe, seed, pipeline, log, rewarder)
    after = evaluate(pipeline, chains, seed=seed, steps=recipe.steps)
    write_report(output, log, asdict(recipe), chains, before, after)


if __name__ == "__main__":
    typer.run(main)
