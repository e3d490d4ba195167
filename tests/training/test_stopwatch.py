"""Every second of the wall clock belongs to one phase."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mteditflow.training.stopwatch import Stopwatch, shares


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    return clock


def test_golden_seconds_of_phases_inside_each_other(clock):
    watch = Stopwatch()
    clock.now += 1
    with watch.phase("sampling"):
        clock.now += 2
        with watch.phase("scoring"):
            clock.now += 4
            assert watch.read() == {"other": 1, "sampling": 2, "scoring": 4}
        clock.now += 8
    clock.now += 16
    assert watch.lap() == {"other": 17, "sampling": 10, "scoring": 4}
    clock.now += 32
    assert watch.lap() == {"other": 32}


def test_a_phase_ends_where_its_work_fails(clock):
    watch = Stopwatch()

    def fail():
        with watch.phase("updating"):
            clock.now += 1
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        fail()
    clock.now += 2
    assert watch.lap() == {"other": 2, "updating": 1}


@given(st.recursive(st.integers(0, 9), lambda inner: st.lists(inner, max_size=3), max_leaves=9))
def test_phases_add_up_to_the_time_that_passed(tree):
    clock = Clock()

    def work(node, depth):
        if isinstance(node, int):
            clock.now += node
            return
        with watch.phase(f"depth {depth}"):
            for part in node:
                work(part, depth + 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.monotonic", clock)
        watch = Stopwatch()
        work(tree, 0)
        assert sum(watch.lap().values()) == clock.now - 100


def test_shares_add_up_to_one_the_longest_first():
    assert list(shares({"a": 1.0, "b": 3.0}).items()) == [("b", 0.75), ("a", 0.25)]
    assert shares({"a": 0.0}) == {"a": 0.0}
