"""Numbers of a scored benchmark against loops by hand, its tables, and paired differences."""

import csv
import io

import pytest
import torch

from mteditflow.chains import TASK_TYPES, Chain
from mteditflow.evaluation.comparison import most_changed, report_difference
from mteditflow.evaluation.figures import draw_report
from mteditflow.evaluation.report import ALL, DROP, Report, report_of
from mteditflow.evaluation.tables import (
    as_csv,
    checks_in_short,
    lost_in_short,
    markdown,
    rich_tables,
)
from tests.samples_of_scores import evaluation, few_resamples, nan

__all__ = ["few_resamples"]  # a fixture of every test here

ADD, COLOR = "subject_add", "color_alter"


def chains_of(found, types=None):
    return [
        Chain(id=name, image="x.png", instructions=words, task_types=types and types[c])
        for c, (name, words) in enumerate(zip(found.chain_ids, found.instructions, strict=True))
    ]


def test_golden_numbers_with_a_short_chain_and_a_lost_one():
    """IF 2/3, 1/2; Marginal 2/3, 1/2; the fourth chain lost a turn and counts nowhere."""
    found = evaluation([[1, 0], [1, 1], [0, None], [1, nan]], lost=[(3, 1)])
    report = report_of(found, chains_of(found), title="x", left_out={"c9": "no image"})
    assert (report.asked, report.counted) == (5, 3)
    assert report.left_out == {"c9": "no image"}
    assert "following at turn 2: time-out" in report.lost["c3"]
    for metric in ("instruction_following", "marginal"):
        numbers = [report.find(metric, turn) for turn in (1, 2, DROP)]
        assert [x.estimate for x in numbers] == pytest.approx([200 / 3, 50, 50 / 3])
        assert [x.count for x in numbers] == [3, 2, 2]
    assert report.notes == ("The chains name no edit types.",)


def test_numbers_by_type_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(20, 3, generator=generator) < 0.6).float().tolist()
    places = torch.randint(len(TASK_TYPES) - 2, (20, 3), generator=generator).tolist()
    types = [[TASK_TYPES[i] for i in row] for row in places]
    found = evaluation(scores)
    report = report_of(found, chains_of(found, types), title="x", left_out={})
    for kind in report.edit_types:
        turns = [(c, n) for c in range(20) for n in range(3) if types[c][n] == kind]
        for turn in (1, 2, 3, ALL):
            own = [(c, n) for c, n in turns if turn in (ALL, n + 1)]
            following = [all(scores[c][: n + 1]) for c, n in own]
            for metric, values in {
                "instruction_following": following,
                "marginal": [scores[c][n] for c, n in own],
            }.items():
                number = report.find(metric, turn, kind)
                assert number.count == len(own)
                if own:
                    assert number.estimate == pytest.approx(100 * sum(values) / len(own), abs=1e-4)
                    assert number.low <= number.estimate + 1e-4
                else:
                    assert number.estimate is None
    assert set(report.edit_types) == {kind for row in types for kind in row}


def test_cc_is_the_corpus_average_of_its_parts_beside_the_per_sample_average():
    """Objects 0.8, 0.6; background 1, none. Corpus (0.7 + 1) / 2; per sample (0.9 + 0.6) / 2."""
    found = evaluation([[1], [1]], [[0.9], [0.6]], object=[[0.8], [0.6]], background=[[1.0], [nan]])
    report = report_of(found, chains_of(found), title="x", left_out={})
    assert report.find("content_consistency", 1).estimate == pytest.approx(85)
    assert report.find("content_consistency_per_sample", 1).estimate == pytest.approx(75)
    assert report.find("overall", 1).estimate == pytest.approx(100 * 0.85**0.5)
    assert "object" not in report.metrics


def three_chains():
    """One whole, one of two turns, one that lost its second score."""
    return evaluation(
        [[1, 1, 0], [1, 0, None], [0, nan, 1]],
        [[0.7, 0.7, 0.7], [0.7, 0.4, None], [nan, 0.2, 0.9]],
        object=[[0.9, 0.8, 0.7], [0.7, nan, None], [nan, nan, nan]],
        background=[[0.5, 0.6, nan], [nan, 0.4, None], [nan, 0.2, 0.9]],
        lost=[(2, 1)],
    )


def test_metrics_by_hand():
    found = three_chains()
    report = report_of(found, chains_of(found), title="x", left_out={})
    # Turn 1: objects (0.9 + 0.7) / 2, background 0.5. Turn 2: 0.8; (0.6 + 0.4) / 2. Turn 3: 0.7.
    content = [65, 65, 70]
    for metric, expected in {
        "instruction_following": [100, 50, 0],
        "marginal": [100, 50, 0],
        "content_consistency": content,
        "content_consistency_per_sample": [70, 55, 70],  # turn 2: (0.7 + 0.4) / 2
        "overall": [(a * b) ** 0.5 for a, b in zip([100, 50, 0], content, strict=True)],
    }.items():
        got = [report.find(metric, turn).estimate for turn in (1, 2, 3)]
        assert got == pytest.approx(expected, abs=1e-4), metric


