"""CRD: its limit in AWM, a plain loop, what centering does, gradients, masks, errors, the KL."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import crd_loss, flow_matching_loss, kl_coef_by_reward, optimality_probability
from tests.loops import some

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
GROUP = torch.tensor([7, -2, 7, 7, -2])
ADVANTAGE = torch.tensor([1.0, 0.5, -1.0, 2.5, -7.0], dtype=torch.float64)  # one beyond the clip


def exactly(message):
    return f"^{re.escape(message)}$"


def case(shape=(5, 2, 3), seed=0, dtype=torch.float64):
    """A velocity that wants a gradient, the old policy's and the target."""
    generator = torch.Generator().manual_seed(seed)
    velocity, old, target = torch.randn(3, *shape, generator=generator, dtype=dtype)
    return velocity.requires_grad_(), old, target


def loss_of(inputs, advantage=ADVANTAGE, group=GROUP, **options):
    return crd_loss(*inputs, advantage, group, **options)


def gradient_of(loss, velocity):
    return torch.autograd.grad(loss, velocity, retain_graph=True)[0]


def matching(velocity, target):
    return flow_matching_loss(velocity, torch.zeros_like(target), target)


def test_golden():
    # target 0; q = 4 - 1 = 3 and 4 - 9 = -5, 4 from their mean; a = 0.6 and 0.4, 0.1 from theirs
    velocity, old = torch.tensor([[1.0, 1.0], [3.0, -3.0]]), torch.full((2, 2), 2.0)
    inputs = (velocity, old, torch.zeros(2, 2))
    assert loss_of(inputs, [1, -1], [0, 0]).tolist() == pytest.approx([5 * 3.9**2] * 2)
    loss = loss_of(inputs, [1, -1], [0, 0], crd_beta=0.5, advantage_max=2.0)
    assert loss.tolist() == pytest.approx([4 * (2 - 0.25) ** 2] * 2)
    # errors over mean absolute errors: q = 2 - 1 and 2 - 3
    loss = loss_of(inputs, [1, -1], [0, 0], adaptive=True)
    assert loss.tolist() == pytest.approx([5 * 0.9**2] * 2)
    assert loss_of(inputs, [1, -1], [0, 0], adaptive=True, floor=4.0).tolist() == pytest.approx(
        [5 * (4 / 4 - 0.1) ** 2] * 2  # q = 3/4 and -5/4
    )


@pytest.mark.parametrize("shape", [(5, 1), (5, 3, 5)])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("b", [0.2, 3.0])
def test_equals_the_loop(shape, adaptive, b):
    inputs = case(shape)
    v, old, target = (x.detach().flatten(1).tolist() for x in inputs)

    def error(x, row):
        gaps = [p - q for p, q in zip(x[row], target[row], strict=True)]
        size = math.fsum(map(abs, gaps)) / len(gaps) if adaptive else 1.0
        return math.fsum(gap * gap for gap in gaps) / len(gaps) / size

    q = [error(old, row) - error(v, row) for row in range(5)]
    a = [min(max(x, -5.0), 5.0) / 10 + 0.5 for x in ADVANTAGE.tolist()]
    expected = []
    for row, name in enumerate(GROUP.tolist()):
        own = [j for j, other in enumerate(GROUP.tolist()) if other == name]
        q_mean, a_mean = (math.fsum(x[j] for j in own) / len(own) for x in (q, a))
        expected.append((b * (q[row] - q_mean) - (a[row] - a_mean)) ** 2 * 5 / b)
    loss = loss_of(inputs, crd_beta=b, adaptive=adaptive)
    assert loss.tolist() == pytest.approx(expected, rel=1e-9)


# limits


@pytest.mark.parametrize("b", [0.3, 20.0])
@pytest.mark.parametrize("advantage_max", [7.5, 20.0])
def test_on_policy_it_is_the_variance_with_the_gradient_of_weighted_matching(b, advantage_max):
    velocity, _, target = case()
    loss = loss_of((velocity, velocity.detach(), target), crd_beta=b, advantage_max=advantage_max)
    a = optimality_probability(ADVANTAGE, advantage_max=advantage_max)
    centered = ADVANTAGE.clone()
    for name in some([7, -2]):
        own = name == GROUP
        variance = a[own].var(correction=0) * advantage_max / b
        torch.testing.assert_close(loss[own].mean(), variance)
        centered[own] -= ADVANTAGE[own].mean()
    expected = gradient_of((centered * matching(velocity, target)).sum(), velocity)
    torch.testing.assert_close(gradient_of(loss.sum(), velocity), expected)


