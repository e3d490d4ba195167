"""TempFlow's weights of steps: values, the law of the gradient, and beside GRPO-Guard's."""

import math

import pytest
import torch

from mteditflow import (
    CPS,
    ODE,
    DanceSDE,
    FlowSDE,
    gaussian_log_prob,
    guard_log_ratio,
    guard_step_weight,
    noise_step_weight,
)

GRID = torch.tensor([0.95, 0.8, 0.6, 0.55, 0.3, 0.1], dtype=torch.float64)
START, END = GRID[:-1], GRID[1:]


def test_golden_and_a_loop():
    # std 0.7 sqrt(sigma / (1 - sigma)) sqrt(h): at 0.8 twice that at 0.5, of equal steps
    weight = noise_step_weight(FlowSDE(0.7), [0.8, 0.5], [0.5, 0.2])
    assert weight.tolist() == pytest.approx([4 / 3, 2 / 3])
    pairs = zip(START.tolist(), END.tolist(), strict=True)
    std = [0.7 * math.sqrt(s / (1 - s)) * math.sqrt(s - t) for s, t in pairs]
    expected = [x * len(std) / math.fsum(std) for x in std]
    assert noise_step_weight(FlowSDE(0.7), START, END).tolist() == pytest.approx(expected)


def gradient_sizes(solver, weight, of):
    """Norm of the gradient by the velocity at each step on policy, all at the same noise."""
    noise = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)).double()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).double()
    velocity = torch.zeros_like(x, requires_grad=True)
    step = solver(x, velocity, START, END)
    next_x = (step.mean + step.std * noise).detach()
    value = of(next_x, step.mean, step.std) * weight
    return torch.autograd.grad(value.sum(), velocity)[0].norm(dim=1)


def log_prob(next_x, mean, std):
    return gaussian_log_prob(next_x, mean, std, reduction="mean")


def guarded(next_x, mean, std):
    return guard_log_ratio(next_x, mean, mean.detach(), std, reduction="mean")


@pytest.mark.parametrize("level", [0.3, 1.0])
def test_the_weighted_gradient_of_a_log_prob_is_proportional_to_the_step_size(level):
    solver = FlowSDE(level)
    sizes = gradient_sizes(solver, noise_step_weight(solver, START, END), log_prob)
    torch.testing.assert_close(sizes / sizes[0], (START - END) / (START - END)[0])


@pytest.mark.parametrize("solver", [FlowSDE(0.7), DanceSDE(0.3), CPS(0.5)], ids=str)
def test_it_is_the_gradient_of_the_unweighted_guard_and_not_that_of_the_weighted_one(solver):
    weight = noise_step_weight(solver, START, END)
    sizes = gradient_sizes(solver, weight, log_prob)
    plain = gradient_sizes(solver, 1.0, guarded)
    torch.testing.assert_close(sizes / sizes[0], plain / plain[0])
    equal = gradient_sizes(solver, guard_step_weight(solver, START, END), guarded)
    torch.testing.assert_close(equal, equal[0].expand(5))
    assert sizes.max() > 2 * sizes.min()


def test_steps_of_one_std_weigh_1_and_the_mean_is_1():
    equal = noise_step_weight(DanceSDE(0.3), [1.0, 0.75, 0.5], [0.75, 0.5, 0.25])
    assert equal.tolist() == pytest.approx([1.0, 1.0, 1.0])
    for solver in (FlowSDE(0.7), DanceSDE(0.3), CPS(0.5)):
        assert noise_step_weight(solver, START, END).mean().item() == pytest.approx(1.0)
    assert not noise_step_weight(ODE(), START, END).any()


def test_dtype_is_kept_and_errors():
    for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        assert noise_step_weight(FlowSDE(0.7), START.to(dtype), END.to(dtype)).dtype == expected
    with pytest.raises(ValueError, match=r"^next_sigma - sigma: expected a step toward data"):
        noise_step_weight(FlowSDE(0.7), END, START)
    with pytest.raises(TypeError, match=r"^solver: expected a function, got str"):
        noise_step_weight("sde", START, END)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_eager():
    torch.compiler.reset()
    compiled = torch.compile(noise_step_weight, fullgraph=True, backend="aot_eager")
    solver = FlowSDE(0.7)
    torch.testing.assert_close(compiled(solver, START, END), noise_step_weight(solver, START, END))
