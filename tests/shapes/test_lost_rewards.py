"""Lost and invented rewards compared: the trainer, its services and the page, for short."""

import json
import sys
from contextlib import nullcontext

import pytest
from mteditflow_examples import lost_rewards
from mteditflow_examples.lost_rewards import KINDS, document, draw, run
from mteditflow_examples.shapes import served
from PIL import Image

from tests.forked import forking
from tests.loops import some

if sys.version_info >= (3, 11):
    from tomllib import loads as parse
else:
    from tomli import loads as parse

pytestmark = pytest.mark.slow
SMALL = ("--training.rounds", "2", "--data.groups", "4", "--output.strips-every", "0")
COUNTS = (8, 12)
SEED = 1  # of which some answers are lost


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def report(runs):
    with forking(lost_rewards, served):
        return run("invalid", SEED, runs, counts=COUNTS, options=SMALL)


def test_lost_answers_are_left_out_of_training_and_told(report):
    assert 0 < report["lost_answers"]["share"] < 0.4
    assert report["invalid_reward_share"] == report["lost_answers"]["share"]
    assert sum(report["lost_answers"]["reasons"].values()) == 64 * report["invalid_reward_share"]


def test_a_run_is_scored_exactly_before_and_after(report):
    for when in ("before", "after"):
        assert report["held_out_chains"] == 12
        assert report[when]["chains"]["marginal"] == [12] * 3
        assert len(report[when]["strict"]) == 3
    assert report["after"]["round"] == report["rounds"] == len(report["following"]) == 2


def test_a_run_that_is_done_is_kept_and_that_of_another_judge_refused(report, runs, monkeypatch):
    monkeypatch.setattr(lost_rewards, "train", None)
    assert run("invalid", SEED, runs) == report
    path = runs / f"none-{SEED}" / "report.json"
    path.parent.mkdir()
    path.write_text(json.dumps(report))
    with pytest.raises(ValueError, match="expected a report of"):
        run("none", SEED, runs)


def test_a_trainer_that_fails_is_heard(runs, monkeypatch):
    monkeypatch.setattr(lost_rewards, "service", lambda *_: nullcontext("http://127.0.0.1:9/v1"))
    with forking(lost_rewards), pytest.raises(RuntimeError, match="minibatches: expected a divi"):
        run("invented", SEED, runs, counts=COUNTS, options=(*SMALL, "--training.minibatches", "7"))


def test_settings_are_the_demos_but_for_who_scores():
    own = parse(lost_rewards.settings())
    preset = lost_rewards.HERE / "flux" / "presets" / "shapes-nft.toml"
    demo = parse(preset.read_text())
    rewards, exact = own.pop("rewards"), demo.pop("rewards")
    assert own == demo
    assert exact.pop("scorer")
    assert "scorer" not in rewards
    assert exact.items() <= rewards.items()


def test_the_page_is_written_from_reports(report, tmp_path):
    reports = {(kind, seed): report for kind in KINDS for seed in (0, 1)}
    text = document(reports)
    assert text.count(f"| {report['lost_answers']['share']:.1%} | ") == 6
    for title in some(lost_rewards.TITLES.values()):
        assert text.count(f"| {title} |") == 3  # two seeds and their mean
    for reason, count in some(report["lost_answers"]["reasons"].items()):
        assert f"- {reason}: {6 * count}" in text
    draw(reports, tmp_path / "lost.png")
    with Image.open(tmp_path / "lost.png") as image:
        assert min(image.size) > 300
