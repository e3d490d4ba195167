"""``mteditflow budget``: figures of the presets, exit codes, errors in one line, a local folder."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import Flux2KleinPipeline
from mteditflow_examples import budget
from mteditflow_examples.flux.command_line import PRESETS, parse
from mteditflow_examples.shapes.editor import Family
from mteditflow_examples.shapes.files import write_world

from docs import render_budget
from mteditflow import cli
from mteditflow.budget import GPUS, find_model, least_hours, peak, phases, work
from mteditflow.budget.advice import CHANGES, QUANTIZE
from tests.loops import some

# F per trajectory: 18 steps in each branch, then rows forward, backward and once more forward;
# TFLOP of F.
KNOWN = {"kontext-nft": (27.9, 38.2), "kontext-grpo": (37.2, 38.7), "klein-nft": (55.5, 39.6)}


def run(capsys, monkeypatch, *words):
    """Exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", sys.argv)  # the command sets it
    with pytest.raises(SystemExit) as ended:
        cli.main(["budget", *map(str, words)])
    return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize("preset", KNOWN)
def test_shipped_presets_fit_one_card_of_48(preset, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, preset, "--memory", 48, "--json")
    values = json.loads(out)
    assert (code, values["verdict"]) == (0, "fits")
    forwards, unit = KNOWN[preset]
    assert values["flops"]["forwards"] == pytest.approx(forwards, abs=0.06)
    assert values["flops"]["forward"] / 1e12 == pytest.approx(unit, abs=0.06)
    highest = max(values["phases"], key=lambda x: x["total"])
    assert highest["name"] == "text encoders"
    assert 33 < highest["total"] < 37


