"""Runs that start from a LoRA: what they save, going on, what is refused."""

import shutil

import pytest
import torch
from mteditflow_examples import train_flux
from safetensors.torch import load_file, save_file

from mteditflow.pipelines import Editor, read_lora
from tests.flux.rounds import started
from tests.flux.worlds import options, weights
from tests.loops import some
from tests.refusals import call

pytestmark = pytest.mark.usefixtures("undrawn")
SHORT = ("--data.held-out", "None", "--training.rounds", 1, "--evaluation.policy", "current")
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def before(world, tmp_path_factory):
    """The LoRA of a run of one round, of rank 16."""
    folder = tmp_path_factory.mktemp("before")
    assert call(train_flux.main, options(world, folder, *SHORT)).code == 0
    return folder / "checkpoints" / "round-000001" / "lora"


def on(lora, start, *more):
    kl = ("--objective.kl-coef", 0.1, "--model.lora-reference", "start")
    return (*SHORT, "--model.lora", lora, "--model.lora-start", start, *kl, *more)


def test_a_continued_run_begins_with_the_weights_of_the_file(world, before, tmp_path):
    with started(world, tmp_path, *on(before, "continue")) as run:
        given = read_lora(type(run.editor.pipeline), before)
        own = run.policies.state_dict()
        assert all(torch.equal(own[name], x) for name, x in some(given.items()))
        assert len(own) == 3 * len(given) / 2  # and a scale for each layer


def test_a_frozen_start_is_saved_below_what_was_trained(world, before, tmp_path):
    more = on(before, "freeze", "--model.lora-rank", 4, "--model.lora-alpha", 8)
    assert call(train_flux.main, options(world, tmp_path, *more)).code == 0
    given = load_file(before / FILE)
    saved = load_file(tmp_path / "checkpoints" / "round-000001" / "lora" / FILE)
    own = weights(tmp_path, done=1)
    assert saved.keys() == given.keys()
    for name, x in some(saved.items()):
        dim = 1 if ".lora_B." in name else 0
        first, rest = x.split([16, 4], dim)
        scale = 2 if dim else 1
        assert torch.equal(first, given[name])  # alpha 16 of rank 16
        assert torch.equal(rest, scale * own[name.removeprefix("transformer.")])
    assert any(x.any() for name, x in some(own.items()) if ".lora_B." in name)


def test_it_goes_on_to_the_same_weights(world, before, tmp_path):
    for rounds, folder in ((2, "whole"), (1, "parts"), (2, "parts")):
        more = on(before, "freeze", "--training.schedule", "constant")
        words = options(world, tmp_path / folder, *more, "--training.rounds", rounds)
        assert call(train_flux.main, words).code == 0
    whole, parts = (weights(tmp_path / folder, done=2) for folder in ("whole", "parts"))
    assert all(torch.equal(parts[name], x) for name, x in some(whole.items()))
    other = tmp_path / "other"
    shutil.copytree(before, other)
    state = {name: 2 * x for name, x in load_file(before / FILE).items()}
    save_file(state, other / FILE)
    for lora, begun, message in (
        (other, "freeze", "model.lora: expected a file or folder of content "),
        (before, "continue", "model.lora_start: expected 'freeze', with which the run in "),
    ):
        ended = call(train_flux.main, options(world, tmp_path / "parts", *on(lora, begun)))
        assert (ended.code, ended.err[: len(message) + 7]) == (2, f"error: {message}")
    without = options(world, tmp_path / "parts", *SHORT)
    ended = call(train_flux.main, without)
    assert ended.code == 2
    assert ended.err.startswith("error: model.lora")


@pytest.mark.parametrize(
    ("file", "more", "message"),
    [
        (FILE, (), "model.lora: expected a LoRA of rank 4, as model.lora_rank, got [16]"),
        ("none", (), "model.lora: expected a folder with pytorch_lora_weights.safetensors, or"),
        ("config", (), "model.lora: expected a LoRA, got none in "),
        (FILE, ("--objective.kl-coef", 0), "model.lora_reference: has an effect only where mod"),
    ],
)
def test_what_is_no_such_lora_is_refused(file, more, message, world, before, tmp_path, monkeypatch):
    monkeypatch.setattr(Editor, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    path = before / file
    if file == "config":
        path = tmp_path / "config.safetensors"
        save_file({"x": torch.ones(1)}, path)
    words = (*on(path, "continue"), "--model.lora-rank", 4, *more)
    ended = call(train_flux.main, options(world, tmp_path / "run", *words))
    assert (ended.code, ended.err[: len(message) + 7]) == (2, f"error: {message}")


def test_modules_that_are_not_those_of_the_run_are_refused(world, before, tmp_path):
    words = (*on(before, "continue"), "--model.lora-targets", "attn.to_q")
    ended = call(train_flux.main, options(world, tmp_path, *words))
    assert ended.code == 2
    assert "error: model: start: expected the layers of the adapter, got others, as ['" in ended.err
