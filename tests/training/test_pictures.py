"""Pictures: written, of the size that they need, with every word on the canvas and legible."""

import io
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from mteditflow import Signal
from mteditflow.evaluation.figures import AMBER, BAD, GOOD, INK, house_style
from mteditflow.rewards import Fault, Lost, TurnScores
from mteditflow.training.pictures import (
    Strip,
    draw_before_after,
    draw_curves,
    draw_histograms,
    draw_strips,
    log_pictures,
    write_chart,
    write_picture,
)
from mteditflow.training.pictures.before_after import random_rows, risen_and_fallen
from mteditflow.training.pictures.curves import smooth
from mteditflow.training.pictures.page import text_width, wrap
from tests.loops import some
from tests.samples_of_scores import evaluation, few_resamples, nan, turn_scores

__all__ = ["few_resamples"]  # a fixture of every test here

LONG = (
    "Replace the old wooden rowing boat that lies on the left of the jetty with a small white "
    "sailing yacht, and keep its reflection in the calm water"
)  # 25 words
SHORT = "Make it snow on the roofs"
TITLE = "Round 120 of a run with a long name: " + LONG


def images(turns, size=(12, 12)):
    return [Image.new("RGB", size, (40 * n, 90, 200 - 30 * n)) for n in range(turns + 1)]


def strips(chains=2, members=2, turns=3, size=(12, 12), instruction=LONG):
    rows = chains * members
    mask = torch.ones(rows, turns, dtype=torch.bool)
    score = torch.full((rows, turns), 3.0)
    score[0, 0], score[0, -1] = 5, nan
    why = {(0, turns - 1): Lost(Fault.format, "no JSON in the answer", 4)}
    terms = {
        "following": TurnScores(score, mask, why),
        "consistency": turn_scores([[0.93] * turns] * rows),
        "aesthetic quality of what was made": turn_scores([[-0.125] * turns] * rows),
    }
    words = [instruction if n % 2 == 0 else SHORT for n in range(turns)]
    return [
        Strip(
            f"chain-{i // members}", words, images(turns, size), terms, i, f"member {i % members}"
        )
        for i in range(rows)
    ]


def check_words_are_on_the_canvas(figure):
    """Everything that is drawn lies inside, in inches."""
    canvas = FigureCanvasAgg(figure)
    if figure.get_layout_engine() is not None:
        canvas.draw()  # only then is everything in its place
    box, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
    assert -0.005 <= box.x0 < box.x1 <= width + 0.005
    assert -0.005 <= box.y0 < box.y1 <= height + 0.005


def check_nothing_overlaps(figure):
    renderer = FigureCanvasAgg(figure).get_renderer()
    words = [x for x in figure.texts if x.get_text()]
    drawn = {x: x.get_window_extent(renderer).padded(-1) for x in words}
    for (a, first), (b, second) in some(combinations(drawn.items(), 2)):
        assert not first.overlaps(second), (a, b)
    for text, box in some(drawn.items()):
        assert not any(box.overlaps(axes.bbox) for axes in some(figure.axes)), text


def close_to(figure, size):
    return (np.abs(figure.get_size_inches() * figure.dpi - size) <= 1).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": (512, 512)},
        {"size": (256, 1024), "chains": 1},
        {"turns": 1, "chains": 1, "members": 1},
        {"turns": 6, "chains": 2, "members": 1, "size": (768, 512)},
        {"instruction": "Add " + "x" * 300 + " and $5 or $6, 100% _new_ {a} \\frac"},
        {"instruction": " ".join([LONG] * 5), "chains": 1},
        {"instruction": "把左边的红色木船换成一艘白色的小帆船并保留它在平静水面上的倒影 🐱"},
    ],
)
def test_words_of_strips_are_whole_and_apart(options):
    figure = draw_strips(strips(**options), success_at=5, title=TITLE)
    with house_style():
        check_words_are_on_the_canvas(figure)
        check_nothing_overlaps(figure)


