"""mteditflow export: weights and card of a run; what cannot be exported is refused."""

import json
import re
import shlex
import shutil

import pytest
import torch
from diffusers import FluxKontextPipeline
from mteditflow_examples import evaluate, export, train_flux
from mteditflow_examples.flux.card import MARK
from PIL import Image
from safetensors.torch import load_file

from mteditflow.evaluation import Evaluation
from mteditflow.pipelines import comfyui_lora, read_lora
from tests.flux.worlds import options
from tests.loops import some
from tests.refusals import call
from tests.samples_of_scores import few_resamples
from tests.undrawn import undraw

__all__ = ["few_resamples"]  # a fixture of every test here
LORA = "lora/pytorch_lora_weights.safetensors"


def trained(world, folder, *more, family="kontext"):
    words = options(world, folder, "--training.rounds", 2, *more, family=family)
    with pytest.MonkeyPatch.context() as patch:
        undraw(patch)
        assert call(train_flux.main, words).code == 0
    return folder


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """Two rounds, evaluated before and after, of which there is no picture."""
    folder = trained(world, tmp_path_factory.mktemp("run"), "--evaluation.every", 2)
    (folder / "chains.png").unlink()
    return folder


@pytest.fixture(scope="module")
def blind(klein_world, tmp_path_factory):
    """A klein that nobody evaluated."""
    more = ("--data.held-out", "None", "--training.rounds", 1)
    return trained(klein_world, tmp_path_factory.mktemp("blind"), *more, family="klein")


def test_the_diffusers_file_is_that_of_the_newest_checkpoint(run, tmp_path):
    ended = call(export.app, [run, "--output", tmp_path / "out" / "edits.safetensors"])
    assert (ended.code, ended.err) == (0, "")
    written = (tmp_path / "out" / "edits.safetensors").read_bytes()
    assert written == (run / "checkpoints" / "round-000002" / LORA).read_bytes()
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == [
        "README.md",
        "edits.safetensors",
    ]


