"""The old policy's decay schedules, and the step that moves it."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mteditflow import ema_decay, old_policy_decay, update_old_policy
from tests.loops import some


def exactly(message):
    return f"^{re.escape(message)}$"


# ema_decay


@pytest.mark.parametrize(
    ("maximum", "expected"),
    [
        (0.9, {0: 1 / 10, 1: 2 / 11, 8: 9 / 18, 79: 80 / 89, 80: 81 / 90, 81: 0.9, 10_000: 0.9}),
        (0.9999, {80: 0.9, 990: 991 / 1000, 10**6: 0.9999}),
        (0.05, {0: 0.05, 9: 0.05}),
        (0.0, {0: 0.0, 9: 0.0}),
    ],
)
def test_an_average_warms_up_as_in_the_reference_implementation(maximum, expected):
    for update, decay in some(expected.items()):
        assert ema_decay(update, maximum=maximum) == pytest.approx(decay, abs=1e-12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((-1, 0.9), "update: expected an integer >= 0, got -1"),
        ((0, 1.5), "maximum: expected a finite number in [0, 1], got 1.5"),
    ],
)
def test_an_average_out_of_range(given, message):
    with pytest.raises(ValueError, match=exactly(message)):
        ema_decay(given[0], maximum=given[1])


# old_policy_decay


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"slope": 0.0, "maximum": 0.5}, {0: 0.0, 75: 0.0, 10_000: 0.0}),
        ({"slope": 0.001, "maximum": 0.5}, {0: 0.0, 1: 0.001, 499: 0.499, 500: 0.5, 501: 0.5}),
        (
            {"slope": 0.0075, "start": 75, "maximum": 0.999},
            {0: 0.0, 75: 0.0, 76: 0.0075, 175: 0.75, 208: 0.9975, 209: 0.999, 9999: 0.999},
        ),
    ],
)
def test_the_schedules_of_the_reference_implementation(schedule, expected):
    for update, decay in some(expected.items()):
        assert old_policy_decay(update, **schedule) == pytest.approx(decay)


@given(st.integers(0, 2000), st.floats(0, 0.1), st.floats(0, 1), st.integers(0, 100))
def test_the_decay_rises_from_0_to_its_maximum(update, slope, maximum, start):
    options = {"slope": slope, "maximum": maximum, "start": start}
    now, later = (old_policy_decay(k, **options) for k in (update, update + 1))
    assert 0 <= now <= later <= maximum
    if update <= start:
        assert now == 0


def test_decay_errors():
    good = {"slope": 0.1, "maximum": 0.5}
    for options, message in [
        ({"slope": -0.1}, "slope: expected a finite number in [0, inf], got -0.1"),
        ({"maximum": 1.5}, "maximum: expected a finite number in [0, 1], got 1.5"),
        ({"maximum": -0.5}, "maximum: expected a finite number in [0, 1], got -0.5"),
        ({"start": -1}, "start: expected an integer >= 0, got -1"),
    ]:
        with pytest.raises(ValueError, match=exactly(message)):
            old_policy_decay(0, **{**good, **options})
    with pytest.raises(ValueError, match=exactly("update: expected an integer >= 0, got -1")):
        old_policy_decay(-1, **good)
    with pytest.raises(TypeError, match=exactly("update: expected an integer, got float")):
        old_policy_decay(1.0, **good)


# update_old_policy


def test_golden_update():
    old = [torch.tensor([0.0, 8.0]), torch.tensor(4.0)]
    pointers = [x.data_ptr() for x in old]
    current = [torch.tensor([4.0, 0.0]), torch.tensor(0.0)]
    assert update_old_policy(iter(old), iter(current), decay=0.75) is None
    assert [x.tolist() for x in old] == [[1.0, 6.0], 3.0]
    assert [x.tolist() for x in current] == [[4.0, 0.0], 0.0]
    assert [x.data_ptr() for x in old] == pointers


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=5), st.floats(0, 1))
def test_the_update_equals_the_loop(values, decay):
    old = torch.tensor(values, dtype=torch.float64)
    current = torch.tensor(values[::-1], dtype=torch.float64)
    expected = [decay * a + (1 - decay) * b for a, b in zip(values, values[::-1], strict=True)]
    update_old_policy([old], [current], decay=decay)
    assert old.tolist() == pytest.approx(expected, abs=1e-12)


def test_the_old_policy_keeps_its_dtype():
    old = [torch.zeros(2, dtype=torch.float64)]
    update_old_policy(old, [torch.ones(2, dtype=torch.bfloat16)], decay=0.5)
    assert old[0].dtype == torch.float64
    assert old[0].tolist() == [0.5, 0.5]
    half = [torch.zeros(2, dtype=torch.bfloat16)]
    update_old_policy(half, [torch.ones(2)], decay=0.0)  # a copy loses nothing
    assert half[0].tolist() == [1.0, 1.0]


def test_nothing_moves_when_an_error_is_raised():
    first = torch.zeros(2)
    cases = [
        ([torch.ones(2)], ValueError, "current: expected 2 parameters as in old, got 1"),
        (
            [torch.ones(2), torch.ones(4)],
            ValueError,
            "current[1]: expected shape of old[1] = [3], got [4]",
        ),
        (
            [torch.ones(2), torch.ones(3, dtype=torch.int64)],
            TypeError,
            "current[1]: expected a floating-point tensor, got torch.int64",
        ),
    ]
    for current, error, message in some(cases):
        with pytest.raises(error, match=exactly(message)):
            update_old_policy([first, torch.zeros(3)], current, decay=0.5)
        assert first.tolist() == [0.0, 0.0]


def test_parameters_that_cannot_be_changed_or_come_twice_are_refused_before_any_change():
    first, tied = torch.zeros(2), torch.nn.Parameter(torch.zeros(3))
    with torch.inference_mode():
        frozen = torch.zeros(3)
    for last, message in some(
        [
            ([frozen], "old[1]: expected a tensor that can be changed, got one made in inference"),
            ([torch.zeros(1).expand(3)], "old[1]: expected memory for each element, got an expa"),
            ([tied, tied.detach()], "old[2]: expected each parameter once, got old[1] again; mo"),
        ]
    ):
        old = [first, *last]
        current = [torch.ones(x.shape) for x in old]
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            update_old_policy(old, current, decay=0.5)
        assert [x.abs().max().item() for x in old] == [0.0] * len(old)
    whole = torch.zeros(4)  # parts of one tensor are parameters of their own
    update_old_policy([whole[:2], whole[2:]], [torch.ones(2)] * 2, decay=0.5)
    assert whole.tolist() == [0.5] * 4
    empty = torch.zeros(0)  # as sharded weights are between their uses
    update_old_policy([empty, empty], [empty, empty], decay=0.5)


def test_update_errors():
    one, two = [torch.zeros(2)], [torch.zeros(2)]
    for decay in (-0.5, 1.5):
        message = f"decay: expected a finite number in [0, 1], got {decay}"
        with pytest.raises(ValueError, match=exactly(message)):
            update_old_policy(one, two, decay=decay)
    message = (
        "old[0]: expected float32 or float64, got torch.bfloat16; half precision "
        "would silently change the result (convert with .float())"
    )
    with pytest.raises(TypeError, match=exactly(message)):
        update_old_policy([torch.zeros(2).bfloat16()], two, decay=0.5)
    message = "old[0]: expected a floating-point tensor, got torch.int64"
    with pytest.raises(TypeError, match=exactly(message)):
        update_old_policy([torch.zeros(2, dtype=torch.int64)], two, decay=0.0)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_left_out_is_not_read(broken):
    old = [torch.tensor([broken])]
    update_old_policy(old, [torch.tensor([1.0])], decay=0)
    assert old[0].item() == 1
    update_old_policy(old, [torch.tensor([broken])], decay=1)
    assert old[0].item() == 1
