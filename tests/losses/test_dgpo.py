"""DGPO: its limits in AWM and DPO, a plain loop, the meaning of its gradient, masks, errors."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import dgpo_loss, dpo_loss, flow_matching_loss, group_advantage, masked_mean
from tests.loops import some

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
GROUP = torch.tensor([7, -2, 7, 7, -2])  # of three and of two, in any order
ADVANTAGE = torch.tensor([1.0, 0.5, -1.5, 0.5, -0.5], dtype=torch.float64)  # sums 0 in each


def exactly(message):
    return f"^{re.escape(message)}$"


def case(shape=(5, 2, 3), seed=0, dtype=torch.float64):
    """A velocity that wants a gradient, the reference's, the target and the old policy's."""
    generator = torch.Generator().manual_seed(seed)
    velocity, reference, target, old = torch.randn(4, *shape, generator=generator, dtype=dtype)
    return velocity.requires_grad_(), reference, target, old


def loss_of(inputs, advantage=ADVANTAGE, group=GROUP, dgpo_beta=2.0, **options):
    return dgpo_loss(*inputs[:3], advantage, group, dgpo_beta=dgpo_beta, **options)


def gradient_of(loss, velocity):
    return torch.autograd.grad(loss, velocity, retain_graph=True)[0]


def matching(velocity, target):
    return flow_matching_loss(velocity, torch.zeros_like(target), target)


def test_golden():
    # target 0, reference 2 everywhere (loss 4); the good row at 1 (loss 1), the bad at 3 (loss 9):
    # S = b/2 (1 * (1 - 4) - 1 * (9 - 4)) = -4 b; the other way round 4 b
    velocity, reference = torch.tensor([[1.0, 1.0], [3.0, -3.0]]), torch.full((2, 2), 2.0)
    for sign in (1, -1):
        loss = dgpo_loss(
            velocity, reference, torch.zeros(2, 2), [sign, -sign], [0, 0], dgpo_beta=0.5
        )
        weight = 1 / (1 + math.exp(2 * sign))
        assert loss.tolist() == pytest.approx([sign * weight, -9 * sign * weight])


@pytest.mark.parametrize("shape", [(5, 1), (5, 3, 5)])
@pytest.mark.parametrize("b", [0.0, 0.7, 10.0])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_equals_the_loop(shape, b, clip):
    inputs = case(shape)
    v, ref, target, old = (x.detach().flatten(1).tolist() for x in inputs)

    def error(x, row):
        pairs = zip(x[row], target[row], strict=True)
        return math.fsum((p - q) ** 2 for p, q in pairs) / len(x[row])

    expected, moves = [], []
    for row, name in enumerate(GROUP.tolist()):
        members = [j for j, other in enumerate(GROUP.tolist()) if other == name]
        a = ADVANTAGE.tolist()
        ahead = math.fsum(a[j] * (error(v, j) - error(ref, j)) for j in members) / len(members)
        expected.append(a[row] * error(v, row) / (1 + math.exp(-b * ahead)))
        ratio = math.exp(error(old, row) - error(v, row))
        beyond = ratio > 1 + 0.5 if a[row] > 0 else ratio < 1 - 0.5
        moves.append(clip is None or not beyond)
    options = {} if clip is None else {"old_velocity": inputs[3], "ratio_clip": clip}
    loss = loss_of(inputs, dgpo_beta=b, **options)
    assert loss.tolist() == pytest.approx(expected, rel=1e-9)
    gradient = gradient_of(loss.sum(), inputs[0])
    assert gradient.flatten(1).any(dim=1).tolist() == moves
    assert clip is None or {*moves} == {True, False}


# what it is beside others


def test_a_group_of_two_has_the_gradient_of_dpo_over_beta():
    """With the std of the population, which makes the advantages 1 and -1; of a sample 1/root 2."""
    velocity, reference, target, _ = case((2, 3))
    advantage = group_advantage([0.2, 0.9], [0, 0], eps=0.0)
    assert advantage.tolist() == [-1.0, 1.0]
    for b in (0.3, 40.0):
        loss = loss_of((velocity, reference, target), advantage, [0, 0], b).mean()
        pair = dpo_loss(velocity, reference, target, [1], [0], dpo_beta=b).sum()
        torch.testing.assert_close(
            gradient_of(loss, velocity), gradient_of(pair, velocity) / b, rtol=1e-12, atol=1e-14
        )
        narrow = loss_of((velocity, reference, target), advantage / 2**0.5, [0, 0], b).mean()
        same = loss_of((velocity, reference, target), advantage, [0, 0], b / 2**0.5).mean()
        assert narrow.item() == pytest.approx(same.item() / 2**0.5)


def test_any_group_has_the_gradient_of_its_bradley_terry_loss_over_beta():
    """-log sigmoid(-S_g) with S attached, b / G times the mean over rows."""
    velocity, reference, target, _ = case()
    b = 1.7
    gain = matching(velocity, target) - matching(reference, target)
    whole = gradient_of(loss_of((velocity, reference, target), dgpo_beta=b).sum(), velocity)
    for name in some([7, -2]):
        own = name == GROUP
        s = b * (ADVANTAGE * gain)[own].mean()
        expected = gradient_of(torch.nn.functional.softplus(s), velocity)[own]
        torch.testing.assert_close(whole[own], expected * own.sum() / b, rtol=1e-12, atol=1e-14)


def test_at_the_reference_it_is_half_of_advantage_weighted_matching_and_so_it_is_for_beta_0():
    velocity, reference, target, _ = case()
    half = gradient_of((ADVANTAGE * matching(velocity, target)).sum() / 2, velocity)
    for other, b in ((velocity.detach(), 50.0), (reference, 0.0), (reference, 1e-12)):
        loss = loss_of((velocity, other, target), dgpo_beta=b)
        torch.testing.assert_close(gradient_of(loss.sum(), velocity), half, rtol=1e-9, atol=1e-12)


def test_a_large_beta_trains_the_groups_that_are_ordered_wrongly_and_no_others():
    velocity, reference, target, _ = case(seed=3)
    gain = (matching(velocity, target) - matching(reference, target)).detach()
    wrong = torch.stack([(ADVANTAGE * gain)[name == GROUP].sum() > 0 for name in GROUP])
    assert {*wrong.tolist()} == {True, False}
    gradient = gradient_of(loss_of((velocity, reference, target), dgpo_beta=1e8).sum(), velocity)
    whole = gradient_of((ADVANTAGE * matching(velocity, target)).sum(), velocity)
    torch.testing.assert_close(gradient[wrong], whole[wrong])
    assert not gradient[~wrong].any()


def test_a_constant_added_to_the_reference_losses_of_a_group_changes_nothing():
    """That is how the normalizing constants cancel; where advantages do not sum to 0 it counts."""
    velocity, reference, target, _ = case((5, 4))
    # an element that is the target's for the policy alone: its square over 4 joins every l_ref
    velocity = velocity.detach()
    velocity[:, 0] = target[:, 0]
    shifted = reference.clone()
    reference[:, 0], shifted[:, 0] = target[:, 0], target[:, 0] + 3.0
    before, after = (loss_of((velocity, x, target)) for x in (reference, shifted))
    torch.testing.assert_close(before, after)
    uneven = ADVANTAGE + 0.1
    before, after = (loss_of((velocity, x, target), uneven) for x in (reference, shifted))
    assert (before - after).abs().max() > 1e-3


def test_equal_rewards_are_no_loss_and_no_gradient():
    inputs = case()
    advantage = group_advantage(torch.full((5,), 3.0, dtype=torch.float64), GROUP)
    loss = loss_of(inputs, advantage)
    assert not loss.any()
    assert not gradient_of(loss.sum(), inputs[0]).any()


@given(st.permutations(range(5)), st.integers(-(2**60), 2**60))
def test_rows_may_come_in_any_order_and_ids_be_any(order, shift):
    whole = loss_of(case())
    mixed = loss_of([x[order] for x in case()], ADVANTAGE[order], (GROUP + shift)[order])
    torch.testing.assert_close(mixed, whole[order])
    alone = [x[GROUP == 7] for x in case()]
    torch.testing.assert_close(loss_of(alone, ADVANTAGE[GROUP == 7], [1] * 3), whole[GROUP == 7])


def test_descent_improves_the_order_of_the_group():
    _, reference, target, _ = case()
    velocity = reference.clone().requires_grad_()
    loss = loss_of((velocity, reference, target), dgpo_beta=5.0)
    moved = reference - 0.01 * gradient_of(loss.sum(), velocity)
    gain = matching(moved, target) - matching(reference, target)
    assert bool((ADVANTAGE * gain < 0).all())  # nearer to the good, further from the bad


# derivatives, masks, errors, precision


def test_the_gradient_reaches_the_velocity_alone_and_is_that_of_the_value_at_beta_0():
    tensors = [x.detach().clone().requires_grad_() for x in (*case(), ADVANTAGE)]
    v, ref, target, old, advantage = tensors
    loss = loss_of((v, ref, target), advantage, old_velocity=old, ratio_clip=0.9)
    loss.sum().backward()
    assert [x.grad is not None for x in tensors] == [True, False, False, False, False]
    velocity, *rest = case((5, 2))
    assert torch.autograd.gradcheck(lambda v: loss_of((v, *rest), dgpo_beta=0.0), velocity)


def test_the_bound_keeps_the_value():
    inputs = case()
    bounded = loss_of(inputs, old_velocity=inputs[3], ratio_clip=0.01)
    assert torch.equal(bounded, loss_of(inputs))
    at_once = loss_of(inputs, old_velocity=inputs[0].detach(), ratio_clip=0.01)
    free = gradient_of(loss_of(inputs).sum(), inputs[0])
    assert torch.equal(gradient_of(at_once.sum(), inputs[0]), free)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_a_masked_row_is_as_if_deleted(garbage):
    valid = torch.tensor([True, True, False, True, True])
    whole = case()
    alone = [x.detach()[valid] for x in whole]
    held = [torch.where(valid[:, None, None], x.detach(), garbage) for x in whole]
    for inputs in (held, alone):
        inputs[0].requires_grad_()
    bound = {"ratio_clip": 0.5}
    advantage = torch.where(valid, ADVANTAGE, garbage)
    loss = loss_of(held, advantage, valid=valid, old_velocity=held[3], **bound)
    expected = loss_of(alone, ADVANTAGE[valid], GROUP[valid], old_velocity=alone[3], **bound)
    torch.testing.assert_close(loss[valid], expected)
    gradient = gradient_of(loss.sum(), held[0])
    torch.testing.assert_close(gradient[valid], gradient_of(expected.sum(), alone[0]))
    assert not loss[2].any()
    assert not gradient[2].any()
    assert masked_mean(loss, valid).isfinite()
    nobody = loss_of(held, advantage, valid=torch.zeros(5, dtype=torch.bool))
    assert not nobody.any()


def test_errors():
    x = torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"^target: expected the shape of velocity"):
        loss_of((x, x, x[:4]))
    with pytest.raises(ValueError, match=r"^reference_velocity: expected the shape of velocity"):
        loss_of((x, x[:, :2], x))
    with pytest.raises(ValueError, match=r"^velocity: expected a non-empty tensor of shape \[M,"):
        loss_of((x[0], x[0], x[0]))
    with pytest.raises(ValueError, match=r"^old_velocity: expected the shape of velocity"):
        loss_of((x, x, x), old_velocity=x[:4], ratio_clip=0.1)
    message = "dgpo_beta: expected a finite number in [0, inf], got -1.0"
    with pytest.raises(ValueError, match=exactly(message)):
        loss_of((x, x, x), dgpo_beta=-1.0)
    message = "ratio_clip: expected a finite number in (0, 1), got 1.0"
    with pytest.raises(ValueError, match=exactly(message)):
        loss_of((x, x, x), old_velocity=x, ratio_clip=1.0)
    message = "old_velocity, ratio_clip: expected both or neither, got only ratio_clip"
    with pytest.raises(ValueError, match=exactly(message)):
        loss_of((x, x, x), ratio_clip=0.1)
    with pytest.raises(ValueError, match=r"neither, got only old_velocity$"):
        loss_of((x, x, x), old_velocity=x)
    message = "group: expected shape [M] = [5], got [4]"
    with pytest.raises(ValueError, match=exactly(message)):
        loss_of((x, x, x), group=GROUP[:4])
    with pytest.raises(TypeError, match=r"^group: expected integer ids, got torch\.float32$"):
        loss_of((x, x, x), group=GROUP.float())
    with pytest.raises(ValueError, match=r"^advantage: expected a number or a tensor whose shape"):
        loss_of((x, x, x), ADVANTAGE[:4])
    with pytest.raises(TypeError, match=r"^advantage: expected float32 or float64, got torch\.bfl"):
        loss_of((x, x, x), ADVANTAGE.bfloat16())


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
        torch.testing.assert_close(loss, wide, rtol=0, atol=0)  # half precision is reduced in full
        column = loss_of(inputs, ADVANTAGE.to(device)[:, None, None], GROUP.to(device).int())
        assert torch.equal(column, loss)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_eager():
    torch.compiler.reset()
    compiled = torch.compile(dgpo_loss, fullgraph=True, backend="aot_eager")
    velocity, reference, target, old = case(dtype=torch.float32)
    valid = torch.tensor([True, True, True, True, False])
    results = []
    for function in (compiled, dgpo_loss):
        loss = function(
            velocity, reference, target, ADVANTAGE.float(), GROUP, dgpo_beta=2.0,
            old_velocity=old, ratio_clip=0.5, valid=valid,
        )  # fmt: skip
        results.append((loss.detach(), gradient_of(loss.sum(), velocity)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_advantage_that_is_not_finite_is_refused_where_it_is_valid(value):
    zeros = torch.zeros(2, 3)
    group, advantage = torch.tensor([0, 0]), torch.tensor([1.0, value])
    with pytest.raises(ValueError, match="advantage: expected finite values where valid, got"):
        dgpo_loss(zeros, zeros, zeros, advantage, group, dgpo_beta=1.0)
    valid = torch.tensor([True, False])
    assert (
        dgpo_loss(zeros, zeros, zeros, advantage, group, dgpo_beta=1.0, valid=valid)
        .isfinite()
        .all()
    )
