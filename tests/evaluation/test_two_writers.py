"""Two evaluators of one folder: the second is refused while the first works, and harms nothing."""

import json
import os
from functools import partial

import anyio.to_thread
import pytest
from mteditflow_examples import evaluate, evaluate_single_turn, score_chains
from mteditflow_examples.shapes.scoring import ExactRewards
from PIL import Image

from mteditflow.rewards import Judge
from mteditflow.testing.endpoint import ScriptedServer, completion
from tests.evaluation.judged_items import rating
from tests.evaluation.test_wrong_inputs import EXACT, write_world
from tests.refusals import call, files
from tests.samples_of_scores import few_resamples

__all__ = ["few_resamples"]  # a fixture of every test here


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = write_world(tmp_path_factory.mktemp("two") / "world", 5)
    Image.new("RGB", (8, 8)).save(root / "in.png")
    (root / "single").mkdir()
    Image.new("RGB", (8, 8)).save(root / "single" / "1.png")
    entry = {"id": "in.png", "prompt": "Add a dog", "edit_type": "add"}
    (root / "imgedit.json").write_text(json.dumps({"1": entry}))
    return root


def run_two(monkeypatch, owner, name, program, words, output):
    """Run a command whose scoring, before it scores, runs the same command in this process."""
    score, second = getattr(owner, name), []

    async def score_and_run(*given, **named):
        if not second:
            before = files(output)
            second.append(None)
            second[0] = await anyio.to_thread.run_sync(partial(call, program, words))
            assert files(output) == before
        return await score(*given, **named)

    monkeypatch.setattr(owner, name, score_and_run)
    first = call(program, words)
    assert first.code == 0, first
    assert second[0].code == 2, second
    assert second[0].err.startswith(
        f"error: {output}: expected no other writer, got process {os.getpid()} ("
    )
    assert second[0].err.count("\n") == 1
    assert call(program, words).code == 0  # the folder is free again, and goes on


def test_two_of_evaluate(root, tmp_path, monkeypatch):
    words = ["run", root / "chains.jsonl", "--images", root / "made", "--output", tmp_path, *EXACT]
    run_two(monkeypatch, ExactRewards, "score", evaluate.app, words, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())


def test_two_of_score_chains(root, tmp_path, monkeypatch):
    given = [root / "chains.jsonl", root / "made", "--output", tmp_path, "--max-invalid", 1]
    with ScriptedServer(lambda _: completion("ok")) as judge:  # of the chains each answer is lost
        words = [*given, "--judge", judge.url, "--model", "m"]
        run_two(monkeypatch, Judge, "score", score_chains.app, words, tmp_path)
    assert len(json.loads((tmp_path / "scores.json").read_text())["chains"]) == 2


def test_two_of_evaluate_single_turn(root, tmp_path, monkeypatch):
    given = ["imgedit", root / "imgedit.json", root / "single", "--output", tmp_path]
    owner = evaluate_single_turn
    with ScriptedServer(rating(lambda made, name: 1)) as judge:
        words = [*given, "--judge", judge.url, "--model", "m"]
        run_two(monkeypatch, owner, "score_imgedit", owner.app, words, tmp_path)
    assert json.loads((tmp_path / "imgedit.json").read_text())["scores"]
