r"""What the solvers do to the marginals, on Gaussian data, where everything is known exactly.

Let clean ~ N(m, s^2) and noise ~ N(0, 1), independent. On the path x = (1 - t) clean + t noise at
flow time t, so the marginal the ODE keeps is

    E x = (1 - t) m,    V(t) = Var x = (1 - t)^2 s^2 + t^2.

(clean, noise, x) are jointly Gaussian; with Cov(clean, x) = (1 - t) s^2 and Cov(noise, x) = t the
conditional expectations are the regression lines

    E[clean | x] = m + (1 - t) s^2 / V (x - E x),    E[noise | x] = t / V (x - E x),

and the velocity, which is the minimiser of the flow-matching loss, their difference:

    v(x, t) = E[noise - clean | x] = -m + (t - (1 - t) s^2) / V (x - E x).

It is affine in x, so every solver step is x' = A x + b + std z and moves mean and variance by

    mean' = A mean + b,    var' = A^2 var + std^2.

A and b are read off the solver itself, at x = 0 and x = 1: no Monte Carlo noise anywhere, and
orders of convergence are seen to two digits.
"""

import math
from itertools import pairwise

import pytest
import torch

from mteditflow import (
    CPS,
    ODE,
    DanceSDE,
    FlowSDE,
    batched_noise,
    clean_from_velocity,
    interpolate,
    noise_from_velocity,
    rollout,
    shift_sigmas,
    trajectory_generators,
    velocity_target,
)
from tests.loops import some

MEAN, STD = 0.7, 0.5  # of the data


def marginal(sigma):
    """Mean and variance on the path."""
    return (1 - sigma) * MEAN, (1 - sigma) ** 2 * STD**2 + sigma**2


def exact_velocity(x, sigma):
    mean, variance = marginal(sigma)
    return -MEAN + (sigma - (1 - sigma) * STD**2) / variance * (x - mean)


def grid(steps, start=1.0, shift=1.0):
    return shift_sigmas(torch.linspace(start, 0, steps + 1, dtype=torch.float64), shift)


def propagate(solver, sigmas):
    """Mean and variance at each point of a grid, exactly, from the path's at the first."""
    before = sigmas[:-1, None]
    zero, one = torch.zeros_like(before), torch.ones_like(before)
    at_zero, std = solver(zero, exact_velocity(zero, before), sigmas[:-1], sigmas[1:])
    at_one, _ = solver(one, exact_velocity(one, before), sigmas[:-1], sigmas[1:])
    maps = zip(
        (at_one - at_zero).flatten().tolist(),
        at_zero.flatten().tolist(),
        std.flatten().tolist(),
        strict=True,
    )
    moments = [marginal(sigmas[0].item())]
    for slope, offset, std in maps:
        mean, variance = moments[-1]
        moments.append((slope * mean + offset, slope**2 * variance + std**2))
    return moments


def variance_errors(solver, counts, **options):
    """Variance at data, minus that of the data, for each number of steps."""
    return [propagate(solver, grid(steps, **options))[-1][1] - STD**2 for steps in counts]


