"""``evaluate.py --checks edival``: turns by the check of their type, and the report tells which."""

import json
import sys
from collections import Counter

import pytest
from mteditflow_examples.evaluate import app
from mteditflow_examples.shapes.vision import RuleDetector, to_pil
from mteditflow_examples.shapes.world import draw, make_chains
from typer.testing import CliRunner

from mteditflow import evaluation
from mteditflow.chains import read_chains, write_chains
from mteditflow.evaluation import Evaluation
from mteditflow.evaluation.report import Report
from mteditflow.testing.endpoint import ScriptedServer, completion
from tests.evaluation.formatted_worlds import FORMS, world_chain
from tests.loops import some
from tests.samples_of_scores import few_resamples

__all__ = ["few_resamples"]  # a fixture of every test here
EXACT = "mteditflow_examples.shapes.scoring:ExactRewards"
CHAINS, DINO = 12, "mteditflow.rewards.consistency.models.GroundingDino.from_pretrained"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Chains with what a perfect editor makes of them, and what an idle one does."""
    root = tmp_path_factory.mktemp("edival")
    chains = []
    for i, world in enumerate(make_chains(CHAINS, turns=3, seed=5, split="train")):
        pictures = [to_pil(draw(state)) for state in world.states]
        pictures[0].save(root / f"{i}.png")
        for turn in (1, 2, 3):
            for editor, picture in (("perfect", pictures[turn]), ("idle", pictures[0])):
                path = root / editor / str(i) / f"turn_{turn}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
        chains.append(
            world_chain(world).model_copy(update={"id": str(i), "image": str(root / f"{i}.png")})
        )
    write_chains(chains, root / "chains.jsonl")
    return root


@pytest.fixture(autouse=True, scope="module")
def rules():
    """The rule of the shapes world under the name of a detector."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DINO, lambda path, device: {"rules": RuleDetector()}[path])
        yield


def no(request):
    return completion(json.dumps({"scores": [0]}))


def run(folder, output, *options, editor="perfect", code=0):
    """Output of a run whose judge always says no, and how often it was asked."""
    with ScriptedServer(no) as server:
        arguments = ["run", folder / "chains.jsonl", "--images", folder / editor, "--output",
            output, "--judge", server.url, "--model", "m", "--no-thinking", *options]  # fmt: skip
        said = invoke(*arguments, code=code)
        return said, len(server.requests)


def invoke(*arguments, code=0):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return " ".join(done.output.replace("│", " ").split())


def report(output):
    return Report.model_validate_json((output / "report.json").read_bytes())


def of_way(checks, way):
    return sum(used.get(way, 0) for used in checks.values())


@pytest.fixture(scope="module")
def checked(folder, tmp_path_factory):
    """A run that no test writes into: its folder, output, and how often the judge was asked."""
    output = tmp_path_factory.mktemp("checked")
    said, asked = run(folder, output, "--checks", "edival", "--detector", "rules")
    return output, said, asked


def test_the_detector_tells_what_it_can_and_the_judge_the_rest(folder, checked):
    output, said, asked = checked
    found, kinds = report(output), Counter()
    for chain in read_chains(folder / "chains.jsonl").chains:
        kinds.update(chain.task_types)
    assert {kind: sum(used.values()) for kind, used in found.checks.items()} == kinds
    assert {kind for kind, used in found.checks.items() if "detector" in used} == {
        "subject_remove",
        "count_change",
    }
    by_detector = {kind for kind, used in found.checks.items() if "detector" in " ".join(used)}
    assert by_detector == set(FORMS)
    seen = of_way(found.checks, "detector")
    assert asked == 1 + sum(kinds.values()) - seen  # the first: whether the judge is there
    assert of_way(found.checks, "judge")
    assert of_way(found.checks, "detector + judge")
    success = Evaluation.read(output / "evaluation.json").success
    assert int(success.sum()) == seen  # as the judge says no
    for kind, used in some(found.checks.items()):
        marginal = found.find("marginal", "all", kind)
        assert marginal.estimate == pytest.approx(
            100 * used.get("detector", 0) / kinds[kind], abs=1e-4
        )
    assert "## Check of success, in turns\n\n|  | detector |" in (output / "report.md").read_text()
    assert "Check of success, in turns" in said


def test_what_an_idle_editor_leaves_is_no_success(folder, tmp_path):
    options = "--checks", "edival", "--detector", "rules"
    run(folder, tmp_path, *options, editor="idle")
    assert not Evaluation.read(tmp_path / "evaluation.json").success[:, 0].any()


def test_without_checks_the_single_question_tells(folder, tmp_path):
    _, asked = run(folder, tmp_path)
    checks = report(tmp_path).checks
    assert {way for used in checks.values() for way in used} == {"single question"}
    assert asked - 1 == 3 * CHAINS == of_way(checks, "single question")


def test_a_scorer_of_ones_own_is_named(folder, tmp_path):
    invoke("run", folder / "chains.jsonl", "--images", folder / "perfect", "--output", tmp_path,
        "--scorer", EXACT, "--scale", "likert")  # fmt: skip
    assert (
        of_way(report(tmp_path).checks, "mteditflow_examples.shapes.scoring:ExactRewards")
        == 3 * CHAINS
    )


def test_a_comparison_says_what_told_either_run(folder, checked, tmp_path):
    run(folder, tmp_path / "y", "--title", "asked")
    folders = "compare", checked[0], tmp_path / "y", "--output", tmp_path / "z"
    refused = invoke(*folders, code=2)
    assert all(f"{x}: " in refused for x in ("prompt", "checks", "detector"))
    assert "checks: 'edival' and 'question'" in refused
    invoke(*folders, "--across-judges")
    first, second = report(tmp_path / "z").notes[-2:]
    assert "detector" in first
    assert "detector" not in second
    assert second.startswith("Turns of asked by check of success: ")
    assert second in (tmp_path / "z" / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--detector", "rules"], "--checks edival, --detector: expected both or neither"),
        (["--checks", "edival"], "--checks edival, --detector: expected both or neither"),
        (["--ocr"], "--ocr: expected --checks edival with it"),
        (["--checks", "edival", "--scale", "likert"], "expected no --scorer and --scale binary"),
        (["--checks", "edival", "--scorer", "a:b"], "--scorer: expected no --judge and no --cons"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, tmp_path, options, message):
    said, asked = run(folder, tmp_path, *options, code=2)
    assert message in said
    assert asked == 0


def test_without_rapidocr_the_extra_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    monkeypatch.delitem(sys.modules, "mteditflow.evaluation.ocr", raising=False)
    monkeypatch.delitem(vars(evaluation), "RapidOcr", raising=False)
    options = "--checks", "edival", "--detector", "rules", "--ocr"
    said, asked = run(folder, tmp_path, *options, code=2)
    assert "--ocr: expected rapidocr (pip install 'mteditflow[ocr]')" in said
    assert asked == 0
