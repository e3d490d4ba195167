"""Flow-DPPO: which terms drop out, what is left of the gradient, and what a mask hides."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import clipped_surrogate_loss, divergence_gated_loss, gaussian_kl
from tests.loops import some

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
NAN = math.nan
NEVER = 1e30
ROWS = st.lists(
    st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3), st.floats(0, 2)),
    min_size=1,
    max_size=8,
)


def exactly(message):
    return f"^{re.escape(message)}$"


def loss_and_gradient(log_ratio, advantage, divergence, threshold=0.5, valid=None):
    log_prob = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    loss = divergence_gated_loss(
        log_prob,
        torch.zeros_like(log_prob),
        torch.tensor(advantage, dtype=torch.float64),
        torch.tensor(divergence, dtype=torch.float64),
        threshold=threshold,
        valid=None if valid is None else torch.tensor(valid),
    )
    loss.sum().backward()
    return loss.tolist(), log_prob.grad.tolist()


def test_golden():
    # ratios 2 and 1/2, advantages 3 and -3, all of them outside the trust region: Eq. 18's table
    double, half = math.log(2.0), math.log(0.5)
    outside = loss_and_gradient([double, double, half, half], [3.0, -3.0, 3.0, -3.0], [0.6] * 4)
    for found in some(outside):
        assert found == pytest.approx([0, 2 * 3, -0.5 * 3, 0])
    # inside, and on its edge, nothing is dropped
    for divergence in (0.1, 0.5):
        inside = loss_and_gradient(
            [double, double, half, half], [3.0, -3.0, 3.0, -3.0], [divergence] * 4
        )
        assert inside[0] == pytest.approx([-2 * 3, 2 * 3, -0.5 * 3, 0.5 * 3])


@given(ROWS, st.floats(0, 2))
def test_equals_the_loop(rows, threshold):
    """Eq. 17-18 as they stand."""
    expected = []
    for log_prob, old, advantage, divergence in rows:
        # ratio > 1 and ratio < 1, on the logarithm: the ratio itself rounds to 1 before that to 0
        log_ratio = log_prob - old
        further = (advantage > 0 and log_ratio > 0) or (advantage < 0 and log_ratio < 0)
        kept = -math.exp(log_ratio) * advantage
        expected.append(0 if further and divergence > threshold else kept)
    columns = torch.tensor(rows, dtype=torch.float64).T
    loss = divergence_gated_loss(*columns, threshold=threshold)
    assert loss.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(ROWS)
def test_with_an_endless_threshold_it_is_the_ratio_times_the_advantage(rows):
    log_prob, old, advantage, divergence = torch.tensor(rows, dtype=torch.float64).T
    loss = divergence_gated_loss(log_prob, old, advantage, divergence, threshold=NEVER)
    torch.testing.assert_close(loss, -(log_prob - old).exp() * advantage)


def test_inside_both_trust_regions_it_is_the_clipped_surrogate():
    log_prob, advantage = torch.tensor([0.1, -0.1, 0.05]), torch.tensor([2.0, -1.0, 0.0])
    gated = divergence_gated_loss(
        log_prob, torch.zeros(3), advantage, torch.full((3,), 1e-7), threshold=1e-6
    )
    clipped = clipped_surrogate_loss(
        log_prob, torch.zeros(3), advantage, clip_low=0.2, clip_high=0.2
    )
    torch.testing.assert_close(gated, clipped)


def test_two_samples_of_one_policy_are_dropped_alike_where_clipping_tells_them_apart():
    """The divergence is of the policies; a ratio depends on the noise that was drawn."""
    mean, old_mean = torch.tensor([[0.4, 0.0]]), torch.zeros(1, 2)
    std = torch.ones(1, 1)
    divergence = gaussian_kl(mean, old_mean, std, reduction="sum").expand(2)
    log_ratio = torch.tensor([0.05, 0.5])  # a sample of little noise along the way, and of much
    advantage = torch.ones(2)
    gated = divergence_gated_loss(
        log_ratio, torch.zeros(2), advantage, divergence, threshold=float(divergence[0]) / 2
    )
    assert gated.tolist() == [0, 0]
    clipped = clipped_surrogate_loss(
        log_ratio, torch.zeros(2), advantage, clip_low=0.2, clip_high=0.2
    )
    assert clipped.tolist() == pytest.approx([-math.exp(0.05), -1.2])


# what the gradient means


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8), st.floats(0, 1))
def test_on_policy_the_gradient_is_minus_the_advantage(advantages, threshold):
    zeros = [0.0] * len(advantages)
    _, gradient = loss_and_gradient(zeros, advantages, zeros, threshold=threshold)
    assert gradient == pytest.approx([-a for a in advantages])


def test_a_step_back_is_never_stopped():
    loss, gradient = loss_and_gradient([3.0, -3.0], [-1.0, 1.0], [50.0, 50.0], threshold=0.0)
    assert gradient == pytest.approx([math.exp(3), -math.exp(-3)])
    assert loss == gradient


def test_a_dropped_term_stays_finite_however_far_off():
    loss, gradient = loss_and_gradient([1e4, -1e4], [1.0, -1.0], [9.0, 9.0])
    assert loss == [0, 0]
    assert gradient == [0, 0]


# masks, shapes


def test_any_shape_and_dtype_are_kept():
    for device in DEVICES:
        for dtype in (torch.float32, torch.float64):
            inputs = torch.rand(4, 2, 3, 4, dtype=dtype, device=device)
            loss = divergence_gated_loss(*inputs, threshold=0.5)
            assert loss.shape == (2, 3, 4)
            assert loss.dtype == dtype
            assert loss.device.type == device


def test_errors():
    x = torch.zeros(3)
    message = "divergence: expected the shape of log_prob, [3], got [2]"
    with pytest.raises(ValueError, match=exactly(message)):
        divergence_gated_loss(x, x, x, x[:2], threshold=1.0)
    for position, name in enumerate(("log_prob", "old_log_prob", "advantage", "divergence")):
        inputs = [x, x, x, x]
        inputs[position] = x.half()
        with pytest.raises(TypeError, match=rf"^{name}: expected float32 or float64, got torch\.f"):
            divergence_gated_loss(*inputs, threshold=1.0)
    for threshold in (-1.0, math.inf):
        message = f"threshold: expected a finite number in [0, inf], got {threshold}"
        with pytest.raises(ValueError, match=exactly(message)):
            divergence_gated_loss(x, x, x, x, threshold=threshold)
    with pytest.raises(TypeError, match=r"^valid: expected a boolean mask, got torch\.float32"):
        divergence_gated_loss(x, x, x, x, threshold=1.0, valid=x)
    with pytest.raises(ValueError, match=r"^valid: expected shape of log_prob = \[3\], got \[2\]"):
        divergence_gated_loss(x, x, x, x, threshold=1.0, valid=x[:2] > 0)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_eager_also_when_the_threshold_moves():
    torch.compiler.reset()
    compiled = torch.compile(divergence_gated_loss, fullgraph=True, backend="aot_eager")
    old, advantage, start = torch.randn(3, 4, 5)
    divergence, valid = torch.rand(4, 5), torch.rand(4, 5) > 0.3
    for threshold in (0.1, 0.5):
        results = []
        for function in (compiled, divergence_gated_loss):
            log_prob = start.clone().requires_grad_()
            loss = function(log_prob, old, advantage, divergence, threshold=threshold, valid=valid)
            loss.sum().backward()
            results.append((loss.detach(), log_prob.grad))
        torch.testing.assert_close(results[0], results[1])


def test_a_step_that_did_not_move_by_its_ratio_is_not_dropped():
    """Ratio 1 has no direction, however far the divergence is."""
    log_prob = torch.zeros(2, requires_grad=True)
    advantage = torch.tensor([1.5, -0.5])
    loss = divergence_gated_loss(log_prob, torch.zeros(2), advantage, torch.ones(2), threshold=1e-6)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), -advantage)
    torch.testing.assert_close(log_prob.grad, -advantage)
