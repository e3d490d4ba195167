"""Curves of a run: rewards, held-out metrics, invalid rewards, and seconds by phase."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mteditflow.evaluation.evaluation import Evaluation
from mteditflow.evaluation.figures import (
    AMBER,
    BAD,
    BLUE,
    BROWN,
    FAINT,
    GOOD,
    INK,
    LIME,
    PINK,
    PURPLE,
    SLATE,
    SOFT,
    TEAL,
    house_style,
    legend_below,
    titled_figure,
)
from mteditflow.metrics import FEW_CASES
from mteditflow.training.metrics_file import ROUND, SECONDS
from mteditflow.training.pictures.histograms import PANEL_TITLE, color_of
from mteditflow.training.stopwatch import OTHER, shares

REWARD, INVALID = "reward/", "invalid_share"
HELD_OUT = {
    "content_consistency": ("CC", AMBER),
    "marginal": ("Marginal", PURPLE),
    "instruction_following": ("IF", BLUE),
    "overall": ("Overall", GOOD),
}
BY_TURN = {
    "overall": "Overall: all turns so far, percent",
    "marginal": "Marginal: this turn alone, percent",
}
PHASES = (BLUE, GOOD, AMBER, PURPLE, BAD, TEAL, PINK, LIME, BROWN, SLATE)
NUMBERS = {  # further numbers of a round, a panel each
    "training/grad_norm": ("Gradient norm before clipping", INK),
    "training/kl": ("KL to the reference", PURPLE),
    "training/old_kl": ("KL to the policy that sampled", TEAL),
}
WINDOW, WINDOWS = 8, 12  # rounds of the bold mean: at least WINDOW, 1/WINDOWS of a long run

# Layout: sizes in inches, lines and marks in points.
COLUMNS, PANEL_WIDTH, LEAST_WIDTH, PANEL_HEIGHT, TITLE_HEIGHT = 3, 4.9, 7.5, 3.7, 0.5
LINE, ROUND_TICKS = {"linewidth": 2.2}, 7
RAW = {"alpha": 0.25, "linewidth": 1}
BAND, TURN_BAND = {"alpha": 0.13, "linewidth": 0}, {"alpha": 0.14, "linewidth": 0}
SPAN = {"alpha": 0.4, "linewidth": 1.2}
MARKED = {"marker": "o", "markersize": 4.5} | LINE
FIRST, LAST = {"color": SOFT, "linestyle": "--"}, {"color": BLUE, "linestyle": "-"}
SHARE_AREA, SHARE_LINE = {"alpha": 0.2, "linewidth": 0}, {"linewidth": 1.6}
STACK = {"alpha": 0.8, "linewidth": 0, "step": "mid"}
UNIT, PERCENT, NUMBERED = (0, 1.04), (0, 104), (0, 108)  # ends of axes, with space for marks
LEAST_SPAN, SPAN_ROOM = 0.02, 0.08  # rewards: least height of the axis; space beside the data
LEAST_SHARE, SHARE_ROOM = 5.0, 1.15  # invalid share: least top in percent; top over the largest
BESIDE_TURNS = {"x": 0.14}
NUMBER: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 10}
ABOVE, BELOW, LOW = (0, 7), (0, -16), 10  # offsets of a number; below LOW percent it is ABOVE
CHANGED = {"color": SOFT, "linestyle": ":", "linewidth": 1}
CHANGE_NOTE: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "top", "fontsize": 8}
CHANGE_NOTE |= {"color": SOFT, "xytext": (-3, 0), "textcoords": "offset points"}
CENTER: dict[str, Any] = {"x": 0.5, "y": 0.5, "ha": "center", "color": SOFT}

Panel = Callable[[Any], None]


def draw_curves(
    metrics: Sequence[Mapping[str, float]],
    evaluations: Sequence[Evaluation],
    *,
    title: str,
    changes: Sequence[Mapping[str, Any]] = (),
) -> Figure:
    """Draw the curves of a run in up to nine panels; a panel without data is omitted.

    The panels are: rewards per term, raw and as a moving mean; IF, Marginal, CC and Overall of
    held-out chains at the last turn over rounds, with 95% intervals; Overall by turn and Marginal
    by turn, first evaluation against the last; norm of the gradient, KL to the reference and KL to
    the policy that sampled, raw and as a moving mean; share of invalid rewards; seconds by phase.

    Args:
        metrics: ``RunLog.metrics``: "round", "reward/<term>", "training/grad_norm", "training/kl",
            "training/old_kl", "invalid_share", "seconds/<phase>".
        evaluations: evaluations of the same chains, in the order of their rounds.
        title: title of the figure.
        changes: options that a resumed run changed: "after_round" and "option" of each. The panel
            of rewards marks these rounds.

    Raises:
        ValueError: there is nothing to draw.

    Example:
        >>> rounds = [{"round": i, "reward/following": i / 10} for i in range(1, 9)]
        >>> [axes.get_title(loc="left") for axes in draw_curves(rounds, [], title="A run").axes]
        ['Rewards in training']
    """
    panels = _panels(metrics, evaluations, changes)
    if not panels:
        raise ValueError("metrics: expected rewards of some round, or an evaluation, got neither")
    columns = min(len(panels), COLUMNS)
    rows = math.ceil(len(panels) / columns)
    with house_style():
        width = max(PANEL_WIDTH * columns, LEAST_WIDTH)
        figure = titled_figure(width, PANEL_HEIGHT * rows + TITLE_HEIGHT, title)
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, panel in zip(grid, panels, strict=False):
            panel(axes)
        for axes in grid[len(panels) :]:
            axes.remove()
    return figure


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of the last ``window`` values at each position, without NaN.

    Example:
        >>> smooth([1.0, math.nan, 2.0, 4.0], window=2)
        [1.0, 1.0, 2.0, 3.0]
    """
    recent = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    finite = [[x for x in last if math.isfinite(x)] for last in recent]
    return [math.fsum(last) / len(last) if last else math.nan for last in finite]


