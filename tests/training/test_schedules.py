"""The learning rate of a round: closed forms, ends, monotony, errors."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mteditflow.training import learning_rate_share
from tests.loops import some


def shares(rounds, **options):
    return [learning_rate_share(k, rounds, **options) for k in range(rounds)]


def test_golden():
    # (k + 1) / 3 for k = 0, 1; then 1 - 0.8 p for p = 0, 1/4, ..., 1
    linear = [1 / 3, 2 / 3, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert shares(7, warmup=2, final=0.2) == pytest.approx(linear)
    # cos 0, 60, 120, 180 degrees = 1, 1/2, -1/2, -1; 0.2 + 0.4 (1 + cos)
    cosine = [0.5, 1.0, 0.8, 0.4, 0.2]
    assert shares(5, schedule="cosine", warmup=1, final=0.2) == pytest.approx(cosine)
    assert shares(4, schedule="constant", warmup=3) == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@given(rounds=st.integers(1, 300), part=st.floats(0, 0.99), final=st.floats(0, 1))
def test_it_rises_to_the_peak_and_falls_to_its_end(schedule, rounds, part, final):
    warmup = int(part * rounds)
    values = shares(rounds, schedule=schedule, warmup=warmup, final=final)
    assert values[:warmup] == [float(Fraction(k + 1, warmup + 1)) for k in range(warmup)]
    assert values[warmup] == 1.0
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    if rounds > warmup + 1:
        assert values[-1] == pytest.approx(final, abs=1e-12)


def test_the_middle_is_half_way_for_both():
    for schedule in some(["linear", "cosine"]):
        middle = learning_rate_share(50, 101, schedule=schedule, final=0.5)
        assert math.isclose(middle, 0.75)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((5, 5), {}, "done: expected an integer <= 4, got 5"),
        ((0, 0), {}, "rounds: expected an integer >= 1, got 0"),
        ((0, 5), {"warmup": 5}, "warmup: expected an integer <= 4, got 5"),
        ((0, 5), {"final": 1.5}, r"final: expected a finite number in \[0, 1\], got 1\.5"),
        ((0, 5), {"schedule": "step"}, r"schedule: expected one of \['constant', .*, got 'step'"),
        (
            (0, 5),
            {"schedule": "constant", "final": 0.5},
            r"final: expected 1 for a constant schedule, got 0\.5",
        ),
    ],
)
def test_errors(arguments, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        learning_rate_share(*arguments, **options)