def test_constants_in_reward_or_implicit_reward_change_nothing():
    velocity, old, target = case((5, 4))
    inside = ADVANTAGE.clamp(-2, 2)
    loss = loss_of((velocity, old, target), inside)
    torch.testing.assert_close(loss_of((velocity, old, target), inside + 1.3), loss)
    # an element that is the target's for the policy alone: its square over 4 joins every q
    same, further = old.clone(), old.clone()
    velocity = velocity.detach()
    velocity[:, 0] = same[:, 0] = target[:, 0]
    further[:, 0] = target[:, 0] + 3.0
    torch.testing.assert_close(
        loss_of((velocity, further, target)), loss_of((velocity, same, target))
    )


def test_the_detached_mean_of_the_implicit_reward_is_no_approximation():
    velocity, old, target = case()
    q = matching(old, target) - matching(velocity, target)
    a = optimality_probability(ADVANTAGE)
    same = (GROUP[:, None] == GROUP).double()
    means = same / same.sum(dim=1, keepdim=True)
    attached = ((q - means @ q - (a - means @ a)).square() * 5).sum()
    loss = loss_of((velocity, old, target)).sum()
    torch.testing.assert_close(loss, attached)
    torch.testing.assert_close(gradient_of(loss, velocity), gradient_of(attached, velocity))


def test_the_loss_is_0_where_the_implicit_reward_is_the_reward_up_to_a_constant():
    a = optimality_probability(ADVANTAGE)
    error = 4.0 - (a + torch.tensor([0.1, -0.3, 0.1, 0.1, -0.3])) / 2.0  # b q = a + constant
    velocity = error.sqrt()[:, None].expand(5, 3).clone().requires_grad_()
    old, target = torch.full((5, 3), 2.0).double(), torch.zeros(5, 3).double()
    loss = loss_of((velocity, old, target), crd_beta=2.0)
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-24, rtol=0)
    assert gradient_of(loss.sum(), velocity).abs().max() < 1e-12
    assert loss_of((velocity, old, target), crd_beta=1.0).min() > 1e-4


@given(st.permutations(range(5)), st.integers(-(2**60), 2**60))
def test_rows_may_come_in_any_order_and_groups_are_alone(order, shift):
    whole = loss_of(case())
    mixed = loss_of([x[order] for x in case()], ADVANTAGE[order], (GROUP + shift)[order])
    torch.testing.assert_close(mixed, whole[order])
    own = GROUP == 7
    alone = loss_of([x[own] for x in case()], ADVANTAGE[own], [1] * 3)
    torch.testing.assert_close(alone, whole[own])
    batch = loss_of(case(), group=torch.zeros(5, dtype=torch.long))  # as public code centers
    assert (batch - whole).abs().min() > 1e-6


def test_descent_raises_the_implicit_reward_of_the_good_against_the_bad():
    _, old, target = case()
    velocity = old.clone().requires_grad_()
    gradient = gradient_of(loss_of((velocity, old, target)).sum(), velocity)
    q = matching(old, target) - matching(old - 0.01 * gradient, target)
    for name in some([7, -2]):
        own = name == GROUP
        order = ADVANTAGE[own].argsort()
        assert bool((q[own][order].diff() > 0).all())


# derivatives, masks, errors, precision


def test_the_gradient_reaches_the_velocity_alone():
    tensors = [x.detach().clone().requires_grad_() for x in (*case(), ADVANTAGE)]
    loss_of(tensors[:3], tensors[3]).sum().backward()
    assert [x.grad is not None for x in tensors] == [True, False, False, False]
    velocity, *rest = case((5, 2))
    assert torch.autograd.gradcheck(lambda v: loss_of((v, *rest)).sum(), velocity)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_masked_row_is_as_if_deleted(garbage, adaptive):
    valid = torch.tensor([True, True, False, True, True])
    held = [torch.where(valid[:, None, None], x.detach(), garbage) for x in case()]
    alone = [x.detach()[valid] for x in case()]
    for inputs in (held, alone):
        inputs[0].requires_grad_()
    advantage = torch.where(valid, ADVANTAGE, garbage)
    loss = loss_of(held, advantage, valid=valid, adaptive=adaptive)
    expected = loss_of(alone, ADVANTAGE[valid], GROUP[valid], adaptive=adaptive)
    torch.testing.assert_close(loss[valid], expected)
    gradient = gradient_of(loss.sum(), held[0])
    torch.testing.assert_close(gradient[valid], gradient_of(expected.sum(), alone[0]))
    assert not loss[2].any()
    assert not gradient[2].any()


