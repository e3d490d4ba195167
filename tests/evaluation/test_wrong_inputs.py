"""Every evaluation command with wrong inputs: one line, exit code 2, nothing written."""

import json
import shutil

import pytest
import torch
from mteditflow_examples import evaluate, evaluate_single_turn, score_chains
from mteditflow_examples.shapes.served import record_of
from mteditflow_examples.shapes.vision import to_pil
from mteditflow_examples.shapes.world import draw, make_chains
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from mteditflow.chains import EditedImages, read_chains, write_chains
from mteditflow.testing.endpoint import ScriptedServer, completion
from tests.refusals import call as call_of
from tests.refusals import refusal
from tests.samples_of_scores import few_resamples

__all__ = ["few_resamples"]  # a fixture of every test here
SCORERS = "mteditflow_examples.shapes.scoring"
EXACT = ["--scorer", f"{SCORERS}:ExactRewards"]
NOBODY = "http://127.0.0.1:9/v1"
JUDGE = ["--judge", NOBODY, "--model", "m"]


def write_world(root, seed):
    """Two chains, their references and what a perfect editor makes of them."""
    records, edited = [], EditedImages(root / "made")
    for world in make_chains(2, turns=2, seed=seed, split="train"):
        record = record_of(world)
        record = record.model_copy(update={"image": f"{record.id}.png", "root": root})
        pictures = [to_pil(draw(state)) for state in world.states]
        root.mkdir(exist_ok=True)
        pictures[0].save(root / record.image)
        edited.write(record, pictures[1:])
        records.append(record)
    write_chains(records, root / "chains.jsonl")
    return root


def write_bad_inputs(root):
    """Files that are no chains, no images, no benchmark."""
    (root / "empty").write_text("")
    (root / "binary").write_bytes(bytes(range(256)))
    (root / "none.json").write_text("{}")
    chains = read_chains(root / "chains.jsonl").chains
    bare = {"unchanged_objects": None, "all_objects": None}
    write_chains([x.model_copy(update=bare) for x in chains], root / "bare.jsonl")
    write_chains([chains[0], chains[1].model_copy(update={"image": "no.png"})], root / "l.jsonl")
    lines = (root / "l.jsonl").read_text().splitlines()
    (root / "gone.jsonl").write_text(lines[1])
    (root / "nan.jsonl").write_text(lines[0].replace('["', "[NaN, ", 1))
    for chain in chains:
        for folder, size in (("torn", None), ("odd", (13, 13)), ("short", (12, 12))):
            for turn in (1, 2) if folder != "short" else (1,):
                path = root / folder / chain.id / f"turn_{turn}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"no image") if size is None else Image.new("RGB", size).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = write_world(tmp_path_factory.mktemp("inputs") / "world", 5)
    write_bad_inputs(root)
    write_world(root / "other", 6)
    Image.new("RGB", (8, 8)).save(root / "in.png")
    entry = {"id": "in.png", "prompt": "Add a dog", "edit_type": "add"}
    (root / "imgedit.json").write_text(json.dumps({"1": entry}))
    (root / "types.json").write_text(json.dumps({"1": {**entry, "edit_type": "dance"}}))
    row = {"key": "1", "task_type": "subject-add", "instruction": "a", "image": "in.png"}
    (root / "gedit.jsonl").write_text(json.dumps({**row, "language": "en"}))
    (root / "types.jsonl").write_text(json.dumps({**row, "task_type": "x", "language": "en"}))
    (root / "editor").mkdir()
    (root / "editor" / "model_index.json").write_text('{"_class_name": "Nobody"}')
    checkpoint = root / "trained" / "checkpoints" / "round-000003"
    checkpoint.mkdir(parents=True)
    for path in (checkpoint / "manifest.json", root / "text.safetensors"):
        path.write_text("{}")
    save_file({"weight": torch.zeros(1)}, root / "plain.safetensors")
    (root / "kontext" / "vae").mkdir(parents=True)
    index = {"_class_name": "FluxKontextPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (root / "kontext" / "model_index.json").write_text(json.dumps(index))
    vae = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 8, 8]}
    (root / "kontext" / "vae" / "config.json").write_text(json.dumps(vae))
    for folder in ("single", "single/fullset/subject-add/en"):
        (root / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / folder / "1.png")
        (root / f"torn/{folder.removeprefix('single')}").mkdir(parents=True, exist_ok=True)
        (root / f"torn/{folder.removeprefix('single')}/1.png").write_bytes(b"no image")
    old = {"imgedit.json": {"judge": "m"}, "gedit_en.json": {"judge": "m"}, "scores.json": {}}
    for name, report in old.items():  # without provenance
        (root / "old").mkdir(exist_ok=True)
        (root / "old" / name).write_text(json.dumps(report))
    for name in old:
        (root / "others").mkdir(exist_ok=True)
        (root / "others" / name).write_text(json.dumps({"judged_by": {"judge": "another"}}))
    return root


