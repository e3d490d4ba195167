"""Turns over the rounds: the schedule, and the curriculum by what the editor leaves still."""

import pytest

from mteditflow.training import DepthCurriculum, scheduled_turns
from tests.loops import some


def test_the_schedule_rises_by_one_and_stops():
    found = [scheduled_turns(done, first=1, every=2, most=3) for done in range(8)]
    assert found == [1, 1, 2, 2, 3, 3, 3, 3]
    assert scheduled_turns(0, first=3, every=1, most=3) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"done": -1}, "done: expected an integer >= 0"),
        ({"every": 0}, "every: expected an integer >= 1"),
        ({"first": 4}, "first: expected an integer <= 3"),
        ({"most": 0}, "most: expected an integer >= 1"),
    ],
)
def test_the_schedule_refuses(options, message):
    given = {"done": 0, "first": 1, "every": 1, "most": 3} | options
    with pytest.raises(ValueError, match=message):
        scheduled_turns(given.pop("done"), **given)


def depths(changes, **options):
    """Depth before each round."""
    curriculum = DepthCurriculum(
        **{"depth": 2, "most": 4, "threshold": 9.0, "patience": 3, **options}
    )
    found = []
    for change in changes:
        found.append(curriculum.depth)
        curriculum = curriculum.update(change)
    return [*found, curriculum.depth]


def test_it_deepens_after_enough_rounds_in_a_row_and_counts_anew():
    # 9.0 is at the threshold and counts; 9.1 breaks the row; the third in a row deepens.
    assert depths([9.0, 8.0, 9.1, 1.0, 1.0, 1.0]) == [2, 2, 2, 2, 2, 2, 3]
    assert depths([0.0] * 9) == [2, 2, 2, 3, 3, 3, 4, 4, 4, 4]


def test_a_resumed_curriculum_goes_on_with_the_same_depths():
    changes = [3.0, 12.0, 3.0, 3.0, 3.0, 3.0, 3.0, 12.0, 3.0, 3.0, 3.0]
    fresh = DepthCurriculum(2, 10, 9.0, 3)
    for stop in some(range(len(changes))):
        one = fresh
        for change in changes[:stop]:
            one = one.update(change)
        other = fresh.resumed(one.depth, one.streak)
        assert other == one
    assert fresh.resumed(99, 99) == DepthCurriculum(10, 10, 9.0, 3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 5}, "depth: expected an integer <= 4"),
        ({"threshold": -1.0}, "threshold: expected a finite number"),
        ({"patience": 0}, "patience: expected an integer >= 1"),
        ({"streak": 3}, "streak: expected an integer <= 2"),
    ],
)
def test_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        depths([], **options)
    with pytest.raises(ValueError, match="change: expected a finite number"):
        depths([float("nan")])
