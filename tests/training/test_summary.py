"""The end of a run on the terminal."""

import io
import json

import pytest
from rich.console import Console
from test_report import METRICS, pair

from mteditflow.training.report import run_report
from mteditflow.training.summary import print_summary, summary_lines
from tests.samples_of_scores import evaluation, few_resamples, nan

__all__ = ["few_resamples"]  # a fixture of every test here


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
    table, name = {}, ""
    for title, when, *cells in rows:
        name = title or name
        table[name, when] = cells
    assert [cell.split(" [")[0] for cell in table["Marginal: this turn alone", "before"]] == [
        *("100.0", "50.0")
    ]
    assert table["IF: all turns so far", "after"] == ["100.0 [100.0, 100.0]"] * 2
    assert table["CC", "after"][1] == "60.0 [60.0, 60.0]"
    assert table["whole, mean", "after"] == ["1.000 [1.000, 1.000]"] * 2
    assert len(table) == 10
    assert "3 held-out chains, percent [95% interval]" in text
    assert "curves.png" in text
    assert ".hidden" not in text
    assert "sqlite" not in text


def test_the_rest_is_told_in_words(report):
    lines = "\n".join(summary_lines(report)).replace("\\", "")
    assert "At turn 2, paired over 2 chains: IF +50.0 [" in lines
    assert "CC +10.0 [+10.0, +10.0], Overall" in lines
    assert "Of success at turn 1, turn 2 keeps 100% (before: 50%; +50.0 [" in lines
    assert "Of 'whole' at turn 1, turn 2 keeps 100% (before: 0%; +100.0 [" in lines
    assert "Before, 1 of 3 held-out chains could not be scored" in lines
    assert "(turns lost: 1 time-out)" in lines
    assert "After," not in lines
    assert "3 rounds took 0:00:08: a 75%, b 25%." in lines
    assert "25.0% of training trajectories lost an answer (3 refusal, 2 time-out)." in lines
    assert "20.0% of training rewards were invalid; they trained nothing." in lines


def test_an_undisturbed_run_of_one_turn_is_told_shortly():
    one = evaluation([[1], [0]])
    (line,) = summary_lines(run_report(one, one, [], config={}, seed=0))
    assert line.startswith("At turn 1, paired over 2 chains: IF +0.0")


def test_a_run_without_scores_is_told(tmp_path):
    none = evaluation([[nan, nan], [nan, nan]])
    text = printed(run_report(none, none, [], config={}, seed=0), tmp_path)
    assert "At turn 2 no chain can be compared." in text
    assert text.count("none") >= 8
    assert "turn 2 keeps nothing (before: nothing)." in text


def test_a_folder_with_brackets_is_named_as_it_is(report, tmp_path):
    folder = tmp_path / "run[red]"
    folder.mkdir()
    assert "run[red]" in printed(report, folder, width=300)