@pytest.fixture(scope="module")
def finished(root, few_resamples):
    """Evaluations by ``evaluate.py run``: one, the same by another judge, one of other chains."""
    runs = {"one": [], "hasty": ["--scorer", f"{SCORERS}:HastyJudge"]}
    for name, judge in runs.items():
        call("run", root / "chains.jsonl", "--images", root / "made", *(judge or EXACT),
             "--output", root / name)  # fmt: skip
    other = root / "other"
    call("run", other / "chains.jsonl", "--images", other / "made", *EXACT,
         "--output", root / "disjoint")  # fmt: skip
    damage = {
        "no_settings": ("settings.json", None),
        "bad_settings": ("settings.json", "{"),
        "no_images": ("settings.json", '{"chains": "x"}'),
        "no_scores": ("evaluation.json", None),
        "bad_scores": ("evaluation.json", '{"round": 0}'),
        "no_chains": ("chains.jsonl", None),
        "bad_chains": ("chains.jsonl", '{"id": 8, "image": "x", "instructions": ["a"]}'),
        "no_report": ("report.json", None),
        "bad_report": ("report.json", "[]"),
        "cut": ("evaluation.json", "{"),
    }
    for name, (file, text) in damage.items():
        shutil.copytree(root / "one", root / name)
        (root / name / file).unlink() if text is None else (root / name / file).write_text(text)
    for name, change in {
        "unknown": lambda x: x.pop("provenance"),
        "nan": lambda x: x.update(success_at=float("nan")),
        "threshold": lambda x: x.update(success_at=4),
        "off": lambda x: x["terms"]["following"]["score"][0].__setitem__(0, 7.0),
        "terms": lambda x: x["terms"].pop("strict"),
    }.items():
        shutil.copytree(root / "one", root / name)
        path = root / name / "evaluation.json"
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))
    shutil.copytree(root / "one", root / "types")
    path, types = root / "types" / "chains.jsonl", ("subject_add", "color_alter")
    chains = read_chains(path, allow_outside=True).chains
    write_chains([x.model_copy(update={"task_types": types}) for x in chains], path)
    shutil.copytree(root / "one", root / "first_turns")
    write_chains([x.first_turns(1) for x in chains], root / "first_turns" / "chains.jsonl")
    (root / "compared").mkdir()
    shutil.copy(root / "one" / "report.json", root / "compared")
    shutil.copytree(root / "one", root / "imageless")
    settings = (root / "imageless" / "settings.json").read_text()
    (root / "imageless" / "settings.json").write_text(settings.replace("world/made", "no"))
    return root


