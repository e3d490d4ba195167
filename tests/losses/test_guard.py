"""GRPO-Guard: no bias and one spread in closed form, and one gradient scale for every step."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import (
    CPS,
    ODE,
    DanceSDE,
    FlowSDE,
    clipped_surrogate_loss,
    gaussian_kl,
    gaussian_log_prob,
    guard_log_ratio,
    guard_step_weight,
)
from tests.loops import some

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])
SOLVERS = {
    "ODE": ODE(),
    "FlowSDE": FlowSDE(0.7),
    "DanceSDE": DanceSDE(0.3),
    "CPS": CPS(0.6),
}
solvers = pytest.mark.parametrize("name", SOLVERS)
SIGMA = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.1], dtype=torch.float64)
NEXT_SIGMA = torch.tensor([0.9, 0.7, 0.4, 0.1, 0.0], dtype=torch.float64)


def exactly(message):
    return f"^{re.escape(message)}$"


def case(shape=(5, 2, 3), seed=0, dtype=torch.float64):
    """A next sample, the policy's mean, the old mean and a std that differs from row to row."""
    generator = torch.Generator().manual_seed(seed)
    noise, mean, old = torch.randn(3, *shape, generator=generator, dtype=dtype)
    std = torch.linspace(0.1, 2.0, shape[0], dtype=dtype).reshape(-1, *(1,) * (len(shape) - 1))
    return old + std * noise, mean.requires_grad_(), old, std


# guard_log_ratio: values


def test_golden():
    # std 1/2, old mean 0: noise (1, 2); the mean moved by (0.2, -0.3): 1 * 0.2 - 2 * 0.3 = -0.4
    next_x, mean = torch.tensor([[0.5, 1.0]]), torch.tensor([[0.2, -0.3]])
    inputs = (next_x, mean, torch.zeros(1, 2), torch.tensor([[0.5]]))
    assert guard_log_ratio(*inputs, reduction="sum").tolist() == pytest.approx([-0.4])
    assert guard_log_ratio(*inputs, reduction="mean").tolist() == pytest.approx([-0.2])


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (2, 3, 5), (4, 2, 3, 2)])
def test_equals_the_loop(shape):
    next_x, mean, old, std = case(shape)
    for row, total in some(
        enumerate(guard_log_ratio(next_x, mean, old, std, reduction="sum").tolist())
    ):
        s = std[row].item()
        columns = (x[row].flatten().tolist() for x in (next_x, mean, old))
        expected = math.fsum((x - o) / s * (m - o) for x, m, o in zip(*columns, strict=True))
        assert total == pytest.approx(expected)


@reductions
def test_is_the_log_ratio_and_its_kl_times_the_std(reduction):
    """s (log rho + KL), from the two functions that GRPO is built on."""
    next_x, mean, old, std = case()
    log_ratio = gaussian_log_prob(next_x, mean, std, reduction=reduction) - gaussian_log_prob(
        next_x, old, std, reduction=reduction
    )
    expected = std.flatten() * (log_ratio + gaussian_kl(mean, old, std, reduction=reduction))
    torch.testing.assert_close(guard_log_ratio(*case(), reduction=reduction), expected)


@reductions
def test_has_no_bias_under_the_old_policy(reduction):
    """Noise and its mirror image are as likely: the two average to 0, the plain ratio to -KL."""
    next_x, mean, old, std = case()
    mirrored = 2 * old - next_x
    pair = [guard_log_ratio(x, mean, old, std, reduction=reduction) for x in (next_x, mirrored)]
    torch.testing.assert_close(pair[0] + pair[1], torch.zeros(5, dtype=torch.float64))
    plain = [
        gaussian_log_prob(x, mean, std, reduction=reduction)
        - gaussian_log_prob(x, old, std, reduction=reduction)
        for x in (next_x, mirrored)
    ]
    kl = gaussian_kl(mean, old, std, reduction=reduction)
    torch.testing.assert_close((plain[0] + plain[1]) / 2, -kl)


def test_has_one_spread_at_every_std():
    """Noise of covariance exactly 1 on 4 elements: the variance of the sum is ||d||^2."""
    corners = 2 * torch.eye(4, dtype=torch.float64)
    noise = torch.cat([corners, -corners])
    moved = torch.tensor([0.3, -0.1, 0.2, 0.5], dtype=torch.float64)
    for std in (0.01, 0.3, 5.0):
        s = torch.full((1, 1), std, dtype=torch.float64)
        ratio = guard_log_ratio(
            s * noise, moved.expand(8, 4), torch.zeros_like(noise), s, reduction="sum"
        )
        assert ratio.square().mean().item() == pytest.approx(moved.square().sum().item())