def test_exit_codes(capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "kontext-nft", "--memory", 80)
    assert (code, err) == (0, "")
    assert out.startswith("kontext-nft on 1 GPU of 80 GiB: fits as configured (predicted")
    code, out, err = run(capsys, monkeypatch, "kontext-nft", "--memory", 6)
    assert (code, err) == (1, "")
    assert "Nothing fits" in out
    assert run(capsys, monkeypatch, "--help")[0] == 0
    assert run(capsys, monkeypatch)[0] == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nope"], "preset: expected one of"),
        (["kontext-nft", "--memory", "much"], "--memory: expected a number, got 'much'"),
        (["kontext-nft", "--memory", "0"], "memory: expected a finite number in (0.6, 10000]"),
        (["kontext-nft", "--memory", "inf"], "memory: expected a finite number in"),
        (["kontext-nft", "--model.resolution", "500"], "resolution: expected a multiple of 16"),
        (["kontext-nft", "--gpus", "0"], "gpus: expected"),
        (["kontext-nft", "--gpus"], "--gpus: expected a value, got none"),
        (
            ["kontext-nft", "--gpus", "6"],
            "--gpus: expected a divisor of the 8 groups, each on one GPU, got 6; give "
            "--data.groups 12\n",
        ),
        (
            ["kontext-nft", "--gpus", "16"],
            "--gpus: expected a divisor of the 8 groups, each on one GPU, got 16; give "
            "--data.groups 16, or --data.split-groups\n",
        ),
        (
            ["kontext-nft", "--gpu", "H200"],
            "options: expected --memory, --gpus, --efficiency, --json or --SECTION.FIELD of the "
            "trainer, got --gpu; perhaps --gpus\n",
        ),
        (["kontext-nft", "--memry=24"], "options: expected --memory, --gpus, --effi"),
        (["kontext-nft", "--lr", "1"], "options: expected --memory, --gpus, --effi"),
        (["kontext-nft", "--model.shard", "fsdp2"], "model.shard: expected none in one process"),
        (
            ["kontext-nft", "--gpus", "2", "--model.shard", "fsdp2", "--model.quantize", "nf4"],
            "model.quantize: expected none under fsdp2",
        ),
        (["qwen-edit-nft", "--model.prompt-folder", "x"], "model.prompt_folder: expected None"),
        (["kontext-nft", "--model.resolution", "8192"], "model.resolution: expected at most 4096"),
        (["kontext-nft", "--efficiency", "2"], "efficiency: expected"),
        (["kontext-nft", "--training.batch", "0"], "training.batch: "),
        (["kontext-nft", "--training.btach", "2"], "Unrecognized options: --training.btach"),
        (["kontext-nft", "--model.path", "nowhere"], "model.path: expected a folder with model_"),
        (["kontext-nft", "--model.path", "/" + "x" * 300], "model.path: [Errno 36] File name"),
        (["kontext-nft", "--sampling.steps", "1", "objective:nope"], "objective: expected one of"),
    ],
)
def test_bad_input_is_one_line(words, expected, capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {expected}")
    assert err.count("\n") == 1


def test_services_may_be_given_and_are_not_needed(capsys, monkeypatch):
    services = ("--rewards.judge", "http://localhost:1/v1", "--rewards.judge-model", "judge")
    words = ("kontext-nft", "--memory", "48", "--json")
    assert run(capsys, monkeypatch, *words) == run(capsys, monkeypatch, *words, *services)


def test_every_preset_of_a_known_model_is_planned():
    for path in some(sorted(PRESETS.glob("*.toml"))):
        if path.stem.startswith(("pictures-", "shapes-")):
            continue  # their models are written by a command
        plan = budget.plan_of(parse([path.stem], services=False), gpus=1)
        assert plan.costs.row.forward > 1e12, path
        if (plan.quantize, plan.encoders) == ("none", "device"):  # as docs/training.md says
            assert peak(plan).name == "text encoders", path


def test_options_reach_the_plan():
    config = parse(
        [
            "kontext-nft", "--training.batch", "2", "--sampling.batch", "3", "--data.turns", "2",
            "--model.vae-tiling", "--model.no-checkpointing", "--training.ema-decay", "0",
            "--evaluation.policy", "current",
        ],
        services=False,
    )  # fmt: skip
    plan = budget.plan_of(config, gpus=2)
    assert (plan.training_batch, plan.sampling_batch, plan.turns, plan.gpus) == (2, 3, 2, 2)
    assert (plan.vae_tiling, plan.checkpointing, plan.average) == (True, False, False)
    assert plan.passes.trained == 2
    names = {x.option for x in CHANGES} | {QUANTIZE}
    assert names <= budget.trainer_options(config)  # each option that is advised exists


def test_loading_options_reach_the_plan(tmp_path):
    def plan(*words):
        return budget.plan_of(parse(["kontext-nft", *words], services=False), gpus=2)

    assert plan("--model.quantize", "nf4").quantize == "nf4"
    assert plan("--model.encoders", "host").encoders == "host"
    assert plan("--model.prompt-folder", str(tmp_path)).encoders == "ahead"
    assert plan("--model.shard", "zero3").shard == "zero3"
    assert plan("--training.optimizer", "adamw_8bit").optimizer_bytes == 2
    start = ("--model.lora", str(tmp_path), "--model.lora-start", "freeze")
    assert plan(*start).more_adapters == 1
    assert plan(*start, "--model.lora-reference", "start").more_adapters == 2


KLEIN = ("klein-nft", "--sampling.steps", "4")
DISTILLED = ("--sampling.model", "black-forest-labs/FLUX.2-klein-9B")


def lora_of(folder, names, rank=8, width=4096):
    """Write a LoRA of square layers of klein-9B, and return its number of weights."""
    pair = {"lora_A": torch.zeros(rank, width), "lora_B": torch.zeros(width, rank)}
    weights = {f"{name}.{part}.weight": x.clone() for name in names for part, x in pair.items()}
    Flux2KleinPipeline.save_lora_weights(folder, weights)
    return 2 * rank * width * len(names)


def test_a_distilled_sibling_is_counted():
    def plan(*words):
        return budget.plan_of(parse([*KLEIN, *words], services=False), gpus=1)

    alone, pair = plan(), plan(*DISTILLED)
    row = alone.costs.row
    # One branch is recorded and trained; forward passes are those of one configuration.
    assert (alone.branches, pair.branches) == (2, 1)
    assert work(pair).sampling == work(alone).sampling / 2 == 3 * 4 * row.forward
    assert work(pair).update == pytest.approx(work(alone).update / 2)
    assert work(pair).sampling_forward == work(pair).forward == row.forward
    for one, other in some(list(zip(phases(pair), phases(alone), strict=True))):
        assert one.weights - other.weights == 2 * row.weights  # of bfloat16
        assert one.adapters - other.adapters == 2 * 4 * row.adapters  # current and old of the copy
    started = plan(*DISTILLED, "--model.lora", "x", "--model.lora-start", "freeze")
    assert started.sampler.sets == 3


def test_a_lora_for_few_steps_is_counted(tmp_path, capsys, monkeypatch):
    count = lora_of(tmp_path, [f"transformer_blocks.{n}.attn.to_q" for n in range(8)])
    lora = ("--sampling.lora", str(tmp_path))

    def plan(*words):
        return budget.plan_of(parse([*KLEIN, *words], services=False), gpus=1)

    alone, few = plan(), plan(*lora)
    extra = 2 * count * (2 * 32 * 32 + 512)
    assert few.branches == 2
    assert work(few).sampling_forward == alone.costs.row.forward + extra
    assert work(few).sampling == 3 * 4 * 2 * (alone.costs.row.forward + extra)
    assert work(few).update == work(alone).update
    for one, other in some(list(zip(phases(few), phases(alone), strict=True))):
        assert (one.weights, one.adapters - other.adapters) == (other.weights, 4 * count)
    assert plan(*lora, "--sampling.guidance", "1").branches == 1
    both = plan(*lora, *DISTILLED)
    assert (both.sampler.lora, both.sampler.sets, both.branches) == (count, 2, 1)
    words = ("klein-nft", *lora, "--gpus", 2, "--memory", 24)
    out = run(capsys, monkeypatch, *words)[1]
    assert "TFLOP; sampling's 39.6" in out
    assert "model.shard" not in out  # the trainer refuses it with a sampler
    shown = json.loads(run(capsys, monkeypatch, *words, "--json")[1])["flops"]
    assert shown["sampling_forward"] == shown["forward"] + extra


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--sampling.lora", "nowhere"), "sampling.lora: "),
        (("--sampling.model", "nowhere"), "sampling.model: expected a folder with model_index"),
        (
            ("--sampling.model", "black-forest-labs/FLUX.1-Kontext-dev"),
            "sampling.model: expected a Flux2KleinPipeline, got a FluxKontextPipeline",
        ),
        (
            ("--sampling.model", "black-forest-labs/FLUX.2-klein-4B"),
            "sampling.model: expected a transformer configured as the editor's (joint_att",
        ),
        (
            (*DISTILLED, "--gpus", "2", "--model.shard", "fsdp2"),
            "sampling.model: expected None under fsdp2",
        ),
    ],
)
def test_a_sampler_that_the_trainer_refuses_is_refused(words, expected, capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, *KLEIN, *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {expected}")
    assert err.count("\n") == 1


def test_options_that_lower_the_work_of_a_trajectory():
    def cheaper(*words):
        config = parse(list(words), services=False)
        return budget.techniques(config, budget.plan_of(config, gpus=1))

    published = ("--objective.old-slope", "0.001", "--objective.kl-share", "1")
    nft = cheaper("kontext-nft", *published)
    assert nft["objective.old_slope 0"] == pytest.approx(33.6 - 3, abs=0.06)
    assert nft["objective.kl_share 0.25"] == pytest.approx(33.6 - 3 * 0.75, abs=0.06)
    assert nft["sampling.steps 4"] == pytest.approx(33.6 - 6, abs=0.06)
    grpo = cheaper("kontext-grpo", "--objective.stochastic-steps", "5")
    assert grpo["objective.stochastic_steps 2"] == pytest.approx(18 + 6 * 3.2, abs=0.06)
    assert not any("kl" in x or "sampling" in x for x in some(grpo))  # 5 of its steps draw noise
    assert "objective.old_slope 0" not in cheaper("kontext-nft")


def test_kontext_trains_on_one_card_of_24(capsys, monkeypatch):
    words = ("kontext-nft", "--memory", 24, "--model.quantize", "nf4")
    assert json.loads(run(capsys, monkeypatch, *words, "--json")[1])["verdict"] == "fits"
    code, out, _ = run(capsys, monkeypatch, "kontext-nft", "--memory", 24)
    assert code == 0  # with options changed
    assert "It fits only with changes:" in out
    assert "model.quantize nf4" in out


def test_a_local_folder_is_read_and_simulated(tmp_path, capsys, monkeypatch):
    write_world(tmp_path, Family.klein, seed=0, counts=(2, 2), turns=1)
    capsys.readouterr()
    words = ("shapes-klein-grpo", "--model.path", tmp_path / "model", "--memory", 4, "--json")
    code, out, err = run(capsys, monkeypatch, *words)
    assert (code, err) == (0, "")
    values = json.loads(out)
    assert values["verdict"] == "fits"
    assert 0 < values["flops"]["forward"] < 1e10
    weights = sum(x.stat().st_size for x in (tmp_path / "model").rglob("*.safetensors"))
    assert values["phases"][0]["weights"] == pytest.approx(weights / 2**30, abs=0.01)


def test_a_folder_of_kontext_is_read(tmp_path):
    write_world(tmp_path, Family.kontext, seed=0, counts=(2, 2), turns=1)
    model = find_model(tmp_path / "model")
    assert (model.pipeline, len(model.encoders)) == ("FluxKontextPipeline", 2)
    vae = json.loads((tmp_path / "model/vae/config.json").read_text())
    assert model.token == 2 ** len(vae["block_out_channels"])  # halved but for the last, and packed


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", r"model_index.json: expected JSON"),
        ("[]", r"model_index.json: expected a JSON object, got list"),
        (
            '{"_class_name": "UnCLIPPipeline"}',
            r"model: expected a pipeline among FluxKontextPipeline.*got UnCLIPPipeline",
        ),
        (
            '{"_class_name": "ZImagePipeline", "transformer": [null, null]}',
            r"model_index.json: expected an entry for transformer, got none",
        ),
        (
            '{"_class_name": "ZImagePipeline", "vae": ["diffusers", "AutoencoderKL"], '
            '"transformer": ["diffusers", "FluxTransformer2DModel"]}',
            r"model: expected a ZImageTransformer2DModel, got FluxTransformer2DModel",
        ),
    ],
)
def test_a_folder_that_is_no_pipeline_is_refused(content, expected, tmp_path):
    (tmp_path / "model_index.json").write_text(content)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=expected):
        find_model(tmp_path)