def call(*arguments):
    done = CliRunner().invoke(evaluate.app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output


def refused(app, root, tmp_path, arguments):
    return refusal(app, arguments, root=root, scratch=tmp_path)


MADE = ["ROOT/chains.jsonl", "--images", "ROOT/made", "--output", "OUT"]
SCORED = [*MADE, *EXACT]
RUN = {
    "no such file": (["none.jsonl", *SCORED[1:]], "error: CHAINS: [Errno 2] No such file"),
    "a folder for a file": (["ROOT", *SCORED[1:]], "error: CHAINS: [Errno 21] Is a directory"),
    "an empty file": (["ROOT/empty", *SCORED[1:]], "error: CHAINS: ROOT/empty: expected content"),
    "a binary file": (["ROOT/binary", *SCORED[1:]], "error: CHAINS: ROOT/binary: expected UTF-8"),
    "NaN in the file": (["ROOT/nan.jsonl", *SCORED[1:]], "expected"),
    "no reference": (["ROOT/gone.jsonl", *SCORED[1:]], "no.png"),
    "no such scorer": ([*MADE, "--scorer", "nowhere:Thing"], "error: --scorer: expected module:na"),
    "another scale than declared": ([*SCORED, "--scale", "binary"], "that mteditflow_examples"),
    "an unknown scale": ([*SCORED, "--scale", "ternary"], "Invalid value for '--scale'"),
    "a threshold off the scale": ([*SCORED, "--success", "7"], "in (1, 5], got 7"),
    "a threshold off the judge's": ([*MADE, *JUDGE, "--success", "5"], "in (0, 1], got 5"),
    "a threshold of NaN": ([*SCORED, "--success", "nan"], "expected a finite number in (1, 5]"),
    "a negative number": ([*SCORED, "--batch", "-1"], "Invalid value for '--batch'"),
    "a share above 1": ([*SCORED, "--max-invalid", "2"], "Invalid value for '--max-invalid'"),
    "no such option": ([*SCORED, "--scales", "likert"], "No such option"),
    "no folder of images": (["ROOT/chains.jsonl", "--images", "no", *SCORED[3:]], "got none"),
    "a turn is missing": (
        ["ROOT/chains.jsonl", "--images", "ROOT/short", *SCORED[3:]],
        "turn 2: e",
    ),
    "unreadable images": (["ROOT/chains.jsonl", "--images", "ROOT/torn", *SCORED[3:]], "an image,"),
    "images of other chains": (
        ["ROOT/chains.jsonl", "--images", "ROOT/other/made", *SCORED[3:]],
        "expected at least one chain with its images",
    ),
    "a bad URL": ([*MADE, "--judge", "127.0.0.1", "--model", "m"], "expected http"),
    "a URL without /v1": ([*MADE, "--judge", "http://x", "--model", "m"], "end in /v1"),
    "a port that is none": (
        [*MADE, "--judge", "http://127.0.0.1:99999/v1", "--model", "m"],
        "expected a port of 1..65535",
    ),
    "an editor's option beside images": ([*SCORED, "--lora", "x"], "expected no --lora"),
    "an editor's seed beside images": ([*SCORED, "--seed", "0"], "expected no --seed"),
    "a judge's option beside a scorer": (
        [*SCORED, "--model", "m"],
        "expected no --model",
    ),
    "no model": ([*MADE, "--judge", NOBODY], "expected --judge and --model"),
    "a dead judge": ([*MADE, *JUDGE], f"--judge: expected an answer from {NOBODY}, got no c"),
    "a dead consistency server": (
        [*MADE, "--judge", "LIVE", "--model", "m", "--consistency", NOBODY],
        f"--consistency: expected an answer from {NOBODY}, got no connection",
    ),
    "no detector": (
        [*MADE, *JUDGE, "--checks", "edival", "--detector", "nowhere/at/all"],
        "--detector: expected a folder with config.json or a hub id, got 'nowhere/at/all'",
    ),
    "no preference model": ([*SCORED, "--preference", "ROOT/made"], "--preference: expected a fo"),
    "a LoRA that is none": (
        ["ROOT/chains.jsonl", "--editor", "ROOT/editor", "--lora", "no/such/lora", *SCORED[3:]],
        "--lora: expected a LoRA file, a folder with pytorch_lora_weights.safetensors or a hub id, "
        "got 'no/such/lora'; mteditflow export RUN --output FILE.safetensors writes one",
    ),
    "a LoRA that is a name": (
        ["ROOT/chains.jsonl", "--editor", "ROOT/editor", "--lora", "lora", *SCORED[3:]],
        "or a hub id, got 'lora'; mteditflow export RUN",
    ),
    "a LoRA that is a run": (
        ["ROOT/chains.jsonl", "--editor", "ROOT/editor", "--lora", "ROOT/trained", *SCORED[3:]],
        "or a hub id, got ROOT/trained: this is a run, and the LoRA of its newest checkpoint is "
        "ROOT/trained/checkpoints/round-000003/lora",
    ),
    "a LoRA that is a checkpoint": (
        [
            "ROOT/chains.jsonl",
            "--editor",
            "ROOT/editor",
            *SCORED[3:],
            "--lora",
            "ROOT/trained/checkpoints/round-000003",
        ],
        ": this is a checkpoint, and its LoRA is ROOT/trained/checkpoints/round-000003/lora",
    ),
    "a LoRA that is a folder": (
        ["ROOT/chains.jsonl", "--editor", "ROOT/editor", "--lora", "ROOT/made", *SCORED[3:]],
        "or a hub id, got ROOT/made, with 0 .safetensors files",
    ),
    "a LoRA that is text": (
        [
            "ROOT/chains.jsonl",
            "--editor",
            "ROOT/editor",
            *SCORED[3:],
            "--lora",
            "ROOT/text.safetensors",
        ],
        "or a hub id, got ROOT/text.safetensors: ",
    ),
    "a LoRA without factors": (
        [
            "ROOT/chains.jsonl",
            "--editor",
            "ROOT/editor",
            *SCORED[3:],
            "--lora",
            "ROOT/plain.safetensors",
        ],
        "or a hub id, got ROOT/plain.safetensors, which has no weights of a LoRA",
    ),
    "an editor that is none": (
        ["ROOT/chains.jsonl", "--editor", "ROOT/made", *SCORED[3:]],
        "--editor: expected a folder with model_index.json or a hub id",
    ),
    "no objects for consistency": (
        ["ROOT/bare.jsonl", *MADE[1:], *JUDGE, "--consistency", NOBODY],
        "expected unchanged_objects or all_objects",
    ),
    "a resolution that is rounded down": (
        ["ROOT/chains.jsonl", "--editor", "ROOT/kontext", "--resolution", 500, *SCORED[3:]],
        "--resolution: expected a multiple of 16 pixels for ROOT/kontext, got 500",
    ),
    "editor and images": ([*SCORED, "--editor", "x"], "either --editor or --images"),
    "no such editor": (
        ["ROOT/chains.jsonl", "--editor", "no/such/editor", "--output", "OUT", *EXACT],
        "no/such/editor",
    ),
    "a call without a value": (
        ["ROOT/chains.jsonl", "--editor", "x", "--call", "steps", *SCORED[3:]],
        "call: expected key=value",
    ),
    "a scorer and a judge": ([*SCORED, *JUDGE], "expected no --judge"),
    "the output is a file": (
        [*SCORED[:-4], "--output", "ROOT/empty", *EXACT],
        "--output: expected a folder, got the file ROOT/empty",
    ),
}


@pytest.fixture(scope="module")
def live():
    with ScriptedServer(lambda _: completion("ok")) as server:
        yield server.url


@pytest.mark.parametrize("case", RUN)
def test_evaluate_run(root, live, tmp_path, case):
    arguments, message = RUN[case]
    words = [live if word == "LIVE" else word for word in arguments]
    said = refused(evaluate.app, root, tmp_path, ["run", *words])
    assert message.replace("ROOT", str(root)) in said


def test_what_a_scorer_refuses_is_a_failure_of_one_line(root, tmp_path):
    words = ["run", root / "chains.jsonl", "--images", root / "odd", "--output", tmp_path, *EXACT]
    ended = call_of(evaluate.app, words)
    assert ended.code == 1
    last = ended.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "images: expected squares whose side is a multiple of 12 pixels, got 13 x 13" in last
    assert "Traceback" not in ended.err
    assert not (tmp_path / "report.json").exists()


AGAIN = {
    "another scorer": (["--scorer", f"{SCORERS}:CarefulJudge"],
                       "holds an evaluation of scorer = "),
    "another threshold": ([*EXACT, "--success", "4"], "holds an evaluation of scale = "),
    "other chains": (EXACT, "holds an evaluation of chains = "),
    "other images": (EXACT, "holds an evaluation of images = "),
    "settings that were deleted": (EXACT, "holds evaluation.json without settings.json"),
    "a comparison": (EXACT, "holds the report of a comparison: choose another --output"),
    "another resolution": ([*EXACT, "--resolution", "12"], "holds an evaluation of resolution"),
}  # fmt: skip


@pytest.mark.parametrize("case", AGAIN)
def test_evaluate_run_into_a_folder_of_something_else(finished, tmp_path, case):
    more, message = AGAIN[case]
    chains = "ROOT/l.jsonl" if case == "other chains" else "ROOT/chains.jsonl"
    images = "ROOT/odd" if case == "other images" else "ROOT/made"
    others = {"settings that were deleted": "no_settings", "a comparison": "compared"}
    output = f"ROOT/{others.get(case, 'one')}"
    where = ["run", chains, "--images", images, "--output", output]
    assert message in refused(evaluate.app, finished, tmp_path, [*where, *more])


COMPARE = {
    "no such folder": (
        ["ROOT/nowhere", "ROOT/one"],
        "BEFORE: expected the folder of an evaluation",
    ),
    "a file for a folder": (["ROOT/empty", "ROOT/one"], "expected the folder of an evaluation"),
    "one folder": (["ROOT/one"], "Missing argument"),
    "no settings": (
        ["ROOT/one", "ROOT/no_settings"],
        "AFTER: expected the folder of an evaluation",
    ),
    "settings that are no JSON": (["ROOT/bad_settings", "ROOT/one"], "settings.json"),
    "settings without images": (["ROOT/one", "ROOT/no_images"], "images: expected this field"),
    "no scores": (["ROOT/one", "ROOT/no_scores"], "evaluation.json"),
    "scores that are none": (["ROOT/one", "ROOT/bad_scores"], "expected this field"),
    "no chains": (["ROOT/one", "ROOT/no_chains"], "chains.jsonl"),
    "a bad chain": (["ROOT/one", "ROOT/bad_chains"], "chains.jsonl:1: "),
    "no report": (["ROOT/one", "ROOT/no_report"], "report.json"),
    "a report that is none": (["ROOT/one", "ROOT/bad_report"], "report.json"),
    "no common chain": (["ROOT/one", "ROOT/disjoint"], "expected chains that both runs scored"),
    "another judge": (["ROOT/one", "ROOT/hasty"], "of one judge, got scorer: "),
    "an unknown judge": (["ROOT/unknown", "ROOT/one"], "of one judge, got unknown and scorer"),
    "two unknown judges": (["ROOT/unknown", "ROOT/unknown"], "got unknown and unknown"),
    "a threshold of NaN": (["ROOT/one", "ROOT/nan"], "success_at"),
    "another threshold than the judge's": (
        ["ROOT/one", "ROOT/threshold"],
        "success_at: expected 5",
    ),
    "scores off the scale": (["ROOT/off", "ROOT/one"], "whole scores in 1..5, got 7"),
    "other terms": (["ROOT/one", "ROOT/terms"], "terms (after): after: expected the terms ["),
    "a cut file": (["ROOT/one", "ROOT/cut"], "evaluation.json: expected JSON, got"),
    "no images": (["ROOT/one", "ROOT/imageless"], "expected the image"),
    "the output is a file": (
        ["ROOT/one", "ROOT/one", "--output", "ROOT/empty"],
        "--output: expected a folder, got the file",
    ),
    "other edit types": (["ROOT/one", "ROOT/types"], "types/chains.jsonl: expected the edit types"),
    "fewer turns": (["ROOT/one", "ROOT/first_turns"], "expected as many turns as in "),
    "the output is one of both": (
        ["ROOT/one", "ROOT/one", "--output", "ROOT/one"],
        "--output: expected a folder without an evaluation",
    ),
    "the output is another run": (
        ["ROOT/one", "ROOT/one", "--output", "ROOT/hasty"],
        "--output: expected a folder without an evaluation",
    ),
    "a negative number": (["ROOT/one", "ROOT/one", "--shown", "-1"], "Invalid value for '--shown'"),
}


@pytest.mark.parametrize("case", COMPARE)
def test_evaluate_compare(finished, tmp_path, case):
    arguments, message = COMPARE[case]
    output = [] if "--output" in arguments else ["--output", "OUT"]
    said = refused(evaluate.app, finished, tmp_path, ["compare", *arguments, *output])
    assert message in said


SCORES = ["ROOT/chains.jsonl", "ROOT/made", *JUDGE, "--output", "OUT"]
CHAINS = {
    "no such file": (["none.jsonl", *SCORES[1:]], "No such file"),
    "a folder for a file": (["ROOT", *SCORES[1:]], "Is a directory"),
    "an empty file": (["ROOT/empty", *SCORES[1:]], "expected content of one of the formats"),
    "a binary file": (["ROOT/binary", *SCORES[1:]], "got a file with NUL bytes"),
    "NaN in the file": (["ROOT/nan.jsonl", *SCORES[1:]], "expected content of one of"),
    "no reference": (["ROOT/gone.jsonl", *SCORES[1:]], "no.png"),
    "no folder of images": (
        ["ROOT/chains.jsonl", "nowhere", *SCORES[2:]],
        "expected a folder of",
    ),
    "a turn is missing": (["ROOT/chains.jsonl", "ROOT/short", *SCORES[2:]], "turn 2: expected the"),
    "unreadable images": (["ROOT/chains.jsonl", "ROOT/torn", *SCORES[2:]], "expected an image"),
    "images of other chains": (["ROOT/chains.jsonl", "ROOT/other/made", *SCORES[2:]], "got none"),
    "no service": (["ROOT/chains.jsonl", "ROOT/made", "--output", "OUT"], "--judge, --consistency"),
    "no model": ([*SCORES[:4], "--output", "OUT"], "expected --model"),
    "a bad URL": ([*SCORES, "--judge", "127.0.0.1"], "expected http"),
    "a URL without /v1": ([*SCORES, "--consistency", "http://127.0.0.1:9"], "end in /v1"),
    "a dead judge": (SCORES, f"--judge: expected an answer from {NOBODY}, got no connection"),
    "no objects for consistency": (
        ["ROOT/bare.jsonl", *SCORES[1:], "--consistency", NOBODY],
        "expected unchanged_objects or all_objects",
    ),
    "an unknown scale": ([*SCORES, "--scale", "ternary"], "Invalid value for '--scale'"),
    "an unknown pattern": (
        [*SCORES, "--name", "{chain}.png"],
        "expected a pattern of {id}",
    ),
    "a pattern that is none": ([*SCORES, "--name", "{id"], "expected '}'"),
    "a share that is no number": ([*SCORES, "--max-invalid", "x"], "Invalid value for '--max-in"),
    "no such option": ([*SCORES, "--success", "7"], "No such option"),
    "scores of an unknown judge": ([*SCORES[:-1], "ROOT/old"], "by an unknown judge"),
    "scores of another judge": ([*SCORES[:-1], "ROOT/others"], "judge = 'another', got 'm'"),
}


@pytest.mark.parametrize("case", CHAINS)
def test_score_chains(root, tmp_path, case):
    arguments, message = CHAINS[case]
    assert message in refused(score_chains.app, root, tmp_path, arguments)


def single(file, types):
    """Cases of a benchmark of single edits."""
    given = [f"ROOT/{file}", "ROOT/single", *JUDGE, "--output", "OUT"]
    return {
        "no such file": (["none.json", *given[1:]], "No such file"),
        "a folder for a file": (["ROOT", *given[1:]], "Is a directory"),
        "an empty file": (["ROOT/empty", *given[1:]], "expected at least one item, got none"),
        "a binary file": (["ROOT/binary", *given[1:]], "expected at least one item, got none"),
        "no entry": (["ROOT/none.json", *given[1:]], "expected at least one item, got none"),
        "an unknown category": ([f"ROOT/{types}", *given[1:]], "_type: expected"),
        "no folder of images": ([given[0], "nowhere", *given[2:]], "one item with both images"),
        "unreadable images": ([given[0], "ROOT/torn", *given[2:]], "one item with both images"),
        "no judge": ([*given[:2], "--model", "m", "--output", "OUT"], "Missing option '--judge'"),
        "no model": ([*given[:4], "--output", "OUT"], "Missing option '--model'"),
        "a bad URL": ([*given, "--judge", "127.0.0.1"], "expected http"),
        "a URL without /v1": ([*given, "--judge", "http://127.0.0.1:9"], "end in /v1"),
        "a dead judge": (given, f"--judge: expected an answer from {NOBODY}, got no connection"),
        "a negative patience": ([*given, "--patience", "-1"], "Invalid value for '--patience'"),
        "a patience of NaN": ([*given, "--patience", "nan"], "patience"),
        "a share above 1": ([*given, "--max-invalid", "1.5"], "Invalid value for '--max-invalid'"),
        "no such option": ([*given, "--scale", "likert"], "No such option"),
        "scores of an unknown judge": ([*given[:-1], "ROOT/old"], "by an unknown judge"),
        "scores of another judge": ([*given[:-1], "ROOT/others"], "judge = 'another', got 'm'"),
    }


SINGLE = {
    "imgedit": single("imgedit.json", "types.json"),
    "gedit": single("gedit.jsonl", "types.jsonl"),
}


@pytest.mark.parametrize("command", SINGLE)
@pytest.mark.parametrize("case", SINGLE["imgedit"])
def test_evaluate_single_turn(root, tmp_path, command, case):
    arguments, message = SINGLE[command][case]
    assert message in refused(evaluate_single_turn.app, root, tmp_path, [command, *arguments])


def test_each_command_has_fifteen_wrong_inputs():
    assert all(len(cases) >= 15 for cases in (RUN, COMPARE, CHAINS, *SINGLE.values()))
