"""Sums, means and norms of huge and subnormal numbers: what is a number in the end is returned."""

import math

import pytest
import torch

import mteditflow as mt

GROUP = torch.tensor([0, 0, 1, 1])
PATTERN = torch.tensor([-1.0, 1.0, 0.5, 1.5], dtype=torch.float64)
TINY, HUGE = 2.0**-1060, 2.0**1022


@pytest.mark.parametrize("std", ["group", "batch"])
@pytest.mark.parametrize("exponent", [-1060, -600, -300, 300, 600, 1022])
def test_advantages_have_no_unit(exponent, std):
    """In units of 2^exponent the rewards are others, their normalized advantages are not."""
    unit = 2.0**exponent
    got = mt.group_advantage(PATTERN * unit, GROUP, std=std, eps=0.0)
    expected = mt.group_advantage(PATTERN, GROUP, std=std, eps=0.0)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        mt.group_std(PATTERN * unit, GROUP), mt.group_std(PATTERN, GROUP) * unit, rtol=1e-3, atol=0
    )


def test_groups_of_any_magnitude_beside_each_other():
    reward = torch.tensor([0.0, 1e-200, 0.0, 1e200], dtype=torch.float64)
    got = mt.group_advantage(reward, GROUP, eps=0.0)
    torch.testing.assert_close(got, torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64))
    whole = mt.group_advantage(reward, GROUP, std="batch", eps=0.0)
    assert whole.isfinite().all()
    assert whole[:2].tolist() == [0.0, 0.0]  # 1e-200 of 1e200 is none
    no_std = mt.group_advantage(reward, GROUP, std="none")
    torch.testing.assert_close(
        no_std, torch.tensor([-5e-201, 5e-201, -5e199, 5e199], dtype=torch.float64)
    )


def test_a_group_without_a_valid_reward_beside_huge_ones():
    reward = torch.tensor([torch.nan, 1e300], dtype=torch.float64)
    got = mt.group_advantage(reward, [0, 1], valid=[False, True], std="batch", eps=0.0)
    assert got.tolist() == [0.0, 0.0]


def test_eps_is_in_the_unit_of_the_reward():
    reward = torch.tensor([0.0, 2e-200], dtype=torch.float64)
    got = mt.group_advantage(reward, GROUP[:2], eps=1e-4)
    torch.testing.assert_close(got, torch.tensor([-1e-196, 1e-196], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_means_of_the_largest_and_the_smallest_number(dtype):
    info = torch.finfo(dtype)
    for number in (info.max, -info.max, info.smallest_normal * info.eps):
        values = torch.full((3, 4), number, dtype=dtype)
        assert mt.masked_mean(values).item() == pytest.approx(number, rel=4 * info.eps, abs=0)
        mask = torch.ones(3, 4, dtype=torch.bool)
        assert torch.equal(mt.masked_mean(values, mask), mt.masked_mean(values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mean_of_many_in_half_precision(dtype):
    values = torch.ones(100_000, dtype=dtype, requires_grad=True)
    mask = torch.ones(100_000, dtype=torch.bool)
    mean = mt.masked_mean(values, mask)
    mean.backward()
    assert mean.item() == 1.0
    assert mean.dtype == dtype
    assert values.grad[0].item() == pytest.approx(1e-5, rel=1e-2)


def test_a_float64_mean_has_a_gradient_where_its_sum_overflows():
    values = torch.full((4,), 1e308, dtype=torch.float64, requires_grad=True)
    mt.masked_mean(values, torch.tensor([True, True, True, False])).backward()
    assert values.grad.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0])


@pytest.mark.parametrize("number", [3e38, 1e-44])
def test_turn_means_and_returns(number):
    score = torch.full((1, 3), number)
    assert mt.turn_average(score).item() == pytest.approx(score[0, 0].item())
    back = mt.reward_to_go(torch.tensor([[-3e38, 3e38, 3e38]]))
    assert back.tolist() == [[pytest.approx(3e38), math.inf, pytest.approx(3e38)]]
    assert mt.content_consistency(score.T).item() == pytest.approx(score[0, 0].item())


@pytest.mark.parametrize("number", [1e-30, 1e30])
def test_overall_and_norms_of_extreme_numbers(number):
    x = torch.tensor([number])
    assert mt.overall(x, x).item() == pytest.approx(number)
    velocity = torch.full((2, 4), number, requires_grad=True)
    hinge = mt.velocity_norm_hinge(velocity, torch.full((2, 4), number / 4))
    assert hinge.tolist() == pytest.approx([0.75 * number] * 2)
    (gradient,) = torch.autograd.grad(hinge.sum(), velocity)
    assert gradient.flatten().tolist() == pytest.approx([0.25] * 8)


@pytest.mark.parametrize("unit", [1e-200, 1.0, 1e200])
def test_diagnostics_have_no_unit(unit):
    reward = torch.tensor([0.0, 4.0, 1.0, 3.0], dtype=torch.float64) * unit
    other = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) * unit
    assert mt.variance_ratio(reward, other, GROUP).item() == pytest.approx(2.5)
    assert mt.advantage_correlation(reward, other, GROUP).item() == pytest.approx(0.31622776)
    assert mt.zero_variance_share(reward, GROUP).item() == 0.0


def test_a_group_of_subnormal_spread_is_not_constant():
    reward = torch.tensor([0.0, 1e-45])
    assert mt.zero_variance_share(reward, GROUP[:2]).item() == 0.0
    assert mt.group_advantage(reward, GROUP[:2], eps=0.0).tolist() == [-1.0, 1.0]


def test_huge_multipliers_keep_the_proportions_of_weights():
    got = mt.constrained_weights({"a": 1.5e308, "b": 1.5e308}, {"a": 1.5e308, "b": 1.5e308})
    assert got == {"a": pytest.approx(1.0), "b": pytest.approx(1.0)}
    plain = mt.constrained_weights({"a": 0.3, "b": 0.7}, {"b": 0.25})
    assert plain == {"a": 0.3 / 1.25, "b": 0.95 / 1.25}


def test_an_infinite_ratio_times_advantage_0_is_0():
    log_prob = torch.tensor([1000.0, 1000.0], requires_grad=True)
    loss = mt.divergence_gated_loss(
        log_prob, torch.zeros(2), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), threshold=0.5
    )
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0]
    assert log_prob.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("measured", [None, {"b": torch.tensor([True] * 4)}])
