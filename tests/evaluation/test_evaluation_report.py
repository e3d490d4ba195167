"""Numbers of a scored benchmark against loops by hand, its tables, and paired differences."""

import csv
import io
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer

from mteditflow.chains import TASK_TYPES, Chain
from mteditflow.evaluation import JudgedBy, Provenance
from mteditflow.evaluation.comparison import compare, most_changed, report_difference
from mteditflow.evaluation.figures import (
    AMBER,
    BLUE,
    GOOD,
    INK,
    LINES,
    PURPLE,
    draw_report,
    write_picture,
)
from mteditflow.evaluation.report import Estimate, Report, report_of
from mteditflow.evaluation.tables import (
    as_csv,
    checks_in_short,
    lost_in_short,
    markdown,
    rich_tables,
)
from mteditflow.evaluation.tabulation import ALL, DROP
from mteditflow.metrics import paired_difference_interval
from tests.loops import some
from tests.samples_of_scores import evaluation, few_resamples, nan

__all__ = ["few_resamples"]  # a fixture of every test here

ADD, COLOR = "subject_add", "color_alter"
SHARES = ("instruction_following", "content_consistency", "marginal")


def chains_of(found, types=None):
    return [
        Chain(id=name, image="x.png", instructions=words, task_types=types and types[c])
        for c, (name, words) in enumerate(zip(found.chain_ids, found.instructions, strict=True))
    ]


def test_golden_numbers_with_a_short_chain_and_a_lost_one():
    """IF and Marginal 3/4, 1/2; the fourth chain counts up to the turn that it lost."""
    found = evaluation([[1, 0], [1, 1], [0, None], [1, nan]], lost=[(3, 1)])
    report = report_of(found, chains_of(found), title="x", left_out={"c9": "no image"})
    assert (report.asked, report.scored, report.invalid_share) == (5, 4, 2 / 5)
    assert report.left_out == {"c9": "no image"}
    assert "following at turn 2: time-out" in report.lost["c3"]
    for metric in ("instruction_following", "marginal"):
        numbers = [report.find(metric, turn) for turn in (1, 2, DROP)]
        assert [x.estimate for x in numbers] == pytest.approx([75, 50, 50])  # 1 and 0 of two
        assert [x.count for x in numbers] == [4, 2, 2]
        assert all(x.few for x in some(numbers))
    assert report.notes == ("The chains name no edit types.",)


def test_numbers_by_type_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(20, 3, generator=generator) < 0.6).float().tolist()
    places = torch.randint(len(TASK_TYPES) - 2, (20, 3), generator=generator).tolist()
    types = [[TASK_TYPES[i] for i in row] for row in places]
    found = evaluation(scores)
    report = report_of(found, chains_of(found, types), title="x", left_out={})
    for kind in some(report.edit_types):
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
    # Turn 1: objects (0.9 + 0.7) / 2, background 0.5. Turn 2: 0.8; (0.6 + 0.4 + 0.2) / 3.
    content = [65, 60, 80]  # turn 3: 0.7; 0.9
    following = [200 / 3, 50, 0]
    for metric, expected in {
        "instruction_following": following,
        "marginal": [200 / 3, 50, 50],
        "content_consistency": content,
        "content_consistency_per_sample": [70, 130 / 3, 80],  # turn 2: (0.7 + 0.4 + 0.2) / 3
        "overall": [(a * b) ** 0.5 for a, b in zip(following, content, strict=True)],
    }.items():
        got = [report.find(metric, turn).estimate for turn in (1, 2, 3)]
        assert got == pytest.approx(expected, abs=1e-4), metric


