"""Trackers: project and name of a run, where files lie, what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from mteditflow_examples import train_flux
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import Output
from mteditflow_examples.flux.trackers import RUN_NAMES, named, places, run_name, start_trackers

from tests.flux.worlds import options
from tests.loops import some
from tests.refusals import call


def test_tensorboard_writes_into_a_folder_of_the_project(tmp_path):
    config = parse(["shapes-nft", "--output.folder", str(tmp_path), "--output.project", "edits"])
    accelerator = Accelerator(
        cpu=True, log_with="tensorboard", project_config=places(config.output)
    )
    start_trackers(accelerator, config)
    accelerator.log({"reward": 1.0}, step=1)
    accelerator.end_training()
    assert list((tmp_path / "trackers" / "edits").glob("events.out.tfevents.*"))
    assert [x.name for x in tmp_path.iterdir()] == ["trackers"]


def test_the_name_is_the_one_given_or_that_of_the_folder():
    output = Output(folder=Path("runs/kontext"))
    assert run_name(output) == "kontext"
    assert run_name(replace(output, run="seed 3")) == "seed 3"
    assert named(("wandb", "tensorboard", "mlflow"), "seed 3") == {
        "wandb": {"name": "seed 3"},
        "mlflow": {"run_name": "seed 3"},
    }


def test_trackers_with_names_are_those_of_accelerate():
    for name in some(RUN_NAMES):
        assert name in LOGGER_TYPE_TO_CLASS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output.trackers", "lightning"], "output.trackers: expected names among ["),
        (["--output.run", "seed 3"], "output.run: has an effect only where output.trackers has"),
        (["--output.project", ""], "output.project: string should have at least 1 character"),
    ],
)
def test_what_no_tracker_takes_is_refused(world, tmp_path, words, message):
    ended = call(train_flux.main, options(world, tmp_path, *words))
    assert ended.code == 2
    assert ended.err.startswith(f"error: {message}")
