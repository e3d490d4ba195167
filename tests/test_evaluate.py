"""From a model and a benchmark to a report: the numbers of the exact rewards, whatever fails."""

import csv
import io
import json
import re
import shlex
import shutil
from itertools import chain as joined
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from mteditflow_examples.evaluate import app
from mteditflow_examples.evaluating.editors import Model, call_options
from mteditflow_examples.evaluating.images import MadeImages
from mteditflow_examples.shapes import served as services
from mteditflow_examples.shapes.editor import Family
from mteditflow_examples.shapes.files import write_world
from mteditflow_examples.shapes.rewards import Truth, score
from mteditflow_examples.shapes.served import chain_of, service
from mteditflow_examples.shapes.vision import pixels_of
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import mteditflow as mt
from mteditflow import pipelines
from mteditflow.chains import EditedImages, read_chains, write_chains
from mteditflow.evaluation import Evaluation
from mteditflow.evaluation.provenance import Provenance, content_hash
from mteditflow.evaluation.report import Report
from mteditflow.rewards import LIKERT
from mteditflow.testing.endpoint import ScriptedServer, completion, error, good
from tests.forked import forking
from tests.loops import some
from tests.samples_of_scores import few_resamples
from tests.tiny_pick_score import write_pick_score
from tests.undrawn import undrawn

__all__ = ["few_resamples", "undrawn"]  # fixtures of every test here
pytestmark = pytest.mark.usefixtures("undrawn")  # but those of the module draw
ROOT = Path(__file__).parents[1]
CHAINS = 12
EDITOR = ["--dtype", "float32", "--resolution", "12", "--batch", "5"]
CALL = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 10}
CALLS = [part for key, value in CALL.items() for part in ("--call", f"{key}={value}")]
EXACT = ["--scorer", "mteditflow_examples.shapes.scoring:ExactRewards"]


def run(*arguments, code=0):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return " ".join(done.output.replace("│", " ").split())


def report(folder):
    return Report.model_validate_json((folder / "report.json").read_bytes())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny editor, and chains of the shapes world as EdiVal-Bench holds its own."""
    root = tmp_path_factory.mktemp("world")
    write_world(root, Family.kontext, seed=0, counts=(1, CHAINS), turns=3)
    chains = []
    for i, chain in enumerate(read_chains(root / "held_out.jsonl").chains):
        name = f"{i}_input_raw.jpg"  # a PNG all the same: the rewards read every pixel
        shutil.copy(chain.image_path, root / name)
        changes = {"id": str(i), "image": name, "formatted_instructions": chain.instructions}
        chains.append(chain.model_copy(update=changes))
    write_chains(chains, root / "edival.csv", format="edival")
    return root


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """An evaluation of the tiny editor."""
    output = tmp_path_factory.mktemp("made")
    run("run", world / "edival.csv", "--editor", world / "model", *EDITOR, *CALLS, *EXACT,
        "--output", output, "--title", "tiny")  # fmt: skip
    return output


def exact(world, images):
    """IF, Marginal, CC, Overall of a folder of images, in percent, without evaluate's own code."""
    truths, pictures = [], []
    for chain in read_chains(world / "edival.csv").chains:
        turns = [images / chain.id / f"turn_{n}.png" for n in (1, 2, 3)]
        reference, *edited = [pixels_of(_open(path)) for path in (chain.image_path, *turns)]
        truths.append(chain_of(reference, chain.instructions))
        pictures.append(torch.stack(edited) / 255)
    found = score(torch.stack(pictures), Truth.of(truths))
    following = found.success.float().cumprod(dim=1).mean(dim=0)
    consistency = found.consistency.float().mean(dim=0)
    return {
        "instruction_following": 100 * following,
        "marginal": 100 * found.success.float().mean(dim=0),
        "content_consistency": 100 * consistency,
        "overall": 100 * (following * consistency).sqrt(),
    }


def _open(path):
    return Image.open(path).convert("RGB")


def assert_exact(found, expected):
    for metric, values in some(expected.items()):
        got = [found.find(metric, turn) for turn in (1, 2, 3)]
        assert [x.estimate for x in got] == pytest.approx(values.tolist(), abs=1e-4), metric
        assert {x.count for x in got} == {CHAINS}
        drop = found.find(metric, "drop").estimate
        assert drop == pytest.approx(float(values[0] - values[-1]), abs=1e-4)


def test_the_numbers_are_those_of_the_exact_rewards(world, made):
    assert_exact(report(made), exact(world, made / "images"))
    assert {"report.csv", "report.md", "report.png", "gallery.html"} <= {
        path.name for path in made.iterdir()
    }