def test_every_denominator_is_stated():
    """A chain counts where it has the score, and Overall is over the fewer of IF and CC."""
    found = three_chains()
    report = report_of(found, chains_of(found), title="x", left_out={"c8": "none", "c9": "none"})
    assert (report.asked, report.scored, len(report.left_out)) == (5, 3, 2)
    assert set(report.lost) == {"c2"}
    assert report.unmeasured == {"consistency": 1, "object": 4, "background": 3}
    for metric, counts in {
        "instruction_following": [3, 2, 1, 1],
        "marginal": [3, 2, 2, 2],
        "content_consistency": [2, 3, 2, 1],
        "content_consistency_per_sample": [2, 3, 2, 1],
        "overall": [2, 2, 1, 1],
    }.items():
        found = [report.find(metric, turn).count for turn in (1, 2, 3, DROP)]
        assert found == counts, metric
    assert "by turn: object 2 / 1 / 1, background 1 / 3 / 1." in report.notes[0]
    page = markdown(report)
    assert report.notes[0] in page
    assert "(not lost): consistency 1, object 4, background 3. 95% intervals" in page
    assert "*: over fewer than 10 cases" in page


def test_edges_keep_a_width():
    """All agree: Wilson of the chains, also where several turns of each are pooled."""
    found = evaluation([[1, 1], [1, 1]])
    types = [[ADD, COLOR], [ADD, ADD]]
    report = report_of(found, chains_of(found, types), title="x", left_out={})
    wilson = pytest.approx(34.2380, abs=1e-3)
    for number in (
        report.find("marginal", 1),
        report.find("marginal", 1, ADD),
        report.find("marginal", ALL, ADD),
    ):
        assert (number.estimate, number.low, number.high) == (100, wilson, 100)
    fall = report.find("instruction_following", DROP)
    ends = pytest.approx(-65.762, abs=1e-3), pytest.approx(65.762, abs=1e-3)
    assert (fall.estimate, fall.low, fall.high) == (0, *ends)
    same = report_difference(found, found, chains_of(found, types), title="x", left_out={})
    shares = [x for x in same.estimates if x.count]
    assert {x.estimate for x in shares} == {0}
    assert all(x.low < 0 < x.high for x in some(shares))


UNLIKE = 1 - 0.757502  # upper end of Wilson's interval of 0 of 12


@pytest.fixture(scope="module")
def alike(few_resamples):
    """Twelve chains that all fail, or all pass, at the same consistency; and a term of no range."""

    def run(following, consistency):
        found = evaluation([[following] * 2] * 12, [[consistency] * 2] * 12, looks=[[20, 20]] * 12)
        judge = JudgedBy(scorer="mine:Scorer")
        return replace(found, provenance=Provenance(judged_by=judge))

    return {"fail": run(0, 0.9), "pass": run(1, 1.0)}


@pytest.mark.parametrize(
    ("name", "content", "following"),
    [
        ("fail", (90, 90 - 90 * UNLIKE, 90 + 10 * UNLIKE), (0, 0, 100 * UNLIKE)),
        ("pass", (100, 100 - 100 * UNLIKE, 100), (100, 100 - 100 * UNLIKE, 100)),
    ],
)
def test_all_chains_alike_are_no_certainty(alike, name, content, following):
    found = alike[name]
    report = report_of(found, chains_of(found), title="x", left_out={})
    both = [(a * b) ** 0.5 for a, b in zip(content, following, strict=True)]
    for metric, expected in (
        ("instruction_following", following),
        ("content_consistency", content),
        ("overall", both),
    ):
        number = report.find(metric, 2)
        assert [number.estimate, number.low, number.high] == pytest.approx(expected, abs=1e-3)
        own = [float(x[1]) for x in found.metrics[metric]]
        assert own == pytest.approx(expected, abs=1e-3)
    fall = report.find("content_consistency", DROP)
    ends = [0, -100 * UNLIKE, 100 * UNLIKE]
    assert [fall.estimate, fall.low, fall.high] == pytest.approx(ends, abs=1e-3)
    looks = report.find("looks", 2)
    assert (looks.estimate, looks.low, looks.high) == (20, None, None)
    assert "20.000 [none: all 12 alike]" in markdown(report)
    assert "[none] stands" in markdown(report)
    assert ",20.0,,,12," in as_csv(report)
    assert report.find("overall", DROP).low < 0 < report.find("overall", DROP).high
    assert len(draw_report(report).axes) == 2