def test_the_comfyui_file_holds_the_weights_of_the_checkpoint_that_is_named(run, tmp_path):
    checkpoint = run / "checkpoints" / "round-000002"
    words = [checkpoint, "--format", "comfyui", "--output", tmp_path / "edits.safetensors"]
    assert call(export.app, words).code == 0
    weights = read_lora(FluxKontextPipeline, checkpoint / "lora")
    expected = comfyui_lora(weights, "FluxTransformer2DModel")
    found = load_file(tmp_path / "edits.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in some(expected.items()))
    assert "ComfyUI's `models/loras`" in (tmp_path / "README.md").read_text()


def test_the_card_has_what_the_run_has_measured(run, tmp_path):
    Image.new("RGB", (4, 4)).save(run / "chains.png")
    assert call(export.app, [run, "--output", tmp_path / "edits.safetensors"]).code == 0
    (run / "chains.png").unlink()
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")  # a folder is no base model of a hub
    assert MARK in card
    assert "# LoRA of kontext0/model, trained by DiffusionNFT" in card
    assert "| policy | current, after round 2 of 2 |" in card
    assert "| LoRA | rank 16, alpha 16 |" in card
    assert "| rewards | following 1, consistency 0.5, strict 0 |" in card
    assert (
        "| a round | 4 chains of 2 turns, each sampled 4 times; 4 optimizer steps in all |" in card
    )
    assert "![chains of edits](chains.png)" in card
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert compile(program, "card", "exec")
    assert 'pipe = DiffusionPipeline.from_pretrained("kontext0/model", torch_dtype=' in program
    log = (run / "log.txt").read_text()
    assert re.search(r"instruction_following [\d.]+% \(", log)  # percent beside means of rewards
    assert re.search(r" strict [\d.e-]+ \(", log)
    assert (tmp_path / "chains.png").is_file()
    for done in (0, 2):
        evaluation = Evaluation.read(run / "evaluations" / f"round-{done:06d}.json")
        for name in some(evaluation.names):
            (line,) = [
                line
                for line in card.splitlines()
                if line.startswith(f"| {name.replace('_', ' ')} | round {done} |")
            ]
            assert all(
                f"{x:.2f}" in line or "none" in line for x in some(evaluation.estimates[name])
            )
    shown = json.loads(card.partition("```json\n")[2].partition("\n```")[0])
    assert set(shown) == {"objective", "sampling", "training"}
    assert str(tmp_path.parent) not in card


def test_the_command_on_the_card_gives_the_numbers_on_the_card(run, world, tmp_path):
    """The noise of each chain at each turn and the call are those of the trainer's evaluation."""
    assert call(export.app, [run, "--output", tmp_path / "edits.safetensors"]).code == 0
    card = (tmp_path / "README.md").read_text()
    command = card.partition("```bash\n")[2].partition("```")[0].replace("\\\n", " ")
    words = shlex.split(command)
    assert words[:4] == ["mteditflow", "evaluate", "run", "HELD_OUT.jsonl"]
    words[words.index("--editor") + 1] = world / "model"
    words[words.index("--lora") + 1] = tmp_path / "edits.safetensors"
    given = ["run", world / "held_out.jsonl", *words[4:], "--output", tmp_path / "again"]
    with pytest.MonkeyPatch.context() as patch:
        undraw(patch)
        assert call(evaluate.app, given).code == 0
    expected = Evaluation.read(run / "evaluations" / "round-000002.json")
    found = Evaluation.read(tmp_path / "again" / "evaluation.json")
    assert found.chain_ids == expected.chain_ids
    for name in some(expected.terms):
        assert torch.equal(found.terms[name].score, expected.terms[name].score), name
    made = json.loads((tmp_path / "again" / "settings.json").read_text())["provenance"]["made_by"]
    assert json.loads(made["call"])["noise"] == "row"


def test_what_was_not_measured_is_said_to_be_so(blind, tmp_path):
    assert call(export.app, [blind, "--output", tmp_path / "edits.safetensors"]).code == 0
    card = (tmp_path / "README.md").read_text()
    assert "None: up to this checkpoint no held-out chains were scored." in card
    assert "The run has no picture of chains." in card
    assert "| metric |" not in card


def test_a_card_of_its_own_is_written_again(run, tmp_path):
    for _ in range(2):
        assert call(export.app, [run, "--output", tmp_path / "edits.safetensors"]).code == 0


@pytest.mark.parametrize(
    "fault", ["name", "card", "file", "inside", "nothing", "beside", "empty", "layer"]
)
def test_what_cannot_be_exported_is_refused(fault, run, blind, tmp_path):
    source, output, words = run, tmp_path / "edits.safetensors", []
    if fault == "name":
        output, message = tmp_path / "edits.bin", "--output: expected a .safetensors file, got "
    elif fault == "card":
        (tmp_path / "README.md").write_text("mine")
        message = "--output: expected a folder of an earlier export, or one without files of these"
    elif fault == "file":
        output.write_text("mine")
        message = "--output: expected a folder of an earlier export, or one without files of these"
    elif fault == "inside":
        output = max((run / "checkpoints").glob("round-*")) / LORA
        message = "--output: expected a file outside of checkpoints, got one in "
    elif fault == "nothing":
        source = tmp_path / "none"
        message = (
            "source: expected the folder of a training run, which has checkpoints, or of one "
            f"checkpoint, got {source}, which does not exist\n"
        )
    elif fault == "beside":
        source = run / "checkpoints" / "round-000007"
        message = (
            "source: expected the folder of a training run, which has checkpoints, or of one "
            f"checkpoint, got {source}, which does not exist; there are round-000002 beside it\n"
        )
    elif fault == "empty":
        source = tmp_path / "run"
        (source / "checkpoints").mkdir(parents=True)
        message = "source: expected a run or a checkpoint with a LoRA, got "
    else:
        source, words = blind, ["--format", "comfyui"]
        message = (
            "weights: expected layers with an exact form in ComfyUI, got norm_out.linear: conv"
        )
    before = sorted(tmp_path.rglob("*"))
    ended = call(export.app, [source, "--output", output, *words])
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert ended.err.startswith(f"error: {message}")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_before_the_end_has_the_numbers_of_then(run, tmp_path):
    """Of a run that went on: no later evaluation, no picture of the end."""
    shutil.copytree(run, tmp_path / "run")
    Image.new("RGB", (4, 4)).save(tmp_path / "run" / "chains.png")
    later = tmp_path / "run" / "evaluations" / "round-000002.json"
    evaluation = json.loads(later.read_text())
    evaluation["round"] = 9
    later.with_name("round-000009.json").write_text(json.dumps(evaluation))
    later.unlink()
    words = [tmp_path / "run", "--output", tmp_path / "out" / "edits.safetensors"]
    assert call(export.app, words).code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The policy of round 0, not of 2." in card
    assert "round 9" not in card