def test_every_report_says_who_judged_and_who_made_the_images(world, made):
    kept = Provenance.model_validate(json.loads((made / "settings.json").read_text())["provenance"])
    assert report(made).sources == (kept,)
    assert Evaluation.read(made / "evaluation.json").provenance == kept
    judge, maker = kept.judged_by, kept.made_by
    assert judge.scorer.startswith("mteditflow_examples.shapes.scoring:ExactRewards ")
    assert judge.scale == LIKERT
    assert (maker.editor, maker.editor_hash) == (
        str(world / "model"),
        content_hash(world / "model"),
    )
    expected = (0, CALL["num_inference_steps"], CALL["guidance_scale"], 12, "float32")
    assert (maker.seed, maker.steps, maker.guidance, maker.resolution, maker.dtype) == expected
    table = list(csv.DictReader(io.StringIO((made / "report.csv").read_text())))
    page = (made / "gallery.html").read_text()
    data = json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])
    markdown = (made / "report.md").read_text()
    for name, value in some(kept.stated.items()):
        assert {row[name] for row in table} == {value}
        assert data["sources"][0][name] == value
        assert f"| {name} | {value} |" in markdown
    assert (made / "report.svg").read_bytes().startswith(b"<?xml")


def test_a_folder_of_images_gives_the_same_numbers_in_both_layouts(world, made, tmp_path):
    for chain in range(CHAINS):
        for turn in (1, 2, 3):
            source = made / "images" / str(chain) / f"turn_{turn}.png"
            shutil.copy(source, tmp_path / f"{chain}_input_raw_turn_{turn}.png")
    for i, images in enumerate((made / "images", tmp_path)):
        output = tmp_path / f"out{i}"
        run("run", world / "edival.csv", "--images", images, *EXACT, "--output", output)
        assert report(output).estimates == report(made).estimates


def test_what_is_there_is_not_made_again_and_ranks_share_the_rest(world, made, tmp_path):
    """Two ranks, batches of another size, and a chain that was half done: the same images."""
    shutil.copytree(made / "images", tmp_path / "images")
    for chain in range(3, CHAINS):
        shutil.rmtree(tmp_path / "images" / str(chain))
    (tmp_path / "images" / "2" / "turn_3.png").unlink()
    kept = (tmp_path / "images" / "0" / "turn_1.png").stat().st_mtime_ns
    chains, images = read_chains(world / "edival.csv").chains, MadeImages(tmp_path / "images", 12)
    model = Model(str(world / "model"), None, "float32", CALL, 12, 0).load("cpu")
    for rank in range(2):
        state = SimpleNamespace(process_index=rank, num_processes=2, wait_for_everyone=lambda: None)
        images.make(model, images.missing(chains, state), state, batch=3)
    for chain in some(chains):
        for turn in (1, 2, 3):
            there = [
                _open(EditedImages(x).path(chain, turn)) for x in (made / "images", images.folder)
            ]
            assert there[0].tobytes() == there[1].tobytes()
    assert (tmp_path / "images" / "0" / "turn_1.png").stat().st_mtime_ns == kept


def test_without_a_resolution_images_keep_the_shape_of_their_references(world):
    chains = read_chains(world / "edival.csv").chains[:2]
    references = [Image.new("RGB", size, "red") for size in ((16, 8), (9, 13))]
    edited = Model(str(world / "model"), None, "float32", CALL, None, 0).load("cpu")(
        references, chains
    )
    assert [{image.size for image in chain} for chain in edited] == [{(16, 8)}, {(8, 12)}]


def test_any_other_pipeline_is_called_one_chain_at_a_time(world, monkeypatch):
    chains = read_chains(world / "edival.csv").chains[:1]
    references = [MadeImages(world, 12).reference(chain) for chain in chains]
    own = {"_auto_resize": False, "max_area": 144}  # which the family sets by itself
    first, second = (
        Model(str(world / "model"), None, "float32", call, 12, 0) for call in (CALL, CALL | own)
    )
    family = first.load("cpu")(references, chains)
    monkeypatch.setattr(pipelines, "FAMILIES", ())
    other = second.load("cpu")(references, chains)
    assert [x.tobytes() for x in other[0]] == [x.tobytes() for x in family[0]]


def test_the_record_has_the_scale_of_guidance_by_whatever_name_the_pipeline_gives_it(tmp_path):
    index = tmp_path / "model_index.json"
    for kind, name in (("QwenImageEditPlusPipeline", "true_cfg_scale"), ("Any", "guidance_scale")):
        index.write_text(json.dumps({"_class_name": kind}))
        call = {name: 3.0, "num_inference_steps": 2}
        made_by = Model(str(tmp_path), None, "float32", call, 12, 0).made_by
        assert (made_by.guidance, made_by.steps, made_by.call) == (3.0, 2, "{}")


