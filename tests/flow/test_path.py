"""The path: golden values, loops, laws, gradients, errors, precision, compilation."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from hypothesis import given, settings
from hypothesis import strategies as st

from mteditflow import (
    clean_from_velocity,
    exponential_shift_sigmas,
    flow_matching_loss,
    flux2_mu,
    flux_mu,
    interpolate,
    noise_from_velocity,
    score_from_velocity,
    shift_sigmas,
    uniform_sigmas,
    velocity_target,
)

shapes = st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple)
seeds = st.integers(0, 2**31)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def inner_sigma(seed, m):
    """Flow times well inside (0, 1), one per row."""
    return 0.05 + 0.9 * torch.rand(
        m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def rows(x):
    """Rows as plain lists of floats."""
    return [row.flatten().tolist() for row in x]


CONVERSIONS = {
    # function -> (formula per element, golden value at x = 2, v = 3, sigma = 0.25)
    clean_from_velocity: (lambda x, v, s: x - s * v, 1.25),  # 2 - 3/4
    noise_from_velocity: (lambda x, v, s: x + (1 - s) * v, 4.25),  # 2 + 9/4
    score_from_velocity: (lambda x, v, s: -(x + (1 - s) * v) / s, -17.0),  # -(17/4) / (1/4)
}
conversions = pytest.mark.parametrize("function", CONVERSIONS)


# ---------------------------------------------------------------- interpolation and conversions


def test_interpolate_golden():
    # By hand: (1 - s) c + s n with c = (1, -2), n = (5, 2).
    clean, noise = torch.tensor([[1.0, -2.0]] * 3), torch.tensor([[5.0, 2.0]] * 3)
    sigma = torch.tensor([0.0, 0.25, 0.75])
    expected = torch.tensor([[1.0, -2.0], [2.0, -1.0], [4.0, 1.0]])
    assert torch.equal(interpolate(clean, noise, sigma), expected)
    assert torch.equal(interpolate(clean[:1], noise[:1], 0.25), expected[1:2])
    assert torch.equal(interpolate(clean[:1], noise[:1], torch.tensor(0.75)), expected[2:])


def test_velocity_target_golden():
    clean, noise = torch.tensor([[1.0, -2.0]]), torch.tensor([[5.0, 2.0]])
    assert torch.equal(velocity_target(clean, noise), torch.tensor([[4.0, 4.0]]))


@conversions
def test_conversion_golden(function):
    expected = CONVERSIONS[function][1]
    result = function(torch.tensor([[2.0]]), torch.tensor([[3.0]]), 0.25)
    assert torch.equal(result, torch.tensor([[expected]]))


@given(shapes, seeds)
def test_interpolate_is_its_loop(shape, seed):
    clean, noise, sigma = (
        normal(seed, *shape),
        normal(seed + 1, *shape),
        inner_sigma(seed, shape[0]),
    )
    expected = [
        [(1 - s) * c + s * n for c, n in zip(cs, ns, strict=True)]
        for cs, ns, s in zip(rows(clean), rows(noise), sigma.tolist(), strict=True)
    ]
    expected = torch.tensor(expected, dtype=torch.float64).reshape(shape)
    torch.testing.assert_close(interpolate(clean, noise, sigma), expected, rtol=1e-14, atol=1e-14)


@conversions
@settings(max_examples=25)
@given(shape=shapes, seed=seeds)
def test_conversion_is_its_loop(function, shape, seed):
    x_t, v, sigma = normal(seed, *shape), normal(seed + 1, *shape), inner_sigma(seed, shape[0])
    formula = CONVERSIONS[function][0]
    expected = [
        [formula(x, v, s) for x, v in zip(xs, vs, strict=True)]
        for xs, vs, s in zip(rows(x_t), rows(v), sigma.tolist(), strict=True)
    ]
    expected = torch.tensor(expected, dtype=torch.float64).reshape(shape)
    torch.testing.assert_close(function(x_t, v, sigma), expected, rtol=1e-13, atol=1e-13)


@given(shapes, seeds)
def test_ends_are_exact(shape, seed):
    clean, noise = normal(seed, *shape), normal(seed + 1, *shape)
    velocity = velocity_target(clean, noise)
    assert torch.equal(interpolate(clean, noise, 0), clean)
    assert torch.equal(interpolate(clean, noise, 1), noise)
    assert torch.equal(clean_from_velocity(clean, velocity, 0.0), clean)
    assert torch.equal(noise_from_velocity(noise, velocity, 1.0), noise)
    assert torch.equal(score_from_velocity(noise, velocity, 1.0), -noise)


@given(shapes, seeds)
def test_velocity_gives_clean_and_noise_back(shape, seed):
    clean, noise, sigma = (
        normal(seed, *shape),
        normal(seed + 1, *shape),
        inner_sigma(seed, shape[0]),
    )
    x_t, velocity = interpolate(clean, noise, sigma), velocity_target(clean, noise)
    torch.testing.assert_close(clean_from_velocity(x_t, velocity, sigma), clean)
    torch.testing.assert_close(noise_from_velocity(x_t, velocity, sigma), noise)
    row = sigma.reshape(-1, *(1,) * (len(shape) - 1))
    torch.testing.assert_close(score_from_velocity(x_t, velocity, sigma), -noise / row)
    # And the velocity is noise minus clean, whatever it is.
    other = normal(seed + 2, *shape)
    difference = noise_from_velocity(x_t, other, sigma) - clean_from_velocity(x_t, other, sigma)
    torch.testing.assert_close(difference, other)


@pytest.mark.parametrize("function", [interpolate, *CONVERSIONS])
@settings(max_examples=20)
@given(seed=seeds, m=st.integers(2, 5))
def test_rows_are_independent(function, seed, m):
    a, b, sigma = normal(seed, m, 2, 3), normal(seed + 1, m, 2, 3), inner_sigma(seed, m)
    whole = function(a, b, sigma)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(function(a[order], b[order], sigma[order]), whole[order])
    assert torch.equal(function(a[1:], b[1:], sigma[1:]), whole[1:])
    # A number, a scalar tensor and a full tensor say the same.
    number = function(a, b, 0.5)
    assert torch.equal(function(a, b, torch.tensor(0.5)), number)
    assert torch.equal(function(a, b, torch.full((m, 2), 0.5)), number)
    # Linear in both latents.
    torch.testing.assert_close(function(2 * a, 2 * b, sigma), 2 * whole)
    ones = torch.ones_like(a)
    torch.testing.assert_close(function(a + 1, b + 1, sigma), whole + function(ones, ones, sigma))


@pytest.mark.parametrize("function", [interpolate, *CONVERSIONS])
def test_gradients(function):
    a, b = normal(0, 2, 3).requires_grad_(), normal(1, 2, 3).requires_grad_()
    sigma = inner_sigma(2, 2).requires_grad_()
    grad_a, grad_b = torch.autograd.grad(function(a, b, sigma).sum(), (a, b))
    s = sigma.detach()[:, None].expand(2, 3)
    expected = {
        interpolate: (1 - s, s),
        clean_from_velocity: (torch.ones_like(s), -s),
        noise_from_velocity: (torch.ones_like(s), 1 - s),
        score_from_velocity: (-1 / s, -(1 - s) / s),
    }[function]
    torch.testing.assert_close((grad_a, grad_b), expected)
    assert torch.autograd.gradcheck(function, (a, b, sigma))


def test_velocity_target_gradient():
    clean, noise = normal(0, 2, 3).requires_grad_(), normal(1, 2, 3).requires_grad_()
    down, up = torch.autograd.grad(velocity_target(clean, noise).sum(), (clean, noise))
    assert torch.equal(down, -torch.ones_like(down))
    assert torch.equal(up, torch.ones_like(up))


@pytest.mark.parametrize("function", [interpolate, *CONVERSIONS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(function, dtype):
    a, b = normal(0, 64, 8).to(dtype), normal(1, 64, 8).to(dtype)
    sigma = torch.rand(64, generator=torch.Generator().manual_seed(2)) * 0.9 + 0.1
    result = function(a, b, sigma)
    assert result.dtype == dtype
    assert torch.equal(result, function(a.float(), b.float(), sigma).to(dtype))


@pytest.mark.parametrize("function", [interpolate, *CONVERSIONS])
def test_dtype_is_that_of_the_first_latent(function):
    a, b = normal(0, 2, 3), normal(1, 2, 3)
    for first in (torch.bfloat16, torch.float32, torch.float64):
        for second in (torch.bfloat16, torch.float32, torch.float64):
            assert function(a.to(first), b.to(second), 0.3).dtype == first
    mixed = function(a.float(), b, 0.3)  # computed in float64
    assert torch.equal(mixed, function(a.float().double(), b, 0.3).float())


def test_velocity_target_has_the_common_dtype():
    clean, noise = torch.zeros(1, 2, dtype=torch.bfloat16), torch.zeros(1, 2)
    assert velocity_target(clean, noise).dtype == torch.float32
    assert velocity_target(clean, clean).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("function", "first", "second"),
    [
        (interpolate, "clean", "noise"),
        *((function, "x_t", "velocity") for function in CONVERSIONS),
    ],
)
def test_errors(function, first, second):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=rf"^{second}: .* {first}, \[2, 3\], got \[2, 4\]$"):
        function(x, torch.zeros(2, 4), 0.5)
    with pytest.raises(TypeError, match=rf"^{first}: expected a floating-point .* torch.int64$"):
        function(x.long(), x, 0.5)
    with pytest.raises(TypeError, match=rf"^{second}: expected a floating-point .* torch.bool$"):
        function(x, x.bool(), 0.5)
    with pytest.raises(TypeError, match=rf"^{second}: expected a torch.Tensor, got float$"):
        function(x, 1.0, 0.5)
    for wrong in (-0.1, 1.5, math.nan, torch.tensor(-0.1), torch.tensor([0.5, math.nan])):
        with pytest.raises(ValueError, match=r"^sigma: .* in \[0, 1\]"):
            function(x, x, wrong)
    with pytest.raises(ValueError, match=r"^sigma: .* leading part of \[2, 3\], got \[3\]$"):
        function(x, x, torch.full((3,), 0.5))
    with pytest.raises(TypeError, match=r"^sigma: .*got torch.complex64$"):
        function(x, x, torch.ones(2, dtype=torch.complex64))
    whole = torch.ones(2, dtype=torch.int64)
    assert torch.equal(function(x, x, whole), function(x, x, whole.to(x)))
    with pytest.raises(TypeError, match=r"^sigma: expected numbers or a torch.Tensor, got str$"):
        function(x, x, "0.5")


def test_velocity_target_errors():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^noise: expected the shape of clean, \[2, 3\]"):
        velocity_target(x, torch.zeros(3))
    with pytest.raises(TypeError, match=r"^clean: expected a floating-point"):
        velocity_target(x.int(), x)
    with pytest.raises(TypeError, match=r"^noise: expected a floating-point"):
        velocity_target(x, x.int())


def test_score_does_not_exist_at_data():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^sigma: expected values in \(0, 1\], got 0\.0 at"):
        score_from_velocity(x, x, torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match=r"^sigma: expected values in \(0, 1\], got 0\.0"):
        score_from_velocity(x, x, 0)


# ------------------------------------------------------------------------- flow-matching loss


def test_loss_golden():
    # By hand: v - (n - c) = (3 - 1, 0 - 4) = (2, -4), mean of squares (4 + 16) / 2 = 10; and 0.
    velocity = torch.tensor([[3.0, 0.0], [1.0, 2.0]])
    clean = torch.tensor([[1.0, -2.0], [0.0, 0.0]])
    noise = torch.tensor([[2.0, 2.0], [1.0, 2.0]])
    torch.testing.assert_close(
        flow_matching_loss(velocity, clean, noise), torch.tensor([10.0, 0.0])
    )


@given(shapes, seeds)
def test_loss_is_its_loop(shape, seed):
    v, c, n = (normal(seed + k, *shape) for k in range(3))
    expected = []
    for vs, cs, ns in zip(rows(v), rows(c), rows(n), strict=True):
        total = 0.0
        for a, b, d in zip(vs, cs, ns, strict=True):
            total += (a - (d - b)) ** 2
        expected.append(total / len(vs))
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(flow_matching_loss(v, c, n), expected)


@given(seeds, st.integers(2, 5), st.floats(-3, 3))
def test_loss_laws(seed, m, factor):
    v, c, n = (normal(seed + k, m, 2, 3) for k in range(3))
    whole = flow_matching_loss(v, c, n)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(flow_matching_loss(v[order], c[order], n[order]), whole[order])
    assert torch.equal(flow_matching_loss(v[1:], c[1:], n[1:]), whole[1:])
    scaled = flow_matching_loss(factor * v, factor * c, factor * n)
    torch.testing.assert_close(scaled, factor**2 * whole)
    torch.testing.assert_close(flow_matching_loss(v, c + 1, n + 1), whole)
    torch.testing.assert_close(flow_matching_loss(v + 1, c, n + 1), whole)
    assert torch.equal(flow_matching_loss(velocity_target(c, n), c, n), torch.zeros_like(whole))


def test_loss_gradient():
    v, c, n = (normal(k, 2, 3, 2).requires_grad_() for k in range(3))
    error = (v - (n - c)).detach()
    grads = torch.autograd.grad(flow_matching_loss(v, c, n).sum(), (v, c, n))
    expected = 2 * error / 6  # d mean(e^2) / de with 6 elements a row
    torch.testing.assert_close(grads, (expected, expected, -expected))
    assert torch.autograd.gradcheck(flow_matching_loss, (v, c, n))
    # At the target itself there is no gradient, and no NaN.
    c, n = c.detach(), n.detach()
    v = velocity_target(c, n).requires_grad_()
    flow_matching_loss(v, c, n).sum().backward()
    assert torch.equal(v.grad, torch.zeros_like(v))
    assert torch.autograd.gradgradcheck(lambda v: flow_matching_loss(v, c, n), v)


def test_loss_dtype():
    v, c, n = (normal(k, 4, 100) for k in range(3))
    assert flow_matching_loss(v, c, n).dtype == torch.float64
    half = [x.bfloat16() for x in (v, c, n)]
    result = flow_matching_loss(*half)
    assert result.dtype == torch.float32
    assert torch.equal(result, flow_matching_loss(*(x.float() for x in half)))
    assert flow_matching_loss(half[0], half[1], n.float()).dtype == torch.float32


def test_loss_errors():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^clean: expected the shape of velocity, \[2, 3\]"):
        flow_matching_loss(x, torch.zeros(2, 4), x)
    with pytest.raises(ValueError, match=r"^noise: expected the shape of velocity, \[2, 3\]"):
        flow_matching_loss(x, x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"^velocity: .* shape \[M, \.\.\.\], got \[2\]$"):
        flow_matching_loss(x[:, 0], x[:, 0], x[:, 0])
    with pytest.raises(ValueError, match=r"^velocity: .* non-empty .* got \[0, 3\]$"):
        flow_matching_loss(x[:0], x[:0], x[:0])
    for position, name in enumerate(("velocity", "clean", "noise")):
        arguments = [x, x, x]
        arguments[position] = x.int()
        with pytest.raises(TypeError, match=rf"^{name}: expected a floating-point"):
            flow_matching_loss(*arguments)


# --------------------------------------------------------------------------------------- grids


def test_uniform_sigmas():
    assert uniform_sigmas(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert uniform_sigmas(1).tolist() == [1.0, 0.0]
    assert uniform_sigmas(3).dtype == torch.float32
    for steps in (2, 7, 50, 1000):
        grid = uniform_sigmas(steps)
        assert grid.shape == (steps + 1,)
        assert (grid[0], grid[-1]) == (1, 0)
        expected = torch.tensor([1 - k / steps for k in range(steps + 1)])
        torch.testing.assert_close(grid, expected)
        assert bool((grid[1:] < grid[:-1]).all())
    with pytest.raises(ValueError, match=r"^steps: expected an integer >= 1, got 0$"):
        uniform_sigmas(0)
    with pytest.raises(TypeError, match=r"^steps: expected an integer, got float$"):
        uniform_sigmas(4.0)


def test_shift_golden():
    # By hand, a = 3: 3 (1/2) / (1 + 2 (1/2)) = 3/4, 3 (1/4) / (1 + 2 (1/4)) = 1/2.
    sigmas = torch.tensor([[1.0, 0.5], [0.25, 0.0]])
    torch.testing.assert_close(shift_sigmas(sigmas, 3.0), torch.tensor([[1.0, 0.75], [0.5, 0.0]]))
    torch.testing.assert_close(
        exponential_shift_sigmas(sigmas, math.log(3)), torch.tensor([[1.0, 0.75], [0.5, 0.0]])
    )


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), seeds)
def test_shift_laws(first, second, seed):
    sigmas = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    shifted = shift_sigmas(sigmas, first)
    expected = [first * s / (1 + (first - 1) * s) for s in sigmas.tolist()]
    torch.testing.assert_close(shifted, torch.tensor(expected, dtype=torch.float64))
    # Two shifts make one; the inverse shift undoes one; 1 is the identity.
    torch.testing.assert_close(shift_sigmas(shifted, second), shift_sigmas(sigmas, first * second))
    torch.testing.assert_close(shift_sigmas(shifted, 1 / first), sigmas)
    torch.testing.assert_close(shift_sigmas(sigmas, 1.0), sigmas)
    # In terms of odds it is a factor: sigma / (1 - sigma) times a.
    torch.testing.assert_close(shifted / (1 - shifted), first * sigmas / (1 - sigmas))
    torch.testing.assert_close(exponential_shift_sigmas(sigmas, math.log(first)), shifted)


@given(st.floats(1e-30, 1e30), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_shift_keeps_the_ends_and_the_order(shift, dtype):
    shifted = shift_sigmas(torch.linspace(1, 0, 101).to(dtype), shift)
    assert shifted.dtype == dtype
    assert (shifted[0], shifted[-1]) == (1, 0)
    assert bool(((shifted >= 0) & (shifted <= 1)).all())
    rounding = 4 * torch.finfo(dtype).eps
    assert bool((shifted[1:] <= shifted[:-1] * (1 + rounding)).all())


def test_shift_of_half_precision_is_computed_in_float32():
    sigmas = torch.linspace(0, 1, 301).bfloat16()
    assert torch.equal(shift_sigmas(sigmas, 3.0), shift_sigmas(sigmas.float(), 3.0).bfloat16())


def test_shift_gradient():
    sigmas = inner_sigma(0, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(shift_sigmas(sigmas, 3.0).sum(), sigmas)
    torch.testing.assert_close(gradient, 3 / (1 + 2 * sigmas.detach()) ** 2)
    assert torch.autograd.gradcheck(lambda s: shift_sigmas(s, 3.0), (sigmas,))
    assert torch.autograd.gradcheck(lambda s: exponential_shift_sigmas(s, 0.7), (sigmas,))


def test_shift_errors():
    sigmas = torch.tensor([1.0, 0.0])
    for wrong in (0.0, -1.0, math.inf, math.nan, 1e31, 1e-31):
        with pytest.raises(ValueError, match=r"^shift: expected .* in \[1e-30, 1e\+30\], got"):
            shift_sigmas(sigmas, wrong)
    for wrong in (-69.1, 69.1, math.inf):
        with pytest.raises(ValueError, match=r"^mu: expected a finite number in \[-69, 69\], got"):
            exponential_shift_sigmas(sigmas, wrong)
    assert exponential_shift_sigmas(sigmas, -69.0).tolist() == [1.0, 0.0]
    assert exponential_shift_sigmas(sigmas, 69.0).tolist() == [1.0, 0.0]
    for shift in (shift_sigmas, exponential_shift_sigmas):
        with pytest.raises(ValueError, match=r"^sigmas: .* in \[0, 1\], got 1\.5 at index \[1\]$"):
            shift(torch.tensor([1.0, 1.5]), 1.0)
        with pytest.raises(ValueError, match=r"^sigmas: .* in \[0, 1\], got -0\.5 at index \[0\]$"):
            shift(torch.tensor([-0.5]), 1.0)
        with pytest.raises(TypeError, match=r"^sigmas: expected a floating-point"):
            shift(torch.tensor([1j, 0]), 1.0)
        assert shift([1, 0], 1.0).tolist() == [1.0, 0.0]
    with pytest.raises(TypeError, match=r"^shift: expected a number, got str$"):
        shift_sigmas(sigmas, "3")
    with pytest.raises(TypeError, match=r"^mu: expected a number, got str$"):
        exponential_shift_sigmas(sigmas, "3")


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.93])
def test_static_shift_is_that_of_diffusers(shift):
    grid = np.linspace(1, 1 / 20, 20)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=grid.tolist())
    sigmas = torch.cat([torch.from_numpy(grid).float(), torch.zeros(1)])
    torch.testing.assert_close(shift_sigmas(sigmas, shift), scheduler.sigmas, rtol=2e-7, atol=0)


@pytest.mark.parametrize("mu", [0.5, 0.6366, 1.15, 2.3])
def test_dynamic_shift_is_that_of_diffusers(mu):
    grid = np.linspace(1, 1 / 28, 28)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=grid.tolist(), mu=mu)
    sigmas = torch.cat([torch.from_numpy(grid).float(), torch.zeros(1)])
    shifted = exponential_shift_sigmas(sigmas, mu)
    torch.testing.assert_close(shifted, scheduler.sigmas, rtol=3e-7, atol=0)


def test_flux_mu_golden():
    # The two points of the line, its middle, and one beyond.
    assert flux_mu(256) == 0.5
    assert flux_mu(4096) == pytest.approx(1.15, rel=1e-15)
    assert flux_mu(2176) == pytest.approx(0.825, rel=1e-15)
    assert flux_mu(8, base_tokens=2, max_tokens=4, base_shift=1.0, max_shift=2.0) == 4.0


@given(st.integers(1, 20000), st.integers(1, 1000), st.floats(0, 1), st.floats(1, 2))
def test_flux_mu_is_that_of_diffusers(tokens, base, low, high):
    assert flux_mu(tokens) == pytest.approx(calculate_shift(tokens), rel=1e-12, abs=1e-12)
    ours = flux_mu(tokens, base_tokens=base, max_tokens=5000, base_shift=low, max_shift=high)
    theirs = calculate_shift(tokens, base, 5000, low, high)
    assert ours == pytest.approx(theirs, rel=1e-10, abs=1e-10)


@given(st.one_of(st.integers(1, 10000), st.sampled_from([4299, 4300, 4301])), st.integers(1, 300))
def test_flux2_mu_is_that_of_diffusers(tokens, steps):
    assert flux2_mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)


def test_flux2_mu_golden():
    # By hand: at 10 and at 200 steps the two lines, in between linear, beyond 4300 tokens one line.
    at_10, at_200 = 8.73809524e-05 * 1000 + 1.89833333, 0.00016927 * 1000 + 0.45666666
    assert flux2_mu(1000, 10) == pytest.approx(at_10, rel=1e-14)
    assert flux2_mu(1000, 200) == pytest.approx(at_200, rel=1e-14)
    assert flux2_mu(1000, 105) == pytest.approx((at_10 + at_200) / 2, rel=1e-14)
    assert flux2_mu(4301, 10) == 0.00016927 * 4301 + 0.45666666
    assert flux2_mu(4300, 10) == pytest.approx(8.73809524e-05 * 4300 + 1.89833333, rel=1e-14)


def test_mu_errors():
    with pytest.raises(ValueError, match=r"^image_tokens: expected an integer >= 1, got 0$"):
        flux_mu(0)
    with pytest.raises(ValueError, match=r"^base_tokens: expected an integer >= 1, got 0$"):
        flux_mu(1, base_tokens=0)
    with pytest.raises(ValueError, match=r"^max_tokens: expected an integer >= 257, got 256$"):
        flux_mu(1, max_tokens=256)
    with pytest.raises(ValueError, match=r"^base_shift: expected a finite number .* got nan$"):
        flux_mu(1, base_shift=math.nan)
    with pytest.raises(ValueError, match=r"^max_shift: expected a finite number .* got inf$"):
        flux_mu(1, max_shift=math.inf)
    with pytest.raises(TypeError, match=r"^image_tokens: expected an integer, got float$"):
        flux_mu(256.0)
    with pytest.raises(ValueError, match=r"^image_tokens: expected an integer >= 1, got 0$"):
        flux2_mu(0, 10)
    with pytest.raises(ValueError, match=r"^steps: expected an integer >= 1, got 0$"):
        flux2_mu(1, 0)
    assert flux_mu(1) < flux_mu(2)
    assert flux_mu(3, base_tokens=1, max_tokens=2) > 0
    assert flux2_mu(1, 1) > 0


# --------------------------------------------------------------------------------- compilation


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_compiled_equals_eager():
    def everything(clean, noise, sigma):
        x_t, velocity = interpolate(clean, noise, sigma), velocity_target(clean, noise)
        return (
            x_t,
            clean_from_velocity(x_t, velocity, sigma),
            noise_from_velocity(x_t, velocity, sigma),
            score_from_velocity(x_t, velocity, sigma),
            flow_matching_loss(x_t, clean, noise),
            exponential_shift_sigmas(shift_sigmas(sigma, 3.0), 0.5),
        )

    arguments = normal(0, 3, 4, 5).float(), normal(1, 3, 4, 5).float(), inner_sigma(2, 3).float()
    compiled = torch.compile(everything, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), everything(*arguments))
