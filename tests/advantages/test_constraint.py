"""A floor under a reward: the multiplier, and what it makes of the weights."""

import json
import math
import re
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import LagrangeMultiplier, constrained_weights, fuse_advantages, fuse_rewards
from tests.loops import some

weights = st.dictionaries(st.sampled_from("abc"), st.floats(-2, 2), min_size=1)


def exactly(message):
    return f"^{re.escape(message)}$"


# golden values


def test_golden_updates():
    multiplier, values = LagrangeMultiplier(floor=0.5, rate=2.0, maximum=1.0), []
    for mean in (0.25, 0.0, 0.25, 0.75, 1.0):  # + 0.5, + 1 up to 1, + 0.5 up to 1, - 0.5, - 1
        multiplier = multiplier.update(mean)
        values.append(multiplier.value)
    assert values == [0.5, 1.0, 1.0, 0.5, 0.0]


def test_golden_weights():
    found = constrained_weights({"a": 1.0, "b": 0.5, "c": 0.0}, {"b": 1.0, "c": 2.0})
    assert found == {"a": 0.25, "b": 0.375, "c": 0.5}


# properties


@given(weights)
def test_without_a_multiplier_nothing_is_changed(given_):
    assert constrained_weights(given_, {}) == given_
    assert constrained_weights(given_, dict.fromkeys(given_, 0.0)) == given_


@pytest.mark.parametrize("fuse", [fuse_advantages, fuse_rewards])
@given(multiplier=st.floats(0, 50), seed=st.integers(0, 99))
def test_the_fusion_is_that_of_the_lagrangian_over_a_number(fuse, multiplier, seed):
    random = torch.Generator().manual_seed(seed)
    rewards = {name: torch.rand(8, generator=random, dtype=torch.float64) for name in ("r", "c")}
    group, given_ = torch.arange(8) // 4, {"r": 1.0, "c": 0.15}
    found = fuse(rewards, constrained_weights(given_, {"c": multiplier}), group, eps=0.0)
    plain = fuse(rewards, {"r": 1.0, "c": 0.15 + multiplier}, group, eps=0.0)
    scale = 1 + multiplier if fuse is fuse_advantages else 1.0  # rewards are normalized after it
    torch.testing.assert_close(found * scale, plain)
    assert found.abs().max() <= 1.15 * 3**0.5 + 1e-9  # of one in four, whatever the multiplier


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=20), st.floats(0.01, 9), st.floats(0.01, 9))
def test_values_stay_in_range_and_a_state_is_a_number(means, rate, maximum):
    multiplier = LagrangeMultiplier(0.5, rate, maximum)
    for mean in some(means):
        before, multiplier = multiplier, multiplier.update(mean)
        assert 0 <= multiplier.value <= maximum
        assert (multiplier.value - before.value) * (0.5 - mean) >= 0
        assert LagrangeMultiplier(**json.loads(json.dumps(asdict(multiplier)))) == multiplier


# what it is for


def ascend(floor, *, rounds=4000, maximum=10.0):
    """Maximize -(x - 2)^2 / 2 subject to -x >= floor by the weights of a Lagrangian, from 0."""
    multiplier, x = LagrangeMultiplier(floor=floor, rate=0.02, maximum=maximum), 0.0
    for _ in range(rounds):
        own = constrained_weights({"r": 1.0, "c": 0.0}, {"c": multiplier.value})
        x += 0.1 * (own["r"] * (2 - x) - own["c"])
        multiplier = multiplier.update(-x)
    return x, multiplier.value


@pytest.mark.parametrize(
    ("floor", "x", "value"),
    [
        (-1.0, 1.0, 1.0),  # the derivative, 2 - x, is that of the constraint times lambda
        (-0.5, 0.5, 1.5),
        (-2.0, 2.0, 0.0),  # the floor just holds at the optimum
        (-3.0, 2.0, 0.0),  # slack: the floor does not matter
    ],
)
def test_dual_ascent_finds_the_constrained_optimum(floor, x, value):
    found, multiplier = ascend(floor)
    assert found == pytest.approx(x, abs=1e-3)
    assert multiplier == pytest.approx(value, abs=1e-3)
    assert multiplier * (-found - floor) == pytest.approx(0, abs=1e-3)  # complementary slackness


def test_a_floor_out_of_reach_leaves_the_others_their_weight():
    x, multiplier = ascend(5.0, maximum=3.0)  # -x >= 5 costs more than the largest multiplier pays
    assert multiplier == 3.0
    assert x == pytest.approx(2 - 3.0, abs=1e-3)


def test_a_policy_of_two_arms_keeps_the_floor():
    # Arm 0 follows, arm 1 is consistent; with a floor of 0.3 the best policy plays arm 0 in 0.7.
    # REINFORCE with fused advantages; without the floor, arm 0 alone.
    random = torch.Generator().manual_seed(0)

    def play(multiplier):
        logit, shares = 0.0, []
        for _ in range(600):
            share = 1 / (1 + math.exp(-logit))
            arm = (torch.rand(64, generator=random) > share).float()
            own = {} if multiplier is None else {"c": multiplier.value}
            rewards = {"r": 1 - arm, "c": arm}
            fused = fuse_advantages(
                rewards, constrained_weights({"r": 1.0, "c": 0.0}, own), torch.zeros(64).long()
            )
            logit += float((fused * (1 - arm - share)).mean())
            multiplier = multiplier and multiplier.update(float(arm.mean()))
            shares.append(share)
        return sum(shares[300:]) / 300

    assert play(None) > 0.98
    assert play(LagrangeMultiplier(floor=0.3, rate=0.2)) == pytest.approx(0.7, abs=0.02)


# errors


def test_errors():
    for options, message in (
        ({"floor": math.nan}, "floor: expected a finite number in [-inf, inf], got nan"),
        ({"rate": 0.0}, "rate: expected a finite number in (0, inf], got 0.0"),
        ({"maximum": 0.0}, "maximum: expected a finite number in (0, inf], got 0.0"),
        ({"value": 11.0}, "value: expected a finite number in [0, 10], got 11.0"),
        ({"value": -1.0}, "value: expected a finite number in [0, 10], got -1.0"),
    ):
        with pytest.raises(ValueError, match=exactly(message)):
            LagrangeMultiplier(**{"floor": 0.5, **options})
    with pytest.raises(
        ValueError, match=exactly("mean: expected a finite number in [-inf, inf], got nan")
    ):
        LagrangeMultiplier(0.5).update(math.nan)
    for own, multipliers, message in (
        ({"a": math.inf}, {}, "weights['a']: expected a finite number in [-inf, inf], got inf"),
        (
            {"a": 1.0},
            {"a": -1.0},
            "multipliers['a']: expected a finite number in [0, inf], got -1.0",
        ),
        ({"a": 1.0}, {"b": 1.0}, "multipliers: expected names among ['a'], got 'b'"),
    ):
        with pytest.raises(ValueError, match=exactly(message)):
            constrained_weights(own, multipliers)