def test_a_strip_says_instructions_scores_and_what_was_lost():
    figure = draw_strips(strips(1, 1), success_at=5, title="Round 7")
    said = [x.get_text() for x in figure.texts if x.get_text()]
    together = " ".join(said)
    for words in (LONG, SHORT, "Round 7", "chain-0", "member 0", "following"):
        assert words in together
    for value in ("5", "3", "0.930", "-0.125"):
        assert value in said
    assert "lost: answer not in the format that was asked for" in together
    colors = [to_hex(axes.spines["top"].get_edgecolor()) for axes in figure.axes[1:]]
    assert colors == [GOOD, AMBER, INK]


@pytest.mark.parametrize(
    ("score", "success_at", "color"),
    [(5, 5, GOOD), (3, 5, AMBER), (2, 5, BAD), (1, 1, GOOD), (0.5, 1, AMBER), (0, 1, BAD)],
)
def test_frames_tell_success(score, success_at, color):
    terms = {"following": turn_scores([[score]])}
    figure = draw_strips([Strip("1", ["x"], images(1), terms, 0)], success_at=success_at, title="")
    assert to_hex(figure.axes[1].spines["left"].get_edgecolor()) == color


def test_dollars_are_no_formula():
    terms = {"following": turn_scores([[1]])}
    strip = Strip("$a$", ["Write $5 or $6"], images(1), terms, 0, label="$b$")
    figure = draw_strips([strip], success_at=1, title="$c$")
    assert not any(text.get_parse_math() for text in some(figure.texts))


def test_a_score_that_was_not_measured_says_so():
    terms = {"following": turn_scores([[5.0]]), "consistency": turn_scores([[nan]])}
    figure = draw_strips([Strip("1", ["x"], images(1), terms, 0)], success_at=5, title="")
    assert "not measured" in [x.get_text() for x in figure.texts]


def test_members_share_the_instructions_of_their_chain():
    figure = draw_strips(strips(1, 3), success_at=5, title="")
    assert sum(x.get_text() == SHORT for x in figure.texts) == 1


def test_small_images_are_enlarged_without_blur_and_large_ones_get_more_room(tmp_path):
    """12 pixels: each is one color on paper, so the picture has only the colors of the image."""
    pixels = np.random.default_rng(0).integers(0, 2, (12, 12, 3)) * 255
    small = [Image.fromarray(pixels.astype(np.uint8))] * 2
    strip = Strip("1", ["x"], small, {"following": turn_scores([[1.0]])}, 0)
    figure = draw_strips([strip], success_at=1, title="")
    write_picture(figure, tmp_path / "new" / "strip.png")
    with Image.open(tmp_path / "new" / "strip.png") as picture:
        assert close_to(figure, picture.size)
        box = figure.axes[0].get_position()
        x = [int(picture.width * (box.x0 + box.width * (i + 0.5) / 12)) for i in range(12)]
        y = [int(picture.height * (1 - box.y1 + box.height * (i + 0.5) / 12)) for i in range(12)]
        shown = np.asarray(picture.convert("RGB"))[np.ix_(y, x)]
    assert (shown == pixels).all()
    large = draw_strips(strips(1, 1, size=(512, 512)), success_at=5, title="")
    assert large.axes[0].bbox.width > 1.4 * figure.axes[0].bbox.width > 200


def test_strips_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="strips: expected at least one"):
        draw_strips([], success_at=5, title="")
    with pytest.raises(ValueError, match="images: expected 2, the reference and one per instr"):
        Strip("1", ["x"], images(3), {}, 0)


def pair():
    """Turns followed: +2, -1, equal, +1, left out, -2."""
    before = evaluation([[0, 0], [1, 1], [1, 0], [1, 0], [0, 0], [1, 1]])
    after = [[1, 1], [0, 1], [0, 1], [1, 1], [1, nan], [0, 0]]
    return before, evaluation(after, lost=[(4, 1)], after=9)


