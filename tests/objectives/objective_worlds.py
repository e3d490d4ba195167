"""Hand-made samples, four small policies, and a velocity that remembers how it was called."""

import torch
from torch import nn

from mteditflow import FlowSDE, rollout
from mteditflow.objectives import CleanSamples
from tests.loops import some

LATENT = (2, 3)
NOISE_LEVEL = 0.7
GROUP = torch.tensor([5, 5, 5, 5, -2, -2, -2, -2])
TURN_MASK = torch.tensor([[True, True, True]] * 6 + [[True, True, False], [True, False, False]])


class Policy(nn.Module):
    """Velocity linear in the state, moved by flow time, trajectory and turn; float64."""

    def __init__(self, seed, scale=0.3):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        size = 6
        self.weight = nn.Parameter(
            scale * torch.randn(size, size, generator=random, dtype=torch.float64)
        )
        self.bias = nn.Parameter(torch.randn(size, generator=random, dtype=torch.float64))

    def forward(self, x_t, sigma, at):
        place = 0.1 * at[:, 0].double() - 0.2 * at[:, 1].double()
        moved = x_t.double().flatten(1) @ self.weight + sigma.double()[:, None] * self.bias
        return (moved + place[:, None]).view(x_t.shape)


def near(policy, seed, by):
    """A copy of a policy whose parameters are disturbed."""
    other, random = Policy(0), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for own, theirs in zip(other.parameters(), policy.parameters(), strict=True):
            noise = torch.randn(own.shape, generator=random, dtype=torch.float64)
            own.copy_(theirs + by * noise)
    return other


class Recorded:
    """A velocity that keeps its ``calls``: policy, x_t, sigma, at, whether with gradient."""

    def __init__(self, by=0.02):
        old = Policy(1)
        self.policies = {
            "current": near(old, 2, by),
            "old": old,
            "reference": near(old, 3, 0.1),
            "teacher": near(old, 4, 0.1),
        }
        self.calls = []

    def __call__(self, policy, x_t, sigma, at):
        self.calls.append((policy, x_t, sigma, at, torch.is_grad_enabled()))
        return self.policies[policy](x_t, sigma, at)

    def asked(self):
        """Policies in the order in which they were called."""
        return [call[0] for call in self.calls]

    def parameters(self):
        return list(self.policies["current"].parameters())

    def at(self, units, unit, member=0):
        """State of a member as the current policy was asked about it, batched as one row."""
        _, x_t, sigma, at, _ = next(call for call in self.calls if call[0] == "current")
        row = member * len(units) + unit
        assert at[row].tolist() == units.rows[unit, member, :2].tolist()
        return x_t[row : row + 1], sigma[row : row + 1], at[row : row + 1]


def recorded_trajectory(policy, *, reduction="mean", stochastic=(0, 1, 2), solver=None, seed=0):
    """Roll 8 chains of up to 3 turns of 4 steps out, in float64."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(8, 3, *LATENT, generator=random, dtype=torch.float64)
    everyone = torch.arange(8)

    def velocity(x_t, sigma, *, reference, turn):
        at = torch.stack([everyone, torch.full_like(everyone, turn)], dim=1)
        return policy(x_t, sigma, at)

    return rollout(
        velocity,
        noise,
        torch.tensor([1.0, 0.8, 0.55, 0.3, 0.0], dtype=torch.float64),
        solver=solver or FlowSDE(NOISE_LEVEL),
        generators=[torch.Generator().manual_seed(seed + 100 + b) for b in range(8)],
        reduction=reduction,
        group=GROUP,
        turn_mask=TURN_MASK,
        stochastic_steps=stochastic,
    )


def clean_samples(seed=0):
    random = torch.Generator().manual_seed(seed)
    return CleanSamples(torch.randn(8, 3, *LATENT, generator=random), GROUP, TURN_MASK)


def advantages(seed=0):
    """One per turn, with zeros among them, float64."""
    values = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[1, 0] = values[5, 1] = 0.0
    return values


def validity():
    valid = torch.ones(8, 3, dtype=torch.bool)
    valid[2] = False
    valid[4, 1] = False
    return valid


def key(seed=0):
    return torch.Generator().manual_seed(seed)


def gradients(total, parameters):
    """Gradients of a scalar as one vector."""
    found = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    both = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in both])


def assert_equals_loop(output, units, velocity, loop, *, rtol=1e-5, atol=1e-6):
    """Compare loss, every metric, and the gradient with those of a loop over units.

    Args:
        loop: (unit) -> (loss, metrics) as scalars, float64.
    """
    rows = [loop(unit) for unit in range(len(units))]
    loss = torch.stack([loss for loss, _ in rows])
    torch.testing.assert_close(output.loss.double(), loss, rtol=rtol, atol=atol)
    assert set(output.metrics) == set(rows[0][1])
    for name, found in some(output.metrics.items()):
        expected = torch.stack([torch.as_tensor(m[name], dtype=torch.float64) for _, m in rows])
        torch.testing.assert_close(found.double(), expected.detach(), rtol=rtol, atol=atol)
        assert found.shape == (len(units),)
        assert not found.requires_grad
    torch.testing.assert_close(
        gradients(output.loss.sum(), velocity.parameters()),
        gradients(loss.sum(), velocity.parameters()),
        rtol=10 * rtol,
        atol=10 * atol,
    )
