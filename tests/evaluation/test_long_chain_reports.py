"""Long chains in evaluations, reports, comparisons and the command: CR, survival, wear."""

import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mteditflow_examples.evaluate import app
from PIL import Image
from typer.testing import CliRunner

from mteditflow.chains import EditedImages, no_change_chains, write_chains
from mteditflow.evaluation import (
    Evaluation,
    destroyed_below,
    draw_report,
    draw_survival,
    no_change_wear,
    report_difference,
    report_of,
)
from mteditflow.evaluation.long_chains import asks_for_no_change
from mteditflow.evaluation.report import Report
from mteditflow.evaluation.tables import as_csv, grids
from mteditflow.metrics import paired_difference_interval, survival_curve, wilson_interval
from mteditflow.rewards import BINARY, TurnScores
from tests.loops import some
from tests.samples_of_scores import evaluation, few_resamples, nan, turn_scores

__all__ = ["few_resamples"]  # a fixture of every test here


def chains_of(found, types=None):
    made = no_change_chains(found.chain_ids, turns=found.turns)
    return [
        chain.model_copy(update={"instructions": words, "task_types": types})
        for chain, words in zip(made, found.instructions, strict=True)
    ]


def report(found, title="x", types=None):
    return report_of(found, chains_of(found, types), title=title, left_out={})


# CR in an evaluation


FLAGS = [[0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 1, nan], [1, 1, nan, 1]]


def test_cr_by_hand_with_its_denominators_and_wilsons_interval():
    """The third chain lost flag 4, so it counts up to k = 2; the fourth lost flag 3: k = 1."""
    ones = [[1] * 4] * 4
    found = evaluation(ones, destroyed=FLAGS, looks=ones)
    assert found.names == (
        "instruction_following", "marginal", "destroyed", "looks", "collapse"
    )  # fmt: skip
    assert found.counts["collapse"] == [4, 3, 2, 2]
    rate = found.metrics["collapse"]
    assert rate.estimate.tolist() == pytest.approx([25, 100 / 3, 50, 50])
    low, high = wilson_interval([1.0, 1.0, 1.0, 1.0], [4.0, 3.0, 2.0, 2.0])[1:]
    torch.testing.assert_close(rate.low.double(), 100 * low, atol=1e-4, rtol=0)
    torch.testing.assert_close(rate.high.double(), 100 * high, atol=1e-4, rtol=0)
    shares = found.metrics["destroyed"]
    assert shares.estimate.tolist() == pytest.approx([0.5, 0.5, 1, 1 / 3])
    assert shares.low[2] == pytest.approx(float(wilson_interval(3, 3).low), abs=1e-6)  # all alike
    table = report(found)
    drop = table.find("collapse", "drop")
    assert (drop.estimate, drop.count) == (pytest.approx(0 - 50), 2)
    assert found.numbers["held_out/collapse/turn_4"] == pytest.approx(50)


def test_cr_falls_pairwise_with_newcombes_interval():
    ones, before = [[1, 1, 1]] * 4, [[1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]]
    after = [[0, 0, 0], [0, 1, 1], [0, 1, 1], [0, 0, 0]]
    old, new = (evaluation(ones, destroyed=flags) for flags in (before, after))
    found = report_difference(old, new, chains_of(old), title="x", left_out={})
    expected = paired_difference_interval(
        [[1, 1], [0, 1], [1, 1], [0, 0]], [[0, 0], [0, 1], [0, 1], [0, 0]]
    )
    for n in range(2):
        got = found.find("collapse", n + 1)
        ends = [100 * float(x[n]) for x in expected]
        assert [got.estimate, got.low, got.high] == pytest.approx(ends, abs=1e-4)


def test_flags_and_wear_off_their_range_are_refused():
    with pytest.raises(ValueError, match=r"destroyed: expected whole scores in 0..1, got 0.5"):
        evaluation([[1]], destroyed=[[0.5]])
    with pytest.raises(ValueError, match=r"wear: expected scores in 0..1, got 14.7"):
        evaluation([[1]], wear=[[14.7]])


def test_destroyed_is_below_the_threshold_and_what_was_lost_stays_lost():
    consistency = turn_scores([[0.5, 0.49, nan, nan]], lost=[(0, 2)], dtype=torch.float64)
    flags = destroyed_below(consistency, 0.5)
    assert flags.score[0].tolist() == pytest.approx([0, 1, nan, nan], nan_ok=True)
    assert flags.score.dtype == torch.float64
    assert (flags.lost, flags.unmeasured.tolist()) == (
        consistency.lost, [[False, False, False, True]]
    )  # fmt: skip
    with pytest.raises(ValueError, match="threshold: expected a finite number"):
        destroyed_below(consistency, nan)