def test_every_denominator_is_stated():
    """A lost score takes its chain out of every turn, a shorter chain counts where it is."""
    found = three_chains()
    report = report_of(found, chains_of(found), title="x", left_out={"c8": "none", "c9": "none"})
    assert (report.asked, report.counted, len(report.left_out)) == (5, 2, 2)
    assert set(report.lost) == {"c2"}
    for metric in report.metrics:
        assert [report.find(metric, turn).count for turn in (1, 2, 3)] == [2, 2, 1], metric
    assert "by turn: object 2 / 1 / 1, background 1 / 2 / 0." in report.notes[0]
    assert report.notes[0] in markdown(report)


def test_what_told_success_is_counted_by_edit_type_over_the_chains_that_count():
    found = evaluation([[1, 0], [1, 1], [1, nan], [0, None]], lost=[(2, 1)])
    types = [[ADD, COLOR], [ADD, ADD], [COLOR, COLOR], None]
    ways = [("box", "asked"), ("asked", "box"), ("box", "box"), ("asked",)]
    report = report_of(found, chains_of(found, types), title="x", left_out={}, ways=ways)
    told = {ADD: {"box": 2, "asked": 1}, COLOR: {"asked": 1}, "unknown": {"asked": 1}}
    assert report.checks == told
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert f"|  | asked | box |\n| --- | ---: | ---: |\n| {ADD} | 1 | 2 |" in markdown(report)
    assert rich_tables(report)[-1].row_count == 3
    assert checks_in_short(report) == (
        f"Turns of x by check of success: {ADD}: box 2, asked 1; {COLOR}: asked 1; "
        "unknown: asked 1."
    )
    for wrong in (ways[:3], [*ways[:3], ("asked", "asked")]):
        with pytest.raises(ValueError, match="ways: expected one for each turn"):
            report_of(found, chains_of(found, types), title="x", left_out={}, ways=wrong)


def test_forms_of_a_report_hold_its_numbers(tmp_path):
    found = evaluation([[1, 0], [1, 1]], [[0.5, 0.25], [0.5, 0.25]], looks=[[20, 19], [22, 21]])
    types = [[ADD, COLOR], [COLOR, ADD]]
    report = report_of(found, chains_of(found, types), title="a|b [c]", left_out={"x|y": "why\nso"})
    assert Report.model_validate_json(report.model_dump_json()) == report
    rows = list(csv.DictReader(io.StringIO(as_csv(report))))
    assert len(rows) == len(report.estimates)
    values = {(x["metric"], x["edit_type"], x["turn"]): x["estimate"] for x in rows}
    assert float(values["looks", "", "drop"]) == pytest.approx(1)
    page = markdown(report, pictures=["report.png"])
    assert "| Marginal, % | 100.00 [100.00, 100.00] | 50.00 [0.00, 100.00] |" in page
    assert "3 chains asked, 2 counted, 1 left out, 0 without all their scores" in page
    assert r"- x\|y: why so" in page
    assert "![report.png](report.png)" in page
    assert [len(table.rows) for table in rich_tables(report)] == [5, 2, 2]
    assert len(draw_report(report).axes) == len(draw_report(report, report).axes) == 3
    with pytest.raises(KeyError, match="expected a number of the report"):
        report.find("marginal", 7)


def test_what_does_not_count_is_named_up_to_a_number():
    found = evaluation([[1]])
    left_out = {str(i): "no image" for i in range(25)}
    report = report_of(found, chains_of(found), title="x", left_out=left_out)
    assert lost_in_short(report, most=3)[-1] == "... and 22 more"


def test_paired_differences_are_of_the_chains_that_count_in_both():
    before = evaluation([[1, 0], [0, 0], [1, nan], [1, 1]], [[0.5, 0.5]] * 4, lost=[(2, 1)])
    after = evaluation([[1, 1], [1, 1], [0, 0], [1, 1]], [[0.5, 0.6]] * 4)
    report = report_difference(before, after, chains_of(before), title="x", left_out={"z": "gone"})
    assert (report.asked, report.counted, set(report.lost)) == (5, 3, {"c2"})
    assert report.find("marginal", 1).estimate == pytest.approx(100 / 3)
    assert report.find("marginal", 2).estimate == pytest.approx(200 / 3)
    assert report.find("content_consistency", 2).estimate == pytest.approx(10)
    changes = most_changed(before, after)
    assert [(x.row, x.turns) for x in changes] == [(1, 2), (0, 1), (3, 0)]
    same = report_difference(before, before, chains_of(before), title="x", left_out={})
    assert {x for e in same.estimates for x in (e.estimate, e.low, e.high)} <= {0.0, None}


def test_others_chains_are_refused():
    found, other = evaluation([[1]]), evaluation([[1], [1]])
    with pytest.raises(ValueError, match="chains: expected those of the evaluation"):
        report_of(found, chains_of(other), title="x", left_out={})
    with pytest.raises(ValueError, match="after: expected the chain_ids of before"):
        most_changed(found, other)
    with pytest.raises(ValueError, match="reports: expected at least one"):
        draw_report()


def test_some_chains_of_an_evaluation_in_another_order():
    found = evaluation([[1, nan], [0, 1], [1, 1]], lost=[(0, 1)])
    part = found.only(["c2", "c0"])
    assert part.chain_ids == ("c2", "c0")
    assert set(part.terms["following"].lost) == {(1, 1)}
    assert part.estimates["marginal"] == [100, 100]
    with pytest.raises(ValueError, match="expected chains of the evaluation, got 'c9'"):
        found.only(["c9"])
