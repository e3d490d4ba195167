"""Solver steps, their densities and windows: golden values, loops, laws, gradients, errors."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from mteditflow import (
    CPS,
    ODE,
    DanceSDE,
    FlowSDE,
    Solver,
    Transition,
    clean_from_velocity,
    cps_surrogate,
    gaussian_kl,
    gaussian_log_prob,
    noise_from_velocity,
    sliding_window,
)
from mteditflow.flow.solvers import _SDE, _PulledEuler
from tests.loops import some

SOLVERS = [ODE(), FlowSDE(0.7), DanceSDE(0.3), CPS(0.6)]
solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
# Forward-mode derivatives import torch's decompositions, which torch.jit.script still compiles.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])
shapes = st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple)
seeds = st.integers(0, 2**31)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def times(seed, m, dtype=torch.float64):
    """A flow time and a later one for each row; the first row starts at exactly 1."""
    u = torch.rand(2, m, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    sigma = 0.1 + 0.9 * u[0]
    sigma[0] = 1.0
    return sigma, sigma * (0.05 + 0.9 * u[1])


def state(seed, *shape, dtype=torch.float64):
    return normal(seed, *shape, dtype=dtype), normal(seed + 1, *shape, dtype=dtype)


def step_reference(solver, x, v, s, t):
    """Mean and std of one element in plain floats, in the forms of the papers."""
    a = getattr(solver, "noise_level", 0.0)
    if isinstance(solver, CPS):
        clean, noise = x - s * v, x + (1 - s) * v
        angle = a * math.pi / 2
        return (1 - t) * clean + t * math.cos(angle) * noise, t * math.sin(angle)
    below_one = t if s == 1 else s
    g = a * math.sqrt(s / (1 - below_one)) if isinstance(solver, FlowSDE) else a
    dt = t - s
    mean = x * (1 + g * g * dt / (2 * s)) + v * (1 + g * g * (1 - s) / (2 * s)) * dt
    return mean, g * math.sqrt(-dt)


def log_prob_reference(x, mean, std):
    return [
        [
            -((a - b) ** 2) / (2 * s * s) - math.log(s) - math.log(2 * math.pi) / 2
            for a, b in zip(xs.flatten().tolist(), means.flatten().tolist(), strict=True)
        ]
        for xs, means, s in zip(x, mean, std.flatten().tolist(), strict=True)
    ]


# --------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("solver", "sigma", "next_sigma", "mean", "std"),
    [
        # x = 2, v = 1. Euler: 2 - 1/4.
        (ODE(), 0.5, 0.25, 1.75, 0.0),
        # g = 2 sqrt(.5/.5) = 2, pull = 4 (1/4) / 1 = 1 times noise estimate 2 + 1/2; std 2 / 2.
        (FlowSDE(2.0), 0.5, 0.25, 1.75 - 2.5, 1.0),
        # g^2 = .2 / .8, d = .1: pull .025 / .4 times 2 + .8; std sqrt(.025).
        (FlowSDE(1.0), 0.2, 0.1, 1.9 - 0.0625 * 2.8, math.sqrt(0.025)),
        # At 1: g^2 = 1 / (1 - .75) = 4, pull = 4 (1/4) / 2 = 1/2 times 2; std = 2 (1/2).
        (FlowSDE(1.0), 1.0, 0.75, 1.75 - 1.0, 1.0),
        # In one step from noise to data: g^2 = 1, pull = 1/2 times 2, std 1.
        (FlowSDE(1.0), 1.0, 0.0, 1.0 - 1.0, 1.0),
        # pull = (1/4) / 1 times 2.5; std = 1/2.
        (DanceSDE(1.0), 0.5, 0.25, 1.75 - 0.625, 0.5),
        (DanceSDE(0.5), 1.0, 0.75, 1.75 - 0.03125 * 2, 0.25),
        # 30 degrees: (3/4) 1.5 + (1/4) (sqrt(3)/2) 2.5; (1/4) sin 30.
        (CPS(1 / 3), 0.5, 0.25, 1.125 + 0.625 * math.sqrt(3) / 2, 0.125),
        # 90 degrees: the old noise is forgotten.
        (CPS(1.0), 0.5, 0.25, 1.125, 0.25),
        (CPS(1 / 3), 1.0, 0.75, 0.25 * 1.0 + 0.75 * 2 * math.sqrt(3) / 2, 0.375),
        # The last step adds nothing: it lands on the clean estimate.
        (CPS(0.8), 0.5, 0.0, 1.5, 0.0),
    ],
)
def test_step_golden(solver, sigma, next_sigma, mean, std):
    x, v = (torch.full((1, 1), value, dtype=torch.float64) for value in (2.0, 1.0))
    transition = solver(x, v, sigma, next_sigma)
    assert isinstance(transition, Transition)
    assert transition.mean.item() == pytest.approx(mean, rel=1e-14, abs=1e-14)
    assert transition.std.item() == pytest.approx(std, rel=1e-14)


def test_diffusion_golden():
    sigma, next_sigma = torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0.75, 0.25, 0.0])
    torch.testing.assert_close(
        FlowSDE(0.5).diffusion(sigma, next_sigma), torch.tensor([1.0, 0.5, 0.25])
    )
    assert torch.equal(DanceSDE(0.5).diffusion(sigma, next_sigma), torch.full((3,), 0.5))


@solvers
@settings(max_examples=30)
@given(shape=shapes, seed=seeds)
def test_step_is_its_loop(solver, shape, seed):
    (x, v), (sigma, next_sigma) = state(seed, *shape), times(seed, shape[0])
    means, stds = [], []
    for m in range(shape[0]):
        pairs = zip(x[m].flatten().tolist(), v[m].flatten().tolist(), strict=True)
        s, t = sigma[m].item(), next_sigma[m].item()
        results = [step_reference(solver, a, b, s, t) for a, b in pairs]
        means.append([mean for mean, _ in results])
        stds.append(results[0][1])
    transition = solver(x, v, sigma, next_sigma)
    expected = torch.tensor(means, dtype=torch.float64).reshape(shape)
    torch.testing.assert_close(transition.mean, expected, rtol=1e-12, atol=1e-12)
    assert transition.std.shape == (shape[0], *(1,) * (len(shape) - 1))
    expected = torch.tensor(stds, dtype=torch.float64)
    torch.testing.assert_close(transition.std.flatten(), expected, rtol=1e-12, atol=0)


@given(seeds, st.floats(0, 2))
def test_mean_in_the_form_of_the_specification(seed, noise_level):
    """``x - v d - g^2 / (2 sigma) eps d``, and CPS with its clean and noise estimates."""
    (x, v), (sigma, next_sigma) = state(seed, 3, 2, 2), times(seed, 3)
    s, t = sigma.reshape(3, 1, 1), next_sigma.reshape(3, 1, 1)
    noise, clean = noise_from_velocity(x, v, sigma), clean_from_velocity(x, v, sigma)
    for solver in (FlowSDE(noise_level), DanceSDE(noise_level)):
        g = solver.diffusion(s, t)
        mean, std = solver(x, v, sigma, next_sigma)
        torch.testing.assert_close(mean, x - v * (s - t) - g**2 / (2 * s) * noise * (s - t))
        torch.testing.assert_close(std, g * (s - t).sqrt())
    angle = min(noise_level, 1.0) * math.pi / 2
    mean, std = CPS(min(noise_level, 1.0))(x, v, sigma, next_sigma)
    torch.testing.assert_close(mean, (1 - t) * clean + t * math.cos(angle) * noise)
    # All noise in the next sample, old and fresh, makes next_sigma.
    torch.testing.assert_close(std**2 + (t * math.cos(angle)) ** 2, t**2)


@solvers
@given(seed=seeds, factor=st.floats(-3, 3))
def test_mean_is_linear(solver, seed, factor):
    (x, v), (y, w), times_ = state(seed, 3, 4), state(seed + 2, 3, 4), times(seed, 3)
    combined = solver(x + factor * y, v + factor * w, *times_)
    one, other = solver(x, v, *times_), solver(y, w, *times_)
    torch.testing.assert_close(combined.mean, one.mean + factor * other.mean)
    assert torch.equal(combined.std, one.std)  # of the grid alone


@pytest.mark.parametrize("kind", [FlowSDE, DanceSDE, CPS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=seeds)
def test_noise_level_zero_is_euler_bit_for_bit(kind, dtype, seed):
    x, v = state(seed, 4, 3, 2, dtype=dtype)
    sigma, next_sigma = times(seed, 4, dtype=dtype)
    next_sigma[1] = 0.0
    still, euler = kind(0.0)(x, v, sigma, next_sigma), ODE()(x, v, sigma, next_sigma)
    assert torch.equal(still.mean, euler.mean)
    assert torch.equal(still.std, torch.zeros(4, 1, 1, dtype=dtype))
    assert torch.equal(still.sample(normal(seed, 4, 3, 2)), euler.mean)
    step = (next_sigma - sigma).reshape(4, 1, 1)
    torch.testing.assert_close(euler.mean, x + step * v)


@solvers
def test_step_gradients(solver):
    (x, v), (sigma, next_sigma) = state(0, 3, 2), times(0, 3)
    x.requires_grad_()
    v.requires_grad_()
    mean, std = solver(x, v, sigma, next_sigma)
    to_x, to_v = torch.autograd.grad(mean.sum(), (x, v))
    assert not std.requires_grad
    for m in range(3):
        s, t = sigma[m].item(), next_sigma[m].item()
        slope_x = step_reference(solver, 1.0, 0.0, s, t)[0]  # the mean is linear
        slope_v = step_reference(solver, 0.0, 1.0, s, t)[0]
        torch.testing.assert_close(to_x[m], torch.full_like(to_x[m], slope_x))
        torch.testing.assert_close(to_v[m], torch.full_like(to_v[m], slope_v))
    assert torch.autograd.gradcheck(lambda x, v: solver(x, v, sigma, next_sigma).mean, (x, v))


@solvers
def test_step_precision(solver):
    x, v = state(0, 3, 8)
    sigma, next_sigma = times(0, 3)
    assert solver(x, v, sigma, next_sigma).mean.dtype == torch.float64
    assert solver(x, v.float(), sigma, next_sigma).mean.dtype == torch.float64
    assert solver(x.float(), v.float(), sigma, next_sigma).std.dtype == torch.float32
    half = solver(x.bfloat16(), v.bfloat16(), sigma.float(), next_sigma.float())
    exact = solver(x.bfloat16().float(), v.bfloat16().float(), sigma.float(), next_sigma.float())
    for one, other in some(zip(half, exact, strict=True)):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


@solvers
def test_step_errors(solver):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^velocity: expected the shape of x_t, \[2, 3\], got"):
        solver(x, torch.zeros(2, 1), 1.0, 0.5)
    with pytest.raises(ValueError, match=r"^x_t: expected .* \[M, \.\.\.\], got \[2\]$"):
        solver(x[:, 0], x[:, 0], 1.0, 0.5)
    with pytest.raises(TypeError, match=r"^x_t: expected a floating-point tensor, got torch.int64"):
        solver(x.long(), x, 1.0, 0.5)
    with pytest.raises(TypeError, match=r"^velocity: expected a floating-point tensor"):
        solver(x, x.long(), 1.0, 0.5)
    with pytest.raises(ValueError, match=r"^sigma: .* in \[0, 1\], got 1\.5$"):
        solver(x, x, 1.5, 0.5)
    with pytest.raises(ValueError, match=r"^next_sigma: .* in \[0, 1\], got -0\.5$"):
        solver(x, x, 1.0, -0.5)
    with pytest.raises(ValueError, match=r"^sigma: .* got nan at index \[1\]$"):
        solver(x, x, torch.tensor([1.0, math.nan]), 0.5)
    for wrong in (0.5, 0.75, torch.tensor([0.25, 0.5])):
        with pytest.raises(
            ValueError, match=r"^next_sigma - sigma: expected a step toward data, < 0, got 0\."
        ):
            solver(x, x, 0.5, wrong)
    with pytest.raises(ValueError, match=r"^sigma: .* leading part of \[2, 3\], got \[3\]$"):
        solver(x, x, torch.full((3,), 0.5), 0.25)
    with pytest.raises(TypeError, match=r"^next_sigma: .* got torch.complex64$"):
        solver(x, x, 1.0, torch.zeros(2, dtype=torch.complex64))


def test_noise_levels():
    for kind in (FlowSDE, DanceSDE, CPS):
        for wrong in (-0.1, math.nan, math.inf):
            with pytest.raises(ValueError, match=r"^noise_level: expected a finite number in \[0"):
                kind(wrong)
        with pytest.raises(TypeError, match=r"^noise_level: expected a number, got str$"):
            kind("0.7")
    with pytest.raises(ValueError, match=r"^noise_level: .* in \[0, 1\], got 1\.1$"):
        CPS(1.1)
    assert (FlowSDE(1.5).noise_level, DanceSDE(1.5).noise_level) == (1.5, 1.5)


@solvers
def test_solvers_are_values(solver):
    assert isinstance(solver, Solver)
    assert solver == type(solver)(*vars(solver).values())
    assert len({solver, solver}) == 1
    with pytest.raises(AttributeError):
        solver.noise_level = 0.1
    assert solver != FlowSDE(0.123)


def test_the_bases_are_abstract():
    for base in (_PulledEuler, _SDE):
        with pytest.raises(TypeError, match=f"abstract class {base.__name__}"):
            base()


# ----------------------------------------------------------------------------------- transition


def test_sample():
    transition = Transition(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5], [0.0]]))
    noise = torch.tensor([[2.0, -2.0], [9.0, 9.0]])
    assert torch.equal(transition.sample(noise), torch.tensor([[2.0, 1.0], [3.0, 4.0]]))
    assert transition.sample(noise.double()).dtype == torch.float32
    mean = transition.mean.clone().requires_grad_()
    Transition(mean, transition.std).sample(noise).sum().backward()
    assert torch.equal(mean.grad, torch.ones(2, 2))
    with pytest.raises(
        ValueError, match=r"^noise: expected the shape of mean, \[2, 2\], got \[2\]"
    ):
        transition.sample(noise[0])
    with pytest.raises(TypeError, match=r"^noise: expected a floating-point tensor"):
        transition.sample(noise.int())


def test_samples_have_the_transitions_moments():
    mean, std = torch.tensor([[0.7]]).expand(1, 20_000), torch.tensor([[0.3]])
    sample = Transition(mean, std).sample(normal(0, 1, 20_000))
    assert sample.mean().item() == pytest.approx(0.7, abs=4 * 0.3 / math.sqrt(20_000))
    assert sample.std().item() == pytest.approx(0.3, rel=4 / math.sqrt(2 * 20_000))


# -------------------------------------------------------------------------------------- log-prob


def test_log_prob_golden():
    # By hand. Row 0: std 1, squares 0 and 4: -(0 + 4)/2 = -2, minus log(2 pi) = 1.8378770664.
    # Row 1: std 1/2, squares 1 and 1: -(1 + 1) 2 = -4, minus 2 log(1/2), minus log(2 pi).
    x, mean = torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    std = torch.tensor([[1.0], [0.5]])
    joint = torch.tensor([-2 - 1.8378770664, -4 + 2 * math.log(2) - 1.8378770664])
    torch.testing.assert_close(gaussian_log_prob(x, mean, std, reduction="sum"), joint)
    torch.testing.assert_close(gaussian_log_prob(x, mean, std, reduction="mean"), joint / 2)


@given(shapes, seeds, st.booleans())
def test_log_prob_is_its_loop_and_torch_distributions(shape, seed, one_std):
    x, mean = state(seed, *shape)
    std = 0.01 + normal(seed + 2, *(1 if one_std else shape[0], *(1,) * (len(shape) - 1))).abs()
    terms = log_prob_reference(x, mean, std.expand(shape[0], *std.shape[1:]))
    theirs = Normal(mean, std).log_prob(x).flatten(1)
    for reduction, loop, expected in (
        ("sum", [sum(row) for row in terms], theirs.sum(1)),
        ("mean", [sum(row) / len(row) for row in terms], theirs.mean(1)),
    ):
        ours = gaussian_log_prob(x, mean, std, reduction=reduction)
        assert ours.shape == shape[:1]
        torch.testing.assert_close(ours, torch.tensor(loop, dtype=torch.float64))
        torch.testing.assert_close(ours, expected)


@reductions
def test_log_prob_in_float32_is_accurate(reduction):
    """Over many elements, where a naive running sum would lose digits."""
    x, mean = state(0, 2, 16, 128, 128, dtype=torch.float32)
    std = torch.full((2, 1, 1, 1), 0.3)
    exact = Normal(mean.double(), std.double()).log_prob(x.double()).flatten(1)
    exact = exact.sum(1) if reduction == "sum" else exact.mean(1)
    ours = gaussian_log_prob(x, mean, std, reduction=reduction)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=0)


@given(seeds, st.integers(2, 5), st.floats(0.1, 10), st.floats(-5, 5))
def test_log_prob_laws(seed, m, scale, shift):
    (x, mean), std = state(seed, m, 3, 2), 0.1 + normal(seed + 2, m, 1, 1).abs()

    def log_prob(x, mean, std):
        return gaussian_log_prob(x, mean, std, reduction="sum")

    whole = log_prob(x, mean, std)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(log_prob(x[order], mean[order], std[order]), whole[order])
    assert torch.equal(log_prob(x[1:], mean[1:], std[1:]), whole[1:])
    assert torch.equal(log_prob(mean, x, std), whole)  # symmetric
    torch.testing.assert_close(log_prob(x + shift, mean + shift, std), whole)
    scaled = log_prob(scale * x, scale * mean, scale * std)
    torch.testing.assert_close(scaled, whole - 6 * math.log(scale))  # change of variables
    per_element = gaussian_log_prob(x, mean, std, reduction="mean")
    torch.testing.assert_close(per_element * 6, whole)


@solvers
@reductions
@settings(max_examples=25)
@given(shape=shapes, seed=seeds, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_replay_of_a_stored_step_has_ratio_one(solver, reduction, shape, seed, dtype):
    """Whatever the batch and the memory layout of the replay; the latent rounded or not."""
    x, v = state(seed, *shape, dtype=torch.float32)
    sigma, next_sigma = times(seed, shape[0], dtype=torch.float32)
    x, v = x.to(dtype), v.to(dtype)
    transition = solver(x, v, sigma, next_sigma)
    next_x = transition.sample(normal(seed + 2, *shape)).to(dtype)
    stored = gaussian_log_prob(next_x, *transition, reduction=reduction)

    def replay(x, v, sigma, next_sigma, next_x):
        transition = solver(x, v, sigma, next_sigma)
        return gaussian_log_prob(next_x, *transition, reduction=reduction)

    arguments = (x, v, sigma, next_sigma, next_x)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    single = [slice(k, k + 1) for k in range(shape[0])]
    for index in (slice(None), order, order[:1].repeat(3), *single):
        ratio = (replay(*(a[index] for a in arguments)) - stored[index]).exp()
        assert torch.equal(ratio, torch.ones_like(ratio))
    turned = [a.transpose(-1, -2).contiguous().transpose(-1, -2) for a in (x, v, next_x)]
    assert torch.equal(replay(turned[0], turned[1], sigma, next_sigma, turned[2]), stored)


@reductions
def test_deterministic_rows(reduction):
    """Exactly 0 with zero gradient, and no influence on their neighbors."""
    x, mean = state(0, 3, 4)
    std = torch.tensor([[0.0], [0.5], [0.0]], dtype=torch.float64).requires_grad_()
    x.requires_grad_()
    mean.requires_grad_()
    for function in (gaussian_log_prob, gaussian_kl):
        result = function(x, mean, std, reduction=reduction)
        assert result[0].item() == 0.0
        assert result[2].item() == 0.0
        alone = function(x[1:2], mean[1:2], std[1:2], reduction=reduction)
        assert torch.equal(result[1:2], alone)
        grads = torch.autograd.grad(result.sum(), (x, mean, std))
        for gradient in some(grads):
            assert torch.equal(gradient[::2], torch.zeros_like(gradient[::2]))
            assert bool((gradient[1] != 0).all())
    # A step that did not move at all, too.
    mean = mean.detach().requires_grad_()
    result = gaussian_log_prob(mean.detach(), mean, torch.zeros(1, 1), reduction=reduction)
    (gradient,) = torch.autograd.grad(result.sum(), mean)
    assert torch.equal(result, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("std", [1e-38, 1e-30, 1e-20, 1e20])
def test_extreme_std(std):
    x = torch.zeros(1, 4)
    result = gaussian_log_prob(x, x, torch.tensor([[std]]), reduction="mean")
    assert result.item() == pytest.approx(-math.log(std) - math.log(2 * math.pi) / 2, rel=1e-6)
    assert gaussian_kl(x, x, torch.tensor([[std]]), reduction="sum").item() == 0.0


@reductions
def test_log_prob_gradients(reduction):
    (x, mean), std = state(0, 3, 2, 2), torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    std = std.reshape(3, 1, 1).requires_grad_()
    x.requires_grad_()
    mean.requires_grad_()
    count = 1 if reduction == "sum" else 4
    result = gaussian_log_prob(x, mean, std, reduction=reduction)
    grads = torch.autograd.grad(result.sum(), (x, mean, std))
    pull = ((x - mean) / std**2 / count).detach()  # the score of the mean
    to_std = (((x - mean) ** 2 / std**3 - 1 / std) / count).sum((1, 2), keepdim=True).detach()
    torch.testing.assert_close(grads, (-pull, pull, to_std))
    assert torch.autograd.gradcheck(
        lambda *a: gaussian_log_prob(*a, reduction=reduction), (x, mean, std)
    )


@pytest.mark.parametrize("function", [gaussian_log_prob, gaussian_kl])
def test_density_errors(function):
    first, second = ("x", "mean") if function is gaussian_log_prob else ("mean", "reference_mean")
    x, std = torch.zeros(2, 3), torch.ones(2, 1)

    def call(x, mean, std, reduction="mean"):
        return function(x, mean, std, reduction=reduction)

    with pytest.raises(ValueError, match=r"^reduction: expected one of \['mean', 'sum'\], got 'x'"):
        call(x, x, std, "x")
    with pytest.raises(ValueError, match=rf"^{second}: .* of {first}, \[2, 3\], got \[1, 3\]$"):
        call(x, x[:1], std)
    with pytest.raises(ValueError, match=rf"^{first}: expected .* \[M, \.\.\.\], got \[2\]$"):
        call(x[:, 0], x[:, 0], std[:, 0])
    with pytest.raises(TypeError, match=rf"^{first}: expected .*got torch.int64"):
        call(x.long(), x, std)
    with pytest.raises(TypeError, match=rf"^{second}: expected float32 or float64, got torch.bfl"):
        call(x, x.bfloat16(), std)
    with pytest.raises(TypeError, match=r"^std: expected float32 or float64, got torch.float16"):
        call(x, x, std.half())
    for same in (1.0, torch.ones(2), [1.0, 1.0], torch.ones(2, 1, 1)):
        assert torch.equal(call(x, x, same), call(x, x, std / std))
    for wrong in (
        torch.ones(3),
        torch.ones(3, 1),
        torch.ones(2, 3),
        torch.ones(1, 2),
        torch.ones(0, 1),
    ):
        with pytest.raises(ValueError, match=r"^std: expected (one value per|a n).* \[2, 3\], got"):
            call(x, x, wrong)
    with pytest.raises(
        ValueError, match=r"^std: expected values >= 0, got -1\.0 at index \[1, 0\]"
    ):
        call(x, x, torch.tensor([[1.0], [-1.0]]))
    with pytest.raises(ValueError, match=r"^std: expected values >= 0, got nan at index \[0, 0\]$"):
        call(x, x, torch.tensor([[math.nan]]))


def test_density_precision():
    x, mean = state(0, 2, 3)
    std = torch.ones(2, 1)
    assert gaussian_log_prob(x, mean.float(), std, reduction="mean").dtype == torch.float64
    half = gaussian_log_prob(x.bfloat16(), mean.float(), std, reduction="mean")
    assert half.dtype == torch.float32
    exact = gaussian_log_prob(x.bfloat16().float(), mean.float(), std, reduction="mean")
    assert torch.equal(half, exact)
    wide = gaussian_log_prob(x.float(), mean.float(), std.double(), reduction="mean")
    assert wide.dtype == torch.float32
    with pytest.raises(TypeError, match=r"^mean: expected float32 or float64, got torch.bfloat16"):
        gaussian_kl(x.bfloat16(), mean, std, reduction="mean")


# -------------------------------------------------------------------------------------------- KL


def test_kl_golden():
    # By hand: squares 9 and 16 over 2 (1/4): 50; row 1: (1 + 1) / 2 over 1.
    mean, std = torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[0.5], [1.0]])
    reference = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    kl = gaussian_kl(mean, reference, std, reduction="sum")
    torch.testing.assert_close(kl, torch.tensor([50.0, 1.0]))
    kl = gaussian_kl(mean, reference, std, reduction="mean")
    torch.testing.assert_close(kl, torch.tensor([25.0, 0.5]))


@given(shapes, seeds, st.booleans())
def test_kl_is_its_loop_and_torch_distributions(shape, seed, one_std):
    mean, reference = state(seed, *shape)
    std = 0.01 + normal(seed + 2, *(1 if one_std else shape[0], *(1,) * (len(shape) - 1))).abs()
    per_row = std.expand(shape[0], *std.shape[1:]).flatten().tolist()
    loop = []
    for a, b, s in zip(mean, reference, per_row, strict=True):
        pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
        loop.append(sum((p - q) ** 2 / (2 * s * s) for p, q in pairs))
    theirs = kl_divergence(Normal(mean, std), Normal(reference, std)).flatten(1)
    ours = gaussian_kl(mean, reference, std, reduction="sum")
    torch.testing.assert_close(ours, torch.tensor(loop, dtype=torch.float64))
    torch.testing.assert_close(ours, theirs.sum(1))
    ours = gaussian_kl(mean, reference, std, reduction="mean")
    torch.testing.assert_close(ours, theirs.mean(1))


@given(seeds, st.floats(0.1, 10))
def test_kl_laws(seed, scale):
    (mean, reference), std = state(seed, 3, 4), 0.1 + normal(seed + 2, 3, 1).abs()
    kl = gaussian_kl(mean, reference, std, reduction="sum")
    assert bool((kl >= 0).all())
    assert torch.equal(gaussian_kl(mean, mean, std, reduction="sum"), torch.zeros(3).double())
    assert torch.equal(gaussian_kl(reference, mean, std, reduction="sum"), kl)
    torch.testing.assert_close(
        gaussian_kl(scale * mean, scale * reference, scale * std, reduction="sum"), kl
    )
    wide = gaussian_kl(mean, reference, scale * std, reduction="sum")
    torch.testing.assert_close(wide, kl / scale**2)
    assert torch.equal(gaussian_kl(mean[1:], reference[1:], std[1:], reduction="sum"), kl[1:])


def test_kl_is_the_expected_log_ratio():
    mean, reference = torch.tensor([[0.3, -0.2]]), torch.tensor([[0.1, 0.1]])
    std, count = torch.tensor([[0.5]]), 20_000
    x = Transition(mean, std).mean + 0.5 * normal(0, count, 2)
    log_ratios = [
        gaussian_log_prob(x, m.expand(count, 2), std, reduction="sum") for m in (mean, reference)
    ]
    samples = log_ratios[0] - log_ratios[1]
    kl = gaussian_kl(mean, reference, std, reduction="sum").item()
    assert samples.mean().item() == pytest.approx(kl, abs=4 * samples.std().item() / count**0.5)


@reductions
def test_kl_gradients(reduction):
    (mean, reference), std = state(0, 3, 2), torch.tensor([[0.3], [1.0], [2.0]]).double()
    mean.requires_grad_()
    reference.requires_grad_()
    kl = gaussian_kl(mean, reference, std, reduction=reduction).sum()
    grads = torch.autograd.grad(kl, (mean, reference))
    slope = ((mean - reference) / std**2 / (1 if reduction == "sum" else 2)).detach()
    torch.testing.assert_close(grads, (slope, -slope))
    std.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *a: gaussian_kl(*a, reduction=reduction), (mean, reference, std)
    )
    # On policy there is no gradient, and no NaN.
    mean = mean.detach().requires_grad_()
    kl = gaussian_kl(mean, mean.detach(), std.detach(), reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(kl, mean)
    assert torch.equal(gradient, torch.zeros_like(mean))


# ----------------------------------------------------------------------------------- surrogate


def test_surrogate_golden():
    x, mean = torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    torch.testing.assert_close(cps_surrogate(x, mean, reduction="sum"), torch.tensor([-25.0, -4.0]))
    torch.testing.assert_close(
        cps_surrogate(x, mean, reduction="mean"), torch.tensor([-12.5, -2.0])
    )


@given(shapes, seeds)
def test_surrogate_is_its_loop_and_the_density_without_its_scale(shape, seed):
    x, mean = state(seed, *shape)
    loop = []
    for a, b in zip(x, mean, strict=True):
        pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
        loop.append(-sum((p - q) ** 2 for p, q in pairs))
    joint = cps_surrogate(x, mean, reduction="sum")
    torch.testing.assert_close(joint, torch.tensor(loop, dtype=torch.float64))
    count = x[0].numel()
    torch.testing.assert_close(cps_surrogate(x, mean, reduction="mean") * count, joint)
    std = torch.full((1,) * len(shape), 0.5, dtype=torch.float64)
    torch.testing.assert_close(joint, -2 * 0.25 * gaussian_kl(x, mean, std, reduction="sum"))


@forward_mode
@reductions
@pytest.mark.parametrize("function", [gaussian_log_prob, gaussian_kl, cps_surrogate])
def test_second_derivatives_without_a_difference(function, reduction):
    """Minus or plus ``1 / std^2`` by the mean, 2 for the surrogate; 0 for a deterministic row."""
    x, std = normal(0, 3, 2), torch.tensor([[0.5], [2.0], [0.0]], dtype=torch.float64)
    rest = () if function is cps_surrogate else (std,)

    def total(mean):
        return function(mean, x, *rest, reduction=reduction).sum()

    curvature = torch.func.hessian(total)(x.clone()).reshape(6, 6)
    of_a_row = {
        gaussian_log_prob: [-4.0, -0.25, 0.0],
        gaussian_kl: [4.0, 0.25, 0.0],
        cps_surrogate: [-2.0] * 3,
    }[function]
    wanted = torch.tensor(of_a_row, dtype=torch.float64).repeat_interleave(2)
    torch.testing.assert_close(
        curvature, torch.diag(wanted) / (1 if reduction == "sum" else 2), rtol=1e-12, atol=0
    )


@reductions
def test_surrogate_gradient(reduction):
    x, mean = state(0, 3, 2)
    mean.requires_grad_()
    (gradient,) = torch.autograd.grad(cps_surrogate(x, mean, reduction=reduction).sum(), mean)
    torch.testing.assert_close(gradient, 2 * (x - mean.detach()) / (1 if reduction == "sum" else 2))
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: cps_surrogate(*a, reduction=reduction), (x, mean))


def test_surrogate_errors_and_precision():
    x = torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match=r"^reduction: expected one of \['mean', 'sum'\], got None"
    ):
        cps_surrogate(x, x, reduction=None)
    with pytest.raises(ValueError, match=r"^mean: expected the shape of x, \[2, 3\], got \[3\]$"):
        cps_surrogate(x, x[0], reduction="sum")
    with pytest.raises(TypeError, match=r"^mean: expected float32 or float64, got torch.bfloat16"):
        cps_surrogate(x, x.bfloat16(), reduction="sum")
    with pytest.raises(TypeError, match=r"^x: expected a floating-point tensor, got torch.int32$"):
        cps_surrogate(x.int(), x, reduction="sum")
    assert cps_surrogate(x.bfloat16(), x, reduction="sum").dtype == torch.float32
    assert cps_surrogate(x.bfloat16(), x.double(), reduction="sum").dtype == torch.float64


# ------------------------------------------------------------------------------------- windows


def test_window_golden():
    def starts(count, **options):
        windows = [sliding_window(k, **options) for k in range(count)]
        assert all(list(w) == list(range(w[0], w[0] + options["size"])) for w in some(windows))
        return [w[0] for w in windows]

    assert starts(7, size=2, steps=4) == [0, 1, 2, 0, 1, 2, 0]
    assert starts(7, size=2, steps=4, interval=3) == [0, 0, 0, 1, 1, 1, 2]
    assert starts(7, size=2, steps=6, stride=2) == [0, 2, 4, 0, 2, 4, 0]
    # The last move is cut short, so that the last step is trained too.
    assert starts(7, size=2, steps=7, stride=2) == [0, 2, 4, 5, 0, 2, 4]
    assert starts(4, size=2, steps=5, stride=9) == [0, 3, 0, 3]
    assert starts(3, size=4, steps=4) == [0, 0, 0]
    assert sliding_window(1, size=1, steps=2) == range(1, 2)


@example(0, 1, 0, 1, 1)
@given(
    st.integers(0, 500),
    st.integers(1, 6),
    st.integers(0, 12),
    st.integers(1, 14),
    st.integers(1, 5),
)
def test_window_laws(update, size, more, stride, interval):
    options = {"size": size, "steps": size + more, "stride": stride, "interval": interval}
    window = sliding_window(update, **options)
    assert len(window) == size
    assert 0 <= window[0] <= window[-1] < size + more
    assert sliding_window(update - update % interval, **options) == window
    following = sliding_window(update + interval, **options)
    if window[-1] == size + more - 1:
        assert following[0] == 0
    else:
        assert following[0] == min(window[0] + stride, more)
    if stride <= size:
        period = range(0, (more + 1) * interval, interval)
        trained = {step for k in period for step in sliding_window(k, **options)}
        assert trained == set(range(size + more))


def test_window_errors():
    with pytest.raises(ValueError, match=r"^update: expected an integer >= 0, got -1$"):
        sliding_window(-1, size=1, steps=2)
    for name in ("size", "stride", "interval"):
        options = {"size": 1, "steps": 2, name: 0}
        with pytest.raises(ValueError, match=rf"^{name}: expected an integer >= 1, got 0$"):
            sliding_window(0, **options)
        with pytest.raises(TypeError, match=rf"^{name}: expected an integer, got float$"):
            sliding_window(0, **{**options, name: 1.0})
    with pytest.raises(ValueError, match=r"^steps: expected an integer >= 3, got 2$"):
        sliding_window(0, size=3, steps=2)


# --------------------------------------------------------------------------------- compilation


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_compiled_equals_eager():
    def replay(x, v, w, next_x, sigma, next_sigma):
        results = []
        for solver in SOLVERS:
            mean, std = solver(x, v, sigma, next_sigma)
            reference, _ = solver(x, w, sigma, next_sigma)
            results += [
                gaussian_log_prob(next_x, mean, std, reduction="mean"),
                gaussian_kl(mean, reference, std, reduction="sum"),
                cps_surrogate(next_x, mean, reduction="mean"),
            ]
        return torch.stack(results)

    x, v, w, next_x = (normal(k, 3, 4, 5, dtype=torch.float32) for k in range(4))
    arguments = (x, v.requires_grad_(), w, next_x, *times(0, 3, dtype=torch.float32))
    eager, compiled = replay(*arguments), torch.compile(replay, fullgraph=True)(*arguments)
    torch.testing.assert_close(compiled, eager)
    weights = normal(5, *eager.shape, dtype=torch.float32)
    gradients = [torch.autograd.grad((weights * y).sum(), v)[0] for y in (eager, compiled)]
    torch.testing.assert_close(gradients[1], gradients[0])