# Survival in reports


LOSING = [[1, 1, 0], [1, nan, 1], [0, 1, 1], [1, 1, 1]]


def test_reports_hold_survival_with_the_chains_at_risk_and_the_turns_survived():
    """S = 3/4; 3/4 * 2/2; 3/4 * 1/2. IF leaves the second chain out from turn 2 on."""
    found = evaluation(LOSING, lost=[(1, 1)])
    table = report(found)
    numbers = [table.find("survival", turn) for turn in (1, 2, 3)]
    assert [x.estimate for x in numbers] == pytest.approx([75, 75, 37.5])
    assert [x.count for x in numbers] == [4, 2, 2]
    curve = survival_curve(found.success, valid=found.judged)
    assert [x.low for x in numbers] == pytest.approx((100 * curve.low).tolist())
    mean, median = (table.find("turns_survived", name) for name in ("mean", "median"))
    assert (mean.estimate, mean.count, median.estimate) == (pytest.approx(1.875), 4, 2)
    assert "survival" not in table.metrics
    rows = [
        row for row in csv.DictReader(io.StringIO(as_csv(table))) if row["metric"] == "survival"
    ]
    assert len(rows) == 3


def test_the_table_has_survival_where_it_is_not_if_and_says_that_if_is_sr():
    lost = grids(report(evaluation(LOSING, lost=[(1, 1)])))
    assert [row[0] for row in lost[0].body] == ["IF(k) = SR@k, %", "Survival, %", "Marginal, %"]
    assert lost[1].title == "Turns before the first failure, of 3"
    assert lost[1].body[0][1].startswith("1.875 [")
    whole = grids(report(evaluation([[1, 1, 0], [0, 1, 1]])))
    assert [row[0] for row in whole[0].body] == ["IF(k) = SR@k, %", "Marginal, %"]
    assert len({len(row) for table in (*lost, *whole) for row in [table.head, *table.body]}) > 1
    assert all(len(row) == len(table.head) for table in some(lost) for row in some(table.body))


def test_paired_differences_of_survival_are_of_the_chains_of_both():
    old, new = evaluation(LOSING, lost=[(1, 1)]), evaluation([[1, 1, 1]] * 4)
    found = report_difference(old, new, chains_of(old), title="x", left_out={})
    numbers = [found.find("survival", turn) for turn in (1, 2, 3)]
    assert [x.estimate for x in numbers] == pytest.approx([25, 25, 62.5])
    assert [x.count for x in numbers] == [4, 2, 2]
    assert all(x.low <= x.estimate <= x.high for x in some(numbers))
    mean = found.find("turns_survived", "mean")
    # The second chain counts in turn 1 alone: S of the second run is 1 at every turn, 3 turns.
    assert mean.estimate == pytest.approx(3 - 1.875)
    none = report_difference(new, new, chains_of(new), title="x", left_out={})
    flat = none.find("turns_survived", "mean")
    assert flat.low < flat.estimate == 0 < flat.high  # no change is no certainty


def twenty(share, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.rand(12, 20, generator=generator) < share).float()
    content = torch.rand(12, 20, generator=generator) * 0.1 + 0.85
    return evaluation(
        scores.tolist(),
        content.tolist(),
        destroyed=(content < 0.9).float().tolist(),
        wear=(1 - content).tolist(),
    )


@pytest.fixture(scope="module")
def long():
    """Reports of two editors over chains of twenty turns."""
    return [report(twenty(*pair), title, ("no_change",) * 20)
            for *pair, title in ((0.9, 0, "before"), (0.97, 1, "after"))]  # fmt: skip


def test_of_twenty_turns_tables_show_a_few_and_files_all(long):
    table, turns, *by_type = grids(long[0])
    expected = [f"turn {k}" for k in (1, 3, 5, 8, 10, 15, 20)]
    assert table.title == "All chains, some of 20 turns"
    assert table.head == ["", *expected, "drop 1 to 20", "chains"]
    assert turns.title == "Turns before the first failure, of 20"
    assert [name.head[1:8] for name in by_type] == [expected] * 2
    rows = list(csv.DictReader(io.StringIO(as_csv(long[0]))))
    for metric in ("instruction_following", "survival", "collapse", "wear"):
        own = {row["turn"] for row in rows if row["metric"] == metric and not row["edit_type"]}
        assert own >= {str(n) for n in range(1, 21)}, metric
    wear = next(row for row in table.body if row[0] == "wear")
    assert re.match(r"0\.\d{5} \[", wear[1])


