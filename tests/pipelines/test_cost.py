"""Cost of recording in forward passes; for time, see ``python -m benchmarks.recording``."""

import pytest
from mteditflow_examples.shapes.editor import build_kontext

from benchmarks.recording import Calls, forwards_of, profiled


@pytest.mark.parametrize("turns", [1, 2])
def test_verifying_is_one_more_forward_pass_after_the_first_turn_alone(turns):
    calls = Calls(build_kontext(image_size=8), steps=2)
    plain = forwards_of(calls, calls.plain)
    assert plain == 2
    for verify in (False, True):
        count = forwards_of(calls, lambda v=verify: calls.recorded(verify=v, turns=turns))
        assert count == plain * turns + verify


def test_the_profile_tells_the_recorder_from_its_scheduler():
    calls = Calls(build_kontext(image_size=8), steps=2)
    rows = profiled(lambda: calls.recorded(verify=False), rounds=2, steps=2)
    alone, with_scheduler = (float(row[4]) for row in rows)
    assert 1 < alone < with_scheduler
