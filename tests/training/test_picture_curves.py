"""Curves: which numbers each panel draws, in which colors, and the words beside them."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_hex

from mteditflow.evaluation.figures import AMBER, BAD, BLUE, FAINT, GOOD, PURPLE, SOFT
from mteditflow.metrics import FEW_CASES
from mteditflow.training.pictures import curves, draw_curves
from mteditflow.training.pictures.curves import PHASES, smooth
from mteditflow.training.pictures.histograms import SPARE, color_of
from tests.loops import some
from tests.samples_of_scores import evaluation, few_resamples, nan

__all__ = ["few_resamples"]  # a fixture of every test here

CHAINS = FEW_CASES + 1
# Followed of eleven chains at each turn: more at the end, as many, fewer, and nearly none.
AT_FIRST, MIDWAY, AT_LAST = (2, 5, 9, 2), (1, 1, 1, 1), (9, 5, 7, 1)
PANELS = ["rewards", "held_out", "overall", "marginal", "invalid", "time"]


def followed(counts, round_number, lost=()):
    """As many chains as ``counts`` follow each turn; the last chain has three turns alone."""
    rows = [[float(chain < count) for count in counts] for chain in range(CHAINS)]
    rows[-1][-1] = None
    for row, turn in lost:
        rows[row][turn] = nan
    consistency = [[None if x is None else 0.5 + 0.04 * n for n, x in enumerate(r)] for r in rows]
    return evaluation(rows, consistency, after=round_number, lost=lost)


def rounds():
    """Twelve rounds; one has no reward of consistency, one no share and no time of sampling."""
    lines = [
        {
            "round": i,
            "reward/following": i / 12,
            "reward/consistency": nan if i == 4 else 0.9 - 0.01 * i,
            "reward/looks": 0.0,
            "invalid_share": 0.01 * i,
            "seconds/sampling": 1.0,
            "seconds/other": 10.0,
            "seconds/scoring": 6.0,
            "seconds/updating": 3.0,
        }
        for i in range(1, 13)
    ]
    del lines[2]["invalid_share"], lines[2]["seconds/sampling"]
    return lines


@pytest.fixture(scope="module")
def evaluations():
    return [followed(AT_FIRST, 0, [(10, 0), (9, 3)]), followed(MIDWAY, 5), followed(AT_LAST, 12)]


@pytest.fixture(scope="module")
def figure(evaluations):
    return draw_curves(rounds(), evaluations, title="A run of $5")


@pytest.fixture(scope="module")
def panels(figure):
    return SimpleNamespace(**dict(zip(PANELS, figure.axes, strict=True)))


@pytest.fixture(scope="module")
def single():
    """One evaluation, at round 7, and no rounds yet."""
    held_out, overall, marginal = draw_curves([], [followed(AT_LAST, 7)], title="").axes
    return SimpleNamespace(held_out=held_out, overall=overall, marginal=marginal)


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def color(artist):
    """Color of a line, of bands, or of spans, without its transparency."""
    shown = artist.get_color() if hasattr(artist, "get_color") else artist.get_facecolor()
    return to_hex(shown if isinstance(shown, str) else shown[0])


def column(name):
    return [line.get(name, nan) for line in rounds()]


def ends_of(band):
    """Lowest and highest y of a filled band at each x, in the order of x."""
    corners = band.get_paths()[0].vertices
    return [(y.min(), y.max()) for y in (corners[corners[:, 0] == x, 1] for x in places(band))]


def places(band):
    return sorted(set(band.get_paths()[0].vertices[:, 0]))


def test_panels_stand_in_order_three_in_a_row_under_the_title(figure):
    assert figure.get_suptitle() == "A run of $5"
    spots = [(x.get_subplotspec().rowspan.start, x.get_subplotspec().colspan.start)
             for x in figure.axes]  # fmt: skip
    assert spots == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [x.get_title(loc="left") for x in figure.axes] == [
        "Rewards in training",
        "Held out, turn 4, percent (over chains)",
        "Overall: all turns so far, percent",
        "Marginal: this turn alone, percent",
        "Invalid rewards, percent of trajectories",
        "Seconds of a round, by phase",
    ]


def test_four_panels_are_two_rows_and_as_large_as_six(figure):
    four = draw_curves([{"round": 1, "reward/x": 1.0}], [followed(AT_LAST, 7)], title="")
    assert len(four.axes) == 4  # empty places are gone
    assert four.axes[3].get_gridspec().ncols == 3
    assert (four.get_size_inches() == figure.get_size_inches()).all()
    assert figure.get_size_inches()[0] == pytest.approx(3 * curves.PANEL_WIDTH)
    assert figure.get_size_inches()[1] == pytest.approx(
        2 * curves.PANEL_HEIGHT + curves.TITLE_HEIGHT
    )


def test_one_panel_is_wide_enough_for_a_title():
    alone = draw_curves([{"round": 1, "reward/x": 1.0}], [], title="")
    assert alone.get_size_inches()[0] == curves.LEAST_WIDTH > curves.PANEL_WIDTH
    heights = curves.PANEL_HEIGHT + curves.TITLE_HEIGHT
    assert alone.get_size_inches()[1] == pytest.approx(heights)


def test_nothing_to_draw_is_refused():
    message = r"^metrics: expected rewards of some round, or an evaluation, got neither$"
    with pytest.raises(ValueError, match=message):
        draw_curves([{"round": 1}], [], title="")


def test_each_reward_is_drawn_pale_and_as_its_mean_in_one_color(panels):
    names = ["following", "consistency", "looks"]
    assert legend(panels.rewards) == names
    colors = [BLUE, AMBER, SPARE[2]]
    lines = panels.rewards.lines
    for i, name in enumerate(some(names)):
        raw, bold = lines[2 * i : 2 * i + 2]
        assert color(raw) == color(bold) == color_of(name, i) == colors[i]
        assert list(raw.get_xdata()) == list(bold.get_xdata()) == list(range(1, 13))
        values = column(f"reward/{name}")
        np.testing.assert_array_equal(raw.get_ydata(), values)
        np.testing.assert_array_equal(bold.get_ydata(), smooth(values, 8))
        assert raw.get_alpha() < 1
        assert bold.get_alpha() is None
        assert raw.get_linewidth() < bold.get_linewidth()
    assert panels.rewards.get_xlabel() == "round (bold: mean of the last 8)"


def test_the_mean_of_a_long_run_is_over_a_share_of_it():
    lines = [{"round": i, "reward/x": float(i)} for i in range(120)]
    (axes,) = draw_curves(lines, [], title="").axes
    assert axes.get_xlabel() == "round (bold: mean of the last 10)"
    assert axes.lines[1].get_ydata()[-1] == 114.5


@pytest.mark.parametrize(
    ("values", "unit"),
    [([0.0, 1.0], True), ([0.2, nan], False), ([0.0, 1.1], False), ([-0.1, 1.0], False)],
)
def test_rewards_over_all_of_0_to_1_have_the_axis_of_that_range(values, unit):
    lines = [{"round": i, "reward/x": x, "reward/y": 0.5} for i, x in enumerate(values)]
    (axes,) = draw_curves(lines, [], title="").axes
    assert (axes.get_ylim() == curves.UNIT) == unit
    low, high = axes.get_ylim()
    assert low <= min(values)
    assert high > np.nanmax(values)


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([0.60, 0.62], (0.5984, 0.6216)),  # 8% of the spread beside the data
        ([0.5, 0.5], (0.49, 0.51)),
        ([0.0, 0.0], (0.0, 0.01)),  # no space below the range of a reward
        ([1.0, 1.0], (0.99, 1.01)),
    ],
)
def test_a_reward_of_small_spread_fills_its_axis(values, ends):
    lines = [{"round": i, "reward/x": x} for i, x in enumerate(values)]
    (axes,) = draw_curves(lines, [], title="").axes
    assert axes.get_ylim() == pytest.approx(ends)


def test_rounds_after_which_options_changed_are_marked():
    lines = [{"round": i, "reward/x": i / 10} for i in range(1, 9)]
    options = ((3, "training.learning_rate"), (6, "data.groups"), (6, "training.batch"))
    changes = [{"after_round": after, "option": name} for after, name in options]
    (axes,) = draw_curves(lines, [], title="", changes=changes).axes
    assert [x.get_text() for x in axes.texts] == [
        "training.learning_rate changed",
        "2 options changed",
    ]
    assert [x.get_xdata()[0] for x in axes.lines[2:]] == [3.5, 6.5]


def test_a_reward_that_was_always_lost_is_drawn_empty():
    (axes,) = draw_curves([{"round": 1, "reward/x": nan}], [], title="").axes
    assert axes.get_ylim() != curves.UNIT
    assert legend(axes) == ["x"]


def test_other_terms_take_their_color_by_position():
    assert [color_of("looks", i) for i in range(7)] == [*SPARE, GOOD]
    assert SPARE[:3] == (GOOD, PURPLE, SOFT)
    assert len({*SPARE, BLUE, AMBER}) == len(SPARE) + 2
    assert color_of("following", 1) == BLUE
    assert color_of("consistency", 0) == AMBER


def test_smoothing_leaves_out_lost_rounds():
    assert smooth([1.0, nan, 2.0, 4.0], window=2) == [1.0, 1.0, 2.0, 3.0]


def test_held_out_metrics_are_of_the_last_turn_with_intervals_in_their_color(panels, evaluations):
    expected = {
        "content_consistency": AMBER,
        "marginal": PURPLE,
        "instruction_following": BLUE,
        "overall": GOOD,
    }
    artists = panels.held_out.collections
    for i, (name, hue) in enumerate(some(expected.items())):
        band, spans = artists[2 * i : 2 * i + 2]
        line = panels.held_out.lines[i]
        assert color(band) == color(spans) == color(line) == hue
        estimate, low, high = zip(*([float(x[-1]) for x in e.metrics[name]] for e in evaluations),
                                  strict=True)  # fmt: skip
        assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 5, 12], list(estimate))
        assert ends_of(band) == list(zip(low, high, strict=True))
        segments = [segment.tolist() for segment in spans.get_segments()]
        assert segments == [[[x, a], [x, b]] for x, a, b in zip((0, 5, 12), low, high, strict=True)]
        assert line.get_marker() == "o"
        assert band.get_alpha() < 1
        assert spans.get_alpha() < 1
        assert band.get_linewidth() == [0]
    assert len({line.get_linewidth() for line in panels.held_out.lines}) == 1


def test_held_out_labels_count_the_chains_of_the_last_evaluation(panels):
    """Ten of eleven have a fourth turn, one of which was lost at first; ten are not few."""
    assert FEW_CASES == 10
    assert legend(panels.held_out) == ["CC (10)", "Marginal (10)", "IF (10)", "Overall (10)"]


def test_few_chains_are_called_few():
    held_out, _ = draw_curves([], [evaluation([[1]] * (FEW_CASES - 1))], title="").axes
    assert legend(held_out) == ["Marginal (9, few)", "IF (9, few)"]


def test_held_out_axes_show_all_percents_and_all_rounds(panels, single):
    for axes in (panels.held_out, single.held_out):
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] >= 100
        assert axes.get_xlabel() == "round"
    assert single.held_out.get_xlim() == (6, 8)
    low, high = panels.held_out.get_xlim()
    assert low <= 0 < 12 <= high < 20


def test_rounds_are_whole_numbers(panels, single):
    ticks = single.held_out.xaxis.get_major_locator().tick_values(6, 8)
    assert all(tick == round(tick) for tick in some(ticks))
    for axes in (panels.rewards, panels.held_out, panels.invalid, panels.time):
        assert all(tick == round(tick) for tick in some(axes.get_xticks()))


@pytest.mark.parametrize("name", ["overall", "marginal"])
def test_turns_compare_the_first_evaluation_with_the_last(panels, evaluations, name):
    axes = getattr(panels, name)
    assert legend(axes) == ["round 0", "round 12"]
    assert list(axes.get_xticks()) == [1, 2, 3, 4]
    beside = 3 * curves.BESIDE_TURNS["x"]  # so that numbers at the ends are whole
    assert axes.get_xlim() == pytest.approx((1 - beside, 4 + beside))
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 100
    looks = zip((SOFT, BLUE), ("--", "-"), (evaluations[0], evaluations[2]), strict=True)
    for i, (hue, style, shown) in enumerate(some(looks)):
        line, band = axes.lines[i], axes.collections[i]
        estimate, low, high = (x.tolist() for x in shown.metrics[name])
        assert color(line) == color(band) == hue
        assert (line.get_linestyle(), line.get_marker()) == (style, "o")
        assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2, 3, 4], estimate)
        assert (places(band), ends_of(band)) == ([1, 2, 3, 4], list(zip(low, high, strict=True)))
        assert band.get_alpha() < 1
        assert line.get_linewidth() == panels.held_out.lines[0].get_linewidth()


def numbers(axes):
    """(turn, words, above or below) of the numbers of each color."""
    assert axes.get_xlabel() == "turn"
    found = {SOFT: [], BLUE: []}
    for text in some(axes.texts):
        assert text.get_ha() == "center"
        turn, value = text.xy
        assert text.get_text() == f"{value:.0f}"
        x, y = text.get_position()
        assert x == 0
        assert abs(y) in (7, 16)  # points: a number hangs by its top, so it is moved farther
        found[to_hex(text.get_color())].append((turn, text.get_text(), "+" if y > 0 else "-"))
    return found


def test_of_two_numbers_at_a_turn_the_larger_stands_above(panels):
    """Equal numbers: the later stands above; and none is written below the axis."""
    shown = numbers(panels.marginal)
    assert shown[SOFT] == [(1, "20", "-"), (2, "45", "-"), (3, "82", "+"), (4, "22", "+")]
    assert shown[BLUE] == [(1, "82", "+"), (2, "45", "+"), (3, "64", "-"), (4, "10", "-")]


def test_low_numbers_stand_above_the_axis():
    pair = [evaluation([[1, 1]] * 9 + [[1, 0]]), evaluation([[1, 0]] * 10, after=3)]
    shown = numbers(draw_curves([], pair, title="").axes[1])
    assert shown[SOFT] == [(1, "100", "-"), (2, "90", "+")]
    assert shown[BLUE] == [(1, "100", "+"), (2, "0", "+")]


def test_a_single_evaluation_is_drawn_once_as_the_last_with_its_numbers_above(single):
    assert legend(single.marginal) == ["round 7"]
    (line,) = single.marginal.lines
    assert (color(line), line.get_linestyle()) == (BLUE, "-")
    shown = numbers(single.marginal)
    assert shown == {SOFT: [], BLUE: [(1, "82", "+"), (2, "45", "+"), (3, "64", "+"),
                                      (4, "10", "+")]}  # fmt: skip


def test_a_turn_that_no_chain_counts_at_has_no_number():
    lost = evaluation([[1, nan]] * 2, lost=[(0, 1), (1, 1)])
    axes = draw_curves([], [lost], title="").axes[1]
    assert numbers(axes)[BLUE] == [(1, "100", "+")]


def test_invalid_rewards_are_percent_in_the_color_of_loss(panels):
    axes = panels.invalid
    (line,), (band,) = axes.lines, axes.collections
    assert color(line) == color(band) == BAD
    np.testing.assert_array_equal(line.get_xdata(), range(1, 13))
    np.testing.assert_array_equal(line.get_ydata(), [100 * x for x in column("invalid_share")])
    assert band.get_alpha() < 1
    corners = np.concatenate([path.vertices for path in band.get_paths()])
    assert (corners[:, 1].min(), corners[:, 1].max()) == (0, 12)
    assert axes.get_ylim() == (0, pytest.approx(curves.SHARE_ROOM * 12))
    assert not axes.texts
    assert axes.get_xlabel() == "round"
    assert axes.get_legend() is None


@pytest.mark.parametrize(("known", "words"), [([0.0], ["none"]), ([0.0, 0.002], []), ([], [])])
def test_no_invalid_rewards_are_said_in_words_where_a_share_is_known(known, words):
    lines = [{"round": i, "invalid_share": x} for i, x in enumerate([*known, nan])]
    (axes,) = draw_curves(lines, [], title="").axes
    assert [text.get_text() for text in axes.texts] == words
    assert axes.get_ylim() == (0, curves.LEAST_SHARE)
    looks = [(x.get_position(), x.get_ha(), to_hex(x.get_color())) for x in axes.texts]
    assert looks == [((0.5, 0.5), "center", SOFT)] * len(words)
    assert [x.get_transform() == axes.transAxes for x in axes.texts] == [True] * len(words)


def test_phases_are_stacked_the_longest_below_and_what_belongs_to_none_on_top(panels):
    """Seconds of twelve rounds, 239 in all: 72, 36, 11 and, on top, 120."""
    axes = panels.time
    assert legend(axes) == ["scoring 30%", "updating 15%", "sampling 5%", "other 50%"]
    # Colors go by the order of the names, which is the same in every picture of a run.
    assert [color(band) for band in axes.collections] == [PHASES[1], PHASES[2], PHASES[0], FAINT]
    tops = [band.get_paths()[0].vertices[:, 1].max() for band in axes.collections]
    assert tops == [6, 9, 10, 20]
    corners = axes.collections[3].get_paths()[0].vertices
    # A step in the middle between two rounds: in the third one no time went to sampling.
    assert set(corners[corners[:, 0] == 2.5, 1]) == {9, 10, 19, 20}
    assert axes.get_ylim()[0] == 0
    assert (corners[:, 0].min(), corners[:, 0].max()) == (0.5, 12.5)  # bars of one width


def test_time_without_a_rest_and_with_many_phases():
    lines = [{"round": 1} | {f"seconds/{name}": 12.0 - i for i, name in enumerate("abcdefghijk")}]
    (axes,) = draw_curves(lines, [], title="").axes
    hues = [color(band) for band in axes.collections]
    assert hues == [*PHASES, PHASES[0]]
    assert axes.get_legend()._ncols == 4
    assert legend(axes)[0] == "a 16%"  # 12 of 12 + 11 + ... + 2


def test_norm_and_kl_have_a_panel_where_they_were_measured():
    lines = [
        {"round": i, "training/grad_norm": 2.0 * i, "training/old_kl": 0.5, "training/kl": nan}
        for i in (1, 2)
    ]
    norm, kl = draw_curves(lines, [], title="").axes
    assert [x.get_title(loc="left") for x in (norm, kl)] == [
        "Gradient norm before clipping",
        "KL to the policy that sampled",
    ]
    raw, mean = norm.get_lines()
    assert raw.get_ydata().tolist() == [2, 4]
    assert (mean.get_label(), mean.get_ydata().tolist()) == ("training/grad_norm", [2, 3])


def test_every_phase_of_the_trainer_has_a_color_of_its_own():
    assert len(set(PHASES)) == len(PHASES) >= 8  # sampling to saving, and comparing
    assert FAINT not in PHASES
