"""Options that save memory of the device: stored embeddings, encoders on the host, quantization."""

import logging

import pytest
import torch
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import ConfigError
from mteditflow_examples.flux.inputs import check
from mteditflow_examples.flux.sampling import next_chains, sample
from mteditflow_examples.flux.sharding import sharding

from mteditflow.pipelines import quantization
from mteditflow.pipelines.prompts import Prompts
from mteditflow.pipelines.quantization import QUANTIZATIONS, is_quantized
from tests.flux.rounds import started
from tests.flux.worlds import options, run, weights
from tests.loops import some


def test_embeddings_are_stored_ahead_and_change_nothing(world, tmp_path, monkeypatch):
    """All instructions of training and held-out chains; a later run encodes none."""
    folder, latents = tmp_path / "embeddings", []
    stored = ("--model.prompt-folder", folder, "--data.held-out", world / "held_out.jsonl")

    def encode(_, new):
        assert not new, "an instruction was embedded again"
        return iter(())

    for number, more in enumerate([(), stored, stored]):
        if number == 2:
            monkeypatch.setattr(Prompts, "_each_encoded", encode)
        with started(world, tmp_path / str(number), *more) as own:
            latents.append(sample(own, next_chains(own))[0].trajectory.latents)
            held_out = [] if own.held_out is None else own.held_out.chains.chains
            chains = [*own.chains.chains, *held_out]
    texts = {text for chain in chains for text in chain.instructions}
    assert len(list(folder.rglob("*.safetensors"))) == len(texts)
    assert torch.equal(latents[0], latents[1])
    assert torch.equal(latents[0], latents[2])


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
    pytest.importorskip(QUANTIZATIONS[kind])
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
