"""A run that goes on: what has changed is refused or said before anything is loaded."""

import json
import math
import os
import re
import shutil
import signal
import sqlite3
import threading
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import pytest
import torch
from mteditflow_examples import export, train_flux
from mteditflow_examples.flux.checkpointing import cut_back
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.flux.config import ConfigError
from mteditflow_examples.flux.held_out import SETTINGS, HeldOut
from mteditflow_examples.flux.inputs import make_sampler
from mteditflow_examples.flux.reporting import summarize
from mteditflow_examples.flux.resuming import FIXED, HASHED
from mteditflow_examples.shapes.scoring import ExactRewards
from safetensors.torch import save_file

from mteditflow._locks import sole_writer
from mteditflow.chains import read_chains, write_chains
from mteditflow.evaluation import Evaluation
from mteditflow.pipelines import Editor
from mteditflow.rewards import Fault, Lost, TurnScores
from mteditflow.rewards.transport import concurrency
from mteditflow.training import Checkpoints, RunLog, Update, pictures, read_metrics
from mteditflow.training.pictures import draw_before_after
from tests.flux.killing import differences
from tests.flux.rounds import started
from tests.flux.worlds import ENVIRONMENT, SCRIPT, options
from tests.processes import ROOT, Process
from tests.refusals import call, files
from tests.samples_of_scores import few_resamples
from tests.undrawn import undraw

__all__ = ["few_resamples"]  # a fixture of every test here
pytestmark = pytest.mark.usefixtures("undrawn")
TAKEN = Update("taken", 1.0, {})
MORE = (
    *("--data.groups", 2, "--training.rounds", 2),
    *("--evaluation.every", 1, "--evaluation.policy", "current"),
)


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """A run of one round of two that are wanted, with its evaluations, and a world of its own."""
    root = tmp_path_factory.mktemp("stopped")
    shutil.copytree(world, root / "world")
    words = options(root / "world", root / "run", *MORE, "--training.rounds", 1)
    with pytest.MonkeyPatch.context() as patch:
        undraw(patch)
        assert call(train_flux.main, words).code == 0
    return root


@pytest.fixture
def again(stopped, tmp_path, monkeypatch):
    """A copy of the run and its world; the fixture starts it again, and no model is loaded."""
    shutil.copytree(stopped, tmp_path / "all")
    monkeypatch.setattr(Editor, "load", lambda *_, **__: pytest.fail("a model was loaded"))

    def start(*more):
        words = options(tmp_path / "all" / "world", tmp_path / "all" / "run", *MORE, *more)
        before = contents(tmp_path / "all")
        ended = call(train_flux.main, words)
        assert ended.code == 2, ended
        assert ended.err.startswith("error: ")
        assert ended.err.count("\n") == 1
        assert contents(tmp_path / "all") == before
        return ended.err

    start.root = tmp_path / "all"
    return start


def contents(root):
    """Files and the times of their changes, without those of the lock."""
    return {x: t for x, t in files(root).items() if x.is_file() and ".writer." not in x.name}