def test_differences_of_chains_that_are_all_alike_are_no_certainty(alike):
    """CC rises by 0.1 in each of twelve chains, Overall from 0 to 100; looks have no range."""
    before, after = alike["fail"], alike["pass"]
    report = report_difference(before, after, chains_of(before), title="x", left_out={})
    number = report.find("content_consistency", 2)
    expected = [10, 10 - 110 * UNLIKE, 10 + 90 * UNLIKE]
    assert [number.estimate, number.low, number.high] == pytest.approx(expected, abs=1e-3)
    change = compare(before, after).difference
    assert [float(x) for x in change["content_consistency"]] == pytest.approx(expected, abs=1e-3)
    overall = report.find("overall", 2)
    assert overall.estimate == 100
    assert 0 < overall.low < 100 - 100 * UNLIKE
    assert [float(x) for x in change["overall"]] == pytest.approx(
        [overall.estimate, overall.low, overall.high], abs=1e-3
    )
    assert (report.find("looks", 1).estimate, report.find("looks", 1).low) == (0, None)
    assert bool(change["looks"].low.isnan())


def test_overall_takes_the_width_of_a_consistency_that_is_alike():
    """IF is 6 of 12, and CC 1 in all: from 25.4% of 75.8% up to 74.6% of 100%."""
    found = evaluation([[1]] * 6 + [[0]] * 6, [[1.0]] * 12)
    judge = Provenance(judged_by=JudgedBy(scorer="mine:Scorer"))
    number = [float(x[0]) for x in replace(found, provenance=judge).metrics["overall"]]
    ends = [(0.253783 * (1 - UNLIKE)) ** 0.5, 0.746217**0.5]
    assert number == pytest.approx([100 * 0.5**0.5, *(100 * x for x in ends)], abs=0.01)


def test_parts_without_their_mean_give_no_cc_and_the_report_says_so():
    found = evaluation([[1], [0]], object=[[0.5], [0.7]], background=[[0.5], [0.7]])
    report = report_of(found, chains_of(found, [[ADD], [ADD]]), title="x", left_out={})
    assert "content_consistency" not in {x.metric for x in report.estimates}
    assert report.notes[0].startswith("No CC, no Overall: the scorer gives parts of consistency")


def test_one_turn_has_no_fall():
    found = evaluation([[1], [0]], [[0.5], [0.7]])
    report = report_of(found, chains_of(found, [[ADD], [ADD]]), title="x", left_out={})
    assert {x.estimate for x in report.estimates if x.turn == DROP} == {None}
    assert "drop" not in markdown(report)
    assert "all turns" not in markdown(report)


def test_intervals_of_differences_are_newcombes():
    """Four chains: both, lost, gained, gained; by type the same of the chains with that type."""
    before, after = evaluation([[1], [1], [0], [0]]), evaluation([[1], [0], [1], [1]])
    types = [[ADD], [ADD], [ADD], [COLOR]]
    report = report_difference(before, after, chains_of(before, types), title="x", left_out={})
    for rows, kind in (([0, 1, 2, 3], None), ([0, 1, 2], ADD), ([3], COLOR)):
        old, new = (x.success[rows] for x in (before, after))
        expected = [100 * float(x) for x in paired_difference_interval(old, new)]
        number = report.find("marginal", 1, kind)
        assert [number.estimate, number.low, number.high] == pytest.approx(expected, abs=1e-3)