def test_the_figure_has_a_curve_for_each_editor_with_its_mean(long):
    figure = draw_survival(*long)
    assert [axes.get_title() for axes in figure.axes] == [
        "Survival: no failure so far, %", "Collapsed so far (CR), %",
        "Wear: distance to the original",
    ]  # fmt: skip
    for axes, metric in zip(figure.axes, ("survival", "collapse", "wear"), strict=True):
        for line, own in some(zip(axes.lines, long, strict=True)):
            values = [own.find(metric, turn).estimate for turn in range(1, 21)]
            assert line.get_xdata().tolist() == list(range(1, 21))
            assert line.get_ydata().tolist() == pytest.approx(values)
    assert figure.axes[2].get_ylim()[1] < 1
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    mean = long[1].find("turns_survived", "mean").estimate
    assert names[1] == f"after: {mean:.2f} turns on average"
    bars, lines, _ = draw_report(*long).axes
    assert not bars.patches  # curves where bars would be needles
    assert [len(axes.lines) for axes in (bars, lines)] == [3, 2]


def test_one_turn_is_drawn_and_a_report_of_an_older_version_is_refused(long):
    assert len(draw_survival(report(evaluation([[1], [0]]))).axes) == 1
    kept = tuple(x for x in long[0].estimates if x.metric not in ("survival", "turns_survived"))
    old = long[0].model_copy(update={"estimates": kept})
    assert not old.has_survival
    assert grids(old)[1].title.endswith("by edit type")
    with pytest.raises(ValueError, match="reports: expected one or more with survival"):
        draw_survival(long[0], old)


# Wear of chains that ask for no change


def worn(level, size=(6, 4)):
    """Gray images that get lighter by ``level`` of 255 a turn."""
    return [Image.new("RGB", size, (100 + level * n,) * 3) for n in range(4)]


def test_wear_is_measured_as_long_as_a_chain_asks_for_no_change():
    whole, part, short = no_change_chains(["a", "b", "c"], turns=3)
    part = part.model_copy(update={"task_types": ("no_change", "color_alter", "no_change")})
    silent = short.model_copy(update={"task_types": None})
    assert [asks_for_no_change(chain) for chain in (whole, part, silent)] == [
        [True] * 3, [True, False, False], [False] * 3
    ]  # fmt: skip
    found = no_change_wear([whole, part, silent, short.first_turns(2)],
                           [worn(5), worn(10), worn(1), worn(2)[:3]])  # fmt: skip
    expected = [[5, 10, 15], [10, nan, nan], [nan] * 3, [2, 4, nan]]
    torch.testing.assert_close(found.score, torch.tensor(expected) / 255, equal_nan=True)
    assert found.turn_mask.tolist() == [[True] * 3] * 3 + [[True, True, False]]
    assert not found.lost
    with pytest.raises(ValueError, match="images of chain 'a': expected 3 after the reference"):
        no_change_wear([whole], [worn(5)[:3]])


def test_wear_of_another_size_is_that_of_the_image_resized():
    (chain,) = no_change_chains(["a"], turns=1)
    found = no_change_wear([chain], [[worn(0)[0], Image.new("L", (12, 8), 151)]])
    assert float(found.score) == pytest.approx(51 / 255)


class Pixels:
    """Followed where an image is at most 9 of 255 away from the reference."""

    scale = BINARY

    async def score(self, chains, images):
        away = [[np.abs(np.asarray(x, float) - np.asarray(own[0], float)).mean() for x in own[1:]]
                for own in images]  # fmt: skip
        score, exists = torch.tensor(away), torch.ones(len(away), len(away[0])) > 0
        return {
            "following": TurnScores((score <= 9).float(), exists, {}),
            "consistency": TurnScores(1 - score / 255, exists, {}),
        }


