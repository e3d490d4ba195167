"""Distillation: the distance of velocities, and when it is the KL divergence of steps."""

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
    distillation_loss,
    gaussian_kl,
    step_kl_weight,
    velocity_kl,
)
from tests.loops import some

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
SIGMA = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.1], dtype=torch.float64)
NEXT_SIGMA = torch.tensor([0.9, 0.7, 0.4, 0.1, 0.05], dtype=torch.float64)


def case(shape=(5, 2, 3), seed=0, dtype=torch.float64):
    """A velocity that wants a gradient, the teacher's, and a state."""
    generator = torch.Generator().manual_seed(seed)
    velocity, teacher, x_t = torch.randn(3, *shape, generator=generator, dtype=dtype)
    return velocity.requires_grad_(), teacher, x_t


def kl_of_steps(solver, velocity, teacher, x_t, sigma=SIGMA, next_sigma=NEXT_SIGMA):
    mean, std = solver(x_t, velocity, sigma, next_sigma)
    teacher_mean, _ = solver(x_t, teacher, sigma, next_sigma)
    return gaussian_kl(mean, teacher_mean, std, reduction="mean")


# distillation_loss


def test_golden():
    velocity = torch.tensor([[1.0, 3.0], [2.0, 2.0]], requires_grad=True)
    loss = distillation_loss(velocity, torch.tensor([[0.0, 1.0], [2.0, 2.0]]))
    assert loss.tolist() == [2.5, 0]
    loss.sum().backward()
    assert velocity.grad.tolist() == [[1, 2], [0, 0]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (2, 3, 5), (4, 2, 3, 2)])
def test_equals_the_loop(shape):
    velocity, teacher, _ = case(shape)
    for row, value in some(enumerate(distillation_loss(velocity, teacher).tolist())):
        pairs = zip(velocity[row].flatten().tolist(), teacher[row].flatten().tolist(), strict=True)
        expected = sum((v - t) ** 2 for v, t in pairs) / teacher[row].numel()
        assert value == pytest.approx(expected)


def test_with_the_reference_as_teacher_it_is_the_kl_term_of_nft():
    velocity, teacher, _ = case()
    assert torch.equal(distillation_loss(velocity, teacher), velocity_kl(velocity, teacher))


@given(st.permutations(range(5)), st.floats(0.1, 10))
def test_rows_are_independent_and_errors_count_squared(order, scale):
    velocity, teacher, _ = case()
    whole = distillation_loss(velocity, teacher)
    assert torch.equal(distillation_loss(velocity[order], teacher[order]), whole[order])
    torch.testing.assert_close(distillation_loss(velocity[1:3], teacher[1:3]), whole[1:3])
    scaled = distillation_loss(scale * velocity, scale * teacher)
    torch.testing.assert_close(scaled, scale**2 * whole)


def test_a_self_taught_editor_learns_to_see_the_clean_image_in_the_worn_one():
    """MT-OPSD's edit branch on a linear editor: student and teacher differ in their image alone."""
    generator = torch.Generator().manual_seed(0)
    clean, x_t = torch.randn(2, 64, 4, generator=generator, dtype=torch.float64)
    worn = 1.5 * clean  # a fault that can be undone
    weights = torch.eye(4, dtype=torch.float64)

    def velocity(weights, image):
        return x_t - image @ weights

    teacher_velocity = velocity(weights, clean)  # the frozen copy, shown the clean image
    student = weights.clone().requires_grad_()
    for _ in range(60):
        loss = distillation_loss(velocity(student, worn), teacher_velocity).mean()
        (gradient,) = torch.autograd.grad(loss, student)
        with torch.no_grad():
            student -= 0.5 * gradient
    torch.testing.assert_close(student.detach(), weights / 1.5, atol=1e-4, rtol=0)


# step_kl_weight