def test_images_of_other_settings_are_not_taken_for_these(world, made):
    said = run("run", world / "edival.csv", "--editor", world / "model", *EDITOR, *CALLS, *EXACT,
        "--output", made, "--seed", "1", code=2)  # fmt: skip
    assert "holds an evaluation of seed = '0', got '1'" in said


def test_bad_input_is_named_and_counted(world, made, tmp_path):
    """A missing image, one that is none, bad rows, an id that stands twice; short chains stay."""
    images = tmp_path / "images"
    shutil.copytree(made / "images", images)
    (images / "1" / "turn_2.png").unlink()
    (images / "2" / "turn_3.png").write_bytes(b"no image")
    chains = list(read_chains(world / "edival.csv").chains)
    chains[0] = chains[0].first_turns(2)
    lines = [chain.to_json() for chain in chains]
    lines += [
        '{"id": 8}',
        lines[4],
        lines[5].replace("5_input_raw.jpg", "none.jpg").replace('"id": "5"', '"id": "x"'),
    ]
    file = tmp_path / "chains.jsonl"
    file.write_text("\n".join(lines))
    where = ["--references", world, "--images", images, "--output", tmp_path / "out"]
    said = run("run", file, *where, *EXACT, code=1)
    found = report(tmp_path / "out")
    assert (found.asked, found.scored, len(found.left_out)) == (15, 10, 5)
    reasons = found.left_out
    assert "turn_2.png, got none" in reasons["1"]
    assert "expected an image" in reasons["2"]
    assert "id: expected text" in reasons["chains.jsonl:13"]
    assert "got '4' again, as on line 5" in reasons["chains.jsonl:14"]
    assert "none.jpg" in reasons["chains.jsonl:15"]
    assert [found.find("marginal", n).count for n in (1, 2, 3)] == [10, 10, 9]
    assert "15 chains asked, 10 scored, 5 left out, 0 lost a score" in said
    assert "5 of 15 chains were left out or lost a score, more than the 20% allowed" in said
    assert all(name in said for name in ("1: turn 2", "chains.jsonl:14: id"))
    run("run", file, *where, *EXACT, "--max-invalid", "0.5")


def test_without_any_image_there_is_no_report(world, tmp_path):
    said = run("run", world / "edival.csv", "--images", tmp_path, *EXACT,
        "--output", tmp_path / "out", code=2)  # fmt: skip
    assert "expected at least one chain with its images, got none" in said
    assert not (tmp_path / "out" / "report.json").exists()


def test_without_any_usable_chain_the_reasons_are_told(made, tmp_path):
    file = tmp_path / "chains.jsonl"
    file.write_text('{"id": "8", "image": "none.jpg", "instructions": ["Remove the cat"]}\n')
    said = run("run", file, "--images", made / "images", *EXACT, "--output", tmp_path / "x", code=2)
    assert "expected at least one usable chain, got none, read as the format native: " in said
    assert "image: expected a file" in said


def test_lines_of_one_fault_are_counted_under_one_reason(made, tmp_path):
    file = tmp_path / "chains.jsonl"
    line = '{"id": "%d", "instructions": ["Remove the cat"]}\n'
    file.write_text("".join(line % number for number in range(3)))
    said = run("run", file, "--images", made / "images", *EXACT, "--output", tmp_path / "x", code=2)
    assert said.count("image: expected this field, got none") == 1
    assert "line 1 and 2 more: image: expected this field" in said
    assert "`mteditflow chains formats` lists the formats" in said


def test_the_line_of_the_page_is_a_chain(tmp_path):
    file = tmp_path / "chains.jsonl"
    page = (ROOT / "docs" / "evaluation.md").read_text()
    file.write_text(re.search(r"```json\n *(.*)\n", page)[1])
    assert [chain.turns for chain in read_chains(file).chains] == [2]


def yes(request):
    return completion(json.dumps({"scores": [1]}))


