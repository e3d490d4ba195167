"""The exponential advantage: by hand, a loop, limits of its temperature, gate, masks, errors."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import group_advantage, softmax_advantage
from tests.loops import some

GROUP = torch.tensor([3, 3, 3, -1, -1, -1, -1])


def case(seed=0, shape=(7,)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop(reward, group, valid, temperature):
    """One turn, in the words of the formula."""
    own = [i for i in range(len(reward)) if valid[i]]
    if temperature is None:
        mean = sum(reward[i] for i in own) / len(own)
        temperature = max(math.sqrt(sum((reward[i] - mean) ** 2 for i in own) / len(own)), 1e-6)
    found = [0.0] * len(reward)
    for i in own:
        members = [j for j in own if group[j] == group[i]]
        mean = sum(math.exp(reward[j] / temperature) for j in members) / len(members)
        found[i] = math.exp(reward[i] / temperature) / mean - 1
    return found


def test_golden():
    # e^0 = 1 and e^(ln 3) = 3 of mean 2: 1/2 - 1 and 3/2 - 1
    reward = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64)
    found = softmax_advantage(reward, torch.tensor([0, 0]), temperature=1.0)
    assert found.tolist() == pytest.approx([-0.5, 0.5])
    # the population std is ln(3) / 2, so the exponents are 0 and 2: e^2 / ((1 + e^2) / 2) - 1
    found = softmax_advantage(reward, torch.tensor([0, 0]))
    assert found.tolist() == pytest.approx([-math.tanh(1.0), math.tanh(1.0)])


@pytest.mark.parametrize("temperature", [None, 0.3, 5.0])
@pytest.mark.parametrize("lost", [(), (0,), (1, 2, 5)])
def test_equals_the_loop_over_turns(temperature, lost):
    reward, valid = case(1, (7, 3)), torch.ones(7, 3, dtype=torch.bool)
    valid[list(lost), 1] = False
    reward[~valid] = torch.nan
    found = softmax_advantage(reward, GROUP, valid=valid, temperature=temperature)
    for turn in range(3):
        expected = loop(reward[:, turn].tolist(), GROUP.tolist(), valid[:, turn], temperature)
        assert found[:, turn].tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(found[~valid], torch.zeros(len(lost), dtype=torch.float64))


# limits


def test_a_high_temperature_gives_the_linear_advantage():
    reward, linear = case(), group_advantage(case(), GROUP, std="none")
    for temperature in (1e3, 1e5):  # the next term is of the order of 1 / temperature
        scaled = temperature * softmax_advantage(reward, GROUP, temperature=temperature)
        torch.testing.assert_close(scaled, linear, rtol=0, atol=10 / temperature)


def test_the_lowest_temperature_is_a_number():
    # half of it, by which differences of halves were divided, is 0
    found = softmax_advantage([0.0, 1.0, 1.0], [0, 0, 1], temperature=5e-324)
    assert found.tolist() == [-1.0, 1.0, 0.0]


def test_a_low_temperature_leaves_the_best_alone():
    reward = torch.tensor([0.1, 0.3, 0.2, 0.5, 0.5, 0.1, 0.2])  # in the second group two are best
    found = softmax_advantage(reward, GROUP, temperature=1e-3)
    assert found.tolist() == [-1.0, 2.0, -1.0, 1.0, 1.0, -1.0, -1.0]


@given(st.floats(0.01, 100), st.floats(-50, 50))
def test_the_default_temperature_ignores_shift_and_scale(scale, shift):
    reward = case()
    moved = scale * reward + shift * (GROUP == 3) + 1.0
    expected = softmax_advantage(reward + shift / scale * (GROUP == 3), GROUP)
    torch.testing.assert_close(softmax_advantage(moved, GROUP), expected)
    fixed = softmax_advantage(reward + shift * (GROUP == 3), GROUP, temperature=0.7)
    torch.testing.assert_close(fixed, softmax_advantage(reward, GROUP, temperature=0.7))


@given(st.integers(0, 1000), st.floats(0.01, 10))
def test_range_sum_and_order(seed, temperature):
    reward = case(seed)
    found = softmax_advantage(reward, GROUP, temperature=temperature)
    for own in (GROUP == 3, GROUP == -1):
        size = int(own.sum())
        assert -1 <= float(found[own].min()) <= float(found[own].max()) <= size - 1 + 1e-9
        assert abs(float(found[own].sum())) < 1e-9 * size
        order = reward[own].argsort()
        assert bool((found[own][order].diff() >= 0).all())


@pytest.mark.parametrize("reward", [[0.3] * 4, [0.1 + 0.2, 0.3, 0.3, 0.3], [1e300] * 4])
def test_equal_rewards_give_zero(reward):
    group = torch.tensor([0, 0, 1, 1])
    for options in some([{}, {"temperature": 0.5}, {"gate_floor": 0.01}]):
        found = softmax_advantage(torch.tensor(reward, dtype=torch.float64), group, **options)
        assert found.abs().max() < 1e-8  # the floor keeps rounding from becoming a difference
    assert softmax_advantage(torch.tensor([2.0, 9.0]), torch.tensor([0, 1])).tolist() == [0, 0]


def test_it_moves_the_mean_reward_by_the_expected_gain():
    """Weights 1 + A make the group's mean that of the tilted distribution: never lower."""
    reward = case(2)
    weight = 1 + softmax_advantage(reward, GROUP, temperature=0.5)
    for own in (GROUP == 3, GROUP == -1):
        tilted = (weight * reward)[own].mean()
        expected = (torch.softmax(reward[own] / 0.5, 0) * reward[own]).sum()
        torch.testing.assert_close(tilted, expected)
        assert tilted > reward[own].mean()


