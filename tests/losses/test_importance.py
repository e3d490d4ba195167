"""Truncated importance weights: by hand, their law, no gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import clipped_surrogate_loss, truncated_importance_weight


def test_golden_values():
    old = torch.tensor([0.0, math.log(1.5), 3.0, -math.log(4.0)], dtype=torch.float64)
    weight = truncated_importance_weight(old, torch.zeros(4, dtype=torch.float64), cap=2.0)
    torch.testing.assert_close(weight, torch.tensor([1.0, 1.5, 2.0, 0.25], dtype=torch.float64))


@given(
    st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=8),
    st.floats(1, 100),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_smaller_of_ratio_and_cap(dtype, pairs, cap):
    old, recorded = torch.tensor(pairs, dtype=dtype).unbind(1)
    weight = truncated_importance_weight(old, recorded, cap=cap)
    expected = [min(math.exp(float(o - r)), cap) for o, r in zip(old, recorded, strict=True)]
    assert weight.tolist() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-12)
    assert bool((weight <= cap).all())
    assert weight.dtype == dtype


def test_equal_log_probs_weigh_exactly_1_and_far_ones_stay_finite():
    old = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert truncated_importance_weight(old, old, cap=1.0).tolist() == [1.0] * 100
    far = truncated_importance_weight(torch.tensor([1e4, -1e4]), torch.zeros(2), cap=7.3)
    assert far.tolist() == [torch.tensor(7.3).item(), 0.0]


def test_no_gradient_flows():
    old, recorded = (torch.zeros(3, requires_grad=True) for _ in range(2))
    assert not truncated_importance_weight(old, recorded, cap=2.0).requires_grad


def test_weighted_gradient_is_that_of_the_policy_that_sampled():
    """Without truncation E_sampler[w A grad log p] = E_old[A grad log p], over four actions."""
    logits = torch.tensor([0.1, -0.3, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    sampler = torch.tensor([0.4, 0.0, -0.2, 0.3], dtype=torch.float64).log_softmax(0)
    log_prob = logits.log_softmax(0)
    old, advantage = log_prob.detach(), torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    loss = clipped_surrogate_loss(log_prob, old, advantage, clip_low=0.2, clip_high=0.2)
    weight = truncated_importance_weight(old, sampler, cap=10.0)
    (found,) = torch.autograd.grad((sampler.exp() * weight * loss).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((old.exp() * loss).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_errors():
    zero = torch.zeros(2)
    with pytest.raises(ValueError, match=r"cap: expected a finite number in \[1, inf\], got 0.5"):
        truncated_importance_weight(zero, zero, cap=0.5)
    with pytest.raises(ValueError, match="sampling_log_prob: expected the shape of old_log_prob"):
        truncated_importance_weight(zero, torch.zeros(3), cap=2.0)
    with pytest.raises(TypeError, match="sampling_log_prob: expected float32 or float64"):
        truncated_importance_weight(zero, zero.half(), cap=2.0)
    with pytest.raises(TypeError, match=r"^old_log_prob: expected float32 or float64"):
        truncated_importance_weight(zero.half(), zero, cap=2.0)