def test_errors():
    x = torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"^old_velocity: expected the shape of velocity"):
        loss_of((x, x[:, :2], x))
    with pytest.raises(ValueError, match=r"^velocity: expected a non-empty tensor of shape \[M,"):
        loss_of((x[0], x[0], x[0]))
    for name in some(["crd_beta", "advantage_max", "floor"]):
        message = f"{name}: expected a finite number in (0, inf], got 0.0"
        with pytest.raises(ValueError, match=exactly(message)):
            loss_of((x, x, x), **{name: 0.0})
    message = "group: expected shape [M] = [5], got [4]"
    with pytest.raises(ValueError, match=exactly(message)):
        loss_of((x, x, x), group=GROUP[:4])
    with pytest.raises(TypeError, match=r"^advantage: expected float32 or float64, got torch\.bfl"):
        loss_of((x, x, x), ADVANTAGE.bfloat16())
    with pytest.raises(TypeError, match=r"^target: expected a floating-point tensor, got torch"):
        loss_of((x, x, x.long()))


@pytest.mark.parametrize("device", DEVICES)
def test_dtype_and_device_are_kept(device):
    for dtype, expected in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        inputs = [x.to(device, dtype) for x in case()]
        loss = loss_of(inputs, ADVANTAGE.to(device), GROUP.to(device))
        assert loss.dtype == expected
        assert loss.device.type == device
        wide = loss_of([x.to(expected) for x in inputs], ADVANTAGE.tolist(), GROUP.tolist())
        assert torch.equal(loss, wide)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_eager():
    torch.compiler.reset()
    compiled = torch.compile(crd_loss, fullgraph=True, backend="aot_eager")
    velocity, old, target = case(dtype=torch.float32)
    valid = torch.tensor([True, True, True, True, False])
    results = []
    for function in (compiled, crd_loss):
        loss = function(velocity, old, target, ADVANTAGE.float(), GROUP, adaptive=True, valid=valid)
        results.append((loss.detach(), gradient_of(loss.sum(), velocity)))
    torch.testing.assert_close(results[0], results[1])


# the KL that follows the reward


def test_the_weight_of_the_kl_rises_from_the_floor_to_the_coefficient():
    # as public code writes it: kl_coef * (m + a (1 - m)) with m = floor / kl_coef
    advantage = torch.linspace(-9, 9, 37, dtype=torch.float64).requires_grad_()
    weight = kl_coef_by_reward(advantage, kl_coef=0.1)
    a, m = optimality_probability(advantage), 1e-4 / 0.1
    torch.testing.assert_close(weight, 0.1 * (m + a * (1 - m)))
    assert bool((weight.diff() >= 0).all())
    assert (weight[0].item(), weight[-1].item()) == pytest.approx((1e-4, 0.1))
    assert not weight.requires_grad
    assert kl_coef_by_reward([0.0, 3.0], kl_coef=0.2, kl_floor=0.2).tolist() == [0.2, 0.2]
    assert kl_coef_by_reward([5, 0], kl_coef=1.0, kl_floor=0.0).tolist() == [1.0, 0.5]


def test_a_floor_above_the_coefficient_is_refused():
    message = "kl_coef: expected a finite number in [0.1, inf], got 0.01"
    with pytest.raises(ValueError, match=exactly(message)):
        kl_coef_by_reward([0.0], kl_coef=0.01, kl_floor=0.1)
    with pytest.raises(ValueError, match=r"^kl_floor: expected a finite number in \[0, inf\], got"):
        kl_coef_by_reward([0.0], kl_coef=0.1, kl_floor=-1.0)
    with pytest.raises(TypeError, match=r"^advantage: expected float32 or float64, got torch\.flo"):
        kl_coef_by_reward(torch.zeros(1).half(), kl_coef=0.1)


def test_an_advantage_that_is_not_finite_is_refused_where_it_is_valid():
    zeros = torch.zeros(2, 3)
    group, advantage = torch.tensor([0, 0]), torch.tensor([1.0, math.nan])
    with pytest.raises(ValueError, match="advantage: expected finite values where valid, got nan"):
        crd_loss(zeros, zeros, zeros, advantage, group)
    valid = torch.tensor([True, False])
    assert crd_loss(zeros, zeros, zeros, advantage, group, valid=valid).isfinite().all()