def _panels(
    metrics: Sequence[Mapping[str, float]],
    evaluations: Sequence[Evaluation],
    changes: Sequence[Mapping[str, Any]],
) -> list[Panel]:
    names = {name: None for line in metrics for name in line}
    rewards = [name for name in names if name.startswith(REWARD)]
    phases = [name for name in names if name.startswith(SECONDS)]
    panels: list[Panel] = []
    if rewards:
        panels.append(partial(_draw_rewards, metrics=metrics, names=rewards, changes=changes))
    if evaluations:
        panels.append(partial(_draw_held_out, evaluations=evaluations))
        shown = [name for name in BY_TURN if name in evaluations[0].metrics]
        panels += [partial(_draw_turns, evaluations=evaluations, name=name) for name in shown]
    measured = {name for line in metrics for name, x in line.items() if math.isfinite(x)}
    panels += [
        partial(_draw_number, metrics=metrics, name=name) for name in NUMBERS if name in measured
    ]
    if INVALID in names:
        panels.append(partial(_draw_invalid, metrics=metrics))
    if phases:
        panels.append(partial(_draw_time, metrics=metrics, names=phases))
    return panels


def _draw_rewards(
    axes: Any,
    *,
    metrics: Sequence[Mapping[str, float]],
    names: Sequence[str],
    changes: Sequence[Mapping[str, Any]],
) -> None:
    every: list[float] = []
    for i, name in enumerate(names):
        values, term = _column(metrics, name), name.removeprefix(REWARD)
        every += [x for x in values if math.isfinite(x)]
        _draw_smoothed(axes, metrics, values, color_of(term, i), term)
    _over_rounds(axes, "Rewards in training")
    axes.set_xlabel(f"round (bold: mean of the last {_window(metrics)})")
    if every and min(every) >= 0 and max(every) <= 1:
        axes.set_ylim(*_within_unit(every))
    _mark_changes(axes, changes)
    legend_below(axes)


def _mark_changes(axes: Any, changes: Sequence[Mapping[str, Any]]) -> None:
    """Mark rounds after which a resumed run had other options, with the option or their number."""
    for after in sorted({x["after_round"] for x in changes}):
        options = [x["option"] for x in changes if x["after_round"] == after]
        words = options[0] if len(options) == 1 else f"{len(options)} options"
        axes.axvline(after + 0.5, **CHANGED)
        place = {"xy": (after + 0.5, 0.98), "xycoords": ("data", "axes fraction")}
        axes.annotate(f"{words} changed", **place, **CHANGE_NOTE)


