"""Drift of a run's images: a small panel for each statistic, with its band and alarms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mteditflow.drift import DriftWatch
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
    SOFT,
    TEAL,
    house_style,
    titled_figure,
)
from mteditflow.training.metrics_file import ROUND
from mteditflow.training.pictures.histograms import PANEL_TITLE

COLUMN, TURN, REFERENCE = "drift/", "/turn_", "/reference"
SHARES = (
    "brightness",
    "saturation",
    "edge_density",
    "high_frequency_share",
    "change_outside_edits",
)
LARGEST = dict.fromkeys(SHARES, 1.0)  # ends of the ranges; all begin at 0
TURN_COLORS = (BLUE, GOOD, PURPLE, AMBER, TEAL, PINK, LIME, BROWN)

# Layout: sizes in inches, lines and marks in points.
COLUMNS, PANEL_WIDTH, LEAST_WIDTH, PANEL_HEIGHT, TITLE_HEIGHT, ROUND_TICKS = (
    3,
    4.0,
    7.0,
    2.9,
    0.5,
    6,
)
LINE = {"linewidth": 1.6}
REFERENCE_LINE = {"color": SOFT, "linestyle": "--", "linewidth": 1.1}
FIRST_ROUNDS = {"color": INK, "linestyle": ":", "linewidth": 1.3}
BAND = {"color": FAINT, "alpha": 0.45, "linewidth": 0}
LEGEND = {
    "loc": "outside lower center",
    "ncols": 8,
    "frameon": False,
    "fontsize": 9,
    "labelcolor": INK,
}
ALARM = {"color": BAD, "marker": "v", "linestyle": "", "markersize": 8, "zorder": 3}


def draw_drift(
    metrics: Sequence[Mapping[str, float]],
    alarms: Sequence[Mapping[str, Any]] = (),
    *,
    watch: DriftWatch | None = None,
    early: int = 5,
    title: str,
) -> Figure:
    """Draw each statistic over rounds, with one line per turn and a baseline.

    The dashed baseline is the value of each round's reference images; without references it is the
    median of the last turn over the first rounds, dotted. The shaded band is that of the last turn,
    cut to the range of the statistic. Alarms are marked.

    Args:
        metrics: ``RunLog.metrics``: "round", "drift/<statistic>/turn_<n>", and
            "drift/<statistic>/reference".
        alarms: "round", "statistic" ("<statistic>/turn_<n>") and "value" of each.
        watch: watch with the bands of the same statistics; None: no band.
        early: number of first rounds for the baseline.
        title: title of the figure.

    Raises:
        ValueError: no statistic was measured in any round.

    Example:
        >>> rounds = [{"round": i, "drift/saturation/turn_1": 0.2 + i / 50} for i in range(1, 9)]
        >>> [axes.get_title(loc="left") for axes in draw_drift(rounds, title="A run").axes]
        ['saturation']
    """
    columns = dict.fromkeys(name for line in metrics for name in line if TURN in name)
    names = [name.removeprefix(COLUMN) for name in columns if name.startswith(COLUMN)]
    statistics = list(dict.fromkeys(name.rpartition(TURN)[0] for name in names))
    if not statistics:
        raise ValueError("metrics: expected drift statistics of some round, got none")
    across = min(len(statistics), COLUMNS)
    down = math.ceil(len(statistics) / across)
    with house_style():
        width = max(PANEL_WIDTH * across, LEAST_WIDTH)
        figure = titled_figure(width, PANEL_HEIGHT * down + TITLE_HEIGHT, title)
        grid = figure.subplots(down, across, squeeze=False).flatten()
        for axes, statistic in zip(grid, statistics, strict=False):
            own = [name for name in names if name.rpartition(TURN)[0] == statistic]
            _draw(axes, statistic, own, metrics, alarms, watch, early)
        for axes in grid[len(statistics) :]:
            axes.remove()
        pairs = (
            pair
            for axes in figure.axes
            for pair in zip(*axes.get_legend_handles_labels(), strict=True)
        )
        shown = {label: handle for handle, label in pairs}  # one legend for all panels
        figure.legend(shown.values(), shown.keys(), **LEGEND)
    return figure


def _draw(
    axes: Any,
    statistic: str,
    names: Sequence[str],
    metrics: Sequence[Mapping[str, float]],
    alarms: Sequence[Mapping[str, Any]],
    watch: DriftWatch | None,
    early: int,
) -> None:
    """Draw the panel of one statistic."""
    rounds, last = _column(metrics, ROUND), names[-1]
    references = _column(metrics, f"{COLUMN}{statistic}{REFERENCE}")
    if watch is not None and last in watch.bands:
        bands = [watch.band_around(last, x) for x in references]
        low = [max(band.low, 0.0) for band in bands]  # no statistic of pictures is negative
        high = [min(band.high, LARGEST.get(statistic, math.inf)) for band in bands]
        axes.fill_between(rounds, low, high, label=f"band of turn {_turn(last)}", **BAND)
    for i, name in enumerate(names):
        color = TURN_COLORS[i % len(TURN_COLORS)]
        values, label = _column(metrics, f"{COLUMN}{name}"), f"turn {_turn(name)}"
        axes.plot(rounds, values, color=color, label=label, **LINE)
    if any(map(math.isfinite, references)):
        axes.plot(rounds, references, label="reference", **REFERENCE_LINE)
    elif known := [x for x in _column(metrics, f"{COLUMN}{last}")[:early] if math.isfinite(x)]:
        axes.axhline(median(known), label="first rounds", **FIRST_ROUNDS)
    marks = [x for x in alarms if x["statistic"] in names]
    if marks:
        places = ([x[field] for x in marks] for field in ("round", "value"))
        axes.plot(*places, label="alarm", **ALARM)
    axes.set_title(statistic.replace("_", " "), **PANEL_TITLE)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(ROUND_TICKS, integer=True))


def _turn(name: str) -> str:
    return name.rpartition(TURN)[2]


def _column(metrics: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [line.get(name, math.nan) for line in metrics]