def test_facts_that_the_page_states():
    text = " ".join(render_budget.PAGE.read_text(encoding="utf-8").split())

    def plan(preset):
        return budget.plan_of(parse([preset], services=False), gpus=1)

    for preset, share in some({"kontext-nft": 0.43, "kontext-grpo": 0.45}.items()):
        with_it, without = (
            work(replace(plan(preset), checkpointing=on)).update for on in (True, False)
        )
        assert with_it / without - 1 == pytest.approx(share, abs=0.006)
    assert "43% more FLOPs of an update for NFT, 45% for GRPO" in text
    # gradient and two moments of float32 of rank 64 on all ranks but this one, GiB
    assert plan("kontext-grpo").costs.row.adapters * 12 / 2**30 == pytest.approx(2.9, abs=0.05)
    assert "at most 2.9 GiB" in text
    flux = plan("kontext-nft").costs.vae
    assert flux.decode == flux.decode_tiled
    nf4 = peak(replace(plan("kontext-nft"), quantize="nf4"))
    assert f"{nf4.total / 2**30:.1f} GiB at its peak" in text


def test_the_page_shows_every_preset_as_it_is_predicted():
    text = render_budget.PAGE.read_text(encoding="utf-8")
    shown = text.partition(render_budget.START)[2].partition(render_budget.END)[0].splitlines()
    assert set(render_budget.table().splitlines()) <= set(shown)
    assert [x.split("`")[1] for x in shown[2:]] == sorted(x.stem for x in PRESETS.glob("*.toml"))
    for line in some(shown[2:]):
        assert len(line.strip("| ").split(" | ")) == len(render_budget.COLUMNS)
    said = text.partition(render_budget.START)[0].splitlines()[-4:]
    assert "All figures of this table are predicted" in " ".join(said)
    assert render_budget.page(text, "".join(f"{x}\n" for x in shown)) == text
    with pytest.raises(ValueError, match="expected one <!-- budget: start -->"):
        render_budget.page("", "")


def test_the_judges_rate_on_the_page():
    """Calls a round of the command for eight GPUs, over the seconds that its sampling takes."""
    text = " ".join(render_budget.PAGE.read_text(encoding="utf-8").split())
    config = parse(["kontext-nft", "--data.groups", "12"], services=False)
    plan = budget.plan_of(config, gpus=6)
    calls, cost = plan.trajectories, work(plan)
    seconds = least_hours(plan, GPUS["H100/H200"], rounds=1) * 3600
    sampling = seconds * cost.sampling / cost.total
    assert f"12 x 16 = {calls} calls a round, or {calls * plan.turns} with three turns" in text
    assert f"{seconds:.0f} s a round on six H100" in text
    assert f"({sampling:.0f} s), the judge has to give {calls / sampling:.1f} answers" in text