def test_what_told_success_is_counted_by_edit_type_over_the_judged_turns():
    found = evaluation([[1, 0], [1, 1], [1, nan], [0, None]], lost=[(2, 1)])
    types = [[ADD, COLOR], [ADD, ADD], [COLOR, COLOR], None]
    ways = [("box", "asked"), ("asked", "box"), ("box", "box"), ("asked",)]
    report = report_of(found, chains_of(found, types), title="x", left_out={}, ways=ways)
    told = {ADD: {"box": 2, "asked": 1}, COLOR: {"asked": 1, "box": 1}, "unknown": {"asked": 1}}
    assert report.checks == told
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert f"|  | asked | box |\n| --- | ---: | ---: |\n| {ADD} | 1 | 2 |" in markdown(report)
    assert rich_tables(report)[-1].row_count == 3
    assert checks_in_short(report) == (
        f"Turns of x by check of success: {ADD}: box 2, asked 1; {COLOR}: asked 1, box 1; "
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
    assert "| Marginal, % | 100.00 [34.24, 100.00] * | 50.00 [9.45, 90.55] * |" in page
    assert "3 chains asked, 2 scored, 1 left out, 0 lost a score. 95% intervals" in page
    assert r"- x\|y: why so" in page
    assert "![report.png](report.png)" in page
    assert [len(table.rows) for table in rich_tables(report)] == [5, 1, 2, 2]
    assert len(draw_report(report).axes) == len(draw_report(report, report).axes) == 3
    with pytest.raises(KeyError, match="expected a number of the report"):
        report.find("marginal", 7)


def test_markdown_titles_its_tables_and_ends_with_one_newline():
    found, ways = evaluation([[1]]), [("asked",)]
    report = report_of(found, chains_of(found, [[ADD]]), title="x", left_out={}, ways=ways)
    page = markdown(report)
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "# x",
        "## All chains",
        "## IF(k) = SR@k, % by edit type",
        "## Marginal, % by edit type",
        "## Check of success, in turns",
        "## Judged and made by",
    ]
    for text in (page, markdown(report, pictures=["a.png"])):
        assert text == text.rstrip() + "\n"
    assert str(rich_tables(report)[0].title).startswith("x: All chains")


def by_hand(title="mine", *, shift=0, count=40, metrics=("overall", *SHARES), types=True):
    """Two turns; the ends of every interval lie 5 below and 10 above; one type has none."""

    def number(metric, kind, turn, value):
        value += shift
        ends = (
            {"low": None, "high": None} if kind == COLOR else {"low": value - 5, "high": value + 10}
        )
        return Estimate(
            metric=metric, edit_type=kind, turn=turn, estimate=value, count=count, **ends
        )

    whole = {"marginal": 70, "instruction_following": 60, "content_consistency": 50, "overall": 40}
    places = [(name, None, turn, whole[name] - 10 * turn) for name in metrics for turn in (1, 2)]
    places += [("marginal", ADD, ALL, 30), ("marginal", COLOR, ALL, 20)] * types
    return Report(
        title=title, turns=2, asked=count, scored=count, left_out={}, lost={},
        estimates=tuple(number(*x) for x in places), notes=(),
    )  # fmt: skip


def error_bars(axes):
    """Ends of each error bar of an axis, in the order drawn: [[x, y], [x, y]] each."""
    bars = [x for x in axes.containers if not isinstance(x, BarContainer)]
    ends = [line.tolist() for bar in bars for lines in bar[2] for line in lines.get_segments()]
    assert ends, "no error bars"
    return ends


def assert_grid_behind(axes, *directions):
    """Lines of the grid in these directions alone, behind the bars."""
    drawn = [
        name
        for name in ("x", "y")
        if any(line.get_visible() for line in getattr(axes, f"get_{name}gridlines")())
    ]
    assert drawn == [*directions]
    assert axes.get_axisbelow() is True


