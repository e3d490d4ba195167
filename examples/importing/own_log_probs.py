"""The clipped surrogate in a trainer that has its own sampler, log-probs and rollout buffer.

    python examples/importing/own_log_probs.py

Shows the three places where such a trainer calls the library: group advantages, the loss, and
diagnostics: `check_ratio` on the first pass over each rollout, where every ratio must be 1, then
`clip_fraction` and `approximate_kl`. Leaves out images, flows and the library's samplers: the
policy moves a point to a goal in five noisy steps.
"""

import torch
from torch import Tensor, nn

from mteditflow import (
    approximate_kl,
    check_ratio,
    clip_fraction,
    clipped_surrogate_loss,
    group_advantage,
)

GOALS, MEMBERS, STEPS, STD = 16, 16, 5, 0.3
CLIP = {"clip_low": 0.2, "clip_high": 0.2}  # for log-probs that are summed over elements


class Policy(nn.Sequential):
    """Mean displacement [M, 2] given point [M, 2], goal [M, 2] and time [M, 1]."""

    def step(self, point: Tensor, goal: Tensor, time: Tensor) -> torch.distributions.Normal:
        """Return the distribution of the next point."""
        return torch.distributions.Normal(point + self(torch.cat([point, goal, time], 1)), STD)


def roll_out(policy: Policy, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the trainer's rollout buffer: tensors by name, [B, S, ...]."""
    goal = torch.randn(GOALS, 2, generator=generator).repeat_interleave(MEMBERS, dim=0)
    point, rows = torch.zeros_like(goal), []
    with torch.no_grad():
        for step in range(STEPS):
            time = torch.full((len(goal), 1), step / STEPS)
            distribution = policy.step(point, goal, time)
            following = distribution.mean + STD * torch.randn(point.shape, generator=generator)
            rows.append((point, following, time, distribution.log_prob(following).sum(dim=1)))
            point = following
    names = ("point", "following", "time", "log_prob")
    buffer = {n: torch.stack(x, dim=1) for n, x in zip(names, zip(*rows, strict=True), strict=True)}
    return buffer | {"goal": goal, "reward": -(point - goal).norm(dim=1)}


def log_prob_of(policy: Policy, buffer: dict[str, Tensor]) -> Tensor:
    """Return log-probs of the stored steps under the current policy, [B, S]."""
    goal = buffer["goal"][:, None].expand(-1, STEPS, -1)
    inputs = (x.flatten(0, 1) for x in (buffer["point"], goal, buffer["time"]))
    distribution = policy.step(*inputs)
    return distribution.log_prob(buffer["following"].flatten(0, 1)).sum(1).view(-1, STEPS)


torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
policy = Policy(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 2))
optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
group = torch.arange(GOALS).repeat_interleave(MEMBERS)

for rollout in range(27):
    buffer = roll_out(policy, generator)
    advantage = group_advantage(buffer["reward"], group)[:, None].expand(-1, STEPS)
    for epoch in range(4):
        log_prob, old_log_prob = log_prob_of(policy, buffer), buffer["log_prob"]
        if epoch == 0:
            check = check_ratio(log_prob, old_log_prob, clip=CLIP["clip_low"])
            if not check.ok:
                raise SystemExit(check.verdict)
        loss = clipped_surrogate_loss(log_prob, old_log_prob, advantage, **CLIP).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if rollout % 13 == 0:
        log_prob = log_prob_of(policy, buffer).detach()
        below, above = clip_fraction(log_prob, old_log_prob, **CLIP)
        print(
            f"rollout {rollout}: reward {buffer['reward'].mean():.2f}, "
            f"clipped {below:.0%} below and {above:.0%} above, "
            f"KL {approximate_kl(log_prob, old_log_prob):.4f}; {check.verdict}"
        )
