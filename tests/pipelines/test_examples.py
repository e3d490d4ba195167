"""The longer examples of the docstrings run, on a tiny pipeline, as they are written."""

import inspect
import textwrap

import pytest
import torch
from tiny import CHAIN, options, picture

import mteditflow
from mteditflow.pipelines import Recorder, Rollout


def code(documented):
    """The literal block of a docstring's example."""
    docstring = inspect.getdoc(documented)
    lines = docstring.split("Example:")[1].split("::\n", 1)[1].splitlines()
    indent = len(lines[1]) - len(lines[1].lstrip())
    block = [line for line in lines if not line.strip() or line.startswith(" " * indent)]
    return textwrap.dedent("\n".join(block))


@pytest.fixture
def scope(kontext):
    """The names that the examples take for granted."""

    class Short(type(kontext)):
        """A pipeline whose defaults are those of a tiny model."""

        def __call__(self, *args, **given):
            return super().__call__(*args, **options(self) | given)

    kontext.__class__ = Short
    given = {
        "torch": torch,
        "Recorder": Recorder,
        "pipe": kontext,
        "model": kontext.transformer,
        "images": [picture(kontext, b) for b in range(2)],
        "chain": [[CHAIN[b][turn] for b in range(2)] for turn in range(2)],
        "group": [0, 1],
    }
    return vars(mteditflow) | given


def test_recorder_and_velocity(scope):
    exec(code(Recorder), scope)
    rollout, log_prob = scope["rollout"], scope["log_prob"]
    stored = rollout.trajectory.log_prob.flatten()
    torch.testing.assert_close(log_prob.detach(), stored, rtol=0, atol=1e-6)
    log_prob.sum().backward()
    exec(code(Rollout.velocity), scope)
    assert scope["velocity"].shape == scope["clean"].shape
    assert scope["velocity"].requires_grad
