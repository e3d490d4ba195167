"""DPO for flows: the logistic loss of implicit rewards, and what its gradient means at each end."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import dpo_loss, flow_matching_loss

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
WINNER, LOSER = torch.tensor([0, 3, 0]), torch.tensor([1, 2, 4])


def exactly(message):
    return f"^{re.escape(message)}$"


def case(shape=(5, 2, 3), seed=0, dtype=torch.float64):
    """A velocity that wants a gradient, the reference's and the target."""
    generator = torch.Generator().manual_seed(seed)
    velocity, reference, target = torch.randn(3, *shape, generator=generator, dtype=dtype)
    return velocity.requires_grad_(), reference, target


def loss_of(inputs, winner=WINNER, loser=LOSER, dpo_beta=2.0):
    return dpo_loss(*inputs, winner, loser, dpo_beta=dpo_beta)


def test_golden():
    # target 0, reference 2 everywhere (loss 4); winner at 1 (loss 1), loser at 3 (loss 9):
    # rewards b/2 * 3 and b/2 * -5, 8 apart at b = 2; the other way round -8
    velocity = torch.tensor([[1.0, 1.0], [3.0, -3.0]])
    inputs = (velocity, torch.full((2, 2), 2.0), torch.zeros(2, 2))
    pair = torch.tensor([0]), torch.tensor([1])
    assert loss_of(inputs, *pair).tolist() == pytest.approx([math.log1p(math.exp(-8))])
    assert loss_of(inputs, *pair[::-1]).tolist() == pytest.approx([math.log1p(math.exp(8))])
    assert loss_of(inputs, *pair, dpo_beta=0.25).tolist() == pytest.approx(
        [math.log1p(math.exp(-1))]
    )


@pytest.mark.parametrize("shape", [(5, 1), (5, 4), (5, 3, 5)])
@pytest.mark.parametrize("b", [0.1, 1.0, 10.0])
def test_equals_the_loop(shape, b):
    inputs = case(shape)

    def reward(row):
        v, ref, target = (x[row].flatten().tolist() for x in inputs)
        error, reference_error = (
            math.fsum((a - t) ** 2 for a, t in zip(x, target, strict=True)) / len(target)
            for x in (v, ref)
        )
        return b / 2 * (reference_error - error)

    expected = [
        -math.log(1 / (1 + math.exp(reward(lost) - reward(won))))
        for won, lost in zip(WINNER.tolist(), LOSER.tolist(), strict=True)
    ]
    assert loss_of(inputs, dpo_beta=b).tolist() == pytest.approx(expected)


def test_a_pair_and_its_reverse_are_the_two_outcomes_of_one_choice():
    probability, reverse = (
        (-loss_of(case(), *pair)).exp() for pair in ((WINNER, LOSER), (LOSER, WINNER))
    )
    torch.testing.assert_close(probability + reverse, torch.ones(3, dtype=torch.float64))


@given(st.permutations(range(5)), st.permutations(range(3)))
def test_rows_and_pairs_may_come_in_any_order(rows, pairs):
    whole = loss_of(case())
    position = torch.tensor(rows).argsort()  # where each row has gone
    permuted = loss_of([x[rows] for x in case()], position[WINNER[pairs]], position[LOSER[pairs]])
    torch.testing.assert_close(permuted, whole[pairs])
    torch.testing.assert_close(loss_of(case(), WINNER[1:2], LOSER[1:2]), whole[1:2])


def test_rows_in_no_pair_count_nothing():
    velocity, reference, target = case()
    with torch.no_grad():
        velocity[4] = math.nan
    loss = loss_of((velocity, reference, target), WINNER[:2], LOSER[:2])
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    torch.testing.assert_close(loss, loss_of(case())[:2])
    assert gradient[:4].isfinite().all()


def test_a_change_that_both_rows_share_changes_nothing():
    """Only the difference of the implicit rewards counts."""
    rows = torch.full((2, 2), 2.0), torch.full((2, 2), 1.0), torch.zeros(2, 2)
    loss = loss_of(rows, torch.tensor([0]), torch.tensor([1]))
    assert loss.item() == pytest.approx(math.log(2))


def test_the_mean_over_pairs_bounds_the_loss_of_the_mean_reward():
    """Of one trajectory against another at several flow times: rows 0..3 against 4..7."""
    inputs, rows = case((8, 3)), torch.arange(4)
    velocity, reference, target = (x.detach() for x in inputs)
    reward = (reference - target).square().mean(1) - (velocity - target).square().mean(1)  # b = 2
    of_the_mean = torch.nn.functional.softplus((reward[rows + 4] - reward[rows]).mean())
    assert loss_of(inputs, rows, rows + 4).mean() > of_the_mean


# what the gradient means