def test_a_judge_that_dies_half_way_is_asked_for_the_rest_alone(world, made, tmp_path):
    """25 of 36 turns judged, then refusals: the chains are lost by name, and nothing is 0.

    Chains are judged side by side, in any order: 11 refused turns leave one of 12 whole for sure.
    """
    arguments = ["run", world / "edival.csv", "--images", made / "images", "--no-thinking",
        "--model", "m", "--concurrency", "1", "--output", tmp_path]  # fmt: skip
    script = joined([good] * 26, repeat(error(400)))  # the first asks whether there is a judge
    with ScriptedServer(yes, script) as server:
        run(*arguments, "--judge", server.url, code=1)
    found = report(tmp_path)
    assert (found.asked, found.scored) == (CHAINS, CHAINS)
    assert 0 < len(found.lost) < CHAINS
    assert sum(found.find("marginal", n).count for n in (1, 2, 3)) == 25
    assert all("rejected" in why for why in some(found.lost.values()))
    assert found.find("marginal", 1).estimate == 100
    with ScriptedServer(yes) as server:
        run(*arguments, "--judge", server.url)
        assert len(server.requests) == 1 + 11
    assert report(tmp_path).lost == {}
    assert report(tmp_path).find("marginal", 3).count == CHAINS


def served(version):
    """What a judge's server says of its models."""
    return {"data": [{"id": "m", "root": f"org/m-{version}", "created": 1}, {"id": "n"}]}


def test_judges_are_told_apart_and_not_mixed(world, made, tmp_path):
    """By name, prompt, scale and what the server says; identical images are not compared."""
    images = ["run", world / "edival.csv", "--images", made / "images", "--turns", 1]

    def judged(output, *more, version=1, model="m", code=0):
        with ScriptedServer(yes, models=served(version)) as server:
            return run(*images, "--judge", server.url, "--model", model, "--no-thinking",
                       "--output", tmp_path / output, *more, code=code)  # fmt: skip

    assert "Judged by: judge m, judge_server m, root org/m-1" in judged("a")
    judged("a")  # the same again
    for change, name in (
        ({"version": 2}, "judge_server = 'm, root org/m-1', got 'm, root org/m-2'"),
        ({"model": "n"}, "judge = 'm', got 'n'"),
    ):
        assert f"holds an evaluation of {name}" in judged("a", **change, code=2)
    for more, name in ((["--scale", "likert"], "prompt = "), (["--thinking"], "prompt = ")):
        assert f"holds an evaluation of {name}" in judged("a", *more, code=2)
    judged("b", version=2)
    both = "compare", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "c"
    said = run(*both, code=2)
    assert "judge_server: 'm, root org/m-1' and 'm, root org/m-2'" in said
    assert "--across-judges" in said
    assert not (tmp_path / "c").exists()
    assert "ACROSS JUDGES: they differ in judge_server" in run(*both, "--across-judges")
    old = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    del old["provenance"]  # as files were before
    (tmp_path / "a" / "evaluation.json").write_text(json.dumps(old))
    assert "got unknown and judge m" in run(*both, code=2)
    run(*both, "--across-judges")


@pytest.mark.slow
def test_live_services_and_a_preference_model(world, made, tmp_path):
    """A judge and the consistency server over HTTP, of the first turn, whose state they can see."""
    chains = ["run", world / "edival.csv", "--images", made / "images", "--turns", "1"]
    with forking(services), service("judge") as judge, service("consistency") as consistency:
        run(*chains, "--judge", judge, "--model", "scripted", "--scale", "likert", "--no-thinking",
            "--consistency", consistency, "--terms", "l1",
            "--preference", write_pick_score(tmp_path / "pick"), "--output", tmp_path / "out",
            )  # fmt: skip
    found = report(tmp_path / "out")
    marginal = found.find("marginal", 1)
    expected = exact(world, made / "images")["marginal"][0]
    assert (marginal.count, marginal.estimate) == (CHAINS, pytest.approx(float(expected)))
    for metric in ("content_consistency", "preference", "preference_of_reference"):
        assert found.find(metric, 1).count == CHAINS
    assert 50 < found.find("content_consistency", 1).estimate <= 100


def test_two_runs_are_compared_on_the_chains_that_both_scored(world, made, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(made / "images", images)
    shutil.rmtree(images / "7")
    for turn in (1, 2, 3):  # nothing is followed any more
        shutil.copy(world / "3_input_raw.jpg", images / "3" / f"turn_{turn}.png")
    other = tmp_path / "other"
    run(
        "run",
        world / "edival.csv",
        "--images",
        images,
        *EXACT,
        "--output",
        other,
        "--title",
        "changed",
    )
    said = run("compare", made, other, "--output", tmp_path / "compared")
    found, old, new = report(tmp_path / "compared"), *map(_evaluation, (made, other))
    assert (found.asked, found.scored) == (CHAINS, CHAINS - 1)
    assert found.left_out == {"7": "only the first run scored it"}
    rows = [row for row in range(CHAINS) if row != 7]
    gained = new.success.float() - old.success[rows].float()
    for turn in (1, 2, 3):
        expected = 100 * float(gained[:, turn - 1].mean())
        assert found.find("marginal", turn).estimate == pytest.approx(expected, abs=1e-4)
    page = (tmp_path / "compared" / "gallery.html").read_text()
    data = json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])
    assert data["chains"][0]["id"] == "3" or not old.success[3].any()
    assert [series["name"] for series in data["chains"][0]["series"]] == ["tiny", "changed"]
    assert "changed minus tiny" in said
    assert (
        found.notes[0] == "Second minus first, paired by chain, without a record of common noise."
    )