class SelfMeasured(Pixels):
    """With wear and destroyed turns of its own."""

    async def score(self, chains, images):
        found = await super().score(chains, images)
        own = found["consistency"]
        term = TurnScores(torch.zeros_like(own.score), own.turn_mask, {})
        return found | {"wear": term, "destroyed": term}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A file of three chains of four turns that ask for no change, and two folders of images."""
    root = tmp_path_factory.mktemp("no_change")
    for name in "abc":
        Image.new("RGB", (8, 8), (100,) * 3).save(root / f"{name}.png")
    chains = no_change_chains([f"{name}.png" for name in "abc"], turns=4, root=root)
    chains = [chain.model_copy(update={"id": chain.id[0]}) for chain in chains]
    write_chains(chains, root / "chains.jsonl")
    for folder, levels in (("worse", (3, 5, 7)), ("better", (1, 2, 3))):
        for chain, level in zip(chains, levels, strict=True):
            images = [Image.new("RGB", (8, 8), (100 + level * n,) * 3) for n in range(1, 5)]
            EditedImages(root / folder).write(chain, images)
    return root


def run(*arguments, code=0):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    return done.output


def test_the_command_measures_wear_and_collapse_and_compare_their_differences(made, tmp_path):
    scorer = f"{__name__}:Pixels"
    for name in ("worse", "better"):
        run("run", made / "chains.jsonl", "--images", made / name, "--output", tmp_path / name,
            "--scorer", scorer, "--destroyed-below", 0.96)  # fmt: skip
    found = Report.model_validate_json((tmp_path / "worse" / "report.json").read_bytes())
    wear = [found.find("wear", turn) for turn in range(1, 5)]
    assert [x.estimate for x in wear] == pytest.approx([5 * n / 255 for n in range(1, 5)], abs=1e-6)
    assert [x.count for x in wear] == [3] * 4
    # Destroyed beyond 10.2 of 255: the second chain from turn 3 on, the third from turn 2 on.
    rates = [found.find("collapse", turn).estimate for turn in range(1, 5)]
    assert rates == pytest.approx([0, 100 / 3, 200 / 3, 200 / 3])
    kept = Evaluation.read(tmp_path / "worse" / "evaluation.json")
    assert kept.provenance.judged_by.destroyed_below == 0.96
    assert {"survival.png", "survival.svg"} <= {x.name for x in (tmp_path / "worse").iterdir()}
    run("compare", tmp_path / "worse", tmp_path / "better", "--output", tmp_path / "compared")
    change = Report.model_validate_json((tmp_path / "compared" / "report.json").read_bytes())
    less = change.find("wear", 4)
    assert less.estimate == pytest.approx(-4 * 3 / 255, abs=1e-6)
    assert less.low <= less.estimate <= less.high < 0
    assert (tmp_path / "compared" / "survival.png").is_file()
    assert "survival.png" in (tmp_path / "compared" / "report.md").read_text()
    message = run("run", made / "chains.jsonl", "--images", made / "worse", "--output",
                  tmp_path / "worse", "--scorer", scorer, code=2)  # fmt: skip
    assert "destroyed_below" in " ".join(message.split())  # another folder for another threshold


def test_a_scorers_own_wear_stays_and_its_own_flags_refuse_a_threshold(made, tmp_path):
    arguments = ("run", made / "chains.jsonl", "--images", made / "worse", "--scorer",
                 f"{__name__}:SelfMeasured", "--output")  # fmt: skip
    run(*arguments, tmp_path / "own")
    found = Report.model_validate_json((tmp_path / "own" / "report.json").read_bytes())
    assert found.find("wear", 4).estimate == 0
    assert found.find("collapse", 4).estimate == 0
    message = run(*arguments, tmp_path / "both", "--destroyed-below", 0.5, code=1)
    assert "--destroyed-below: expected a term 'consistency' and none" in " ".join(message.split())


def test_a_threshold_without_consistency_or_off_its_range_is_refused(made, tmp_path):
    start = ("run", made / "chains.jsonl", "--images", made / "worse", "--output", tmp_path / "x")
    judge = ("--judge", "http://127.0.0.1:9/v1", "--model", "m")
    message = run(*start, *judge, "--destroyed-below", 0.5, code=2)
    assert "--destroyed-below: expected --consistency or --scorer with it" in message
    message = run(*start, "--scorer", f"{__name__}:Pixels", "--destroyed-below", 2, code=2)
    assert "--destroyed-below: expected a consistency in -1..1, got 2" in message
    assert not (tmp_path / "x").exists()


def test_the_program_of_the_page_prints_what_it_says(capsys):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(program, "docs/evaluation.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == [
        "tensor([1.0000, 0.6667, 0.6667, 0.3333])",
        "tensor([0.0000, 0.0000, 0.3333, 0.3333])",
        "tensor([1.0000, 0.6667, 0.6667, 0.0000], dtype=torch.float64)",
        "tensor(2.6667, dtype=torch.float64)",
        "tensor([[0.1000, 0.1000]]) tensor([[0.1000,    nan]])",
    ]
