"""Bands of early rounds: their arithmetic, false alarms on noise, what is seen, going on."""

import json
import math
import random
import statistics

import pytest

from mteditflow.drift import Band, DriftAlarm, DriftWatch, Reading
from tests.loops import some


def fed(watch, values, name="x", **more):
    """Alarms of each round."""
    return [watch.check({name: Reading(value, **more)}) for value in values]


def test_the_band_is_the_median_and_the_larger_spread():
    watch = DriftWatch(baseline=5, width=2, window=1, least=0)
    fed(watch, [1.0, 2.0, 4.0, 3.0, 10.0])
    # Median 3; deviations 2, 1, 1, 0, 7 of median 1; half-width 2 * 1.4826.
    assert watch.bands["x"] == pytest.approx((3 - 2.9652, 3 + 2.9652))
    watch = DriftWatch(baseline=5, width=2, window=1, least=0)
    fed(watch, [1.0, 2.0, 4.0, 3.0, 10.0], error=2.0)
    assert watch.bands["x"] == pytest.approx((-1, 7))  # a standard error of 2 is the larger spread
    watch = DriftWatch(baseline=3, width=2, window=1, least=0.25)
    fed(watch, [-4.0] * 3)
    assert watch.bands["x"] == Band(-5, -3)


def test_a_reference_moves_the_band_and_lies_inside_it():
    watch = DriftWatch(baseline=3, width=1, window=1, least=0)
    fed(watch, [0.75] * 3, reference=0.5, error=0.125)
    assert watch.band_around("x", 0.5) == Band(0.5, 0.875)  # 0.25 above, give or take 0.125
    assert watch.band_around("x", 0.0) == Band(0.0, 0.375)
    assert fed(watch, [0.25], reference=0.25) == [[]]  # as its reference
    ((alarm,),) = fed(watch, [0.125], reference=0.25)
    assert alarm == DriftAlarm("x", 0.125, Band(0.25, 0.625))
    assert str(alarm) == "x: 0.125, below its band of 0.25 to 0.625"


def test_one_alarm_until_it_comes_back():
    watch = DriftWatch(baseline=3, width=5, window=3, least=0.1)
    alarms = fed(watch, [1, 1, 1, 2, 2, 2, 2, 1, 1, 0.5, 0.5])
    assert [len(found) for found in alarms] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert [found[0].below for found in alarms if found] == [False, True]
    assert watch.outside == {"x"}
    fed(watch, [1, 1])
    assert watch.outside == frozenset()


def test_one_wild_round_of_three_is_no_alarm():
    watch = DriftWatch(baseline=3, window=3, least=0.1)
    assert not any(fed(watch, [1, 1, 1, 9, 1, 1, -9, 1]))


def test_what_is_not_finite_is_left_out_and_names_are_apart():
    watch = DriftWatch(baseline=3, window=1)
    fed(watch, [1, math.nan, 1, 1])
    assert set(watch.bands) == {"x"}
    assert watch.check({"y": Reading(5.0), "x": Reading(math.nan)}) == []
    with pytest.raises(KeyError, match="y: expected 3 early rounds, got 1"):
        watch.band_around("y")


@pytest.mark.parametrize(("known", "least", "most"), [(True, 0, 0), (False, 0.1, 0.3)])
def test_false_alarms_on_stationary_noise(known, least, most):
    """Over 400 series of 100 rounds of normal noise around a reference, at the defaults."""
    random_, watch = random.Random(0), DriftWatch(least=0)
    alarmed = set()
    for _ in range(100):
        error = 0.1 if known else math.nan
        readings = {
            str(i): Reading(1 + random_.gauss(0, 0.1), reference=1.0, error=error)
            for i in range(400)
        }
        alarmed |= {alarm.name for alarm in watch.check(readings)}
    assert least <= len(alarmed) / 400 <= most


@pytest.mark.parametrize("drift", [-0.05, 0.05])
def test_a_slow_drift_is_seen_once_it_is_beyond_the_width(drift):
    """Half a spread a round from round 5: 5 spreads at round 15, in the median one round later."""
    random_, watch = random.Random(1), DriftWatch(least=0)
    first = {}
    for round_ in range(40):
        level = 1 + drift * max(round_ - 5, 0)
        readings = {str(i): Reading(level + random_.gauss(0, 0.1), error=0.1) for i in range(200)}
        for alarm in watch.check(readings):
            first.setdefault(alarm.name, round_)
    assert len(first) == 200
    assert 14 <= statistics.median(first.values()) <= 21
    assert all(10 <= round_ <= 32 for round_ in some(first.values()))


def test_a_watch_goes_on_where_it_was():
    values = [1, 1.1, math.nan, 1, 1, 1.05, 3, 3, 3, 1, 1, 1, 3, 3]
    whole = fed(DriftWatch(window=2), values, reference=0.5)
    first = DriftWatch(window=2)
    begun = fed(first, values[:8], reference=0.5)
    second = DriftWatch(window=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert begun + fed(second, values[8:], reference=0.5) == whole
    assert sum(map(len, whole)) == 2
    assert second.bands["x"] == pytest.approx(first.bands["x"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"baseline": 2}, "baseline: expected an integer >= 3, got 2"),
        ({"width": 0}, r"width: expected a finite number in \(0, inf\], got 0"),
        ({"window": 0}, "window: expected an integer >= 1, got 0"),
        ({"least": -1}, r"least: expected a finite number in \[0, inf\], got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        DriftWatch(**argument)
