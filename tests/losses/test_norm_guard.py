"""NormGuard: exactly 0 at any direction of an allowed length; above, a pull along the velocity."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import nft_loss, velocity_norm_hinge
from tests.loops import some

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def exactly(message):
    return f"^{re.escape(message)}$"


def case(shape=(5, 2, 3), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=generator, dtype=dtype).unbind()


def test_golden():
    # lengths 5 and 13 over 2 elements: (13 - 5) / sqrt(2); the other way nothing
    velocity = torch.tensor([[5.0, 12.0], [3.0, 4.0], [3.0, 4.0]])
    reference = torch.tensor([[3.0, 4.0], [5.0, 12.0], [4.0, -3.0]])
    assert velocity_norm_hinge(velocity, reference).tolist() == pytest.approx(
        [8 / math.sqrt(2), 0, 0]
    )
    # 13 against 5 * 1.4 = 7
    assert velocity_norm_hinge(velocity, reference, margin=0.4).tolist() == pytest.approx(
        [6 / math.sqrt(2), 0, 0]
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (2, 3, 5), (4, 2, 3, 2)])
@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_equals_the_loop(shape, margin):
    velocity, reference = case(shape)
    for row, value in some(
        enumerate(velocity_norm_hinge(velocity, reference, margin=margin).tolist())
    ):
        v, r = (
            math.sqrt(sum(x * x for x in side[row].flatten().tolist()) / side[row].numel())
            for side in (velocity, reference)
        )
        assert value == pytest.approx(max(0, v - (1 + margin) * r))


@given(st.permutations(range(5)), st.floats(0.01, 100), st.integers(2, 4))
def test_rows_scales_and_sizes(order, scale, copies):
    velocity, reference = case()
    whole = velocity_norm_hinge(velocity, reference)
    assert torch.equal(velocity_norm_hinge(velocity[order], reference[order]), whole[order])
    torch.testing.assert_close(velocity_norm_hinge(velocity[1:3], reference[1:3]), whole[1:3])
    scaled = velocity_norm_hinge(scale * velocity, scale * reference)
    torch.testing.assert_close(scaled, scale * whole)
    larger = (x.repeat(1, copies, 1) for x in (velocity, reference))
    torch.testing.assert_close(velocity_norm_hinge(*larger), whole)  # a larger latent


# what the gradient means


def test_a_turned_velocity_of_allowed_length_is_free():
    _, reference = case((4, 6))
    rotation, _ = torch.linalg.qr(case((6, 6), seed=1)[0])
    velocity = (0.999 * reference @ rotation).requires_grad_()
    loss = velocity_norm_hinge(velocity, reference)
    loss.sum().backward()
    assert loss.tolist() == [0] * 4
    assert torch.equal(velocity.grad, torch.zeros(4, 6, dtype=torch.float64))


@pytest.mark.parametrize("excess", [1.001, 3.0])
def test_above_it_the_gradient_is_the_direction_of_the_velocity_however_small_the_excess(excess):
    _, reference = case((4, 6))
    velocity = (excess * reference.flip(1)).requires_grad_()
    velocity_norm_hinge(velocity, reference).sum().backward()
    direction = velocity.detach() / velocity.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(velocity.grad, direction / math.sqrt(6))


def test_added_to_an_objective_it_holds_the_length_and_lets_the_direction_go():
    """NFT alone would make this velocity three times as long; with the hinge it only turns."""
    reference, target = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    r = torch.ones(1)
    lengths = []
    for coefficient in (0.0, 10.0):
        velocity = reference.clone().requires_grad_()
        optimizer = torch.optim.SGD([velocity], lr=0.01)
        for _ in range(400):
            loss = nft_loss(velocity, velocity.detach(), target, r, nft_beta=1.0)
            loss = loss + coefficient * velocity_norm_hinge(velocity, reference)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
        lengths.append(velocity.detach().norm().item())
        assert abs(velocity[0, 0].item()) < 0.15  # turned to the target
    assert lengths == pytest.approx([2.95, 1.0], abs=0.15)


def test_a_velocity_of_zero_has_a_gradient_of_zero():
    velocity = torch.zeros(2, 3, requires_grad=True)
    velocity_norm_hinge(velocity, torch.zeros(2, 3)).sum().backward()
    assert torch.equal(velocity.grad, torch.zeros(2, 3))


def test_second_derivatives_also_of_rows_that_are_zero():
    """Row 0 is inside the bound, row 1 beyond it, rows 2 and 3 are 0 against 1 and against 0."""
    velocity, _ = case((4, 3))
    velocity = velocity * torch.tensor([[0.1], [10.0], [0.0], [0.0]], dtype=velocity.dtype)
    reference = torch.tensor([[1.0], [1.0], [1.0], [0.0]], dtype=velocity.dtype).expand(4, 3)

    def gradient(v):
        return torch.func.grad(lambda v: velocity_norm_hinge(v, reference).sum())(v)

    second = torch.func.jacrev(gradient)(velocity)
    unit = velocity[1] / velocity[1].norm()
    curvature = (torch.eye(3, dtype=unit.dtype) - torch.outer(unit, unit)) / velocity[1].norm()
    expected = torch.zeros(4, 3, 4, 3, dtype=unit.dtype)
    expected[1, :, 1] = curvature / 3**0.5
    torch.testing.assert_close(second, expected)


# errors, dtypes, compilation


def test_errors():
    x = torch.zeros(2, 3)
    message = "reference_velocity: expected the shape of velocity, [2, 3], got [1, 3]"
    with pytest.raises(ValueError, match=exactly(message)):
        velocity_norm_hinge(x, x[:1])
    with pytest.raises(ValueError, match=r"^velocity: expected a non-empty tensor of shape \[M,"):
        velocity_norm_hinge(x[0], x[0])
    with pytest.raises(TypeError, match=r"^velocity: expected a floating-point tensor, got torch"):
        velocity_norm_hinge(x.long(), x)
    message = "margin: expected a finite number in [0, inf], got -0.1"
    with pytest.raises(ValueError, match=exactly(message)):
        velocity_norm_hinge(x, x, margin=-0.1)


@pytest.mark.parametrize("device", DEVICES)
def test_dtype_and_device_are_kept(device):
    for dtype, expected in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        velocity, reference = (x.to(device, dtype) for x in case())
        hinge = velocity_norm_hinge(velocity, reference)
        assert hinge.dtype == expected
        assert hinge.device.type == device


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_eager():
    torch.compiler.reset()
    compiled = torch.compile(velocity_norm_hinge, fullgraph=True, backend="aot_eager")
    velocity, reference = case(dtype=torch.float32)
    results = []
    for function in (compiled, velocity_norm_hinge):
        v = velocity.clone().requires_grad_()
        hinge = function(v, reference, margin=0.1)
        hinge.sum().backward()
        results.append((hinge.detach(), v.grad))
    torch.testing.assert_close(results[0], results[1])


def test_the_reference_is_checked_for_its_dtype():
    with pytest.raises(TypeError, match=r"^reference_velocity: expected a floating-point"):
        velocity_norm_hinge(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.int64))
