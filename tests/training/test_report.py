"""report.json and the summary on the terminal."""

import io
import json
import re
from datetime import date
from enum import Enum
from pathlib import Path

import pytest
import torch
from rich.console import Console

import mteditflow
from mteditflow.evaluation.comparison import compare
from mteditflow.training.report import print_summary, run_report, summary_lines, write_report
from tests.loops import some
from tests.samples_of_scores import evaluation, few_resamples, nan

__all__ = ["few_resamples"]  # a fixture of every test here


class Objective(Enum):
    nft = "nft"


CONFIG = {"learning_rate": 1e-5, "model": Path("models/x"), "objective": Objective.nft, "k": None}
METRICS = [
    {
        "round": 1,
        "trajectories": 8.0,
        "invalid_share": 0.25,
        "lost/time-out": 2.0,
        "seconds/a": 3.0,
    },
    {"round": 2, "trajectories": 8.0, "invalid_share": 0.0, "seconds/a": 3.0, "seconds/b": 2.0},
    {"round": 3, "trajectories": 4.0, "invalid_share": 0.5, "lost/refusal": 3.0, "seconds/a": nan},
]


WHEN = ("before", "after", "difference")


def pair():
    before = evaluation(
        [[1, 0], [1, 1], [1, nan]], [[0.5, 0.5]] * 3, lost=[(2, 1)], whole=[[1, 0]] * 3
    )
    after = evaluation([[1, 1]] * 3, [[0.5, 0.6]] * 3, whole=[[1, 1]] * 3, after=3)
    return before, after


def test_golden_report(tmp_path):
    before, after = pair()
    metrics = [line for line in METRICS if line.get("seconds/a") == 3.0]
    write_report(tmp_path, run_report(before, after, metrics, config=CONFIG, seed=7))
    text = (tmp_path / "report.json").read_text()
    report = json.loads(text, parse_constant=pytest.fail)
    assert text == json.dumps(report, indent=2) + "\n"  # a line for each value: people read it
    assert (report["seed"], report["rounds"], report["held_out_chains"]) == (7, 2, 3)
    assert report["config"] == {
        "learning_rate": 1e-5,
        "model": "models/x",
        "objective": str(Objective.nft),
        "k": None,
    }
    assert report["before"]["chains"]["marginal"] == [3, 2]
    assert report["before"]["chains"]["content_consistency"] == [3, 3]
    assert report["before"]["chains_with_lost_scores"] == 1
    assert report["before"]["lost_scores"] == {"time-out": 1}
    assert report["before"]["unmeasured_turns"] == {}
    assert report["before"]["marginal"] == [100, 50]
    assert report["after"]["round"] == 3
    assert report["after"]["whole"] == [1, 1]
    assert report["after"]["content_consistency"] == pytest.approx([50, 60])
    for name in some(before.names):
        for low, high in some(report["after"][f"{name}_interval"]):
            assert (low, high) == (None, None) if name == "whole" else low <= high
    gain, found = report["difference_at_last_turn"], compare(before, after)
    assert gain["turn"] == 2
    assert gain["chains"] == dict(zip(before.names, [2, 2, 3, 2, 3], strict=True))
    assert gain["marginal"] == 50
    ratios = {name: [x[when] for when in WHEN] for name, x in gain["marginal_ratio"].items()}
    assert ratios == {"marginal": [0.5, 1, 0.5], "whole": [0, 1, 1]}
    assert [gain["conditional_success"][when] for when in WHEN] == [50, 100, 50]
    for stored, computed in (
        (gain["marginal_ratio"]["marginal"], found.marginal_ratio["marginal"]),
        (gain["conditional_success"], found.conditional_success),
    ):
        for when, interval in zip(WHEN, computed, strict=True):
            ends = [float(interval.low), float(interval.high)]
            assert stored[f"{when}_interval"] == pytest.approx(ends, abs=1e-4)
    for name, interval in some(found.difference.items()):
        assert gain[name] == pytest.approx(float(interval.estimate), abs=1e-4)
        ends = [float(interval.low), float(interval.high)]
        stored = [nan if end is None else end for end in gain[f"{name}_interval"]]
        assert stored == pytest.approx(ends, abs=1e-4, nan_ok=True)
    assert report["seconds"] == 8
    assert report["time"] == {"a": [6, 0.75], "b": [2, 0.25]}
    assert report["date"] == date.today().isoformat()
    assert report["threads"] == torch.get_num_threads()
    assert report["versions"]["mteditflow"] == mteditflow.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["devices"]


def test_lost_and_invalid_shares_are_of_all_trajectories():
    report = run_report(*pair(), METRICS, config={}, seed=0)
    assert report["invalid_reward_share"] == pytest.approx((0.25 * 8 + 0.5 * 4) / 20)
    assert report["lost_answers"] == {"share": 0.25, "reasons": {"refusal": 3, "time-out": 2}}
    assert report["seconds"] == 8  # a round whose seconds are not known adds none


def test_rounds_without_a_reward_are_counted_and_told():
    """A reward that a round did not train on, as its weight was 0, has no number."""
    lines = [{"reward/a": 0.5, "reward/[b]": nan}, {"reward/a": 1.0}, {"reward/[b]": nan}]
    report = run_report(*pair(), lines, config={}, seed=0)
    assert report["rounds_without_reward"] == {"[b]": 2}
    assert "No trajectory had the reward \\[b] in 2 of 3 rounds." in summary_lines(report)
    assert run_report(*pair(), lines[1:2], config={}, seed=0)["rounds_without_reward"] == {}