@pytest.mark.parametrize("b", [0.5, 2000.0])
def test_at_the_reference_it_is_log_2_and_b_4_times_the_flow_matching_gradients(b):
    _, reference, target = case()
    velocity = reference.clone().requires_grad_()
    loss = loss_of((velocity, reference, target), dpo_beta=b)
    torch.testing.assert_close(loss, torch.full((3,), math.log(2), dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    matching = flow_matching_loss(velocity, torch.zeros_like(target), target)
    difference = matching[WINNER].sum() - matching[LOSER].sum()  # row 0 wins twice
    (expected,) = torch.autograd.grad(b / 4 * difference, velocity)
    torch.testing.assert_close(gradient, expected)


def test_a_pair_that_is_won_teaches_nothing_more_and_a_lost_one_at_full_strength():
    far, near, target = torch.full((1, 4), 100.0), torch.full((1, 4), 1.0), torch.zeros(2, 4)
    for first, second, weight in [(near, far, 0.0), (far, near, 1.0)]:
        velocity = torch.cat([first, second]).requires_grad_()
        loss = loss_of(
            (velocity, torch.full((2, 4), 10.0), target), torch.tensor([0]), torch.tensor([1])
        )
        loss.sum().backward()
        assert loss.isfinite().all()
        full = torch.tensor([[1.0], [-1.0]]) * 2 * velocity.detach() / 4  # b/2 of both errors
        torch.testing.assert_close(velocity.grad, weight * full)


def test_descent_brings_the_winner_nearer_and_the_loser_further():
    _, reference, target = case((2, 3))
    velocity = reference.clone().requires_grad_()
    pair = torch.tensor([0]), torch.tensor([1])
    loss_of((velocity, reference, target), *pair).sum().backward()
    moved = reference - 0.01 * velocity.grad
    before, after = ((x - target).square().mean(1) for x in (reference, moved))
    assert after[0] < before[0]
    assert after[1] > before[1]


def test_second_derivatives_without_error():
    """Both branches of a pair curve by b / 4 times the matching losses: b / (2 n), minus, plus."""
    velocity = case((2, 3))[0].detach()
    first, second = torch.tensor([0]), torch.tensor([1])

    def gradient(v):
        inputs = (v, velocity, velocity)
        return torch.func.grad(lambda v: loss_of((v, *inputs[1:]), first, second).sum())(v)

    curvature = torch.func.jacrev(gradient)(velocity).reshape(6, 6)
    signs = torch.tensor([1.0] * 3 + [-1.0] * 3, dtype=torch.float64)
    torch.testing.assert_close(curvature, 2.0 / (2 * 3) * torch.diag(signs))


def test_the_gradient_reaches_the_velocity_alone():
    tensors = [x.detach().clone().requires_grad_() for x in case()]
    loss_of(tensors).sum().backward()
    assert [x.grad is not None for x in tensors] == [True, False, False]
    velocity, *rest = case((5, 2))
    assert torch.autograd.gradcheck(lambda v: loss_of((v, *rest)), velocity)


# errors, dtypes, compilation


def test_errors():
    x = torch.zeros(5, 3)
    for name, inputs in [
        ("target", (x, x, x[:4])),
        ("reference_velocity", (x, x[:, :2], x)),
    ]:
        with pytest.raises(ValueError, match=rf"^{name}: expected the shape of "):
            loss_of(inputs)
    with pytest.raises(ValueError, match=r"^velocity: expected a non-empty tensor of shape \[M,"):
        loss_of((x[0], x[0], x[0]))
    with pytest.raises(TypeError, match=r"^velocity: expected a floating-point tensor, got torch"):
        loss_of((x.long(), x, x))
    message = "dpo_beta: expected a finite number in (0, inf], got 0.0"
    with pytest.raises(ValueError, match=exactly(message)):
        loss_of((x, x, x), dpo_beta=0.0)
    with pytest.raises(TypeError, match=r"^winner: expected integer row numbers, got torch\.bool"):
        loss_of((x, x, x), WINNER > 0)
    with pytest.raises(
        TypeError, match=r"^loser: expected integer row numbers, got torch\.float64"
    ):
        loss_of((x, x, x), WINNER, [0.0])
    message = "loser: expected rows in 0..4, got 5 at index [1]"
    with pytest.raises(ValueError, match=exactly(message)):
        loss_of((x, x, x), WINNER, torch.tensor([0, 5, 0]))
    with pytest.raises(ValueError, match=r"^winner: expected rows in 0\.\.4, got -1 at index"):
        loss_of((x, x, x), torch.tensor([-1, 0, 0]), LOSER)
    message = "loser: expected the shape of winner, [3], got [2]"
    with pytest.raises(ValueError, match=exactly(message)):
        loss_of((x, x, x), WINNER, LOSER[:2])
    with pytest.raises(ValueError, match=r"^winner: expected a non-empty tensor of shape \[P\], "):
        loss_of((x, x, x), WINNER[:0], LOSER[:0])


@pytest.mark.parametrize("device", DEVICES)
def test_dtype_and_device_are_kept(device):
    pair = WINNER.to(device), LOSER.to(device)
    for dtype, expected in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        loss = loss_of([x.to(device, dtype) for x in case()], *pair)
        assert loss.dtype == expected
        assert loss.device.type == device
        torch.testing.assert_close(
            loss_of([x.to(device, dtype) for x in case()], *(x.int() for x in pair)), loss
        )


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_eager():
    torch.compiler.reset()
    compiled = torch.compile(dpo_loss, fullgraph=True, backend="aot_eager")
    inputs = case(dtype=torch.float32)
    results = []
    for function in (compiled, dpo_loss):
        loss = function(*inputs, WINNER, LOSER, dpo_beta=2.0)
        (gradient,) = torch.autograd.grad(loss.sum(), inputs[0])
        results.append((loss.detach(), gradient))
    torch.testing.assert_close(results[0], results[1])


def test_the_target_and_the_axes_of_indices_are_checked():
    velocity, pair = torch.ones(2, 3), torch.tensor([0])
    with pytest.raises(ValueError, match=r"^target: expected the shape of velocity"):
        dpo_loss(velocity, velocity, torch.ones(1, 3), pair, pair, dpo_beta=1.0)
    with pytest.raises(ValueError, match=r"^winner: .*\[P\]"):
        dpo_loss(velocity, velocity, velocity, pair[None], pair, dpo_beta=1.0)
