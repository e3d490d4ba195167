"""One training loop for every objective, on a plain module, by the core alone.

Run as a script it trains a 2-D Gaussian policy by each objective and prints, as JSON, the gain in
mean reward of fresh samples and the standard error of that gain. ``test_one_program.py`` runs it
where no other package can be imported, and gives ``train`` a diffusers pipeline.
"""

import copy
import functools
import json
import sys

import torch
from torch import nn

import mteditflow as mt
from mteditflow.objectives import AWM, DPO, DPPO, GRPO, NFT, Distillation, Guard, Renoise, RoundKey


def train(objective, world, optimizer, *, rounds, minibatches=2, batch=64):
    """Train a policy by any objective."""
    for number in range(rounds):
        samples = world.sample(
            objective.samples_with, objective.sampling(number, steps=world.steps)
        )
        advantage = mt.group_advantage(world.reward(samples), samples.group)
        given = advantage if objective.card.rewarded else None
        velocity = world.velocity(samples)
        for units in objective.units(
            samples, given, key=RoundKey(0, number), minibatches=minibatches
        ):
            optimizer.zero_grad()
            for part in units.split(batch):
                output = objective(velocity, samples, part)
                (output.loss.sum() / part.count).backward()
            optimizer.step()
        world.update_old(objective.old_decay(number))


REPLAYS = {"stochastic_steps": 5, "noise_level": 0.7}
WIDE = {"clip_low": 0.2, "clip_high": 0.2}  # for sums over two elements
FORWARD = {"renoise": Renoise(levels=4)}
OBJECTIVES = {
    "nft": NFT(**FORWARD),
    "awm": AWM(**WIDE, **FORWARD),
    "dpo": DPO(dpo_beta=10.0, **FORWARD),
    "grpo": GRPO(**WIDE, **REPLAYS),
    "guard": Guard(**WIDE, **REPLAYS),
    "dppo": DPPO(threshold=0.05, **REPLAYS),
    "distillation": Distillation(share=0.5),
}


class Policy(nn.Module):
    """Flow to a standard Gaussian, moved by a small network that starts at 0."""

    def __init__(self):
        super().__init__()
        self.move = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 2))
        nn.init.zeros_(self.move[2].weight)
        nn.init.zeros_(self.move[2].bias)

    def forward(self, x_t, sigma, goal):
        s = sigma[:, None]
        base = x_t * (2 * s - 1) / (s**2 + (1 - s) ** 2)
        return base + self.move(torch.cat([x_t, s, goal], dim=1))


class Points:
    """Chains of two turns, each to end near a goal of its own; the conditioning is the goal."""

    steps = 6

    def __init__(self, groups=16, size=4):
        torch.manual_seed(0)
        self.policies = {"current": Policy()}
        for name in ("old", "reference"):
            self.policies[name] = copy.deepcopy(self.policies["current"])
        angle = 2 * torch.pi * torch.rand(groups, 2)
        self.group = torch.arange(groups).repeat_interleave(size)
        self.goals = torch.stack([angle.cos(), angle.sin()], dim=2)[self.group]  # [B, N, 2]
        self.seed = 0

    def sample(self, policy, sampling):
        self.seed += len(self.group)
        generators = mt.trajectory_generators(self.seed, len(self.group))
        model = self.policies[policy]
        return mt.rollout(
            lambda x_t, sigma, *, reference, turn: model(x_t, sigma, self.goals[:, turn]),
            mt.batched_noise((2, 2), generators),
            mt.uniform_sigmas(self.steps),
            solver=sampling.solver or mt.ODE(),
            generators=generators,
            reduction="sum",
            group=self.group,
            stochastic_steps=sampling.stochastic_steps,
        )

    def reward(self, samples):
        return -(samples.clean - self.goals).square().sum(dim=2).mean(dim=1)

    def velocity(self, samples):
        def at(policy, x_t, sigma, at):
            goal = self.goals[at[:, 0], at[:, 1]]
            if policy == "teacher":  # the base model, with a drift to the goal
                return self.policies["reference"](x_t, sigma, goal) - goal
            return self.policies[policy](x_t, sigma, goal)

        return at

    def update_old(self, decay):
        old, current = (self.policies[name].parameters() for name in ("old", "current"))
        mt.update_old_policy(old, current, decay=decay)

    @torch.no_grad()
    def fresh_rewards(self, repeats=8):
        """Rewards of the current policy on noise that training never draws, by an ODE."""
        self.seed = 10**6
        sampling = NFT().sampling(0, steps=self.steps)
        return torch.cat([self.reward(self.sample("current", sampling)) for _ in range(repeats)])


@functools.cache
def rewards_before():
    """Rewards of the untrained policy, which every objective starts from."""
    return Points().fresh_rewards()


def gain(objective):
    """Mean gain in reward after 20 updates, paired by noise, and its standard error."""
    world = Points()
    optimizer = torch.optim.Adam(world.policies["current"].parameters(), lr=1e-2)
    train(objective, world, optimizer, rounds=10)
    gains = world.fresh_rewards() - rewards_before()
    return float(gains.mean()), float(gains.std() / len(gains) ** 0.5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps({name: gain(own) for name, own in OBJECTIVES.items()}) + "\n")