def _within_unit(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis around values of [0, 1]: at least LEAST_SPAN, in its range."""
    low, high = min(values), max(values)
    room = max(SPAN_ROOM * (high - low), (LEAST_SPAN - (high - low)) / 2)
    return max(low - room, UNIT[0]), min(high + room, UNIT[1])


def _draw_number(axes: Any, *, metrics: Sequence[Mapping[str, float]], name: str) -> None:
    title, color = NUMBERS[name]
    _draw_smoothed(axes, metrics, _column(metrics, name), color, name)
    _over_rounds(axes, title)
    axes.set_xlabel(f"round (bold: mean of the last {_window(metrics)})")
    legend_below(axes)


def _draw_smoothed(
    axes: Any,
    metrics: Sequence[Mapping[str, float]],
    values: Sequence[float],
    color: str,
    label: str,
) -> None:
    """Draw a number of each round, pale, and its moving mean, bold."""
    rounds = _column(metrics, ROUND)
    axes.plot(rounds, values, color=color, **RAW)
    single = MARKED if len(rounds) == 1 else LINE  # a line of one point is invisible
    axes.plot(rounds, smooth(values, _window(metrics)), color=color, label=label, **single)


def _window(metrics: Sequence[Mapping[str, float]]) -> int:
    return max(WINDOW, len(metrics) // WINDOWS)


def _draw_held_out(axes: Any, *, evaluations: Sequence[Evaluation]) -> None:
    rounds = [evaluation.round for evaluation in evaluations]
    for name, (label, color) in HELD_OUT.items():
        if name in evaluations[0].metrics:
            last = [[float(x[-1]) for x in e.metrics[name]] for e in evaluations]
            estimate, low, high = zip(*last, strict=True)
            axes.fill_between(rounds, low, high, color=color, **BAND)
            axes.vlines(rounds, low, high, color=color, **SPAN)
            count = evaluations[-1].counts[name][-1]
            label += f" ({count}, few)" if count < FEW_CASES else f" ({count})"
            axes.plot(rounds, estimate, color=color, label=label, **MARKED)
    _over_rounds(axes, f"Held out, turn {evaluations[-1].turns}, percent (over chains)")
    axes.set_ylim(*PERCENT)
    if len(rounds) == 1:
        axes.set_xlim(rounds[0] - 1, rounds[0] + 1)
    legend_below(axes)


def _draw_turns(axes: Any, *, evaluations: Sequence[Evaluation], name: str) -> None:
    """Draw one metric by turn, at the first and the last evaluation."""
    first, last = evaluations[0], evaluations[-1]
    turns = range(1, first.turns + 1)
    looks = [(last, LAST)] if len(evaluations) == 1 else [(first, FIRST), (last, LAST)]
    for evaluation, look in looks:
        estimate, low, high = (x.tolist() for x in evaluation.metrics[name])
        other = (last if evaluation is first else first).metrics[name].estimate.tolist()
        axes.fill_between(turns, low, high, color=look["color"], **TURN_BAND)
        label = f"round {evaluation.round}"
        axes.plot(turns, estimate, marker="o", label=label, **look, **LINE)
        for turn, value, there in zip(turns, estimate, other, strict=True):
            if math.isfinite(value):
                above = value > there or (value == there and evaluation is last)
                _annotate(axes, turn, value, look["color"], above=above)
    axes.set(xlabel="turn", ylim=NUMBERED, xticks=list(turns))
    axes.set_title(BY_TURN[name], **PANEL_TITLE)
    axes.margins(**BESIDE_TURNS)
    legend_below(axes)


def _annotate(axes: Any, turn: int, value: float, color: str, *, above: bool) -> None:
    offset = ABOVE if above or value < LOW else BELOW
    axes.annotate(f"{value:.0f}", (turn, value), xytext=offset, color=color, **NUMBER)


def _draw_invalid(axes: Any, *, metrics: Sequence[Mapping[str, float]]) -> None:
    rounds, share = _column(metrics, ROUND), [100 * x for x in _column(metrics, INVALID)]
    known = [x for x in share if math.isfinite(x)]
    axes.fill_between(rounds, 0, share, color=BAD, **SHARE_AREA)
    axes.plot(rounds, share, color=BAD, **SHARE_LINE)
    _over_rounds(axes, "Invalid rewards, percent of trajectories")
    axes.set_ylim(0, max([LEAST_SHARE, *(SHARE_ROOM * x for x in known)]))
    if known and not any(known):
        axes.text(s="none", transform=axes.transAxes, **CENTER)


def _draw_time(axes: Any, *, metrics: Sequence[Mapping[str, float]], names: Sequence[str]) -> None:
    columns = {name: [x if x == x else 0.0 for x in _column(metrics, name)] for name in names}
    total = shares({name: math.fsum(values) for name, values in columns.items()})
    # The longest phase at the bottom, and time outside of all phases on top.
    order = sorted(total, key=lambda name: name == f"{SECONDS}{OTHER}")
    named = [name for name in names if name != f"{SECONDS}{OTHER}"]
    colors = [PHASES[named.index(x) % len(PHASES)] if x in named else FAINT for x in order]
    labels = [f"{name.removeprefix(SECONDS)} {total[name]:.0%}" for name in order]
    rounds = _column(metrics, ROUND)
    # Steps change halfway between rounds: half a round more at both ends gives all bars one width.
    ends = [rounds[0] - 0.5, *rounds, rounds[-1] + 0.5]
    values = [[own[0], *own, own[-1]] for own in (columns[name] for name in order)]
    axes.stackplot(ends, values, labels=labels, colors=colors, **STACK)
    axes.set_xlim(ends[0], ends[-1])
    _over_rounds(axes, "Seconds of a round, by phase")
    axes.set_ylim(bottom=0)
    legend_below(axes)


def _over_rounds(axes: Any, title: str) -> None:
    axes.set_title(title, **PANEL_TITLE)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(ROUND_TICKS, integer=True))


def _column(metrics: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [line.get(name, math.nan) for line in metrics]
