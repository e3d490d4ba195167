"""Advantage weighted matching: the flow-matching loss as a log-prob of the clipped surrogate."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import (
    clipped_surrogate_loss,
    flow_matching_loss,
    matching_log_prob,
    nft_loss,
    optimality_probability,
    velocity_kl,
    velocity_target,
)

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
CLIP = {"clip_low": 0.1, "clip_high": 0.1}


def case(shape=(5, 2, 3), seed=0, dtype=torch.float64):
    """A velocity that wants a gradient, the old one, the target and an advantage."""
    generator = torch.Generator().manual_seed(seed)
    velocity, old, target = torch.randn(3, *shape, generator=generator, dtype=dtype)
    advantage = torch.randn(shape[0], generator=generator, dtype=dtype)
    return velocity.requires_grad_(), old, target, advantage


def awm(velocity, old, target, advantage, **clip):
    log_prob, old_log_prob = (matching_log_prob(v, target) for v in (velocity, old))
    return clipped_surrogate_loss(log_prob, old_log_prob, advantage, **(clip or CLIP))


def test_golden():
    velocity, target = torch.tensor([[2.0, 3.0], [1.0, 1.0]]), torch.ones(2, 2)
    assert matching_log_prob(velocity, target).tolist() == [-2.5, 0]
    # the old policy is off by (1, 1): its loss is 1, the new one's 0.25; ratio exp(0.75)
    loss = awm(
        torch.tensor([[1.5, 1.5]]),
        torch.tensor([[2.0, 2.0]]),
        torch.ones(1, 2),
        torch.tensor([-2.0]),
    )
    assert loss.tolist() == pytest.approx([2 * math.exp(0.75)])


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (2, 3, 5), (4, 2, 3, 2)])
def test_equals_the_loop(shape):
    velocity, old, target, advantage = case(shape)
    expected = []
    for row in range(len(velocity)):
        new, before = (
            sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) / target[row].numel()
            for pair in (
                (v[row].flatten().tolist(), target[row].flatten().tolist()) for v in (velocity, old)
            )
        )
        ratio, a = math.exp(before - new), advantage[row].item()
        expected.append(-min(ratio * a, min(max(ratio, 0.9), 1.1) * a))
    assert awm(velocity, old, target, advantage).tolist() == pytest.approx(expected)


def test_it_is_minus_the_flow_matching_loss():
    velocity, clean, noise, _ = case()
    expected = -flow_matching_loss(velocity, clean, noise)
    torch.testing.assert_close(matching_log_prob(velocity, velocity_target(clean, noise)), expected)


@given(st.permutations(range(5)), st.floats(0.1, 10))
def test_rows_are_independent_and_errors_count_squared(order, scale):
    velocity, _, target, _ = case()
    whole = matching_log_prob(velocity, target)
    assert torch.equal(matching_log_prob(velocity[order], target[order]), whole[order])
    torch.testing.assert_close(matching_log_prob(velocity[1:3], target[1:3]), whole[1:3])
    scaled = matching_log_prob(scale * velocity, scale * target)
    torch.testing.assert_close(scaled, scale**2 * whole)


# what the gradient means


@pytest.mark.parametrize("clip", [0.0, 1e-5, 0.5])
def test_on_policy_the_gradient_is_the_advantage_times_that_of_flow_matching(clip):
    velocity, _, target, advantage = case()
    loss = awm(velocity, velocity.detach(), target, advantage, clip_low=clip, clip_high=clip)
    torch.testing.assert_close(loss, -advantage)  # the ratio is 1
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    matching = flow_matching_loss(velocity, torch.zeros_like(target), target)
    (expected,) = torch.autograd.grad((advantage * matching).sum(), velocity)
    torch.testing.assert_close(gradient, expected)


def test_on_policy_nft_is_awm_times_its_beta_over_the_largest_advantage():
    """While the optimality probability is not cut off, both move the policy the same way."""
    velocity, _, target, advantage = case()
    r = optimality_probability(advantage, advantage_max=5.0)
    loss = nft_loss(velocity, velocity.detach(), target, r, nft_beta=0.5)
    (nft,) = torch.autograd.grad(loss.sum(), velocity)
    loss = awm(velocity, velocity.detach(), target, advantage)
    (matched,) = torch.autograd.grad(loss.sum(), velocity)
    torch.testing.assert_close(nft, 0.5 / 5.0 * matched)


def test_a_policy_that_already_matches_better_is_not_pulled_further():
    old, target = torch.full((2, 3), 2.0), torch.zeros(2, 3)
    velocity = torch.tensor([[1.0] * 3, [3.0] * 3], requires_grad=True)  # nearer, and further off
    awm(velocity, old, target, torch.tensor([1.0, -1.0])).sum().backward()
    assert torch.equal(velocity.grad, torch.zeros(2, 3))


# errors, dtypes, compilation


def test_errors():
    x = torch.zeros(2, 3)
    message = re.escape("target: expected the shape of velocity, [2, 3], got [1, 3]")
    with pytest.raises(ValueError, match=f"^{message}$"):
        matching_log_prob(x, x[:1])
    with pytest.raises(ValueError, match=r"^velocity: expected a non-empty tensor of shape \[M,"):
        matching_log_prob(x[0], x[0])
    with pytest.raises(TypeError, match=r"^target: expected a floating-point tensor, got torch"):
        matching_log_prob(x, x.long())


@pytest.mark.parametrize("device", DEVICES)
def test_dtype_and_device_are_kept(device):
    for dtype, expected in [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        velocity, _, target, _ = (x.to(device, dtype) for x in case())
        log_prob = matching_log_prob(velocity, target)
        assert log_prob.dtype == expected
        assert log_prob.device.type == device


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_eager():
    torch.compiler.reset()
    compiled = torch.compile(awm, fullgraph=True, backend="aot_eager")
    velocity, *rest = case(dtype=torch.float32)
    results = []
    for function in (compiled, awm):
        loss = function(velocity, *rest)
        (gradient,) = torch.autograd.grad(loss.sum(), velocity)
        results.append((loss.detach(), gradient))
    torch.testing.assert_close(results[0], results[1])


# weightings, and the pull to an average


def weight_by_hand(weighting, loss, sigma):
    """W(l) of one row in the words of the formulas."""
    eps = 1e-10
    return {
        "sigma": sigma * loss,
        "sigma_squared": sigma**2 * loss,
        "huber": sigma * (math.sqrt(loss + eps) - math.sqrt(eps)),
        "general_huber": sigma / 0.25 * ((loss + eps) ** 0.25 - eps**0.25),
    }[weighting]


WEIGHTED = ["sigma", "sigma_squared", "huber", "general_huber"]


@pytest.mark.parametrize("weighting", WEIGHTED)
def test_weightings_equal_the_loop_and_scale_the_gradient_of_matching(weighting):
    velocity, _, target, _ = case()
    sigma = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    loss = -matching_log_prob(velocity, target)
    found = matching_log_prob(velocity, target, weighting=weighting, sigma=sigma)
    both = list(zip(loss.tolist(), sigma.tolist(), strict=True))
    assert found.tolist() == pytest.approx([-weight_by_hand(weighting, *row) for row in both])
    (gradient,) = torch.autograd.grad(found.sum(), velocity)
    (plain,) = torch.autograd.grad(loss.sum(), velocity)
    slopes = [
        (weight_by_hand(weighting, x + 1e-6, s) - weight_by_hand(weighting, x - 1e-6, s)) / 2e-6
        for x, s in both
    ]
    slope = torch.tensor(slopes, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(gradient, -slope * plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weighting", WEIGHTED)
def test_a_perfect_match_is_exactly_zero_with_gradient_zero(weighting):
    velocity = torch.ones(2, 3, requires_grad=True)
    found = matching_log_prob(velocity, torch.ones(2, 3), weighting=weighting, sigma=0.7)
    found.sum().backward()
    assert found.tolist() == [0.0, 0.0]
    assert not velocity.grad.any()


@pytest.mark.parametrize("weighting", WEIGHTED)
def test_on_policy_the_gradient_is_the_advantage_times_that_of_the_weight(weighting):
    velocity, _, target, advantage = case()
    options = {"weighting": weighting, "sigma": torch.linspace(0.1, 0.9, 5, dtype=torch.float64)}
    log_prob = matching_log_prob(velocity, target, **options)
    (expected,) = torch.autograd.grad(-(advantage * log_prob).sum(), velocity, retain_graph=True)
    loss = clipped_surrogate_loss(log_prob, log_prob.detach(), advantage, **CLIP)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), velocity)[0], expected)
    better = velocity - 1e-3 * expected  # a step raises the log-prob of good samples alone
    after = matching_log_prob(better, target, **options)
    assert torch.equal(after > log_prob, advantage > 0)


def test_weightings_refuse_what_they_cannot_use_and_ignore_masked_rows():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^sigma: expected None for weighting 'uniform'"):
        matching_log_prob(x, x, sigma=0.5)
    with pytest.raises(ValueError, match=r"^sigma: expected flow times for weighting 'sigma', got"):
        matching_log_prob(x, x, weighting="sigma")
    with pytest.raises(ValueError, match=r"^weighting: expected one of \['uniform', 'sigma', "):
        matching_log_prob(x, x, weighting="l1", sigma=0.5)
    with pytest.raises(ValueError, match=r"^sigma: expected values in \[0, 1\], got 2.0"):
        matching_log_prob(x, x, weighting="huber", sigma=torch.tensor([0.5, 2.0]))
    sigma, valid = torch.tensor([0.5, torch.nan]), torch.tensor([True, False])
    found = matching_log_prob(x + 2, x, weighting="sigma", sigma=sigma, valid=valid)
    assert found.tolist() == pytest.approx([-2.0, 0.0])


@pytest.mark.parametrize("advantage", [-1.5, -1.0, -0.25, 0.0, 1.0])
def test_with_the_pull_to_the_average_the_curvature_is_the_advantage_plus_its_weight(advantage):
    """Across the error, 2 (A + beta) over the elements: >= 0 if and only if A >= -beta.

    Along the error the ratio adds -4 A mean(e^2)^2, by which it bends toward its bound.
    """
    beta, (velocity, _, target, _) = 1.0, case((1, 4))
    average, error = velocity.detach(), (target - velocity).detach()
    across = torch.randn(1, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    across = across - (across * error).sum() / error.square().sum() * error

    def curvature(direction):
        log_prob = matching_log_prob(velocity, target)
        old = log_prob.detach()
        loss = clipped_surrogate_loss(log_prob, old, advantage, clip_low=0.9, clip_high=9.0)
        total = (loss + beta * velocity_kl(velocity, average)).sum()
        (gradient,) = torch.autograd.grad(total, velocity, create_graph=True)
        (twice,) = torch.autograd.grad((gradient * direction).sum(), velocity)
        return float((twice * direction).sum())

    size = float(across.square().mean())
    assert curvature(across) == pytest.approx(2 * (advantage + beta) * size, abs=1e-12)
    assert (curvature(across) >= -1e-12) == (advantage >= -beta)
    size = float(error.square().mean())
    along = 2 * (advantage + beta) * size - 4 * advantage * size**2
    assert curvature(error) == pytest.approx(along)
