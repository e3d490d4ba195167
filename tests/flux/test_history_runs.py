"""Runs whose turns see the original too, or what their chains say: recorded, resumed, evaluated."""

import json
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from mteditflow_examples import budget, self_distillation
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import ConfigError, DistillationConfig
from mteditflow_examples.flux.inputs import read_inputs
from mteditflow_examples.flux.sampling import next_chains, sample, velocity_of
from mteditflow_examples.flux.updating import check_first_ratios
from PIL import Image

from mteditflow.chains import Chain, ChainDataset, read_chains, write_chains
from mteditflow.objectives import keyed_generator
from tests.flux.family_runs import Brightness, make_family_world, run
from tests.flux.rounds import started
from tests.flux.worlds import options, weights
from tests.loops import some
from tests.pipelines.tiny_pipelines.base import picture
from tests.tiny_editors import CALLS

pytestmark = pytest.mark.usefixtures("undrawn")
NAME = "flux2"
ORIGINAL = {"history": "original"}
SCORER = f"{Brightness.__module__}:Brightness"
SCORED = ("--rewards.scorer", SCORER, "--rewards.weights.consistency", 0)


@pytest.fixture(scope="module")
def flux2_world(tmp_path_factory):
    """Chains of which the first held-out one says what its turns see."""
    world = make_family_world(NAME, tmp_path_factory.mktemp("histories"))
    picture(64, 128, seed=9).save(world / "hat.png")
    first, *others = read_chains(world / "held_out.jsonl").chains
    seen = [["last", "hat.png"], ["original"]]
    first = Chain.from_record(first.to_record() | {"references": seen}, root=first.root)
    write_chains([first, *others], world / "held_out.jsonl")
    return world


@pytest.fixture(scope="module")
def trained(flux2_world, tmp_path_factory):
    """A run of two rounds."""
    output = tmp_path_factory.mktemp("trained")
    run(NAME, flux2_world, output, data=ORIGINAL)
    return output


def test_its_images_are_those_of_a_plain_pipeline_given_the_same(trained, flux2_world):
    pipeline = DiffusionPipeline.from_pretrained(flux2_world / "model")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(trained / "checkpoints" / "round-000002" / "lora")
    chains = read_chains(flux2_world / "held_out.jsonl").chains
    hat = picture(64, 128, seed=9).crop((32, 0, 96, 64))
    given = [
        lambda turn, original, last: [[last, hat], [original]][turn],
        lambda turn, original, last: [[last], [original, last]][turn],
    ]
    call = CALLS[NAME] | {"num_inference_steps": 2}
    for row, chain in enumerate(some(chains)):
        original = image = ChainDataset([chain])[0].image
        generator = keyed_generator(0, "held out", row)
        for turn, words in enumerate(some(chain.instructions)):
            seen = given[row](turn, original, image)
            image = pipeline(image=seen, prompt=words, generator=[generator], **call).images[0]
            made = trained / "evaluations" / "round-000002" / chain.id / f"turn_{turn + 1}.png"
            assert Image.open(made).tobytes() == image.tobytes()


def test_a_run_that_was_cut_goes_on_and_its_evaluations_name_the_history(
    trained, flux2_world, tmp_path, capsys
):
    run(NAME, flux2_world, tmp_path, data=ORIGINAL, training={"rounds": 1})
    with pytest.raises(SystemExit):
        run(NAME, flux2_world, tmp_path)
    assert "data.history: expected 'original', with which the run in " in capsys.readouterr().err
    run(NAME, flux2_world, tmp_path, data=ORIGINAL)
    whole, cut = (weights(folder, done=2) for folder in (trained, tmp_path))
    assert all(torch.equal(x, cut[name]) for name, x in some(whole.items()))
    evaluation = json.loads((trained / "evaluations" / "round-000002.json").read_text())
    assert json.loads(evaluation["provenance"]["made_by"]["call"])["history"] == "original"


def test_a_round_of_turns_with_one_and_two_references_replays(klein_world, tmp_path):
    more = (*SCORED, "--data.groups", 1, "--data.history", "original")
    with started(klein_world, tmp_path, *more, objective="grpo", family="klein") as own:
        lengths = Counter()
        own.editor.transformer.register_forward_pre_hook(
            lambda _, __, given: lengths.update([given["hidden_states"].shape[1]]), with_kwargs=True
        )
        drawn = next_chains(own)
        samples, _, _ = sample(own, drawn)
        check_first_ratios(own, velocity_of(own.policies, samples), samples)  # raises
        assert len(lengths) == 2


def test_the_teacher_is_shown_the_clean_image_beside_the_original(klein_world, tmp_path):
    more = ("--data.groups", 1, "--data.group-size", 2, "--data.history", "original")
    asked = {"family": "klein", "kind": DistillationConfig}
    with started(klein_world, tmp_path, *more, **asked) as own:
        own.first_round = 0
        drawn = next_chains(own)
        words = [chain.instructions for chain in drawn.chains]
        given = (own, drawn.references, words, drawn.group)
        rollout = self_distillation.record_student(*given, seen=drawn.seen)
        calls = []
        roll_out = own.editor.roll_out
        own.editor.roll_out = lambda *x, **y: (calls.append((x, y)), roll_out(*x, **y))[1]
        clean = self_distillation.clean_rollout(own, drawn, rollout)
    ((images, _), options_of_call) = calls[0]
    assert options_of_call["seen"] == [[["last"]], [[drawn.references[0], "last"]]]
    assert len(images) == 2
    assert clean.index.shape == rollout.index.shape


def refused(config):
    with pytest.raises(ConfigError) as caught:
        read_inputs(config, Accelerator(cpu=True))
    return str(caught.value)


def test_a_pipeline_of_one_reference_refuses_histories(world, tmp_path):
    arguments = options(world, tmp_path, *SCORED)
    kind = "a FluxKontextPipeline, which takes one reference image"
    message = refused(parse([*arguments, "--data.history", "original"]))
    assert message == f"data.history: expected last for {kind}, got original"
    chain = read_chains(world / "train.jsonl").chains[0].first_turns(2)
    saying = chain.model_copy(update={"references": (("last",), ("original",))})
    write_chains([saying], tmp_path / "chains.jsonl")
    more = ["--data.chains", str(tmp_path / "chains.jsonl"), "--data.allow-outside"]
    assert refused(parse([*arguments, *more])) == (
        f"data: expected references of ['last'] alone for {kind}, got ['original'] in chain "
        f"{chain.id!r}"
    )
    with pytest.raises(ConfigError, match=r"data\.history: has an effect only where data\.turns"):
        parse([*arguments, "--data.turns", "1", "--data.history", "original"])


def test_a_budget_counts_the_second_reference(monkeypatch):
    class Counted(Exception):  # noqa: N818
        """Carries the references of a row in the place of its costs, which take minutes."""

    def counted(_, case):
        raise Counted(case.shape.references)

    monkeypatch.setattr("mteditflow.budget.costs_of", counted)
    for history, references in some([("last", 1), ("original", 2)]):
        config = parse(["klein-nft", "--data.history", history], services=False)
        with pytest.raises(Counted) as caught:
            budget.plan_of(config, gpus=1)
        assert caught.value.args == (references,)
    config = parse(["kontext-nft", "--data.history", "original"], services=False)
    with pytest.raises(ValueError, match=r"data\.history: expected last for a FluxKontextPipeline"):
        budget.plan_of(config, gpus=1)