@pytest.mark.parametrize(
    ("count", "rows", "how"),
    [
        (2, [0, 5], "Shown: the 1 that gained most, then the 1 that lost most."),
        (3, [0, 3, 5], "Shown: all 2 that gained, then the 1 that lost most."),
        (9, [0, 3, 5, 1], "Shown: all 2 that gained, then all 2 that lost."),
    ],
)
def test_both_directions_are_shown_and_the_title_tells_the_choice(count, rows, how):
    choice = risen_and_fallen(*pair(), count=count)
    assert choice.rows == rows
    counts = "2 had more turns followed at round 9 than at round 0, and 2 had fewer."
    assert choice.how == f"Of 5 held-out chains, {counts} {how}"


def test_where_none_fell_those_that_rose_take_their_place():
    before, after = evaluation([[0], [0], [0]]), evaluation([[1], [1], [1]])
    choice = risen_and_fallen(before, after, count=2)
    assert choice.rows == [0, 1]
    assert choice.how.endswith("Shown: the 2 that gained most, then none that lost.")
    assert draw_before_after(before, before, {}, {}, random=0) is None


def test_where_few_rose_more_that_fell_take_their_place():
    before, after = evaluation([[0], [1], [1], [1]]), evaluation([[1], [0], [0], [0]])
    choice = risen_and_fallen(before, after, count=4)
    assert choice.rows == [0, 1, 2, 3]
    assert choice.how.endswith("Shown: the 1 that gained, then all 3 that lost.")


def test_before_and_after_look_at_the_chosen_images_only():
    before, after = pair()
    (other,) = random_rows(before, after, count=1, seed=7, without=[0, 5])
    rows = {row: images(2) for row in (0, 5, other)}
    figure = draw_before_after(before, after, rows, rows, count=2, random=1, seed=7)
    check_words_are_on_the_canvas(figure)
    check_nothing_overlaps(figure)
    said = " ".join(x.get_text() for x in figure.findobj(Text))
    assert risen_and_fallen(before, after, count=2).how in said
    assert "Then 1 drawn at random (seed 7) of the others." in said
    assert said.count("before") == said.count("after") == 3
    assert all(said.count(f"{why}: chain c{row}") == 1
               for why, row in (("gained", 0), ("lost", 5), ("at random", other)))  # fmt: skip


def test_random_chains_count_are_seeded_and_are_none_of_the_others():
    before = evaluation([[0]] * 9 + [[nan]], lost=[(9, 0)])
    draws = [random_rows(before, before, count=4, seed=seed, without=[2]) for seed in range(30)]
    assert all(len(set(rows)) == 4 for rows in some(draws))
    assert {row for rows in draws for row in rows} == {0, 1, 3, 4, 5, 6, 7, 8}
    assert draws[3] == random_rows(before, before, count=4, seed=3, without=[2])
    assert len(random_rows(before, before, count=99, seed=0)) == 9


def test_charts_are_vectors_too_and_equal_ones_are_equal_files(tmp_path):
    for name in ("a", "b"):
        figure = draw_curves(rounds(3), [], title=TITLE)  # lines, bands and stacks
        write_chart(figure, tmp_path / f"{name}.png")
    first, second = ((tmp_path / f"{name}.svg").read_bytes() for name in "ab")
    assert first == second
    assert first.startswith(b"<?xml")
    assert b"<image" not in first  # curves, not pixels
    with pytest.raises(ValueError, match=r"path: expected one of \['png', 'svg'\], got 'gif'"):
        write_picture(figure, tmp_path / "a.gif")


@pytest.mark.parametrize(("groups", "members"), [(1, 1), (100, 4)])
def test_histograms_tell_mean_and_spread(groups, members):
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(groups).repeat_interleave(members)
    value = torch.rand(len(group), generator=generator)
    invalid, everything = value.clone(), torch.ones_like(group) > 0
    invalid[0] = nan
    rewards = {
        "following": Signal(value, everything),
        "consistency": Signal(invalid, invalid.isfinite()),
        "gaps": Signal(invalid, everything, invalid.isfinite()),
    }
    figure = draw_histograms(rewards, group, title=TITLE)
    check_words_are_on_the_canvas(figure)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[0] == f"following: mean {value.mean():.3f} of {len(group)}"
    left = f"of {len(group) - 1}" if len(group) > 1 else "none measured"
    assert titles[1].endswith(f"{left}, 1 lost")
    assert titles[2].endswith(f"{left}, 1 not measured")
    spread = value.view(groups, members).std(dim=1, correction=0)
    flat = int((spread == 0).sum())
    assert titles[3] == f"spread in groups: std {spread.mean():.3f}; equal in {flat} of {groups}"


