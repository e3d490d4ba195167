"""Histograms: which rewards they count, and what they say of the spread in groups."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from mteditflow import Signal
from mteditflow.evaluation.figures import AMBER, BLUE, FAINT, INK, SOFT
from mteditflow.training.pictures import draw_histograms, histograms
from tests.loops import some
from tests.samples_of_scores import nan

FOLLOWING = [0.12, 0.2, 0.31, 0.93, 0.6, 0.9, 0.5, 0.5, 0.5]
GROUP = [7, 7, 7, 2, 2, 2, 5, 5, 5]  # groups in the order of their means: 7, 5, 2
MEMBERS = [[0.12, 0.2, 0.31], [0.5, 0.5, 0.5], [0.93, 0.6, 0.9]]


@pytest.fixture(scope="module")
def figure():
    """ "consistency" lacks two rewards, lost, and one with nothing to measure."""
    everything = torch.ones(9) > 0
    some_lost = torch.tensor(FOLLOWING, dtype=torch.float64)
    some_lost[[0, 4, 8]] = nan
    valid = everything.clone()
    valid[[0, 4]] = False
    rewards = {
        "following": Signal(torch.tensor(FOLLOWING, dtype=torch.float64), everything),
        "consistency": Signal(some_lost, valid, some_lost.isfinite()),
        "looks": Signal(torch.full((9,), -2.0), everything),
    }
    return draw_histograms(rewards, torch.tensor(GROUP), title="Round 3")


@pytest.fixture(scope="module")
def panels(figure):
    return np.array(figure.axes).reshape(2, 3)


def test_a_column_is_a_reward_with_its_groups_below(figure, panels):
    assert figure.get_suptitle() == "Round 3"
    places = [x.get_subplotspec() for x in panels.flatten()]
    assert [(x.rowspan.start, x.colspan.start) for x in places] == [
        (row, column) for row in (0, 1) for column in (0, 1, 2)
    ]
    width, height = figure.get_size_inches()
    assert (width, height) == (pytest.approx(3 * histograms.WIDTH), histograms.HEIGHT)


def test_one_reward_has_room_for_a_title_and_stands_in_its_color_over_its_groups():
    value = torch.tensor([0.75, 0.25, 0.0, 0.0])
    reward = {"consistency": Signal(value, value >= 0)}
    figure = draw_histograms(reward, torch.tensor([0, 0, 1, 1]), title="")
    assert figure.get_size_inches()[0] == histograms.LEAST_WIDTH > histograms.WIDTH
    above, below = figure.axes
    assert {to_hex(bar.get_facecolor()) for bar in above.patches} == {AMBER}
    *members, _ = below.lines
    drawn = [(list(x.get_xdata()), list(x.get_ydata()), x.get_color()) for x in members]
    assert drawn == [([1, 1], [0, 0], AMBER), ([2, 2], [0.75, 0.25], AMBER)]
    spans = [segment.tolist() for bars in below.collections for segment in bars.get_segments()]
    assert spans == [[[1, 0], [1, 0]], [[2, 0.25], [2, 0.75]]]


def test_titles_give_means_and_count_lost_and_unmeasured_apart(panels):
    assert [axes.get_title(loc="left") for axes in panels.flatten()] == [
        "following: mean 0.507 of 9",
        "consistency: mean 0.557 of 6, 2 lost, 1 not measured",
        "looks: mean -2.000 of 9",
        "spread in groups: std 0.076; equal in 1 of 3",
        "spread in groups: std 0.023; equal in 1 of 3",
        "spread in groups: std 0.000; equal in 3 of 3",
    ]


def test_axes_are_named_once_a_row(panels):
    assert [axes.get_ylabel() for axes in panels.flatten()] == [
        *("trajectories", "", ""),
        *("reward", "", ""),
    ]
    assert {axes.get_xlabel() for axes in panels[0]} == {"reward"}
    assert {axes.get_xlabel() for axes in panels[1]} == {"groups, by their mean"}


def test_bars_count_what_was_measured_in_the_range_of_the_rewards(panels):
    for axes, count, hue in zip(panels[0], (9, 6, 9), (BLUE, AMBER, SOFT), strict=True):
        assert sum(bar.get_height() for bar in axes.patches) == count
        assert {to_hex(bar.get_facecolor()) for bar in axes.patches} == {hue}
        assert len(axes.patches) == 24
    first, last = panels[0, 0].patches[0], panels[0, 0].patches[-1]
    assert 0.1 < first.get_x() < 0.12  # bars leave a gap
    assert 0.93 < last.get_x() + last.get_width() < 0.95
    assert [bar.get_height() for bar in (first, last)] == [1, 1]
    assert panels[0, 0].get_xlim() == pytest.approx((0.1, 0.95))
    assert panels[0, 1].get_xlim() == pytest.approx((0.2, 0.95))
    assert panels[0, 2].get_xlim() == pytest.approx((-2.05, -1.95))


def test_a_dotted_line_is_the_mean(panels):
    means = [np.mean(FOLLOWING), np.mean([0.2, 0.31, 0.93, 0.9, 0.5, 0.5]), -2]
    for axes, mean in some(zip(panels[0], means, strict=True)):
        (line,) = axes.lines
        assert line.get_xdata() == pytest.approx([mean, mean])
        assert (to_hex(line.get_color()), line.get_linestyle()) == (INK, ":")


def test_groups_stand_in_the_order_of_their_means(panels):
    axes = panels[1, 0]
    *members, means = axes.lines
    assert [line.get_ydata().tolist() if hasattr(line.get_ydata(), "tolist") else line.get_ydata()
            for line in members] == MEMBERS  # fmt: skip
    assert [list(line.get_xdata()) for line in members] == [[1] * 3, [2] * 3, [3] * 3]
    assert list(means.get_xdata()) == [1, 2, 3]
    assert means.get_ydata() == pytest.approx([np.mean(x) for x in MEMBERS])
    assert (to_hex(means.get_color()), means.get_marker()) == (INK, "_")
    assert {line.get_linestyle() for line in axes.lines} == {"None"}  # marks, joined by nothing
    spans = [segment.tolist() for bars in axes.collections for segment in bars.get_segments()]
    assert spans == [[[i, min(x)], [i, max(x)]] for i, x in enumerate(MEMBERS, start=1)]
    assert {to_hex(bars.get_color()[0]) for bars in axes.collections} == {FAINT}


def test_members_have_the_color_of_their_reward_in_both_panels(panels):
    for above, below, hue in zip(*panels, (BLUE, AMBER, SOFT), strict=True):
        assert to_hex(above.patches[0].get_facecolor()) == hue
        members = below.lines[:-1]
        assert {to_hex(line.get_color()) for line in some(members)} == {hue}
        assert {line.get_marker() for line in members} == {"o"}
        assert all(line.get_alpha() < 1 for line in some(members))  # equal ones are seen as dark


def test_groups_have_room_at_all_four_sides(panels):
    for axes, (low, high) in zip(panels[1], ((0.1, 0.95), (0.2, 0.95), (-2.05, -1.95)),
                                 strict=True):  # fmt: skip
        room = histograms.ROOM * (high - low)
        assert axes.get_ylim() == pytest.approx((low - room, high + room))
        assert axes.get_xlim() == (pytest.approx(0.3), pytest.approx(3.7))


def test_counts_and_groups_are_whole_numbers(panels):
    counts = [axes.yaxis for axes in panels[0]]
    for axis in some(counts + [axes.xaxis for axes in panels[1]]):
        assert all(tick == round(tick) for tick in some(axis.get_major_locator().tick_values(0, 2)))


def test_marks_of_many_groups_are_thin():
    def sizes(groups):
        value = torch.linspace(0, 1, groups)
        reward = {"x": Signal(value, value >= 0)}
        axes = draw_histograms(reward, torch.arange(groups), title="").axes[1]
        member, mean = axes.lines[0], axes.lines[-1]
        width = axes.collections[0].get_linewidth()[0]
        return width, member.get_markersize(), mean.get_markersize(), mean.get_markeredgewidth()

    assert sizes(1) == sizes(40) == pytest.approx((3.6, 6, 12, 2.2))
    assert sizes(80) == pytest.approx((2.1, 3.5, 7.5, 1.3))


def test_equal_rewards_have_no_spread_whatever_their_rounding():
    """Three times 0.1 is not 0.3 in float64, so the standard deviation is not quite 0."""
    value = torch.tensor([0.1] * 3, dtype=torch.float64)
    figure = draw_histograms({"x": Signal(value, value > 0)}, torch.zeros(3).long(), title="")
    title = figure.axes[1].get_title(loc="left")
    assert title == "spread in groups: std 0.000; equal in 1 of 1"


def test_a_round_that_lost_all_rewards_has_no_mean():
    figure = draw_histograms({"x": Signal([nan, nan], [False, True], [False, False])},
                             torch.tensor([0, 0]), title="")  # fmt: skip
    above, below = figure.axes
    assert above.get_title(loc="left") == "x: none measured, 1 lost, 1 not measured"
    assert below.get_title(loc="left") == "spread in groups: none measured"
    assert not above.lines
    assert above.get_xlim() == (0, 1)