def test_a_deterministic_step_counts_nothing():
    next_x, mean, old, std = case((3, 4))
    std[1] = 0
    ratio = guard_log_ratio(next_x, mean, old, std, reduction="sum")
    ratio.sum().backward()
    assert ratio[1] == 0
    assert ratio[0] != 0
    assert torch.equal(mean.grad[1], torch.zeros(4, dtype=torch.float64))


@given(st.permutations(range(5)), st.floats(0.1, 10))
def test_rows_are_independent_and_scale_with_the_latent(order, scale):
    inputs = case()
    whole = guard_log_ratio(*inputs, reduction="mean")
    permuted = guard_log_ratio(*(x[order] for x in inputs), reduction="mean")
    torch.testing.assert_close(permuted, whole[order])
    sliced = guard_log_ratio(*(x[1:3] for x in inputs), reduction="mean")
    torch.testing.assert_close(sliced, whole[1:3])
    scaled = guard_log_ratio(*(scale * x for x in inputs), reduction="mean")
    torch.testing.assert_close(scaled, scale * whole)


def test_one_std_for_all_rows():
    next_x, mean, old, std = case()
    once = guard_log_ratio(next_x, mean, old, std[2:3], reduction="mean")
    expanded = guard_log_ratio(next_x, mean, old, std[2:3].expand(5, 1, 1), reduction="mean")
    assert torch.equal(once, expanded)


# guard_log_ratio: what its gradient means


@reductions
def test_on_policy_the_gradient_is_that_of_the_log_prob_times_the_std(reduction):
    next_x, _, old, std = case()
    mean = old.clone().requires_grad_()
    ratio = guard_log_ratio(next_x, mean, old, std, reduction=reduction)
    assert torch.equal(ratio, torch.zeros(5, dtype=torch.float64))
    (guarded,) = torch.autograd.grad(ratio.sum(), mean)
    log_prob = gaussian_log_prob(next_x, mean, std, reduction=reduction)
    (plain,) = torch.autograd.grad(log_prob.sum(), mean)
    torch.testing.assert_close(guarded, std * plain)


def test_in_the_clipped_surrogate_the_on_policy_gradient_is_the_noise_times_the_advantage():
    next_x, _, old, std = case()
    mean, advantage = old.clone().requires_grad_(), torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    ratio = guard_log_ratio(next_x, mean, old, std, reduction="mean")
    clip = {"clip_low": 1e-3, "clip_high": 1e-3}
    loss = clipped_surrogate_loss(ratio, torch.zeros_like(ratio), advantage.double(), **clip)
    loss.sum().backward()
    noise = (next_x - old) / std
    torch.testing.assert_close(mean.grad, -advantage.double()[:, None, None] * noise / 6)


def test_the_gradient_reaches_the_mean_alone_and_is_linear():
    tensors = [x.detach().clone().requires_grad_() for x in case()]
    guard_log_ratio(*tensors, reduction="mean").sum().backward()
    assert [x.grad is not None for x in tensors] == [False, True, False, False]
    next_x, mean, old, std = case((3, 2, 2))
    assert torch.autograd.gradcheck(
        lambda m: guard_log_ratio(next_x, m, old, std, reduction="sum"), mean
    )


# guard_step_weight


def test_golden_weights():
    sigma, next_sigma = torch.tensor([0.5]), torch.tensor([0.25])
    for solver, expected in [
        (ODE(), 4.0),
        (FlowSDE(1.0), 4 / 1.5),  # 1 + a^2 / 2
        (DanceSDE(2.0), 4 / 3.0),  # 1 + a^2 (1 - sigma) / (2 sigma) = 1 + 4 / 2
        (CPS(1.0), 1 / (0.25 + 0.25 * 0.5)),  # the pull is next_sigma (1 - cos(pi / 2)) = 0.25
    ]:
        assert guard_step_weight(solver, sigma, next_sigma).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("level", [0.0, 0.3, 1.2])
def test_for_flow_sde_it_is_the_papers_one_over_the_step_size(level):
    """Up to a constant, from any sigma below 1; at 1 the pull has no hold on the velocity."""
    weight = guard_step_weight(FlowSDE(level), SIGMA, NEXT_SIGMA) * (SIGMA - NEXT_SIGMA)
    expected = torch.full((4,), 1 / (1 + level**2 / 2), dtype=torch.float64)
    torch.testing.assert_close(weight[1:], expected)
    assert weight[0].item() == pytest.approx(1)