def fitted_order(counts, errors):
    """Minus the slope of log error over log steps, by least squares."""
    x = torch.tensor([math.log(c) for c in counts], dtype=torch.float64)
    y = torch.tensor([math.log(abs(e)) for e in errors], dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    return -((x * y).sum() / x.square().sum()).item()


def test_velocity_is_the_minimiser_of_the_flow_matching_loss():
    """Its residual is uncorrelated with 1 and x, which is what least squares means; 5 sigma."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 200_000, 1, generator=generator, dtype=torch.float64)
    clean = MEAN + STD * clean
    for sigma in (0.1, 0.5, 0.9):
        x_t = interpolate(clean, noise, sigma)
        residual = velocity_target(clean, noise) - exact_velocity(x_t, sigma)
        for factor in (torch.ones_like(x_t), x_t):
            product = residual * factor
            assert abs(product.mean()) < 5 * product.std() / len(product) ** 0.5
        # And the estimates from it are the regression lines of the derivation.
        mean, variance = marginal(sigma)
        v = exact_velocity(x_t, sigma)
        expected = MEAN + (1 - sigma) * STD**2 / variance * (x_t - mean)
        torch.testing.assert_close(clean_from_velocity(x_t, v, sigma), expected)
        expected = sigma / variance * (x_t - mean)
        torch.testing.assert_close(noise_from_velocity(x_t, v, sigma), expected)


@pytest.mark.parametrize("solver", [ODE(), FlowSDE(0.7), DanceSDE(0.8), CPS(0.5)])
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_mean_is_exact_for_any_step_size(solver, steps):
    """The mean of the path is a straight line, and the noise estimate has mean 0 on it."""
    sigmas = grid(steps, shift=2.0)
    means = [mean for mean, _ in propagate(solver, sigmas)]
    assert means == pytest.approx([marginal(s)[0] for s in sigmas.tolist()], abs=1e-13)


@pytest.mark.parametrize(
    ("solver", "start"),
    [
        (ODE(), 1.0),
        (DanceSDE(0.3), 1.0),
        (DanceSDE(1.0), 1.0),
        (FlowSDE(0.7), 0.9),
        (FlowSDE(1.2), 0.9),
        (FlowSDE(1.3), 1.0),
    ],
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_marginals_are_the_odes_at_first_order(solver, start, shift):
    counts = [400, 800, 1600]
    errors = variance_errors(solver, counts, start=start, shift=shift)
    assert fitted_order(counts, errors) == pytest.approx(1, abs=0.06)
    # And on the way, not only at data.
    for steps, bound in ((100, 0.03), (1000, 0.003)):
        sigmas = grid(steps, start=min(start, 0.9), shift=shift)
        for (_, variance), sigma in some(
            zip(propagate(solver, sigmas), sigmas.tolist(), strict=True)
        ):
            assert abs(variance - marginal(sigma)[1]) < bound


@pytest.mark.parametrize("noise_level", [0.5, 0.7, 0.9])
def test_flow_sde_from_pure_noise_converges_at_order_a_squared(noise_level):
    """g diverges at sigma = 1, and the first step, with the substitute, is a^4 / 4 off.

    With d the step, the first step has pull a^2 / 2 and std a, whatever d:
    var = (1 - a^2 / 2)^2 + a^2 = 1 + a^4 / 4. The k-th step after it has pull a^2 / (2 k), which
    shrinks an error of variance by 1 - a^2 / k: after k steps k^(-a^2) of it is left. At a fixed
    flow time k ~ 1 / d, so the error is C d + D d^(a^2). 2 e(d / 2) - e(d) has no first term.
    """
    a = noise_level
    first = propagate(FlowSDE(a), grid(10_000))[1][1]
    assert first == pytest.approx(1 + a**4 / 4, abs=1e-3)
    counts = [1000, 2000, 4000, 8000]
    errors = variance_errors(FlowSDE(a), counts)
    left = [2 * fine - coarse for coarse, fine in pairwise(errors)]
    assert fitted_order(counts[:-1], left) == pytest.approx(a**2, abs=0.03)


def test_wrong_drifts_would_be_seen():
    """The instrument can tell: noise without its pull, or with twice that, does not converge."""

    class Wrong(DanceSDE):
        def coefficients(self, sigma, next_sigma):
            pull, std = super().coefficients(sigma, next_sigma)
            return pull * self.factor, std

    for factor in (0.0, 2.0):
        solver = Wrong(0.5)
        object.__setattr__(solver, "factor", factor)
        coarse, fine = variance_errors(solver, [400, 1600])
        assert abs(fine) > 0.02
        assert fine == pytest.approx(coarse, rel=0.2)


def cps_recursion(noise_level, sigmas):
    """Mean and variance under CPS from its definition, with the regression lines above.

    x' = (1 - t') E[clean | x] + t' (cos E[noise | x] + sin z), so with c = x - E x:
    x' - E x' = ((1 - t') (1 - t) s^2 / V + t' cos t / V) c + t' sin z.
    """
    cosine, sine = math.cos(noise_level * math.pi / 2), math.sin(noise_level * math.pi / 2)
    moments = [marginal(sigmas[0])]
    for t, after in pairwise(sigmas):
        variance = moments[-1][1]
        slope = ((1 - after) * (1 - t) * STD**2 + after * cosine * t) / marginal(t)[1]
        moments.append(((1 - after) * MEAN, slope**2 * variance + (after * sine) ** 2))
    return moments


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 200])
def test_cps_follows_its_own_recursion(noise_level, steps):
    sigmas = grid(steps, shift=1.5)
    ours = propagate(CPS(noise_level), sigmas)
    expected = cps_recursion(noise_level, sigmas.tolist())
    for one, other in some(zip(ours, expected, strict=True)):
        assert one == pytest.approx(other, rel=1e-10, abs=1e-13)


def test_cps_does_not_keep_the_marginals():
    coarse, fine = variance_errors(CPS(0.5), [1000, 4000])
    assert fine < -0.03  # of 0.25: too narrow, and it does not go away
    assert fine == pytest.approx(coarse, rel=0.1)
    # With all noise fresh the clean estimate forgets everything: it collapses to the data's mean.
    (forgetful,) = variance_errors(CPS(1.0), [1000])
    assert forgetful < -0.1


@pytest.mark.parametrize("solver", [ODE(), FlowSDE(0.7), DanceSDE(0.6), CPS(0.5)])
def test_monte_carlo_agrees_with_the_propagation(solver):
    """20,000 samples by ``rollout``; every state of every step within 5 standard errors."""
    b, count = 20, 1000
    noise = batched_noise((1, count), trajectory_generators(0, b), dtype=torch.float64)
    sigmas = grid(12)

    def velocity(x_t, sigma, *, reference, turn):
        return exact_velocity(x_t, sigma[:, None])

    samples = rollout(
        velocity, noise, sigmas, solver=solver, generators=trajectory_generators(b, b),
        reduction="mean",
    ).latents  # fmt: skip
    n = b * count
    for step, (mean, variance) in some(enumerate(propagate(solver, sigmas))):
        x = samples[:, 0, step]
        assert x.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
        assert x.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / n))