def test_a_run_of_no_rounds_and_no_scores_has_a_report(tmp_path):
    none = evaluation([[nan, nan]])
    report = run_report(none, none, [], config={}, seed=0)
    write_report(tmp_path, report)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["after"]["marginal"] == [None, None]
    assert report["difference_at_last_turn"]["marginal_interval"] == [None, None]
    assert (report["seconds"], report["invalid_reward_share"]) == (0, 0)


def printed(report, folder, width=110):
    console = Console(file=io.StringIO(), width=width)
    print_summary(report, folder, console=console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def report(few_resamples):
    report = run_report(*pair(), METRICS, config={}, seed=0)
    return json.loads(json.dumps(report))


def test_the_table_has_a_line_before_and_after_for_each_metric(report, tmp_path):
    (tmp_path / "curves.png").touch()
    for name in (".hidden", "answers.sqlite-wal"):
        (tmp_path / name).touch()
    text = printed(report, tmp_path)
    rows = [[x.strip() for x in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    (head,) = (
        [x.strip() for x in line.split("┃")[1:-1]] for line in text.splitlines() if "┃" in line
    )
    assert head == ["", "", "turn 1", "turn 2"]
    table, name = {}, ""
    for title, when, *cells in rows:
        name = title or name
        table[name, when] = cells
    assert [cell.split(" [")[0] for cell in table["Marginal: this turn alone", "before"]] == [
        *("100.0", "50.0")
    ]
    assert table["IF: all turns so far", "after"] == ["100.0 [43.9, 100.0] *"] * 2
    assert table["CC", "after"][1] == "60.0 [-29.8, 82.5] *"
    assert table["whole, mean", "after"] == ["1.000 [none: all alike] *"] * 2
    assert len(table) == 10
    assert "3 held-out chains, percent [95% interval]; * over fewer than 10" in text
    assert "curves.png" in text
    assert ".hidden" not in text
    assert "sqlite" not in text


def test_the_rest_is_told_in_words(report):
    lines = "\n".join(summary_lines(report)).replace("\\", "")
    assert "At turn 2, paired: IF +50.0 [" in lines
    assert "CC +10.0 [-107.9, +116.7] * over 3, Overall" in lines
    number, ends = r"[+-]?[\d.]+%?", r"\[[\d.+-]+, [\d.+-]+\]"
    for label, chains in ((r"Marginal\(2\) / Marginal\(1\)", (2, 2)), ("P\\(success .*", (2, 2))):
        before, after = (rf"{number} {ends} of {count} chains \*" for count in chains)
        form = rf"{label} = {after} \(before: {before}; {number} {ends}( points)?\)\."
        assert re.search(form, lines), label
    assert "whole(2) / whole(1) = 1.00 [" in lines
    assert "P(success at turn 2 | success at turn 1) = 100.0% [34.2, 100.0] of 2 chains" in lines
    assert "Before, 1 of 3 held-out chains lost a score (turns lost: 1 time-out)" in lines
    assert "After," not in lines
    held = "with evaluations, without loading and what a resumed run repeated"
    assert f"3 rounds took 0:00:08 ({held}): a 75%, b 25%." in lines
    assert "25.0% of training trajectories lost an answer (3 refusal, 2 time-out)." in lines
    assert "20.0% of training rewards were invalid; they trained nothing." in lines


def test_an_undisturbed_run_of_one_turn_is_told_shortly():
    one = evaluation([[1], [0]])
    (line,) = summary_lines(run_report(one, one, [], config={}, seed=0))
    assert line.startswith("At turn 1, paired over 2 chains: IF +0.0")


def test_what_could_not_be_measured_is_told_and_not_as_lost():
    one = evaluation([[1]] * 10, [[0.5]] * 9 + [[nan]])
    lines = summary_lines(run_report(one, one, [], config={}, seed=0))
    nothing = "turns with nothing to measure (not lost): consistency 1."
    assert lines[1:] == [f"Before, {nothing}", f"After, {nothing}"]
    assert "IF +0.0 [-27.8, +27.8] over 10" in lines[0].replace("\\", "")
    assert "* over 9" in lines[0]


def test_a_run_without_scores_is_told(tmp_path):
    none = evaluation([[nan, nan], [nan, nan]])
    text = printed(run_report(none, none, [], config={}, seed=0), tmp_path)
    assert "At turn 2 no chain can be compared." in text
    assert text.count("none") >= 8
    none_of_any = "= none of 0 chains (before: none of 0 chains)."
    assert f"Marginal(2) / Marginal(1) {none_of_any}" in text
    assert f"P(success at turn 2 | success at turn 1) {none_of_any}" in text


def test_a_folder_with_brackets_is_named_as_it_is(report, tmp_path):
    folder = tmp_path / "run[red]"
    folder.mkdir()
    assert "run[red]" in printed(report, folder, width=300)


def test_drift_alarms_are_reported_and_summarized():
    one = evaluation([[1]] * 3)
    alarm = {
        "round": 12,
        "statistic": "saturation/turn_3",
        "value": 0.5,
        "low": 0.125,
        "high": 0.25,
        "picture": "pictures/round-000012-drift.png",
    }
    report = run_report(one, one, [], config={}, seed=0, alarms=[alarm])
    assert report["drift_alarms"] == [alarm]
    assert summary_lines(report)[-1] == (
        "Drift alarm of round 12: saturation/turn_3 0.5 outside 0.125 to 0.25; see "
        "pictures/round-000012-drift.png."
    )
    del report["drift_alarms"]  # of a run before there were any
    assert not [line for line in summary_lines(report) if "Drift" in line]
