"""Presets of families beside Kontext and klein, end to end: train, kill, resume, load the LoRA."""

import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from mteditflow_examples.flux.config import ConfigError, DistillationConfig
from mteditflow_examples.flux.config_values import dumped, typed
from mteditflow_examples.flux.inputs import read_inputs
from mteditflow_examples.flux.loading import require_fitting
from mteditflow_examples.flux.start import main
from mteditflow_examples.train_flux import train
from PIL import Image
from safetensors.torch import load_file

from mteditflow.chains import ChainDataset, read_chains
from mteditflow.objectives import keyed_generator
from mteditflow.pipelines import FAMILIES
from mteditflow.training import read_metrics
from tests.flux import family_runs
from tests.flux.family_runs import FAMILY_PRESETS, MAKERS, configuration, make_family_world, run
from tests.flux.worlds import run as run_ranks
from tests.loops import some
from tests.pipelines.tiny_pipelines import FAMILIES as TABLE
from tests.processes import Process
from tests.tiny_editors import CALLS
from tests.undrawn import undraw


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


@pytest.fixture(scope="module", params=FAMILY_PRESETS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def trained(name, worlds, tmp_path_factory):
    """The folder of a run of two rounds that nothing disturbed."""
    output = tmp_path_factory.mktemp("trained")
    run(name, worlds[name], output)
    return output


def policies(output, done=2):
    folder = output / "checkpoints" / f"round-{done:06d}"
    return {file.stem: load_file(file) for file in folder.glob("*.safetensors")}


def test_its_policy_moves_and_its_log_says_what_becomes_of_references(trained, name):
    metrics = read_metrics(trained / "metrics.jsonl")
    assert len(metrics) == 2
    assert all(line["training/grad_norm"] > 0 for line in some(metrics))
    weights = policies(trained)["current"]
    moved = [key for key, x in weights.items() if ".lora_B." in key and bool(x.abs().max() > 0)]
    assert len(moved) > len(weights) / 6
    said = (trained / "log.txt").read_text()
    assert ("are encoded at 256 x 256" in said) == (name == "qwen-edit")
    assert "assumed:" not in said


def test_a_killed_run_goes_on_as_if_it_had_not_been(trained, name, worlds, tmp_path):
    process = Process(["-m", "tests.flux.family_runs", name, str(worlds[name]), str(tmp_path)])
    assert process.wait(300) == -signal.SIGKILL
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    run(name, worlds[name], tmp_path)
    assert "resuming after round 1" in (tmp_path / "log.txt").read_text()
    expected = policies(trained)
    assert {"current", "old", "optimizer"} <= expected.keys()
    for policy, weights in some(policies(tmp_path).items()):
        assert all(torch.equal(x, expected[policy][key]) for key, x in some(weights.items()))


@pytest.fixture(scope="module")
def of_two_ranks(name, worlds, tmp_path_factory):
    """The folder of a run of one round on two ranks over gloo, one group on each."""
    output = tmp_path_factory.mktemp("ranks")
    words = (name, str(worlds[name]), str(output), "round")
    run_ranks(*words, ranks=2, script=Path(family_runs.__file__))
    return output


def test_two_ranks_end_a_round_as_one_process_does(trained, of_two_ranks):
    expected, found = policies(trained, 1), policies(of_two_ranks, 1)
    for policy in some(("current", "old", "optimizer")):
        ours, theirs = expected[policy], found[policy]
        assert ours.keys() == theirs.keys()
        norm = sum(float(x.double().square().sum()) for x in ours.values()) ** 0.5
        apart = sum(float((x - theirs[k]).double().square().sum()) for k, x in ours.items()) ** 0.5
        assert apart <= 1e-5 * norm
    assert "2 ranks" in (of_two_ranks / "log.txt").read_text()


def test_its_lora_makes_the_evaluated_images_in_a_plain_pipeline(trained, name, worlds):
    chain = read_chains(worlds[name] / "held_out.jsonl").chains[0]
    pipeline = DiffusionPipeline.from_pretrained(worlds[name] / "model")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(trained / "checkpoints" / "round-000002" / "lora")
    image = ChainDataset([chain])[0].image
    side = CALLS[name]["height"]
    image = image and image.resize((side, side), Image.Resampling.LANCZOS)
    generator = keyed_generator(0, "held out", 0)
    options = CALLS[name] | {"num_inference_steps": 2}
    for turn, words in enumerate(some(chain.instructions), start=1):
        given = {} if image is None else {"image": [image]}
        (image,) = pipeline(prompt=words, generator=[generator], **given, **options).images
        file = trained / "evaluations" / "round-000002" / chain.id / f"turn_{turn}.png"
        assert Image.open(file).tobytes() == image.tobytes()


def test_of_a_class_that_is_not_listed_the_log_says_what_was_assumed(worlds, tmp_path):
    TABLE["FluxPipeline"].build().save_pretrained(tmp_path / "model")
    model = {
        "path": str(tmp_path / "model"),
        "guidance": 2.0,
        "resolution": 16,
        "options": {"max_sequence_length": 10},
    }
    config = configuration(
        "z-image",
        worlds["z-image"],
        tmp_path / "run",
        model=model,
        data={"held_out": None},
        training={"rounds": 1},
    )
    main(train, config)
    said = (tmp_path / "run" / "log.txt").read_text()
    for words in ("FluxPipeline is not a listed family", "the guidance scale is guidance_scale"):
        assert f"assumed: {words}" in said
    assert (tmp_path / "run" / "checkpoints" / "round-000001" / "lora").is_dir()


# What is refused.


def refused(config):
    with pytest.raises(ConfigError) as caught:
        read_inputs(config, Accelerator(cpu=True))
    return str(caught.value)


def test_chains_must_have_what_the_pipeline_takes(worlds, tmp_path):
    texts = {"chains": str(worlds["z-image"] / "train.jsonl"), "held_out": None}
    pictures = {"chains": str(worlds["flux2"] / "train.jsonl"), "held_out": None}
    config = configuration("flux2", worlds["flux2"], tmp_path, data=texts | {"turns": 1})
    assert refused(config) == (
        'data: expected an image in every chain ("image": null is none) for a Flux2Pipeline, got '
        "none in chain '0'"
    )
    config = configuration("z-image", worlds["z-image"], tmp_path, data=pictures)
    assert refused(config) == (
        'data: expected no image in any chain ("image": null is none) for a ZImagePipeline, got '
        "'0.png' in chain '0'"
    )
    other = {"held_out": str(worlds["flux2"] / "held_out.jsonl")}
    config = configuration("z-image", worlds["z-image"], tmp_path, data=other)
    assert "got '4.png' in chain '4'" in refused(config)


def test_text_to_image_has_one_turn_and_a_scorer(worlds, tmp_path):
    makers = [family for family in FAMILIES if family.name in MAKERS]
    chains = ChainDataset(read_chains(worlds["sd3.5"] / "train.jsonl").chains)
    for family in some(makers):
        kind = family.pipeline.__name__
        config = configuration("sd3.5", worlds["sd3.5"], tmp_path, data={"turns": 2})
        with pytest.raises(ConfigError, match=f"data.turns: expected 1 for a {kind}, .* got 2"):
            require_fitting(config, family, chains)
        judged = {"scorer": None, "judge": ["http://judge/v1"], "judge_model": "judge"}
        config = configuration("sd3.5", worlds["sd3.5"], tmp_path, rewards=judged)
        with pytest.raises(ConfigError, match=rf"rewards\.scorer: expected one for a {kind}"):
            require_fitting(config, family, chains)
    values = dumped(configuration("sd3.5", worlds["sd3.5"], tmp_path))
    del values["objective"]
    with pytest.raises(ConfigError, match=r"teacher\.path: expected a LoRA for a ZImagePipeline"):
        require_fitting(typed(values, DistillationConfig), makers[0], chains)
