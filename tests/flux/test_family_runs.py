"""Presets of families beside Kontext and klein, end to end: train, kill, resume, load the LoRA."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from mteditflow.training import read_metrics
from tests.flux import family_runs
from tests.flux.family_runs import (
    FAMILY_PRESETS,
    make_family_world,
    run,
)
from tests.loops import some
from tests.processes import Process
from tests.undrawn import undraw

FILES = ("current", "old", "ema")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Runs that draw nothing, on few pixels."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE"):
            patch.setattr(family_runs.edit_plus, name, getattr(family_runs.edit_plus, name))
        family_runs.small_pictures()
        undraw(patch)
        yield


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    return {name: make_family_world(name, folder / name) for name in FAMILY_PRESETS}


def policies(output, done=2):
    folder = output / "checkpoints" / f"round-{done:06d}"
    files = sorted(folder.glob("*.safetensors"))
    return {file.stem: load_file(file) for file in files}


@pytest.mark.parametrize("name", FAMILY_PRESETS)
def test_a_killed_run_goes_on_as_if_it_had_not_been(name, worlds, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(name, worlds[name], whole)
    process = Process(["-m", "tests.flux.family_runs", name, str(worlds[name]), str(killed)])
    assert process.wait(300) == -signal.SIGKILL
    assert len(read_metrics(killed / "metrics.jsonl")) == 1
    run(name, worlds[name], killed)
    assert "going on after round 1" in (killed / "log.txt").read_text()
    expected = policies(whole)
    for policy, weights in some(policies(killed).items()):
        assert weights.keys() == expected[policy].keys()
        assert all(torch.equal(x, expected[policy][key]) for key, x in some(weights.items()))
    metrics = read_metrics(whole / "metrics.jsonl")
    assert all(line["training/grad_norm"] > 0 for line in some(metrics))
