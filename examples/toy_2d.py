"""GRPO and NFT on a ring of eight Gaussians, three of them rewarded; writes toy_2d.png."""

import copy

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import mteditflow as mt

BATCH, STEPS, SOLVER = 256, 12, mt.FlowSDE(noise_level=0.7)
MODES = torch.view_as_real(2 * torch.exp(0.25j * torch.pi * torch.arange(8)))


class Policy(nn.Sequential):
    """Velocity [M, 2] at points [M, 2] and flow times [M]."""

    def forward(self, x_t: Tensor, sigma: Tensor, **_: object) -> Tensor:  # noqa: D102
        return super().forward(torch.cat([x_t, sigma[:, None]], dim=1))


def sample(policy: Policy, solver: mt.Solver, seed: int) -> mt.Trajectory:
    """Roll out one turn, each trajectory with its own generator."""
    generators = mt.trajectory_generators(seed * BATCH, BATCH)
    noise, sigmas = mt.batched_noise((1, 2), generators), mt.uniform_sigmas(STEPS)
    return mt.rollout(policy, noise, sigmas, solver=solver, generators=generators, reduction="sum")


def reward(trajectory: mt.Trajectory) -> Tensor:
    """Return 1 close to a rewarded mode, 0 elsewhere, [B]."""
    return (torch.cdist(trajectory.clean[:, 0], MODES[::3]).amin(dim=1) < 0.4).float()


def flow_matching(policy: Policy, *_: object) -> Tensor:
    """Return the flow-matching loss on samples of the ring, without a reward, [B]."""
    clean, noise = MODES.repeat(BATCH // 8, 1) + 0.12 * torch.randn(BATCH, 2), torch.randn(BATCH, 2)
    sigma = torch.rand(BATCH)
    return mt.flow_matching_loss(policy(mt.interpolate(clean, noise, sigma), sigma), clean, noise)


def grpo(policy: Policy, _old: Policy, trajectory: mt.Trajectory, advantage: Tensor) -> Tensor:
    """Replay every step, and return the clipped surrogate loss per step."""
    rows = trajectory.step_mask.nonzero(as_tuple=True)
    x_t, next_x, sigma, next_sigma, old_log_prob = trajectory.steps(*rows)
    transition = SOLVER(x_t, policy(x_t, sigma), sigma, next_sigma)
    log_prob = mt.gaussian_log_prob(next_x, *transition, reduction="sum")
    advantage = mt.broadcast_to_steps(advantage, turns=1, steps=STEPS)[rows]
    return mt.clipped_surrogate_loss(log_prob, old_log_prob, advantage, clip_low=0.2, clip_high=0.2)


def nft(policy: Policy, old: Policy, trajectory: mt.Trajectory, advantage: Tensor) -> Tensor:
    """Re-noise the samples; pull the velocity toward good ones, and away from bad ones."""
    clean, r = trajectory.clean[:, 0], mt.optimality_probability(advantage)
    noise, sigma = torch.randn_like(clean), torch.rand(BATCH)
    x_t, target = mt.interpolate(clean, noise, sigma), mt.velocity_target(clean, noise)
    return mt.nft_loss(policy(x_t, sigma), old(x_t, sigma), target, r, nft_beta=1.0)


torch.manual_seed(0)
start = Policy(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
plan = {"before": (flow_matching, 1, 1000), "GRPO": (grpo, 20, 4), "NFT": (nft, 20, 4)}
figure, axes = plt.subplots(1, 3, figsize=(12, 4.3), layout="constrained")
for axis, (name, (loss, rounds, updates)) in zip(axes, plan.items(), strict=True):
    policy = start if name == "before" else copy.deepcopy(start)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    for seed in range(rounds):
        old = copy.deepcopy(policy)
        trajectory = sample(old, SOLVER, seed)
        advantage = mt.group_advantage(reward(trajectory), torch.zeros(BATCH).long())  # one group
        for _ in range(updates):
            optimizer.zero_grad()
            loss(policy, old, trajectory, advantage).mean().backward()
            optimizer.step()
    final = sample(policy, mt.ODE(), seed=1000)
    print(text := f"{name}: {reward(final).mean():.0%} at a rewarded mode")
    axis.plot(*final.latents[:, 0].permute(2, 1, 0), color="0.6", linewidth=0.3, zorder=0)
    axis.scatter(*final.clean[:, 0].T, c=reward(final), cmap="coolwarm", vmin=0, vmax=1, s=9)
    axis.set(title=text, xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")
figure.savefig("toy_2d.png", dpi=150)