@pytest.mark.parametrize(
    "metrics", [("overall", *SHARES), SHARES, ("instruction_following", "marginal")]
)
def test_bars_of_a_turn_stand_side_by_side_around_it(metrics):
    axes, *_ = draw_report(by_hand(metrics=metrics)).axes
    drawn = [x for x in axes.containers if isinstance(x, BarContainer)]
    named = {"IF": (BLUE, 60), "CC": (AMBER, 50), "Overall": (GOOD, 40)}
    count = len({*metrics} - {"marginal"})
    assert [bars.get_label() for bars in drawn] == list(named)[:count]
    for bars in some(drawn):
        color, value = named[bars.get_label()]
        assert {to_hex(bar.get_facecolor()) for bar in bars} == {color}
        # The outline shows a bar of 0, whose whiskers would stand alone.
        assert {(to_hex(bar.get_edgecolor()), bar.get_linewidth()) for bar in bars} == {(color, 2)}
        assert [bar.get_height() for bar in bars] == [value - 10, value - 20]
    for turn in (1, 2):
        sides = [(bars[turn - 1].get_x(), bars[turn - 1].get_width()) for bars in drawn]
        centers = [left + width / 2 for left, width in sides]
        assert sum(centers) / count == pytest.approx(turn)
        apart = [b - a for a, b in pairwise(centers)]
        assert apart == pytest.approx([0.8 / count] * (count - 1))
        assert all(0 < width < 0.8 / count for _, width in some(sides))
    ends = [[y for _, y in end] for end in error_bars(axes)]
    heights = [bar.get_height() for bars in drawn for bar in bars]
    assert ends == [pytest.approx([x - 5, x + 10]) for x in heights]
    assert_grid_behind(axes, "y")
    assert axes.get_ylim() == (0, 105)
    assert [list(axes.get_xticks()), list(axes.get_yticks())] == [[1, 2], [*range(0, 101, 20)]]
    assert [x.get_text() for x in axes.get_legend().get_texts()] == list(named)[:count]


def test_a_line_for_each_report_with_its_intervals():
    figure = draw_report(by_hand("base"), by_hand("mine", shift=7))
    axes = figure.axes[1]
    assert [x.get_label() for x in axes.containers] == ["base", "mine"]
    points = [bar[0] for bar in axes.containers]
    assert [list(x.get_ydata()) for x in points] == [[60, 50], [67, 57]]
    assert [list(x.get_xdata()) for x in points] == [[1, 2]] * 2
    assert [x.get_color() for x in points] == list(LINES[:2])
    ends = [[1, 55, 70], [2, 45, 60], [1, 62, 77], [2, 52, 67]]
    assert [[x, low, high] for (x, low), (_, high) in error_bars(axes)] == ends
    assert_grid_behind(axes, "y")
    (own,) = draw_report(by_hand()).axes[1].containers
    assert own[0].get_color() == PURPLE


def test_bars_of_edit_types_have_error_bars_to_the_ends_of_their_intervals():
    """The second type has no interval, and its bar no error bar."""
    axes = draw_report(by_hand()).axes[2]
    assert [bar.get_width() for bar in axes.patches] == [30, 20]
    assert {to_hex(bar.get_facecolor()) for bar in axes.patches} == {PURPLE}
    first, second = error_bars(axes)
    assert first == [[25, 0], [40, 0]]
    assert second == []
    bars = [x for x in axes.containers if not isinstance(x, BarContainer)]
    assert {to_hex(lines.get_color()[0]) for bar in bars for lines in bar[2]} == {INK}
    assert [x.get_text() for x in axes.get_yticklabels()] == [
        "subject add (40)",
        "color alter (40)",
    ]
    assert axes.yaxis_inverted()  # the first type on top
    assert axes.get_xlim() == (0, 100)
    assert_grid_behind(axes, "x")


def test_a_drawn_report_is_titled_by_its_own_name_and_those_it_stands_against():
    mine, base, other = (by_hand(x, types=False) for x in ("mine", "base", "other"))
    assert draw_report(mine).get_suptitle() == "mine"
    found = draw_report(base, other, mine).get_suptitle()
    assert found == "mine, against other, against base"
    assert draw_report(mine, mine).get_suptitle() == "mine"