def test_golden_weights():
    sigma, next_sigma = torch.tensor([0.5]), torch.tensor([0.25])
    for solver, expected in [
        (FlowSDE(1.0), 0.25 * 1.5**2 * 0.5 / (2 * 0.5)),  # d (1 + a^2/2)^2 (1 - s) / (2 a^2 s)
        (DanceSDE(2.0), (0.25 * 3) ** 2 / (2 * 4 * 0.25)),  # the mean moves d (1 + a^2/2 * 1)
        (CPS(1.0), (0.25 + 0.25 * 0.5) ** 2 / (2 * 0.25**2)),
        (ODE(), 0.0),
    ]:
        assert step_kl_weight(solver, sigma, next_sigma).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("solver", [FlowSDE(0.7), DanceSDE(0.3), CPS(0.6), ODE()], ids=repr)
def test_times_the_loss_it_is_the_kl_of_the_steps_with_its_gradient(solver):
    velocity, teacher, x_t = case()
    expected = kl_of_steps(solver, velocity, teacher, x_t)
    loss = step_kl_weight(solver, SIGMA, NEXT_SIGMA) * distillation_loss(velocity, teacher)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(x.sum(), velocity)[0] for x in (loss, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_near_the_teacher_it_keeps_digits_that_the_means_round_away():
    """In float32, velocities 1e-5 apart, a step of 1/50: what the docstring claims."""
    _, teacher, x_t = case((5, 256))
    velocity = teacher + 1e-5 * case((5, 256), seed=1)[1]
    sigma, next_sigma = SIGMA, SIGMA - 0.02
    solver = FlowSDE(0.7)
    half = [x.float() for x in (velocity, teacher, x_t, sigma, next_sigma)]
    exact = kl_of_steps(solver, *(x.double() for x in half))  # of what float32 was given
    weight = step_kl_weight(solver, *half[3:])
    from_velocities = ((weight * distillation_loss(*half[:2])).double() / exact - 1).abs().max()
    from_means = (kl_of_steps(solver, *half).double() / exact - 1).abs().max()
    assert from_velocities < 1e-4
    assert from_means > 10 * from_velocities


# errors, dtypes, compilation


def test_errors():
    x = torch.zeros(2, 3)
    message = re.escape("teacher_velocity: expected the shape of velocity, [2, 3], got [1, 3]")
    with pytest.raises(ValueError, match=f"^{message}$"):
        distillation_loss(x, x[:1])
    with pytest.raises(ValueError, match=r"^velocity: expected a non-empty tensor of shape \[M,"):
        distillation_loss(x[0], x[0])
    with pytest.raises(TypeError, match=r"^teacher_velocity: expected a floating-point tensor, g"):
        distillation_loss(x, x.long())
    with pytest.raises(ValueError, match=r"^next_sigma - sigma: expected a step toward data, < 0"):
        step_kl_weight(DanceSDE(0.3), SIGMA, SIGMA)
    with pytest.raises(
        ValueError, match=r"^next_sigma: expected a number or .* \[5, 1\], got \[1\]"
    ):
        step_kl_weight(DanceSDE(0.3), SIGMA, NEXT_SIGMA[:1])


@pytest.mark.parametrize("device", DEVICES)
def test_dtype_and_device_are_kept(device):
    for dtype, expected in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        velocity, teacher, _ = (x.to(device, dtype) for x in case())
        sigma, next_sigma = SIGMA.to(device, dtype), NEXT_SIGMA.to(device, dtype)
        loss = distillation_loss(velocity, teacher)
        weight = step_kl_weight(FlowSDE(0.7), sigma.requires_grad_(), next_sigma)
        assert loss.dtype == weight.dtype == expected
        assert loss.device.type == weight.device.type == device
        assert not weight.requires_grad


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_eager():
    torch.compiler.reset()

    def kl(velocity, teacher, sigma, next_sigma):
        weight = step_kl_weight(FlowSDE(0.7), sigma, next_sigma)
        return weight * distillation_loss(velocity, teacher)

    compiled = torch.compile(kl, fullgraph=True, backend="aot_eager")
    velocity, teacher, _ = case(dtype=torch.float32)
    results = []
    for function in (compiled, kl):
        loss = function(velocity, teacher, SIGMA.float(), NEXT_SIGMA.float())
        (gradient,) = torch.autograd.grad(loss.sum(), velocity)
        results.append((loss.detach(), gradient))
    torch.testing.assert_close(results[0], results[1])
