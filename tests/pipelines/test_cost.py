"""Cost of recording in forward passes; for time, see ``python -m benchmarks.recording``."""

from functools import partial

import pytest
from mteditflow_examples.shapes.editor import build_kontext

from benchmarks.recording import Calls, passes_of, profiled
from mteditflow import FlowSDE


@pytest.mark.parametrize("turns", [1, 2])
def test_verifying_is_one_more_forward_pass_after_the_first_turn_alone(turns):
    calls, solver = Calls(build_kontext(image_size=8), steps=2), FlowSDE(0.7)
    assert passes_of(calls, calls.plain) == (2, 4)
    for verify in (False, True):
        recorded = partial(calls.recorded, solver, verify=verify, turns=turns)
        assert passes_of(calls, recorded) == (2 * turns + verify, 4 * turns + 3 * verify)


def test_the_profile_finds_the_recorder():
    calls = Calls(build_kontext(image_size=8), steps=2)
    row = profiled(partial(calls.recorded, FlowSDE(0.7)), rounds=2, steps=2)
    assert 1 < float(row[4]) < 2
