"""The clipped surrogate: values, a plain loop, what its gradient means, and what a mask hides."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import (
    clipped_surrogate_loss,
    crd_loss,
    dgpo_loss,
    divergence_gated_loss,
    masked_mean,
)

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
NAN, INF = math.nan, math.inf
CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def exactly(message):
    return f"^{re.escape(message)}$"


def loss_and_gradient(log_ratio, advantage, dtype=torch.float64, **clip):
    log_prob = torch.tensor(log_ratio, dtype=dtype, requires_grad=True)
    loss = clipped_surrogate_loss(
        log_prob,
        torch.zeros_like(log_prob),
        torch.tensor(advantage, dtype=dtype),
        **(clip or CLIP),
    )
    loss.sum().backward()
    return loss.tolist(), log_prob.grad.tolist()


def test_golden():
    # ratios 2 and 1/2 against a range of 0.8 .. 1.3, for an advantage of 3 and of -3
    double, half = math.log(2.0), math.log(0.5)
    loss, gradient = loss_and_gradient([double, double, half, half], [3.0, -3.0, 3.0, -3.0])
    assert loss == pytest.approx([-1.3 * 3, 2 * 3, -0.5 * 3, 0.8 * 3])
    assert gradient == pytest.approx([0, 2 * 3, -0.5 * 3, 0])


@given(
    st.lists(
        st.tuples(st.floats(-5, 5), st.floats(-3, 3), st.floats(-5, 5)), min_size=1, max_size=8
    ),
    st.floats(0, 0.99),
    st.floats(0, 3),
)
def test_equals_the_loop(entries, clip_low, clip_high):
    """Eq. 4 as it stands: -min(ratio A, clip(ratio) A)."""
    expected = []
    for log_prob, old, advantage in entries:
        ratio = math.exp(log_prob - old)
        clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
        expected.append(-min(ratio * advantage, clipped * advantage))
    columns = torch.tensor(entries, dtype=torch.float64).T
    loss = clipped_surrogate_loss(*columns, clip_low=clip_low, clip_high=clip_high)
    assert loss.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.1, 5))
def test_the_loss_scales_with_the_advantage_and_sees_the_difference_alone(x, shift, scale):
    loss, gradient = loss_and_gradient([x, x], [1.0, -1.0])
    scaled, scaled_gradient = loss_and_gradient([x, x], [scale, -scale])
    assert scaled == pytest.approx([scale * value for value in loss])
    assert scaled_gradient == pytest.approx([scale * value for value in gradient])
    at = torch.tensor([x + shift], dtype=torch.float64)
    moved = clipped_surrogate_loss(
        at, torch.tensor([shift], dtype=torch.float64), torch.ones_like(at), **CLIP
    )
    assert moved.item() == pytest.approx(loss[0], abs=1e-9)


# what the gradient means


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [CLIP, {"clip_low": 1e-5, "clip_high": 1e-5}])
def test_on_policy_the_gradient_is_exactly_minus_the_advantage(dtype, clip):
    advantage = [1.7, -0.3, 0.0, 5.0, -5.0]
    loss, gradient = loss_and_gradient([0.0] * 5, advantage, dtype, **clip)
    minus = (-torch.tensor(advantage, dtype=dtype)).tolist()
    assert loss == minus
    assert gradient == minus


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [
        (1.31, 2.0, True),  # gone far enough toward a good sample
        (1.31, -2.0, False),  # drifted toward a bad one: pushed back
        (0.79, 2.0, False),  # drifted from a good one: pulled back
        (0.79, -2.0, True),  # gone far enough from a bad one
        (1.29, 2.0, False),
        (0.81, -2.0, False),
    ],
)
def test_clipping_stops_the_gradient_on_the_side_already_won(ratio, advantage, clipped):
    _, (gradient,) = loss_and_gradient([math.log(ratio)], [advantage])
    if clipped:
        assert gradient == 0.0
    else:
        assert gradient == pytest.approx(-ratio * advantage)


@pytest.mark.parametrize("far", [100.0, 1e4, -100.0, -1e4])
def test_far_off_ratios_leave_clipped_entries_finite(far):
    """exp overflows at 89 in float32; only a bad sample that became likely may show it."""
    loss, gradient = loss_and_gradient([far] * 3, [2.0, 0.0, -2.0], torch.float32)
    if far > 0:
        assert (loss[0], gradient[0]) == (pytest.approx(-1.3 * 2), 0.0)
        assert (loss[1], gradient[1]) == (0.0, 0.0)
        assert (loss[2], gradient[2]) == (INF, INF)
    else:
        assert loss == pytest.approx([0.0, 0.0, 0.8 * 2])
        assert gradient == pytest.approx([0.0, 0.0, 0.0])


# the mask


def test_a_masked_entry_is_zero_even_if_nan():
    log_prob = torch.tensor([0.1, NAN, 0.1, 0.1, -0.1], requires_grad=True)
    old = torch.tensor([0.0, 0.0, INF, 0.0, 0.0])
    advantage = torch.tensor([1.0, 1.0, 1.0, NAN, 1.0])
    valid = torch.tensor([True, False, False, False, True])
    loss = clipped_surrogate_loss(log_prob, old, advantage, valid=valid, **CLIP)
    masked_mean(loss, valid).backward()
    assert loss[1:4].tolist() == [0, 0, 0]
    assert log_prob.grad[1:4].tolist() == [0, 0, 0]
    kept = clipped_surrogate_loss(log_prob[valid], old[valid], advantage[valid], **CLIP)
    assert torch.equal(loss[valid], kept)
    expected = (-torch.tensor([0.1, -0.1]).exp() / 2).tolist()
    assert log_prob.grad[valid].tolist() == pytest.approx(expected)


def test_an_unmasked_nan_shows():
    assert math.isnan(loss_and_gradient([NAN], [1.0])[0][0])


# errors, types


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(position, dtype):
    tensors = [torch.zeros(2) for _ in range(3)]
    tensors[position] = tensors[position].to(dtype)
    name = ["log_prob", "old_log_prob", "advantage"][position]
    message = (
        f"{name}: expected float32 or float64, got {dtype}; half precision would "
        "silently change the result (convert with .float())"
    )
    with pytest.raises(TypeError, match=exactly(message)):
        clipped_surrogate_loss(*tensors, **CLIP)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, a: clipped_surrogate_loss(x[:, 0], x[:, 0], a, **CLIP),
        lambda x, a: divergence_gated_loss(x[:, 0], x[:, 0], a, x[:, 0], threshold=1.0),
        lambda x, a: crd_loss(x, x, x, a, [0, 0, 0]),
        lambda x, a: dgpo_loss(x, x, x, a, [0, 0, 0], dgpo_beta=1.0),
    ],
    ids=["clipped", "dppo", "crd", "dgpo"],
)
def test_the_advantage_of_one_row_is_not_that_of_several(loss):
    message = r"^advantage: .* leading part of \[3\], got \[1\]$"
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(3, 2), torch.ones(1))
    assert loss(torch.zeros(3, 2), torch.tensor(1.0)).shape == (3,)  # a number is one for all rows


def test_errors():
    x = torch.zeros(2)
    with pytest.raises(
        ValueError, match=exactly("old_log_prob: expected the shape of log_prob, [2], got [2, 1]")
    ):
        clipped_surrogate_loss(x, torch.zeros(2, 1), x, **CLIP)
    with pytest.raises(ValueError, match=r"^advantage: .* leading part of \[2\], got \[3\]$"):
        clipped_surrogate_loss(x, x, torch.zeros(3), **CLIP)
    for clip, message in [
        (
            {"clip_low": 1.0, "clip_high": 0.0},
            "clip_low: expected a finite number in [0, 1), got 1.0",
        ),
        (
            {"clip_low": -0.1, "clip_high": 0.0},
            "clip_low: expected a finite number in [0, 1), got -0.1",
        ),
        (
            {"clip_low": 0.0, "clip_high": -1.0},
            "clip_high: expected a finite number in [0, inf], got -1.0",
        ),
    ]:
        with pytest.raises(ValueError, match=exactly(message)):
            clipped_surrogate_loss(x, x, x, **clip)
    with pytest.raises(
        TypeError,
        match=exactly(
            "valid: expected a boolean mask, got torch.float32; convert 0 and 1 with .bool()"
        ),
    ):
        clipped_surrogate_loss(x, x, x, valid=x, **CLIP)
    with pytest.raises(
        ValueError, match=exactly("valid: expected shape of log_prob = [2], got [1]")
    ):
        clipped_surrogate_loss(x, x, x, valid=torch.ones(1, dtype=torch.bool), **CLIP)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_dtype_and_device_are_kept(dtype, device):
    x = torch.zeros(2, 3, 4, dtype=dtype, device=device)
    valid = torch.ones(2, 3, 4, dtype=torch.bool, device=device)
    for loss in (
        clipped_surrogate_loss(x, x, x, **CLIP),
        clipped_surrogate_loss(x, x, x, valid=valid, **CLIP),
    ):
        assert loss.shape == (2, 3, 4)
        assert loss.dtype == dtype
        assert loss.device.type == device


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager_also_when_the_clip_range_moves(backend):
    torch.compiler.reset()
    compiled = torch.compile(clipped_surrogate_loss, fullgraph=True, backend=backend)
    old, advantage, start = torch.randn(3, 4, 5)
    valid = torch.rand(4, 5) > 0.3
    for clip in (0.1, 0.2, 0.35):
        results = []
        for function in (compiled, clipped_surrogate_loss):
            log_prob = start.clone().requires_grad_()
            loss = function(
                log_prob, old, advantage, clip_low=clip, clip_high=2 * clip, valid=valid
            )
            loss.sum().backward()
            results.append((loss.detach(), log_prob.grad))
        torch.testing.assert_close(results[0], results[1])