def _evaluation(folder):
    return Evaluation.read(folder / "evaluation.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judge", "http://127.0.0.1:9/v1", "--model", "m"], "either --editor or --images"),
        (["--images", "."], "expected --judge and --model, or --scorer"),
        (["--editor", "x", *EXACT, "--call", "steps"], "call: expected key=value"),
        (["--images", ".", "--scorer", "nowhere:Thing"], "--scorer: expected module:name"),
    ],
)
def test_options_that_do_not_fit_are_refused(world, tmp_path, arguments, message):
    said = run("run", world / "edival.csv", *arguments, "--output", tmp_path, code=2)
    assert message in said


def test_call_options_are_json_or_text():
    found = call_options(["steps=4", "scale=1.5", "name=x=y", "flag=true"])
    assert found == {"steps": 4, "scale": 1.5, "name": "x=y", "flag": True}


def test_overall_is_the_geometric_mean(made):
    found = report(made)
    for turn in (1, 2, 3):
        parts = [
            found.find(x, turn).estimate for x in ("instruction_following", "content_consistency")
        ]
        expected = mt.overall(*(torch.tensor([x]) for x in parts))
        assert found.find("overall", turn).estimate == pytest.approx(float(expected), abs=1e-3)


def test_the_page_of_documentation_names_commands_that_parse():
    page = (ROOT / "docs" / "evaluation.md").read_text()
    commands = re.findall(r"examples/evaluate\.py ((?:[^\n`]|\\\n)+)", page.replace("\\\n", " "))
    assert len(commands) >= 4
    for command in commands:
        name, *arguments = shlex.split(command)
        typer.main.get_command(app).commands[name].make_context(name, arguments)
    for target in some(re.findall(r"\]\((?!https?:)([^)#]+)\)", page)):
        assert (ROOT / "docs" / target).exists(), target


def test_an_editor_of_one_image_refuses_histories_before_it_is_loaded(world, tmp_path):
    arguments = ("run", world / "edival.csv", "--editor", world / "model", *EDITOR, *CALLS, *EXACT)
    said = run(*arguments, "--output", tmp_path, "--history", "original", code=2)
    assert "expected ['last'] for a FluxKontextPipeline, which is given one image, got" in said
    images = ("run", world / "edival.csv", "--images", world, *EXACT, "--output", tmp_path)
    assert "--history" in run(*images, "--history", "original", code=2)
    model = Model(str(world / "model"), None, "float32", CALL, 12, 0, "original")
    assert json.loads(model.made_by.call)["history"] == "original"


def test_a_lora_of_other_layers_is_refused_and_not_left_out(world, tmp_path):
    path = tmp_path / "lora.safetensors"
    factors = {f"unet.mid.lora_{x}.weight": torch.ones(1, 1) for x in "AB"}
    save_file(factors, path)
    message = f"--lora: expected one for layers of a FluxKontextPipeline, got {path}"
    with pytest.raises(ValueError, match=re.escape(message)):
        Model(str(world / "model"), str(path), "float32", CALL, 12, 0).load("cpu")


def test_a_klein_is_given_what_the_chains_say(tmp_path):
    write_world(tmp_path, Family.klein, seed=0, counts=(2, 2), turns=2)
    (chain, *_) = read_chains(tmp_path / "train.jsonl").chains
    given = MadeImages(tmp_path / "images", None)
    state = SimpleNamespace(process_index=0, num_processes=1, wait_for_everyone=lambda: None)
    call = CALL | {"text_encoder_out_layers": [1, 2], "height": 96, "width": 96}
    model = Model(str(tmp_path / "model"), None, "float32", call, None, 0).load("cpu")
    made = []
    for history in ("last", "original"):
        given.make(model, [chain], state, 1, history)
        made.append([image.tobytes() for image in given.edited.load(chain)])
    saying = chain.model_copy(update={"references": (("last",), ("original", "last"))})
    given.make(model, [saying], state, 1)
    assert [image.tobytes() for image in given.edited.load(chain)] == made[1]
    assert made[0][0] == made[1][0]
    assert made[0][1] != made[1][1]
