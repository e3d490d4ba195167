"""Options that save memory of the device: stored embeddings, encoders on the host, quantization."""

import logging

import pytest
import torch
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import ConfigError
from mteditflow_examples.flux.inputs import check
from mteditflow_examples.flux.sharding import sharding

from mteditflow.pipelines import quantization
from mteditflow.pipelines.prompts import Prompts
from mteditflow.pipelines.quantization import QUANTIZATIONS, is_quantized
from tests.flux.rounds import started
from tests.flux.worlds import options, run, weights
from tests.loops import some


def test_embeddings_are_stored_ahead_and_change_nothing(world, tmp_path, monkeypatch):
    """All instructions of training and held-out chains; a later run encodes none."""
    folder = tmp_path / "embeddings"
    stored = ("--model.prompt-folder", folder, "--training.rounds", 1)
    run(*options(world, tmp_path / "plain", "--training.rounds", 1))
    run(*options(world, tmp_path / "stored", *stored))
    plain, other = (weights(tmp_path / name, done=1) for name in ("plain", "stored"))
    assert all(torch.equal(x, other[name]) for name, x in some(plain.items()))
    assert any(folder.rglob("*.safetensors"))

    def encode(*_):
        raise AssertionError("an instruction was embedded again")

    monkeypatch.setattr(Prompts, "_each_encoded", lambda _, new: encode() if new else iter(()))
    run(*options(world, tmp_path / "again", *stored))
    again = weights(tmp_path / "again", done=1)
    assert all(torch.equal(x, again[name]) for name, x in some(plain.items()))


def test_options_that_cannot_be_kept_are_refused_at_the_start(world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    config = parse(options(world, tmp_path / "run", "--model.prompt-folder", tmp_path / "file"))
    with pytest.raises(ValueError, match=r"model\.prompt_folder: expected a folder, got the file"):
        check(config)
    monkeypatch.setattr(quantization, "find_spec", lambda _: None)
    config = parse(options(world, tmp_path / "run", "--model.quantize", "nf4"))
    with pytest.raises(ConfigError, match=r"model\.quantize: nf4 needs bitsandbytes, which is not"):
        check(config)


def test_quantized_weights_are_not_sharded(world, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = parse(options(world, tmp_path / "run", "--model.quantize", "int8"))
    with pytest.raises(ConfigError, match=r"model.quantize: expected none under fsdp2"):
        sharding(config.model, 2)


@pytest.mark.bases
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao")
@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("objective", ["nft", "grpo"])
def test_quantized_runs_train_and_resume(world, tmp_path, kind, objective, monkeypatch):
    """Ratios are 1 on the first rollout, or the run would stop; a resumed run ends the same."""
    pytest.importorskip(QUANTIZATIONS[kind][0])
    monkeypatch.setattr(logging.getLogger("bitsandbytes.autograd._functions"), "disabled", True)

    def train(folder, rounds):
        more = ("--model.quantize", kind, "--training.rounds", rounds)
        run(*options(world, tmp_path / folder, *more, objective=objective))
        return weights(tmp_path / folder, done=rounds)

    whole = train("whole", 2)
    train("cut", 1)
    assert all(torch.equal(whole[name], x) for name, x in some(train("cut", 2).items()))
    with started(world, tmp_path / "third", "--model.quantize", kind, objective=objective) as own:
        assert is_quantized(own.editor.transformer)