def test_long_titles_are_wrapped_into_the_figure(tmp_path):
    name = "labs/editor + releases/adapter-with-quite-a-long-name-of-its-own.safetensors"
    figure = draw_report(by_hand("base"), by_hand(name))
    write_picture(figure, tmp_path / "report.png")
    for axes in some(figure.axes):
        box = axes.title.get_window_extent()
        assert (box.x0 >= 0, box.x1 <= figure.bbox.x1) == (True, True), axes.get_title()
    bars, lines, _ = figure.axes
    assert bars.title.get_window_extent().x1 < lines.title.get_window_extent().x0
    for axes in (bars, lines):
        legend = axes.get_legend().get_window_extent()
        assert 0 <= legend.y0 < legend.y1 < axes.xaxis.label.get_window_extent().y0


def test_a_drawn_report_says_where_chains_are_few():
    few = draw_report(by_hand(count=9))
    assert [axes.get_xlabel() for axes in few.axes[:2]] == [
        "turn (some points over fewer than 10 chains)"
    ] * 2
    assert few.axes[2].get_yticklabels()[0].get_text() == "subject add (9, few)"
    many = draw_report(by_hand(count=10))
    assert [axes.get_xlabel() for axes in many.axes[:2]] == ["turn"] * 2


def test_what_does_not_count_is_named_up_to_a_number():
    found = evaluation([[1]])
    left_out = {str(i): "no image" for i in range(25)}
    report = report_of(found, chains_of(found), title="x", left_out=left_out)
    assert lost_in_short(report, most=3)[-1] == "... and 22 more"


def test_the_turns_without_a_measure_are_the_most_of_either_report():
    """Consistency has 1 before and 2 after; a term that only one of them misses stays."""
    before = evaluation([[1], [1]], [[0.5], [nan]], looks=[[nan], [1]], object=[[1], [1]])
    after = evaluation([[1], [1]], [[nan], [nan]], looks=[[1], [1]], object=[[nan], [1]])
    expected = {"consistency": 2, "looks": 1, "object": 1}
    for pair in ((before, after), (after, before)):
        report = report_difference(*pair, chains_of(before), title="x", left_out={})
        assert report.unmeasured == expected
    same = report_difference(before, before, chains_of(before), title="x", left_out={})
    assert same.unmeasured == {"consistency": 1, "looks": 1}


def test_paired_differences_are_of_the_chains_that_count_in_both():
    before = evaluation([[1, 0], [0, 0], [1, nan], [1, 1]], [[0.5, 0.5]] * 4, lost=[(2, 1)])
    after = evaluation([[nan, 1], [1, 1], [0, 0], [1, 1]], [[0.5, 0.6]] * 4, lost=[(0, 0)])
    report = report_difference(before, after, chains_of(before), title="x", left_out={"z": "gone"})
    assert (report.asked, report.scored, set(report.lost)) == (5, 4, {"c0", "c2"})
    for metric, turn, estimate, count in (
        ("marginal", 1, 0, 3),  # one gained, one lost
        ("marginal", 2, 200 / 3, 3),
        ("content_consistency", 2, 10, 4),
        ("overall", 2, 100 * (0.6**0.5 - 0.25**0.5), 2),
    ):
        number = report.find(metric, turn)
        assert (number.estimate, number.count) == (pytest.approx(estimate, abs=1e-4), count)
    changes = most_changed(before, after)
    assert [(x.row, x.turns) for x in changes] == [(1, 2), (3, 0)]
    same = report_difference(before, before, chains_of(before), title="x", left_out={})
    assert {x.estimate for x in same.estimates} == {0.0}
    overalls = [x for x in same.estimates if x.metric == "overall"]
    assert all(x.low < 0 < x.high for x in some(overalls))


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


def test_markdown_shows_text_of_others_as_it_stands():
    found = evaluation([[1]])
    text = "<img src=x onerror=y> [a](http://b) ![c](d) **e** `f` | g\n# h"
    page = markdown(report_of(found, chains_of(found), title=text, left_out={text: text}))
    assert "<img" not in page
    assert "](" not in page.replace(r"\](", "")
    assert "http://" not in page
    assert "**e**" not in page
    assert "\n# h" not in page