@pytest.mark.parametrize("std", ["group", "batch"])
@pytest.mark.parametrize(
    ("unit", "weight", "dtype"),
    [
        (2e38, 1.0, torch.float32),
        (1.0, 1e39, torch.float32),
        (1e308, 1.0, torch.float64),
        (1.0, 1e308, torch.float64),
        (1e-300, 1e-20, torch.float64),
        (1e300, 1e-300, torch.float64),
    ],
)
def test_fused_rewards_have_no_unit(unit, weight, dtype, std, measured):
    """Their weighted sum may be no number of the dtype; the advantage of it is."""
    reward = PATTERN.to(dtype)
    got = mt.fuse_rewards(
        {"a": reward * unit, "b": reward * unit}, {"a": weight, "b": weight}, GROUP,
        measured=measured, std=std, eps=0.0,
    )  # fmt: skip
    expected = mt.group_advantage(reward, GROUP, std=std, eps=0.0)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_fused_rewards_are_summed_in_float64():
    """A constant sum of float32 rewards is one, to the last bit of float32."""
    half = torch.tensor([0.1, 0.7, 0.37])
    third = torch.tensor([1.0, 3.0, 7.0])
    rewards, weights = {"a": half, "b": third}, {"a": 0.3, "b": 0.7}
    total = 0.3 * half.double() + 0.7 * third.double()
    got = mt.fuse_rewards(rewards, weights, [0, 0, 0], eps=0.0)
    assert torch.equal(got, mt.group_advantage(total, [0, 0, 0], eps=0.0).float())


@pytest.mark.parametrize(
    ("number", "dtype"), [(3e38, torch.float32), (1.7e308, torch.float64), (1e-44, torch.float32)]
)
def test_credit_of_extreme_rewards(number, dtype):
    reward = torch.full((2, 3), number, dtype=dtype)
    for discount in (1.0, 0.5, 0.0):
        value = mt.RewardToGo(discount)(reward).value
        torch.testing.assert_close(value, reward, rtol=1e-6, atol=0)


def test_densities_and_losses_of_extreme_numbers():
    tiny = torch.full((1, 4), 1e-30)
    zero = torch.zeros(1, 4)
    assert mt.gaussian_kl(tiny, zero, 1e-30, reduction="mean").item() == pytest.approx(0.5)
    huge = torch.full((1, 4), 1e19)
    loss = mt.adaptive_nft_loss(huge, huge, zero, [1.0], 0.5, nft_beta=1.0)
    assert loss.item() == pytest.approx(5 * 0.5 * 1e19)


def test_probabilities_at_a_limit_that_float32_does_not_hold():
    advantage = torch.tensor([-1e-30, 0.0, 1e-30])
    assert mt.optimality_probability(advantage, advantage_max=1e-50).tolist() == [0.0, 0.5, 1.0]
    assert mt.optimality_probability([-9, 0, 5]).tolist() == [0.0, 0.5, 1.0]