def test_the_gate_brings_the_batch_to_std_one_unless_nearly_all_are_equal():
    reward = torch.tensor([0.0, 0, 1, 0, 1, 1, 1])  # a rule: right or wrong
    plain = softmax_advantage(reward, GROUP)
    gated = softmax_advantage(reward, GROUP, gate_floor=0.01)
    torch.testing.assert_close(gated, plain / plain.std(correction=0))
    small = softmax_advantage(reward, GROUP, temperature=1e4)
    assert small.std(correction=0) < 0.01
    gated = softmax_advantage(reward, GROUP, temperature=1e4, gate_floor=0.01)
    torch.testing.assert_close(gated, small / 0.01)


def test_huge_rewards_and_dtypes():
    reward = torch.tensor([1e308, -1e308, 0.0], dtype=torch.float64)
    found = softmax_advantage(reward, torch.tensor([0, 0, 0]), temperature=1.0)
    assert found.tolist() == [2.0, -1.0, -1.0]
    assert softmax_advantage(reward, [0, 0, 0]).isfinite().all()
    ones = softmax_advantage(torch.tensor([1.0, 0.0]).requires_grad_(), torch.tensor([0, 0]))
    assert (ones.dtype, ones.requires_grad) == (torch.float32, False)
    assert softmax_advantage([True, False], [0, 0]).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a finite number in (0, inf], got 0.0"),
        ({"floor": -1.0}, "floor: expected a finite number in (0, inf], got -1.0"),
        ({"gate_floor": 0.0}, "gate_floor: expected a finite number in (0, inf], got 0.0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        softmax_advantage(torch.zeros(2), torch.tensor([0, 0]), **options)


def test_bad_rewards():
    with pytest.raises(ValueError, match=r"^reward: expected finite"):
        softmax_advantage(torch.tensor([0.0, torch.nan]), torch.tensor([0, 0]))
    with pytest.raises(TypeError, match=r"^reward: expected float32 or float64"):
        softmax_advantage(torch.zeros(2, dtype=torch.bfloat16), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"^reward: expected \[B, N\], trajectories by turns"):
        softmax_advantage(torch.zeros(2, 3), torch.tensor([0, 1]))


def test_rewards_of_any_finite_size():
    reward = torch.tensor([1.0, -1.0, 0.0, 1.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 1, 1])
    expected = softmax_advantage(reward, group)
    assert torch.allclose(softmax_advantage(1e308 * reward, group), expected, rtol=1e-12)