@solvers
def test_it_gives_the_velocity_a_gradient_of_one_scale_at_every_step(name):
    """With the same noise in every row, every row has the same gradient."""
    solver = SOLVERS[name]
    generator = torch.Generator().manual_seed(0)
    x_t, velocity = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    velocity.requires_grad_()
    mean, std = solver(x_t, velocity, SIGMA, NEXT_SIGMA)
    if name == "ODE":
        std = torch.ones_like(std)  # it has no noise of its own
    std = torch.where(std > 0, std, 1)  # nor has the last step of CPS
    noise = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    ratio = guard_log_ratio(mean.detach() + std * noise, mean, mean.detach(), std, reduction="sum")
    (guard_step_weight(solver, SIGMA, NEXT_SIGMA) * ratio).sum().backward()
    torch.testing.assert_close(velocity.grad, -noise.expand(5, 3))


# errors, dtypes, compilation


def test_errors():
    next_x, mean, old, std = case((3, 4), dtype=torch.float32)
    ok = {"reduction": "mean"}
    with pytest.raises(ValueError, match=r"^reduction: expected one of \['mean', 'sum'\], got"):
        guard_log_ratio(next_x, mean, old, std, reduction="max")
    message = "old_mean: expected the shape of next_x, [3, 4], got [2, 4]"
    with pytest.raises(ValueError, match=exactly(message)):
        guard_log_ratio(next_x, mean, old[:2], std, **ok)
    with pytest.raises(TypeError, match=r"^old_mean: expected float32 or float64, got torch\.bf"):
        guard_log_ratio(next_x, mean, old.bfloat16(), std, **ok)
    with pytest.raises(ValueError, match=r"^std: expected one value per row"):
        guard_log_ratio(next_x, mean, old, std.expand(3, 4), **ok)
    with pytest.raises(ValueError, match=r"^std: expected values >= 0, got -"):
        guard_log_ratio(next_x, mean, old, -std, **ok)
    with pytest.raises(ValueError, match=r"^next_x: expected a non-empty tensor of shape \[M,"):
        guard_log_ratio(next_x[0], mean[0], old[0], std[0], **ok)
    with pytest.raises(ValueError, match=r"^next_sigma - sigma: expected a step toward data, < 0"):
        guard_step_weight(ODE(), SIGMA, SIGMA)
    with pytest.raises(
        ValueError, match=r"^next_sigma: expected a number or .* \[5, 1\], got \[1\]"
    ):
        guard_step_weight(ODE(), SIGMA, NEXT_SIGMA[:1])
    with pytest.raises(TypeError, match=r"^sigma: expected a floating-point tensor, got torch\.co"):
        guard_step_weight(ODE(), torch.ones(2, dtype=torch.complex64), torch.zeros(2))
    with pytest.raises(ValueError, match=r"^sigma: expected a non-empty tensor of shape \[M\], "):
        guard_step_weight(ODE(), SIGMA[:0], NEXT_SIGMA[:0])


@pytest.mark.parametrize("device", DEVICES)
def test_dtype_and_device_are_kept(device):
    for dtype in (torch.float32, torch.float64):
        next_x, mean, old, std = (x.to(device) for x in case(dtype=dtype))
        for x in (next_x, next_x.bfloat16()):  # the latent that was used may be half
            ratio = guard_log_ratio(x, mean, old, std, reduction="mean")
            assert ratio.dtype == dtype
            assert ratio.device.type == device
        sigma = SIGMA.to(device, dtype)
        weight = guard_step_weight(FlowSDE(0.7), sigma, NEXT_SIGMA.to(sigma))
        assert weight.dtype == dtype
        assert weight.device.type == device
        assert not weight.requires_grad
    halves = SIGMA.bfloat16(), NEXT_SIGMA.bfloat16()
    assert guard_step_weight(ODE(), *halves).dtype == torch.float32


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_eager():
    torch.compiler.reset()

    def weighted(next_x, mean, old, std, sigma, next_sigma):
        ratio = guard_log_ratio(next_x, mean, old, std, reduction="mean")
        return guard_step_weight(FlowSDE(0.7), sigma, next_sigma) * ratio

    compiled = torch.compile(weighted, fullgraph=True, backend="aot_eager")
    inputs = (*case(dtype=torch.float32), SIGMA.float(), NEXT_SIGMA.float())
    results = []
    for function in (compiled, weighted):
        value = function(*inputs)
        (gradient,) = torch.autograd.grad(value.sum(), inputs[1])
        results.append((value, gradient))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("name", ["mean", "old_mean"])
def test_each_mean_is_checked(name):
    given = {"next_x": torch.ones(2, 3), "mean": torch.ones(2, 3), "old_mean": torch.ones(2, 3)}
    std = torch.ones(2, 1)
    with pytest.raises(TypeError, match=f"^{name}: expected float32 or float64"):
        guard_log_ratio(**given | {name: torch.ones(2, 3).half()}, std=std, reduction="mean")
    with pytest.raises(ValueError, match=f"^{name}: expected the shape of next_x"):
        guard_log_ratio(**given | {name: torch.ones(2, 4)}, std=std, reduction="mean")
