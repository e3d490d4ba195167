"""A run is stopped when a reward has fallen far below its best, and not before."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mteditflow.training import RewardCollapseError, RewardWatch


def feed(watch, values, name="following"):
    for value in values:
        watch.check({name: value})


def test_stops_where_the_mean_of_the_window_has_fallen_by_the_share():
    watch = RewardWatch(drop=0.25, window=2)
    feed(watch, [0.8, 0.8, 0.61, 0.61])  # 76% of the best: allowed
    with pytest.raises(RewardCollapseError, match=r"following: mean 0.3\d\d of the last 2 rounds"):
        feed(watch, [0.1])


def test_rewards_below_zero_may_rise_and_may_not_fall():
    watch = RewardWatch(drop=0.3, window=1)
    feed(watch, [-0.5, -0.4, -0.3, -0.44])  # 0.14 below the best, of 0.5 at most
    with pytest.raises(RewardCollapseError, match=r"mean -0.460 .*best -0.300; .* 30% of 0.500"):
        feed(watch, [-0.46])


def test_the_best_mean_is_remembered_and_not_the_last():
    watch = RewardWatch(drop=0.3, window=1)
    feed(watch, [0.5, 1.0, 0.9, 0.8, 0.71])
    with pytest.raises(RewardCollapseError, match=r"best 1\.000"):
        feed(watch, [0.69])


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20))
def test_a_run_that_never_falls_is_never_stopped(values):
    feed(RewardWatch(drop=0.01, window=1), sorted(values))


@pytest.mark.parametrize("best", [-1.0, -0.3, -0.01])
def test_a_fall_to_far_below_zero_is_always_seen(best):
    with pytest.raises(RewardCollapseError):
        feed(RewardWatch(drop=0.9, window=1), [best, 100 * best])


def test_names_the_term_that_pays():
    watch = RewardWatch(drop=0.5, window=1)
    watch.check({"following": 0.5, "consistency": 0.9})
    with pytest.raises(RewardCollapseError, match=r"^consistency: mean 0.300 .*best 0.900"):
        watch.check({"following": 0.9, "consistency": 0.3})


def test_a_window_that_is_not_full_and_lost_rounds_say_nothing():
    watch = RewardWatch(drop=0.1, window=3)
    feed(watch, [0.9, 0.1, math.nan, 0.1, 0.9])


@given(st.lists(st.floats(0, 1), max_size=30))
def test_a_drop_of_one_never_stops(values):
    feed(RewardWatch(drop=1.0, window=1), values)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20), st.integers(0, 20))
def test_a_resumed_watch_is_the_same_watch(values, cut):
    def outcome(split):
        watch = RewardWatch(drop=0.5, window=2)
        for i, value in enumerate(values):
            if i == split:
                state = json.loads(json.dumps(watch.state_dict()))
                watch = RewardWatch(drop=0.5, window=2)
                watch.load_state_dict(state)
            try:
                watch.check({"following": value})
            except RewardCollapseError as error:
                return i, str(error)
        return None

    assert outcome(cut) == outcome(None)


def test_errors():
    with pytest.raises(ValueError, match="drop: expected a finite number in"):
        RewardWatch(drop=0.0, window=1)
    with pytest.raises(ValueError, match="window: expected an integer >= 1, got 0"):
        RewardWatch(drop=0.5, window=0)
