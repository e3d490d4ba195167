"""A weight that holds a KL near its target: the controller's step, and what it settles at."""

import json
import math
import re
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import AdaptiveKL
from tests.loops import some


def test_golden_updates():
    controller, values = AdaptiveKL(target=0.1, value=1.0, rate=1.0), []
    for kl in (0.1, 0.11, 0.2, 0.09, 0.0):  # 0, + 10 %, + 20 % at most, - 10 %, - 20 % at most
        controller = controller.update(kl)
        values.append(controller.value)
    steps = [1.0, 1.1, 1.1 * 1.2, 1.1 * 1.2 * 0.9, 1.1 * 1.2 * 0.9 * 0.8]
    assert values == pytest.approx(steps, rel=1e-12)


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=30),
    st.floats(1e-4, 1),
    st.floats(1e-3, 10),
    st.floats(0.01, 1),
)
def test_a_step_goes_the_right_way_by_a_fifth_of_the_rate_at_most(kls, target, value, rate):
    controller = AdaptiveKL(target, value, rate)
    for kl in some(kls):
        before, controller = controller, controller.update(kl)
        change = controller.value / before.value - 1
        assert abs(change) <= 0.2 * rate + 1e-12
        assert controller.value > 0
        assert change == 0 or math.copysign(1, change) == math.copysign(1, kl - target)
        assert (controller.target, controller.rate) == (target, rate)
        assert AdaptiveKL(**json.loads(json.dumps(asdict(controller)))) == controller


@pytest.mark.parametrize("start", [1e-2, 1.0, 100.0])
def test_a_policy_whose_kl_falls_with_the_weight_settles_at_the_target(start):
    """Maximize x - c x^2 / 2: x = 1 / c, KL x^2 / 2 = 0.02 at c = 5."""
    controller = AdaptiveKL(target=0.02, value=start)
    for _ in range(300):
        controller = controller.update((1 / controller.value) ** 2 / 2)
    assert controller.value == pytest.approx(5.0, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.0}, "target: expected a finite number in (0, inf], got 0.0"),
        ({"value": 0.0}, "value: expected a finite number in [1e-08, 1e+08], got 0.0"),
        ({"rate": 0.0}, "rate: expected a finite number in (0, 1], got 0.0"),
        ({"rate": 1.5}, "rate: expected a finite number in (0, 1], got 1.5"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        AdaptiveKL(**{"target": 0.1, "value": 1.0, **options})


@pytest.mark.parametrize("kl", [-0.1, math.nan, math.inf])
def test_a_kl_that_is_none_is_refused(kl):
    message = f"kl: expected a finite number in [0, inf], got {kl}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        AdaptiveKL(target=0.1, value=1.0).update(kl)
