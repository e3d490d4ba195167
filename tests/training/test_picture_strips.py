"""Strips: which picture, word and score stands where, in which color and frame."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from mteditflow.evaluation.figures import AMBER, BAD, DPI, FAINT, GOOD, INK, SOFT, house_style
from mteditflow.rewards import Fault, Lost, TurnScores
from mteditflow.training.pictures import Strip, draw_before_after, draw_strips
from mteditflow.training.pictures.before_after import random_rows, risen_and_fallen
from mteditflow.training.pictures.page import BASELINE, line_height, text_width, wrap
from mteditflow.training.pictures.strips import (
    BLOCK_GAP,
    GAP,
    LABEL,
    LARGE,
    MARGIN,
    NARROWEST,
    OVER_SCORES,
    SCORE_SIZE,
    SMALL,
    TEXT_SIZE,
    TITLE_SIZE,
    UNDER_HEADER,
    UNDER_STRIP,
)
from tests.loops import some
from tests.samples_of_scores import evaluation, few_resamples, nan, turn_scores

__all__ = ["few_resamples"]  # a fixture of every test here

FAULT = Fault.format.value
MARKS = ("✓ followed", "✗ failed", "no score")
LONG_NAME = "quality of what was made in pictures"


def gray(level, size=(12, 12)):
    return Image.new("RGB", size, (level, level, level))


def strip(chain="c", words=("x",), level=0, size=(12, 12), label="", terms=None, row=0):
    """Pictures are of the gray ``level``, ``level`` + 1 and so on."""
    shown = [gray(level + n, size) for n in range(len(words) + 1)]
    return Strip(chain, words, shown, terms or {"following": turn_scores([[5.0] * len(words)])},
                 row, label)  # fmt: skip


def terms():
    """Two trajectories of three turns."""
    score = torch.tensor([[5.0, 3.0, nan], [2.0, 2.5, nan]])
    lost = {(0, 2): Lost(Fault.format, "no JSON", 1)}
    return {
        "following": TurnScores(score, torch.ones(2, 3) > 0, lost),
        "looks": turn_scores([[0.5, -2.0, nan], [1.25, 10.0, 0.1236]]),
        LONG_NAME: turn_scores([[1.0] * 3] * 2),
    }


WORDS = ("Make it snow on all of the roofs and the trees", "Add $5", "Remove the boat")


@pytest.fixture(scope="module")
def figure():
    """Two strips of three turns of one chain, with labels."""
    members = [
        strip("chain 7", WORDS, 10 * (1 + row), (12, 18), f"member {row}", terms(), row)
        for row in (0, 1)
    ]
    return draw_strips(members, success_at=5, title="Round 9 of a run")


def boxes(figure):
    """(left, top, width, height) of the pictures, in inches from the top left corner."""
    width, height = figure.get_size_inches()
    places = [axes.get_position(original=True) for axes in figure.axes]
    return np.array([(p.x0 * width, (1 - p.y1) * height, p.width * width, p.height * height)
                     for p in places])  # fmt: skip


def levels(figure):
    return [int(axes.images[0].get_array()[0, 0, 0]) for axes in figure.axes]


def texts(figure, words):
    """(x, top, text) of what is said in these words, in inches from the top left corner."""
    width, height = figure.get_size_inches()
    found = [text for text in figure.texts if text.get_text() == words]
    return [
        (x * width, (1 - y) * height - BASELINE * text.get_fontsize() / 72, text)
        for text in found
        for x, y in [text.get_position()]
    ]


def look(text):
    return to_hex(text.get_color()), text.get_ha(), text.get_fontsize()


def test_pictures_stand_in_rows_of_one_size_with_gaps(figure):
    assert levels(figure) == [10, 11, 12, 13, 20, 21, 22, 23]
    left, top, width, height = boxes(figure).T
    assert width == pytest.approx(SMALL)
    assert height == pytest.approx(SMALL * 18 / 12)
    starts = [MARGIN + LABEL + i * (SMALL + GAP) for i in range(4)]
    assert left == pytest.approx(starts * 2)
    assert top[:4] == pytest.approx(top[0])
    assert figure.get_size_inches()[0] == pytest.approx(starts[-1] + SMALL + MARGIN)


def test_strips_are_as_far_apart_as_their_scores_need(figure):
    """The third turn has the most lines below it: a lost score takes several."""
    _, top, _, height = boxes(figure).T
    with house_style():
        most = len(wrap(f"lost: {FAULT}", SMALL, SCORE_SIZE)) + 2 + lines_of_long_name()
        fewer = 2 + lines_of_long_name()
    room = line_height(SCORE_SIZE) * most + UNDER_STRIP
    assert top[4] - top[0] == pytest.approx(height[0] + room)
    below = figure.get_size_inches()[1] - top[4] - height[0]
    room = line_height(SCORE_SIZE) * fewer + UNDER_STRIP
    assert below == pytest.approx(room + MARGIN / 2)


def lines_of_long_name():
    """Lines of its name, and one of its value."""
    return len(wrap(LONG_NAME, SMALL, SCORE_SIZE)) + 1


def test_frames_surround_what_a_turn_made_and_are_dashed_without_a_score(figure):
    colors = [{to_hex(side.get_edgecolor()) for side in axes.spines.values()}
              for axes in figure.axes]  # fmt: skip
    assert colors == [{FAINT}, {GOOD}, {AMBER}, {INK}, {FAINT}, {BAD}, {AMBER}, {INK}]
    styles = [axes.spines["left"].get_linestyle() for axes in figure.axes]
    assert [isinstance(style, str) for style in styles] == [True, True, True, False] * 2
    sides = [side for axes in figure.axes for side in axes.spines.values()]
    assert all(side.get_visible() for side in some(sides))
    widths = [axes.spines["top"].get_linewidth() for axes in figure.axes]
    assert widths[0] < widths[1] == widths[2] == widths[3]
    assert widths[4] == widths[0]


def test_pictures_have_no_axes_and_keep_their_pixels(figure):
    for axes in some(figure.axes):
        assert (len(axes.get_xticks()), len(axes.get_yticks())) == (0, 0)
        assert axes.images[0].get_interpolation() == "auto"
        assert axes.images[0].get_array().shape == (18, 12, 3)


def test_title_and_legend_stand_above_from_the_left(figure):
    ((x, top, title),) = texts(figure, "Round 9 of a run")
    assert (x, top) == (pytest.approx(MARGIN), pytest.approx(0.8 * MARGIN))
    assert look(title) == (INK, "left", TITLE_SIZE)
    ((x, top, legend),) = texts(
        figure,
        "Frames: green, followed (a score of 5 or more); amber, half of that or more; red, less; "
        "dashed, no score.",
    )
    assert (x, top) == pytest.approx((MARGIN, 0.8 * MARGIN + line_height(TITLE_SIZE) + 0.03))
    assert look(legend) == (SOFT, "left", SCORE_SIZE)
    header = line_height(TEXT_SIZE) * 2 + UNDER_HEADER
    top = MARGIN + line_height(TITLE_SIZE) + line_height(SCORE_SIZE) + 0.2 + header
    assert boxes(figure)[0][1] == pytest.approx(top)


def test_a_long_legend_is_wrapped_and_names_the_score_of_a_followed_turn():
    figure = draw_strips([strip()], success_at=0.5, title="")
    first, second, *_ = figure.texts
    assert f"{first.get_text()} {second.get_text()}" == (
        "Frames: green, followed (a score of 0.5 or more); amber, half of that or more; red, less; "
        "dashed, no score."
    )
    tops = [texts(figure, text.get_text())[0][1] for text in (first, second)]
    assert tops[1] - tops[0] == pytest.approx(line_height(SCORE_SIZE))
    top = MARGIN + 2 * line_height(SCORE_SIZE) + 0.2 + 2 * line_height(TEXT_SIZE) + UNDER_HEADER
    assert boxes(figure)[0][1] == pytest.approx(top)


def test_instructions_are_centered_above_their_turn(figure):
    left, top, width, _ = boxes(figure)[:4].T
    with house_style():
        first = wrap(WORDS[0], SMALL, TEXT_SIZE)
    assert len(first) == 2
    columns = [["chain 7", "reference"], first, ["Add $5"], ["Remove the boat"]]
    for i, lines in enumerate(some(columns)):
        for n, line in enumerate(some(reversed(lines))):
            ((x, y, text),) = texts(figure, line)
            assert look(text) == ((INK, "center", TEXT_SIZE) if i else (SOFT, "center", SCORE_SIZE))
            assert x == pytest.approx(left[i] + width[i] / 2)
            bottom = y + line_height(text.get_fontsize()) * (n + 1)
            assert bottom == pytest.approx(top[0] - UNDER_HEADER)


def test_labels_are_written_upwards_beside_their_strip(figure):
    width, height = figure.get_size_inches()
    for row in (0, 1):
        (text,) = (text for text in figure.texts if text.get_text() == f"member {row}")
        left, top, _, tall = boxes(figure)[4 * row]
        x, y = text.get_position()
        assert MARGIN < x * width < left
        assert (1 - y) * height == pytest.approx(top + tall / 2)
        assert (text.get_rotation(), text.get_va()) == (90, "center")
        assert look(text) == (INK, "center", TEXT_SIZE)


def scores_under(figure, picture):
    """(name, value, color of the value) of each line under a picture; "" where there is none."""
    left, top, wide, tall = boxes(figure)[picture]
    (width, height), lines = figure.get_size_inches(), {}
    for text in some(figure.texts):
        x, y = text.get_position()
        down = (1 - y) * height - BASELINE * SCORE_SIZE / 72 - top - tall - OVER_SCORES
        line = down / line_height(SCORE_SIZE)
        if -1e-6 < line < 9 and text.get_fontsize() == SCORE_SIZE and text.get_text():
            if x * width == pytest.approx(left):
                assert look(text)[1:] == ("left", SCORE_SIZE)
                assert text.get_text() in MARKS or look(text)[0] == SOFT
                lines.setdefault(round(line, 6), ["", "", ""])[0] = text.get_text()
            elif x * width == pytest.approx(left + wide):
                color, side, _ = look(text)
                assert side == "right"
                lines.setdefault(round(line, 6), ["", "", ""])[1:] = text.get_text(), color
    assert sorted(lines) == list(range(len(lines)))
    return [tuple(lines[line]) for line in sorted(lines)]


def test_scores_stand_under_their_turn_names_left_and_values_right(figure):
    with house_style():
        names = [(line, "", "") for line in wrap(LONG_NAME, SMALL, SCORE_SIZE)]
        fault = [("", line, BAD) for line in wrap(f"lost: {FAULT}", SMALL, SCORE_SIZE)]
    wide = [*names, ("", "1", INK)]
    assert len(names) == 2
    assert len(fault) > 1
    second = [scores_under(figure, picture) for picture in (5, 6, 7)]
    assert second == [
        [("following", "2", INK), ("looks", "1.250", INK), *wide],
        [("following", "2.500", INK), ("looks", "10", INK), *wide],
        [("following", "not measured", SOFT), ("looks", "0.124", INK), *wide],
    ]
    first = [scores_under(figure, picture)[:n] for picture, n in ((1, 4), (2, 4), (3, 9))]
    assert first[0][:2] == [("following", "5", INK), ("looks", "0.500", INK)]
    assert first[1][:2] == [("following", "3", INK), ("looks", "-2", INK)]
    looks = ("looks", "not measured", SOFT)
    assert first[2] == [("following", "", ""), *fault, looks, *wide]


def test_a_value_that_is_just_too_wide_takes_a_line_of_its_own():
    shown = strip(terms={"following": turn_scores([[5.0]])})
    with house_style():
        width = text_width("following   5", SCORE_SIZE)
        assert shown.score_lines(0, width) == [("following", "5", INK)]
        apart = [("following", "", SOFT), ("", "5", INK)]
        assert shown.score_lines(0, width - 1e-6) == apart


def test_chains_stand_side_by_side_where_there_is_room():
    figure = draw_strips([strip("a", level=1), strip("b", level=5)], success_at=5, title="t")
    left, top, _, _ = boxes(figure).T
    assert levels(figure) == [1, 2, 5, 6]
    wide = 2 * SMALL + GAP
    second = MARGIN + wide + BLOCK_GAP
    assert left == pytest.approx([MARGIN, MARGIN + SMALL + GAP, second, second + SMALL + GAP])
    assert top == pytest.approx(top[0])
    assert figure.get_size_inches()[0] == pytest.approx(2 * (MARGIN + wide) + BLOCK_GAP)


def test_three_chains_are_two_rows_and_the_last_is_at_the_left():
    shown = [strip(name, level=5 * i) for i, name in enumerate("abc")]
    figure = draw_strips(shown, success_at=5, title="t")
    left, top, _, _ = boxes(figure)[::2].T
    assert (left[2], top[1]) == (pytest.approx(left[0]), pytest.approx(top[0]))
    header = line_height(SCORE_SIZE) * 2  # of the names, which are higher than one line of words
    one = SMALL + line_height(SCORE_SIZE) + UNDER_STRIP
    assert top[2] - top[0] == pytest.approx(max(header, line_height(TEXT_SIZE) * 2) + UNDER_HEADER
                                            + one + BLOCK_GAP)  # fmt: skip
    below = figure.get_size_inches()[1] - top[2]
    assert below == pytest.approx(one + MARGIN / 2)


def test_wide_chains_stand_under_each_other():
    """Two of two large pictures have room beside each other; two of three have not."""
    for turns, apart in ((1, False), (2, True)):
        shown = [strip(name, ["x"] * turns, size=(128, 128)) for name in "ab"]
        figure = draw_strips(shown, success_at=5, title="t")
        left, top, width, _ = boxes(figure)[:: turns + 1].T
        assert width == pytest.approx(LARGE)
        assert (top[1] > top[0] + LARGE) == apart == (left[0] == pytest.approx(left[1]))


def test_pictures_side_by_side_are_level_though_instructions_are_not():
    long = ["x " * 60]
    figure = draw_strips([strip("a", long), strip("b")], success_at=5, title="t")
    assert boxes(figure)[:, 1] == pytest.approx(boxes(figure)[0][1])
    ((_, top, _),) = texts(figure, "b")
    assert boxes(figure)[0][1] - top == pytest.approx(2 * line_height(SCORE_SIZE) + UNDER_HEADER)


def test_chains_of_unequal_members_begin_level():
    members = [strip("a", label="1"), strip("a", label="2"), strip("b", label="1")]
    figure = draw_strips(members, success_at=5, title="t")
    top = boxes(figure)[::2, 1]
    assert top[0] == pytest.approx(top[2])
    assert top[1] > top[0]


def test_a_small_figure_has_room_for_its_title():
    figure = draw_strips([strip()], success_at=5, title="t")
    assert figure.get_size_inches()[0] == pytest.approx(NARROWEST + 2 * MARGIN)


def test_one_chain_with_other_words_has_its_own_instructions():
    figure = draw_strips([strip("a", ["x"]), strip("a", ["y"])], success_at=5, title="t")
    assert len(texts(figure, "x")) == len(texts(figure, "y")) == 1
    assert len(texts(figure, "reference")) == 2


def test_long_names_of_chains_are_cut_after_three_lines():
    figure = draw_strips([strip("a " + "chain" * 40, ["y"])], success_at=5, title="t")
    said = [text.get_text() for text in figure.texts]
    assert len(said[said.index("reference") - 3 : said.index("reference")]) == 3
    assert said[said.index("reference") - 3] == "a"
    assert said[said.index("reference") - 1].endswith(" …")


@pytest.mark.parametrize(
    ("size", "cell", "ratio"),
    [
        ((127, 127), SMALL, 1),
        ((128, 64), LARGE, 0.5),
        ((64, 128), LARGE, 2),
        ((40, 100), SMALL, 2),
        ((12, 18), SMALL, 1.5),
    ],
)
def test_pictures_keep_their_shape_up_to_twice_their_width(size, cell, ratio):
    figure = draw_strips([strip(size=size)], success_at=5, title="t")
    _, _, width, height = boxes(figure).T
    assert width == pytest.approx(cell)
    assert height == pytest.approx(cell * ratio)


def test_the_tallest_and_the_largest_reference_make_the_room_of_all():
    flat, tall = strip("a", size=(128, 64)), strip("a", size=(64, 64))
    tall = replace(tall, images=[tall.images[0], gray(1, (64, 32))])
    _, _, width, height = boxes(draw_strips([flat, tall], success_at=5, title="t")).T
    assert width == pytest.approx(LARGE)
    assert height == pytest.approx(LARGE)


def test_a_strip_without_label_starts_at_the_margin_and_one_label_moves_all():
    figure = draw_strips([strip("a"), strip("a", label="z")], success_at=5, title="t")
    assert boxes(figure)[[0, 2], 0] == pytest.approx(MARGIN + LABEL)
    ((_, _, label),) = texts(figure, "z")
    assert look(label) == (INK, "center", TEXT_SIZE)
    figure = draw_strips([strip("a"), strip("a")], success_at=5, title="t")
    assert boxes(figure)[[0, 2], 0] == pytest.approx(MARGIN)


def test_text_is_measured_as_it_is_drawn():
    with house_style():
        drawn = Figure(dpi=DPI).text(0, 0, "Make it snow", fontsize=9.5)
        renderer = FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()
        extent = drawn.get_window_extent(renderer).width / DPI
        assert text_width("Make it snow", 9.5) == pytest.approx(extent)
        assert text_width("Make it snow", 9.5, "bold") > extent
        assert text_width("$x$", 9.5) > text_width("$x", 9.5)
    assert line_height(72) == pytest.approx(1.32)


def test_wrapping_fills_lines_and_breaks_only_words_wider_than_a_line():
    with house_style():
        width = text_width("aaa aaa", 9.5)
        assert wrap("aaa aaa aaa", width, 9.5) == ["aaa aaa", "aaa"]
        assert wrap("aaa aaa aaa", width - 1e-6, 9.5) == ["aaa"] * 3
        assert wrap("  aaa\n aaa ", width, 9.5) == ["aaa aaa"]
        width = text_width("xxxx", 9.5)
        assert wrap("a xxxxxx b", width, 9.5) == ["a", "xxxx", "xx b"]
        assert wrap("x", 0.0, 9.5) == ["x"]


def test_wrapping_cuts_what_is_beyond_the_most_lines():
    with house_style():
        width = text_width("xxxx …", 9.5)
        assert wrap("xxxx xxxx", width, 9.5, most=2) == ["xxxx", "xxxx"]
        assert wrap("xxxx yyyy zzzz", width, 9.5, most=2) == ["xxxx", "yyyy …"]
        assert wrap("xxxx yyyyy zzzz", text_width("yyyyy", 9.5), 9.5, most=2)[1][-2:] == " …"
        assert len(wrap("xxxx " * 20, width, 9.5)) == 12


def twenty(size=(12, 12), labels=("",), turns=20):
    """Strips of so many turns, of which the third fails and the fourth has no score."""
    score = torch.ones(1, turns)
    score[0, 2], score[0, 3] = 0, nan
    terms = {"looks": turn_scores([[0.25] * turns]), "following": turn_scores(score.tolist())}
    words = [f"Word {n}" for n in range(1, turns + 1)]
    shown = [strip("c", words, 100 * i, size, label, terms) for i, label in enumerate(labels)]
    return draw_strips(shown, success_at=1, title="t")


def test_twenty_turns_are_wrapped_into_rows_that_can_be_read_at_1600_pixels():
    figure = twenty()
    left, top, width, _ = boxes(figure).T
    assert levels(figure) == list(range(21))  # the reference first
    assert width == pytest.approx(SMALL)
    assert np.unique(top.round(6), return_counts=True)[1].tolist() == [6, 6, 6, 3]
    assert left == pytest.approx([MARGIN + (n % 6) * (SMALL + GAP) for n in range(21)])
    assert figure.get_size_inches()[0] * DPI < 1.06 * 1600
    for n in (1, 6, 20):
        ((x, y, _),) = texts(figure, f"{n}. Word {n}")
        assert x == pytest.approx(left[n] + SMALL / 2)
        assert y + line_height(TEXT_SIZE) + UNDER_HEADER == pytest.approx(top[n])
    marks = [scores_under(figure, picture) for picture in (1, 3, 4, 7)]
    assert [own[0] for own in marks] == [
        ("✓ followed", "", ""), ("✗ failed", "", ""), ("no score", "", ""), ("✓ followed", "", "")
    ]  # fmt: skip
    assert marks[1][1:] == [("looks", "0.250", INK), ("following", "0", INK)]
    (failed,) = (text for text in figure.texts if text.get_text() == "✗ failed")
    assert to_hex(failed.get_color()) == BAD


def test_members_of_a_long_chain_stand_under_each_other_row_by_row():
    figure = twenty(labels=("before", "after"))
    top = boxes(figure)[:, 1]
    expected = [n + 100 * late for row in (range(6), range(6, 12), range(12, 18), range(18, 21))
                for late in (0, 1) for n in row]  # fmt: skip
    assert levels(figure) == expected
    assert (np.diff(top) >= -1e-9).all()
    assert [text.get_text() for text in figure.texts if text.get_rotation() == 90] == [
        "before", "after"
    ] * 4  # fmt: skip


@pytest.mark.parametrize(
    ("size", "turns", "rows"), [((12, 12), 8, [9]), ((12, 12), 9, [5, 5]), ((128, 128), 5, [6]),
                                ((128, 128), 6, [4, 3])]
)  # fmt: skip
def test_a_chain_is_wrapped_where_one_row_is_too_wide_into_rows_of_one_length(size, turns, rows):
    figure = twenty(size, turns=turns)
    assert np.unique(boxes(figure)[:, 1].round(6), return_counts=True)[1].tolist() == rows
    numbered = any(text.get_text().startswith("1. ") for text in figure.texts)
    assert numbered == (len(rows) > 1)


def pair():
    """Rows: gained 2, lost 1, equal, gained 1, lost 2; a turn is followed from a score of 2."""
    before = [[0, 0, 2], [2, 2, 2], [2, 0, 0], [0, 0, 2], [2, 2, 0]]
    after = [[2, 2, 2], [0, 2, 2], [0, 2, 0], [2, 0, 2], [0, 0, 0]]
    return evaluation(before, success_at=2), evaluation(after, success_at=2, after=9)


@pytest.fixture(scope="module")
def compared():
    """Pictures of row r are of the gray 10 r before, and 100 more after."""
    before, after = pair()
    shown = [[[gray(100 * late + 10 * row + n) for n in range(4)] for row in range(5)]
             for late in (0, 1)]  # fmt: skip
    return draw_before_after(before, after, *shown)


def test_before_stands_above_after_with_its_own_pictures_and_scores(compared):
    """Without numbers four chains are chosen and two, here the one left, drawn at random."""
    starts = levels(compared)[::4]
    assert starts == [10 * row + late for row in (0, 3, 4, 1, 2) for late in (0, 100)]
    labels = [x.get_text() for x in compared.texts if x.get_text() in ("before", "after")]
    assert labels == ["before", "after"] * 5
    frames = [to_hex(axes.spines["left"].get_edgecolor()) for axes in compared.axes[:8]]
    assert frames == [FAINT, BAD, BAD, GOOD, FAINT, GOOD, GOOD, GOOD]
    assert [scores_under(compared, picture)[0] for picture in (1, 5)] == [
        ("following", "0", INK),
        ("following", "2", INK),
    ]


def test_chains_are_named_by_why_they_are_shown(compared):
    names = [x.get_text() for x in compared.texts if ": chain c" in x.get_text()]
    assert names == [
        *("gained: chain c0", "gained: chain c3", "lost: chain c4", "lost: chain c1"),
        "at random: chain c2",
    ]
    assert len(texts(compared, "do 0")) == 5


def test_the_title_tells_the_choice_and_the_draw(compared):
    (last,) = (i for i, x in enumerate(compared.texts) if x.get_text().startswith("Frames: "))
    title = " ".join(x.get_text() for x in compared.texts[:last])
    ((_, top, _),) = texts(compared, compared.texts[last].get_text())
    assert last > 1
    assert top == pytest.approx(0.8 * MARGIN + line_height(TITLE_SIZE) * last + 0.03)
    drawn = "Then 1 drawn at random (seed 0) of the others."
    assert title == f"{risen_and_fallen(*pair(), count=4).how} {drawn}"
    assert "(a score of 2 or more)" in " ".join(x.get_text() for x in compared.texts)


def test_without_others_no_draw_is_told():
    before, after = pair()
    shown = [[gray(0)] * 4] * 5
    figure = draw_before_after(before, after, shown, shown, count=2, random=0)
    assert len(figure.axes) == 16
    assert "random" not in " ".join(x.get_text() for x in figure.texts)


def test_of_equal_changes_the_first_are_taken_and_two_at_random_by_default():
    before, after = evaluation([[0]] * 8), evaluation([[1]] * 8, after=3)
    assert risen_and_fallen(after, before, count=3).rows == [0, 1, 2]
    assert risen_and_fallen(before, after, count=3).rows == [0, 1, 2]
    shown = [[gray(0)] * 2] * 8
    figure = draw_before_after(before, after, shown, shown)
    drawn = random_rows(before, after, count=2, seed=0, without=[0, 1, 2, 3])
    names = [x.get_text() for x in figure.texts if ": chain c" in x.get_text()]
    gained = [f"gained: chain c{row}" for row in range(4)]  # by one turn, the least there is
    assert names == [*gained, *(f"at random: chain c{row}" for row in drawn)]


def test_draws_differ_by_their_seed():
    before = evaluation([[0]] * 8)
    draws = {tuple(random_rows(before, before, count=4, seed=seed)) for seed in range(6)}
    assert len(draws) == 6


def test_of_text_to_image_the_place_of_the_reference_stays_empty():
    whole = strip("c", ("x",), 10, (64, 32))
    without = replace(whole, images=[None, *whole.images[1:]])
    figures = [draw_strips([each], success_at=5, title="t") for each in (whole, without)]
    assert [levels(figure) for figure in figures] == [[10, 11], [11]]
    assert np.allclose(boxes(figures[1]), boxes(figures[0])[1:])
