"""Options with a path that cannot be read: the option is named, and the remedy if it is the hub."""

import os
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from accelerate import Accelerator
from mteditflow_examples.flux.config import Config, ConfigError, DistillationConfig
from mteditflow_examples.flux.inputs import check, read_inputs

from mteditflow._hub import hub_reason
from tests.loops import some

LONG = Path("/" + "x" * 300)  # a name that no file can have, as one in a folder without permission


def given(option, value):
    """A configuration of plain rewards, with one option changed."""
    section, name = option.split(".")
    config = DistillationConfig() if section == "teacher" else Config()
    here = Path(__file__)  # a file, so that all other options pass
    config = replace(config, data=replace(config.data, chains=here))
    part = replace(getattr(config, section), **{name: value})
    return replace(config, **{section: part})


@pytest.mark.parametrize(
    "option",
    [
        "data.chains", "data.held_out", "model.path", "model.prompt_folder", "model.lora",
        "sampling.model", "sampling.lora", "output.folder", "teacher.path", "teacher.sessions",
    ],
)  # fmt: skip
def test_the_option_is_named(option, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # reading it would wait for ever
    for path in some([LONG, loop, pipe]):
        value = str(path) if option.endswith(".model") or option == "model.path" else path
        with pytest.raises(ValueError, match=rf"^{option.replace('.', '[.]')}: "):
            check(given(option, value))


@pytest.mark.parametrize("option", ["model.path", "sampling.model"])
def test_a_model_of_the_hub_without_a_network(option, world, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    config = given("data.chains", world / "train.jsonl")
    config = replace(config, model=replace(config.model, path=str(world / "model")))
    section, name = option.split(".")
    part = replace(getattr(config, section), **{name: "some/model"})
    with pytest.raises(ConfigError) as refused:
        read_inputs(replace(config, **{section: part}), Accelerator(cpu=True))
    assert str(refused.value) == (
        f"{option}: expected a model that can be read, got some/model: HF_HUB_OFFLINE is set and "
        "the model is not in the cache; run hf download some/model with a network (hf auth login "
        "first if it is gated), or give a local folder"
    )


def named(name):
    """An error of a class of the hub's, as its libraries raise it."""
    error = OSError("some/model does not appear to have a file named model_index.json.")
    error.__context__ = type(name, (OSError,), {})("a long text")
    return error


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        (
            "GatedRepoError",
            "accept it on https://huggingface.co/some/model, then run hf auth",
        ),
        ("RepositoryNotFoundError", "check the spelling, or run hf auth login if it is private"),
        ("LocalEntryNotFoundError", "run hf download some/model with a network (hf auth login"),
    ],
)
def test_the_remedy_follows_from_the_cause(name, remedy, tmp_path):
    assert remedy in hub_reason("some/model", named(name))
    assert hasattr(huggingface_hub.errors, name)  # the class is still called so
    assert hub_reason(tmp_path, named(name)) is None  # a folder is not of the hub