CHANGED = {
    "objective": (["objective:awm"], "objective: expected 'nft', with which the run in"),
    "rank": (["--model.lora-rank", 8], "model.lora_rank: expected 16, with which the run in"),
    "alpha": (["--model.lora-alpha", 8], "model.lora_alpha: expected 16, with which the run in"),
    "modules": (["--model.lora-targets", "attn.to_q"], "model.lora_targets: expected ['attn.to_q'"),
    "turns": (["--data.turns", 3], "data.turns: expected 2, with which the run in"),
    "average": (["--training.ema-decay", 0.9], "training.ema_decay: expected 0.0, with which the"),
    "threshold": (["--rewards.success", 4], "rewards.success: expected 5.0, as in the evaluation"),
    "evaluation": (
        ["--evaluation.steps", 9],
        "evaluation.steps: expected 4, as in the evaluation of round 0",
    ),
    "guidance": (
        ["--model.guidance", 2],
        "model.guidance: expected 1.0, as in the evaluation of round",
    ),
    "policy": (
        ["--evaluation.policy", "old"],
        "evaluation.policy: expected 'current', as in the evaluation of round 1, with which",
    ),
    "seed": (["--training.seed", 5], "training.seed: expected 0, with which the run in"),
    "groups": (["--data.groups", 4], "data.groups: expected 2, with which the run in"),
    "members": (["--data.group-size", 2], "data.group_size: expected 4, with which the run in"),
    "order": (["--data.draw", "informative"], "data.draw: expected 'epochs', with which the run"),
    "resume": (["--output.resume", "never"], "output.resume: never, but"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_has_changed_is_refused(again, case):
    words, message = CHANGED[case]
    assert message in again(*words)


def test_the_page_names_every_option_that_is_fixed():
    page = (ROOT / "docs" / "training.md").read_text()
    listed = page.partition("Some things may not change")[2].partition("Any other field")[0]
    named = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)?)`", listed))
    fixed = {"objective" if name == "name" else f"{section}.{name}" for section, name in FIXED}
    hashed = {f"{section}.{name}" for section, name in HASHED}
    compared = {*SETTINGS, "evaluation.policy", "rewards.success"}
    bound_once_used = {"training.ema_decay", "training.reset_steps"}
    assert named == fixed | hashed | compared | bound_once_used


@pytest.mark.parametrize("name", ["train", "held_out"])
def test_a_file_of_chains_that_changed_behind_its_path_is_refused(again, name):
    path = again.root / "world" / f"{name}.jsonl"
    chains = read_chains(path).chains
    same = [chains[0].model_copy(update={"all_objects": None, "unchanged_objects": None})]
    write_chains([*same, *chains[1:]], path)
    field = {"train": "data.chains", "held_out": "data.held_out"}[name]
    assert f"error: {field}: expected a file or folder of content " in again()


def test_other_held_out_chains_are_refused(again):
    path = again.root / "world" / "held_out.jsonl"
    other = path.with_name("fewer.jsonl")
    write_chains(read_chains(path).chains[1:], other)
    assert "error: data.held_out: expected a file" in again("--data.held-out", other)


def test_another_model_is_refused(again):
    save_file({}, again.root / "world" / "model" / "more.safetensors")
    assert "error: model.path: expected a file or folder of content" in again()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("evaluations/round-000000.json", b'{"round": 0, "ch', "delete this file to go on without"),
        ("evaluations/round-000000.json", b"", "round-000000.json: expected JSON, got b''"),
        ("evaluations/round-000001.json", "evaluations/round-000000.json", "got one of round 0; d"),
        ("metrics.jsonl", b"no line of numbers\n", "metrics.jsonl:1: expected an object of numb"),
        ("metrics.jsonl", b'{"round": 1}\n{"round": 1}\n', "metrics.jsonl:2: expected a round aft"),
        ("checkpoints/round-000001/state.json", b"{", "got damaged ones alone; choose another"),
        ("answers-0.sqlite", b"no cache" * 100, "not usable as a cache of answers"),
    ],
)
def test_damaged_files_are_named(again, name, data, message):
    content = data if isinstance(data, bytes) else (again.root / "run" / data).read_bytes()
    (again.root / "run" / name).write_bytes(content)
    assert message in again()


@pytest.mark.parametrize("name", ["checkpoints", "evaluations", "pictures"])
def test_a_file_in_place_of_a_folder_of_the_run_is_named(again, name):
    path = again.root / "run" / name
    shutil.rmtree(path, ignore_errors=True)
    path.write_text("")
    assert f"output.folder: expected a folder, got the file {path}" in again()


def test_a_cache_of_another_program_is_named_and_left(again):
    path = again.root / "run" / "answers-0.sqlite"
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE own (x)")
    connection.close()
    assert "another application's database" in again()


def test_a_folder_that_another_process_writes_is_refused(again):
    with sole_writer(again.root / "run"):
        said = again()
    assert f"{again.root / 'run'}: expected no other writer, got process " in said


def test_strays_and_later_evaluations_are_left_or_made_again(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "all")
    folder = tmp_path / "all" / "run" / "evaluations"
    shutil.copy(folder / "round-000001.json", folder / "round-final.json")
    (folder / "round-best").mkdir()
    (folder / "round-000002.json").write_text("half of one that a kill has")  # after the checkpoint
    checkpoint = Checkpoints(tmp_path / "all" / "run" / "checkpoints").latest()
    (checkpoint.path.with_name("round-000009")).mkdir()
    (tmp_path / "all" / "run" / "metrics.jsonl").write_text("")
    words = options(tmp_path / "all" / "world", tmp_path / "all" / "run", *MORE)
    ended = call(train_flux.main, words)
    assert ended.code == 0, ended.err
    assert (
        "metrics.jsonl: expected a line of every round up to 1, got none of round 1; " in ended.err
    )
    assert "ignored, since no run writes such files: round-best, round-final.json" in ended.err
    assert "warning: checkpoint skipped: " in ended.err
    assert {"round-final.json", "round-best", "round-000002.json"} <= {
        x.name for x in folder.iterdir()
    }
    assert [line["round"] for line in read_metrics(tmp_path / "all" / "run/metrics.jsonl")] == [2]
    log = (tmp_path / "all" / "run" / "log.txt").read_text()
    assert "training.rounds was 1 and is 2 from here on" in log
    assert (
        "training.rounds: the learning rate is 0.001 in round 1, 0.0001 in round 2, 0.0001 in the "
        "last round, 2\n"
    ) in log


def changed(report):
    """Changes of the section training; paths changed as well, since the folder was copied."""
    return [x for x in report["changed_options"] if x["option"].startswith("training.")]


def test_before_is_the_round_that_it_is(stopped, tmp_path, capsys):
    shutil.copytree(stopped, tmp_path / "all")
    world, run = tmp_path / "all" / "world", tmp_path / "all" / "run"
    (run / "evaluations" / "round-000000.json").unlink()
    held_out = ("--data.held-out", world / "held_out.jsonl")
    with started(world, run, *MORE, "--training.rounds", 1, *held_out) as one:
        summarize(one)
    assert "evaluated once, so there is no report" in (run / "log.txt").read_text()
    assert not capsys.readouterr().out
    assert call(train_flux.main, options(world, run, *MORE)).code == 0
    assert "no evaluation of round 0: before is round 1" in (run / "log.txt").read_text()
    said = (run / "log.txt").read_text()
    assert said.count("held-out chains, percent [95% interval]") == 2  # printed by both ends
    assert said.count("Overall") >= 1
    assert "\x1b" not in said
    report = json.loads((run / "report.json").read_text())
    assert (report["before"]["round"], report["after"]["round"]) == (1, 2)
    rounds = {"after_round": 1, "option": "training.rounds", "was": 1, "is": 2}
    assert changed(report) == [rounds]
    assert "After round 1, training.rounds was changed from 1 to 2." in said
    assert call(export.app, [run, "--output", tmp_path / "lora" / "x.safetensors"]).code == 0
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "| 1 | `training.rounds` | `1` | `2` |" in card
    assert str(tmp_path.parent) not in card
    assert call(train_flux.main, options(world, run, *MORE, "--training.rounds", 3)).code == 0
    report = json.loads((run / "report.json").read_text())
    again = {"after_round": 2, "option": "training.rounds", "was": 2, "is": 3}
    assert changed(report) == [rounds, again]
    ended = call(train_flux.main, options(world, run, *MORE, "--training.rounds", 3))
    assert "all 3 rounds are done; to train on, raise training.rounds\n" in ended.err


@pytest.fixture
def ended(stopped, tmp_path):
    """A function that goes on from a copy of the run to the end of round 3, and returns the log."""
    shutil.copytree(stopped, tmp_path / "all")
    run = tmp_path / "all" / "run"
    more = (*MORE, "--training.rounds", 3, "--output.checkpoint-every", 1)

    def go_on(*others):
        words = options(tmp_path / "all" / "world", run, *more, *others)
        ended = call(train_flux.main, words)
        assert ended.code == 0, ended.err
        return ended.err

    go_on.run = run
    return go_on


def test_what_is_gone_of_a_run_that_ended_is_said(ended, monkeypatch):
    """A line in the middle and images of an evaluation, then all evaluations."""
    run = ended.run
    assert "expected" not in ended()
    assert (run / "chains.png").exists()
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[2]]))
    monkeypatch.setattr(pictures, "draw_before_after", draw_before_after)
    before = (run / "report.json").stat().st_mtime_ns
    shutil.rmtree(run / "evaluations" / "round-000000")
    said = ended()
    assert (
        f"warning: {path}: expected a line of every round up to 3, got none of round 2; curves and "
        "report lack them"
    ) in said
    chains = [chain.id for chain in read_chains(run.parent / "world/held_out.jsonl").chains]
    assert re.search(r"warning: chains\.png is not drawn: .*/round-000000/.*/turn_1.png, got", said)
    assert f"; chains without images: round 0: {', '.join(chains)}\n" in said
    assert f"warning: {run}: left from an earlier end of the run: chains.png\n" in said
    assert (run / "report.json").stat().st_mtime_ns > before

    shutil.rmtree(run / "evaluations")
    said = ended()
    assert (
        f"warning: {run / 'evaluations'}: expected those of rounds 0 to 2, got none of rounds 0 to "
        "2; curves and report lack them"
    ) in said
    assert "evaluated once, so there is no report" in said
    assert "left from an earlier end of the run: chains.png, report.json\n" in said


def test_checkpoints_that_are_gone_are_no_reason_to_begin_again(again):
    shutil.rmtree(again.root / "run" / "checkpoints")
    path = again.root / "run" / "metrics.jsonl"
    told = "output.folder: expected checkpoints beside the metrics of "
    path.write_text('{"round": 1}\n{"round": 2}\n')  # saved after round 1, as it was evaluated
    said = again()
    assert (
        f"{told}rounds 1 to 2, got none in {again.root / 'run' / 'checkpoints'}; put them" in said
    )
    assert f"or delete {path} to begin again" in said
    path.write_text('{"round": 5}\n')  # begun from another folder, and killed before it was saved
    more = ("--training.rounds", 9, "--evaluation.every", 9, "--output.checkpoint-every", 9)
    assert f"{told}round 5, got none" in again(*more)


def test_a_run_killed_before_its_first_checkpoint_begins_again(ended):
    shutil.rmtree(ended.run / "checkpoints")
    said = ended("--training.rounds", 1)
    assert f"no checkpoint yet: round 1 of {ended.run / 'metrics.jsonl'} will be repeated" in said
    assert [line["round"] for line in read_metrics(ended.run / "metrics.jsonl")] == [1]


class Killed(BaseException):
    """The process ends before the next change on the disk."""


@contextmanager
def killed_before(change):
    """Let the change of that number, from 0, end the block; renames and removals are changes."""
    left = [change]

    def doomed(function):
        def maybe(*given, **named):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*given, **named)

        return maybe

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, doomed(getattr(os, name)))
        yield


class Branches:
    """The files of a run, whose checkpoints and lines of metrics name the branch they are of."""

    def __init__(self, root, evaluation):
        self.root, self.evaluation = root, evaluation
        self.checkpoints = Checkpoints(root / "checkpoints", keep_last=9)
        self.held_out = HeldOut([], root / "evaluations", None)

    @property
    def log(self):
        """The log as a new process opens it."""
        return RunLog(self.root, console=False, main=True)

    def do(self, branch, rounds, *, saving):
        log = self.log
        for done in rounds:
            log.record(done, {"branch": branch})
            replace(self.evaluation, round=done).write(
                self.root / "evaluations" / f"round-{done:06d}.json"
            )
            if saving:
                self.checkpoints.save(done, {}, {"branch": branch})

    def go_on(self, which="auto"):
        """Go on from a checkpoint, as a start does; return it."""
        found = self.checkpoints.find(which)
        cut_back(found, self.checkpoints, self.log, self.held_out)
        return found

    def of_one_branch(self, found):
        """Whether all that is left led to a checkpoint: rounds 1 and 2 are of both branches."""
        lines = read_metrics(self.root / "metrics.jsonl")
        assert [line["round"] for line in lines] == list(range(1, found.round + 1))
        assert self.held_out.rounds() == list(range(1, found.round + 1))
        assert {line["branch"] for line in lines[2:]} <= {found.state["branch"]}


@pytest.fixture
def branches(stopped, tmp_path):
    """Four rounds, of which the last two are to be given up."""
    branches = Branches(tmp_path, Evaluation.read(stopped / "run/evaluations/round-000001.json"))
    branches.do(0, range(1, 5), saving=True)
    return branches


def test_a_kill_while_a_run_goes_back_leaves_one_history(branches, tmp_path_factory):
    for change in count():
        copy = tmp_path_factory.mktemp("killed") / "run"
        shutil.copytree(branches.root, copy)
        if goes_on_after_a_kill(Branches(copy, branches.evaluation), change):
            break
    assert change >= 5  # two checkpoints, the metrics, two evaluations


def goes_on_after_a_kill(branches, change):
    """Go back, killed before a change on the disk, and on; whether it ended before it."""
    older, ended = branches.root / "checkpoints" / "round-000002", True
    with killed_before(change):
        try:
            branches.go_on(older)
        except Killed:
            ended = False
    branches.of_one_branch(branches.go_on())
    branches.go_on(older)
    branches.do(1, (3, 4), saving=False)  # and killed before its first checkpoint
    found = branches.go_on()
    assert found.path == older
    branches.of_one_branch(found)
    branches.do(2, (3,), saving=True)
    found = branches.go_on()
    assert (found.round, found.state) == (3, {"branch": 2})
    branches.of_one_branch(found)
    return ended


def test_going_back_deletes_no_checkpoint_and_says_where_they_are(branches):
    (branches.root / "report.json").write_text("{}")
    for branch in (0, 1):
        found = branches.go_on(branches.root / "checkpoints" / "round-000002")
        assert found.state == {"branch": 0}
        assert read_metrics(branches.root / "metrics.jsonl")[-1]["round"] == 2
        aside = [branches.root / f"checkpoints/aside-{1 + branch}-round-00000{n}" for n in (4, 3)]
        for path, done in zip(aside, (4, 3), strict=True):
            there = branches.checkpoints.find(path)
            assert (there.round, there.state) == (done, {"branch": branch})
            assert not branches.checkpoints.holds(there)
        assert f"going back to round 2: set aside, not deleted, {aside[0]}, {aside[1]}; " in (
            said := (branches.root / "log.txt").read_text()
        )
        branches.do(1, (3, 4), saving=True)
    assert said.count("and report.json is of them until this run ends\n") == 2
    branches.go_on()
    assert (branches.root / "log.txt").read_text() == said
    names = {x.name for x in (branches.root / "checkpoints").iterdir()}
    assert {"round-000003", "round-000004"} < names


def test_a_checkpoint_of_elsewhere_is_refused_where_there_is_a_run(again, stopped, branches):
    fix = "; go on with auto, or choose another output.folder"
    given = stopped / "run" / "checkpoints" / "round-000001"
    assert f"output.resume: expected a checkpoint of the run in {again.root / 'run'}, got " in (
        said := again("--output.resume", given)
    )
    assert f"{given}{fix}" in said
    shutil.rmtree(again.root / "run" / "checkpoints")  # its metrics alone are a run, too
    assert fix in again("--output.resume", given)
    with pytest.raises(ValueError, match=r"checkpoint: expected one of .*, not set aside, got "):
        branches.checkpoints.set_aside_after(Checkpoints(given.parent).latest())


def test_a_full_disk_ends_a_run_with_1_and_it_goes_on(stopped, tmp_path, monkeypatch):
    shutil.copytree(stopped, tmp_path / "all")
    world, run = tmp_path / "all" / "world", tmp_path / "all" / "run"
    before = (run / "metrics.jsonl").read_bytes()

    def full(self, done, numbers):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mteditflow.training.metrics_file.MetricsFile.append", full)
        ended = call(train_flux.main, options(world, run, *MORE))
    assert ended.code == 1
    assert ended.err.splitlines()[-1].endswith(
        "error: [Errno 28] No space left on device; the checkpoint of round 1 is intact: free "
        "space and start again"
    )
    assert "Traceback" not in ended.err
    assert (run / "metrics.jsonl").read_bytes() == before
    assert call(train_flux.main, options(world, run, *MORE)).code == 0


class Leaving(ExactRewards):
    """Scores some chains, and loses all scores of others."""

    left = math.inf

    async def score(self, chains, images):
        terms = await super().score(chains, images)
        type(self).left -= len(chains)
        return terms if self.left >= 0 else {name: lost(x) for name, x in terms.items()}


def lost(term):
    gone = {
        tuple(at): Lost(Fault.timeout, "no answer", 1) for at in term.turn_mask.nonzero().tolist()
    }
    return TurnScores(torch.full_like(term.score, math.nan), term.turn_mask, gone)


def test_lost_rewards_end_a_run_that_goes_on_as_if_none_were_lost(world, tmp_path, monkeypatch):
    more = (*MORE, "--training.rounds", 3, "--evaluation.every", 3, "--output.checkpoint-every", 1)
    more = (*more, "--output.keep", 9, "--rewards.scorer", f"{__name__}:Leaving")
    assert call(train_flux.main, options(world, tmp_path / "whole", *more)).code == 0
    monkeypatch.setattr(Leaving, "left", 4 + 8)  # held-out chains, and those of the first round
    ended = call(train_flux.main, options(world, tmp_path / "run", *more))
    assert ended.code == 1
    assert "100% of 8 rewards are invalid" in ended.err
    assert (tmp_path / "run" / "checkpoints" / "round-000001").exists()
    assert differences(tmp_path / "run", tmp_path / "whole", ended=False) == []
    monkeypatch.setattr(Leaving, "left", math.inf)
    assert call(train_flux.main, options(world, tmp_path / "run", *more)).code == 0
    assert "resuming after round 1" in (tmp_path / "run" / "log.txt").read_text()
    assert differences(tmp_path / "run", tmp_path / "whole") == []


class Hanging(ExactRewards):
    """Scores a round, then hangs in one of its calls, after a signal to stop has come."""

    calls, let_go = 0, threading.Event()

    async def score(self, chains, images):
        type(self).calls += 1
        if self.calls > 1:
            os.kill(os.getpid(), signal.SIGTERM)
            assert self.let_go.wait(60)
        return await super().score(chains, images)


def test_a_scorer_that_hangs_does_not_keep_a_run_from_stopping(world, tmp_path, monkeypatch):
    monkeypatch.setattr(concurrency, "GRACE", 0.1)
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    run = tmp_path / "run"
    more = (*MORE, "--data.held-out", "None", "--rewards.scorer", f"{__name__}:Hanging")
    more = (*more, "--output.checkpoint-every", 9, "--data.group-size", 2, "--sampling.batch", 4)
    try:
        ended = call(train_flux.main, options(world, run, *more))
        assert (ended.code, ends) == (0, [0])
        assert "stopped by SIGTERM after round 1; start again to resume" in ended.err
        assert "a scorer was still running 0.1 s after its cancellation" in ended.err
        with sole_writer(run) as stale:
            assert stale is None
    finally:
        Hanging.let_go.set()
    assert Checkpoints(run / "checkpoints").latest().round == 1


class Blind(ExactRewards):
    """Finds nothing to measure of consistency."""

    async def score(self, chains, images):
        terms = await super().score(chains, images)
        blind = torch.full_like(terms["following"].score, math.nan)
        return terms | {"consistency": TurnScores(blind, terms["following"].turn_mask, {})}


def test_a_reward_that_no_round_has_is_said_once_and_counted(world, tmp_path):
    more = (*MORE, "--rewards.scorer", f"{__name__}:Blind", "--data.group-size", 2)
    ended = call(train_flux.main, options(world, tmp_path / "run", *more))
    assert ended.code == 0, ended.err
    said = (
        "warning: round 1: no trajectory has the reward consistency (100% had nothing to measure), "
        "so it has no effect there; the report counts such rounds\n"
    )
    assert ended.err.count("no trajectory has the reward") == ended.err.count(said) == 1
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["rounds_without_reward"] == {"consistency": 2}
    assert "No trajectory had the reward consistency in 2 of 2 rounds." in ended.out


def test_an_average_that_warms_up(world, tmp_path):
    """Weights of the average after the first steps, by hand."""
    more = ("--training.ema-decay", 0.9, "--training.ema-every", 1)
    with started(world, tmp_path, *more) as run:
        weight = run.policies.parameters()[0]
        average = weight.detach().clone().double()
        for step in (1, 2, 3):
            weight.data.add_(1.0)
            run.begin_round()
            run.count(TAKEN)
            decay = (1 + step) / (10 + step)
            average = decay * average + (1 - decay) * weight.detach().double()
        name = next(n for n, x in run.policies.state_dict().items() if x.shape == weight.shape)
        found = run.policies.state_dict("ema")[name].double()
        assert float((found - average).abs().max()) < 1e-5


def test_two_trainers_in_one_folder_of_which_one_goes_on(world, tmp_path):
    words = options(world, tmp_path / "run", *MORE, "--training.rounds", 3)
    errors = [tmp_path / f"errors-{n}.txt" for n in range(2)]
    both = [Process([SCRIPT, *words], env=ENVIRONMENT, errors=x, drawn=False) for x in errors]
    codes = [process.wait(300) for process in both]
    assert sorted(codes) == [0, 2], [x.read_text()[-2000:] for x in errors]
    refused = errors[codes.index(2)].read_text()
    winner = both[codes.index(0)].pid
    assert f"expected no other writer, got process {winner} (train_flux.py) on " in refused
    assert [x["round"] for x in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert not list((tmp_path / "run").rglob(".partial-*"))


def test_ranks_that_do_not_divide_the_groups_are_refused(world, tmp_path):
    class TwoRanks:
        num_processes, process_index = 2, 0

    config = parse(options(world, tmp_path, "--data.groups", 3, "--training.minibatches", 1))
    with pytest.raises(
        ConfigError, match=r"data.groups: expected a multiple of the 2 ranks, got 3"
    ):
        make_sampler(config, range(16), TwoRanks)