def rounds(count):
    return [
        {
            "round": i,
            "reward/following": i / count,
            "reward/consistency": nan if i == 2 else 0.9,
            "reward/looks": 0.5,
            "invalid_share": 0.01 * (i % 2),
            **{f"seconds/{name}": 1.0 + i for name in ("sampling", "scoring", "updating", "other")},
        }
        for i in range(1, count + 1)
    ]


@pytest.mark.parametrize("count", [1, 700])
def test_curves_show_what_there_is(count):
    evaluations = [
        evaluation([[1, 0], [p, p]], [[0.9, 0.8]] * 2, after=round_number)
        for p, round_number in ((0, 0), (1, count))
    ]
    figure = draw_curves(rounds(count), evaluations, title=TITLE)
    check_words_are_on_the_canvas(figure)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Rewards in training",
        "Held out, turn 2, percent (over chains)",
        "Overall: all turns so far, percent",
        "Marginal: this turn alone, percent",
        "Invalid rewards, percent of trajectories",
        "Seconds of a round, by phase",
    ]
    said = [x.get_text() for x in figure.findobj(Text)]
    held_out = [f"{name} (2, few)" for name in ("CC", "Marginal", "IF", "Overall")]
    for words in ("following", "consistency", "looks", *held_out):
        assert words in said
    assert f"round {count}" in said
    assert "sampling 25%" in said


def test_curves_of_a_run_at_its_start():
    figure = draw_curves([], [evaluation([[1, 0]])], title="no rounds yet")
    check_words_are_on_the_canvas(figure)
    assert len(figure.axes) == 2
    with pytest.raises(ValueError, match="metrics: expected rewards of some round"):
        draw_curves([], [], title="")


def test_the_smooth_curve_is_the_mean_of_the_last_rounds():
    assert smooth([1.0, 2.0, 6.0], window=2) == [1.0, 1.5, 4.0]
    assert np.isnan(smooth([nan], window=2)).all()


def test_wrapped_lines_keep_all_words_and_the_width():
    with house_style():
        lines = wrap(LONG, 1.7, 9.5)
        assert " ".join(lines) == LONG
        assert all(text_width(line, 9.5) <= 1.7 for line in some(lines))
        broken = wrap("x" * 200, 1.0, 9.5, most=3)
        assert len(broken) == 3
        assert broken[-1].endswith(" …")
        assert all(text_width(line, 9.5) <= 1.0 for line in some(broken))
        assert wrap("", 1.0, 9.5) == []


class Tracker:
    """A tracker of accelerate."""

    def __init__(self, name):
        self.name, self.logged = name, []

    def log_images(self, values, step=None, **options):
        self.logged.append((values, step, options))


def test_trackers_get_pictures_in_the_form_that_they_take():
    trackers = [Tracker("tensorboard"), Tracker("wandb"), object()]
    figure = draw_strips(strips(1, 1), success_at=5, title="")
    log_pictures(trackers, {"strips": figure}, step=7)
    ((arrays, step, options),) = trackers[0].logged
    ((lists, _, others),) = trackers[1].logged
    assert (step, options, others) == (7, {"dataformats": "NHWC"}, {})
    assert arrays["strips"].dtype == np.uint8
    assert arrays["strips"].shape[0::3] == (1, 3)
    (image,) = lists["strips"]
    assert (np.asarray(image) == arrays["strips"][0]).all()


def test_tensorboard_holds_the_picture(tmp_path):
    from accelerate.tracking import TensorBoardTracker
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker("run", tmp_path)
    tracker.start()
    figure = draw_strips(strips(1, 1), success_at=5, title="")
    log_pictures([tracker], {"strips": figure}, step=7)
    tracker.finish()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    (found,) = events.Images("strips")
    assert found.step == 7
    with Image.open(io.BytesIO(found.encoded_image_string)) as image:
        assert close_to(figure, image.size)
