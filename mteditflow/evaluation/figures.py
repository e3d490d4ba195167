"""Figures of reports, with the common style of figures and their output to files and trackers."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import AutoLocator
from PIL import Image

from mteditflow._checks import check_choice
from mteditflow._files import write_all_atomically, write_atomically
from mteditflow.evaluation.intervals import COLLAPSE, METRICS, WEAR
from mteditflow.evaluation.report import Report
from mteditflow.evaluation.tabulation import (
    ALL,
    FEW_TURNS,
    MEAN,
    SURVIVAL,
    SURVIVED,
    turns_shown,
)
from mteditflow.metrics import FEW_CASES

INK, SOFT, FAINT = "#1f2933", "#6b7684", "#c9d0d8"
GOOD, AMBER, BAD, BLUE, PURPLE = "#1a7f4b", "#d97706", "#c0392b", "#2457d6", "#7c3aed"
TEAL, PINK, LIME, BROWN, SLATE = "#0e7490", "#db2777", "#65a30d", "#854d0e", "#334155"
DPI = 140
# Fallbacks for instructions in other scripts; fonts that are not installed are skipped.
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans")
BARS = {
    "instruction_following": ("IF", BLUE),
    "content_consistency": ("CC", AMBER),
    "overall": ("Overall", GOOD),
}
LINES = (SOFT, BLUE, GOOD, AMBER, PURPLE, TEAL, PINK, LIME)  # colors of compared reports, in order
PANEL_TITLE = {"fontsize": 11}
TITLE_CHARS = 40  # of a line of a panel's title or legend
LINE_HEIGHT = 0.2  # of a further line of a title or legend, inches


@contextmanager
def house_style() -> Iterator[None]:
    """Apply the fonts and colors of all figures; a missing glyph is a box without a warning."""
    with mpl.rc_context(_style()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


@lru_cache
def _style() -> dict[str, Any]:
    there = {font.name for font in font_manager.fontManager.ttflist}
    return {
        "font.family": [name for name in FONTS if name in there],
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": SOFT,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "text.parse_math": False,
        "xtick.color": INK,
        "ytick.color": INK,
    }


def titled_figure(width: float, height: float, title: str) -> Figure:
    """Return an empty figure with padding around its panels; call it within ``house_style``.

    Args:
        width: width in inches.
        height: height in inches.
        title: text above the panels, wrapped if it is long.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.12)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    figure.suptitle(title, color=INK, x=0.01, ha="left", fontsize=12.5, wrap=True)
    return figure


def wrapped(text: str, chars: int = TITLE_CHARS) -> str:
    r"""Break a title of a report, which may be one long path, into lines that fit a panel.

    Example:
        >>> wrapped("Marginal of models/kontext + lora/edits.safetensors", 24)
        'Marginal of\nmodels/kontext +\nlora/edits.safetensors'
    """
    return "\n".join(textwrap.wrap(text, chars)) or text


def legend_below(axes: Any, *, columns: int = 4) -> None:
    """Draw the legend below the axis, where it covers no curve, in at most ``columns`` columns."""
    count = len(axes.get_legend_handles_labels()[1])
    axes.legend(
        frameon=False,
        fontsize=9,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17),
        ncols=min(count, columns),
        columnspacing=1.2,
        handlelength=1.5,
        labelcolor=INK,
    )


def write_picture(figure: Figure, path: Path) -> None:
    """Write a figure atomically as PNG or SVG, by its suffix; create the folder if missing.

    Raises:
        ValueError: the suffix is neither .png nor .svg.
    """
    kind = path.suffix.removeprefix(".")
    check_choice("path", kind, ("png", "svg"))
    write_atomically(path, _rendered(figure, kind))


def write_chart(figure: Figure, path: Path) -> None:
    """Write a chart as PNG and as SVG, which stays sharp at any size and in print.

    Args:
        figure: curves and bars; use ``write_picture`` for photographs, whose SVG would be large.
        path: path of the PNG; the SVG differs in the suffix.
    """
    write_all_atomically(path.parent, chart_files(figure, path.stem))


def chart_files(figure: Figure, name: str) -> dict[str, bytes]:
    """Return the bytes of a chart as PNG and SVG by file name."""
    return {f"{name}.{kind}": _rendered(figure, kind) for kind in ("png", "svg")}


def log_pictures(trackers: Sequence[Any], figures: Mapping[str, Figure], *, step: int) -> None:
    """Log figures to the trackers of accelerate that accept images.

    Args:
        trackers: ``Accelerator.trackers``.
        figures: name, such as "strips", to figure.
        step: round of training.
    """
    takers = [tracker for tracker in trackers if hasattr(tracker, "log_images")]
    images = {
        name: Image.open(BytesIO(_rendered(figure, "png")), formats=("PNG",)).convert("RGB")
        for name, figure in figures.items()
        if takers
    }
    for tracker in takers:
        if tracker.name == "tensorboard":  # accepts a batch of arrays, others a list of images
            arrays = {name: np.asarray(image)[None] for name, image in images.items()}
            tracker.log_images(arrays, step=step, dataformats="NHWC")
        else:
            tracker.log_images({name: [image] for name, image in images.items()}, step=step)


def _rendered(figure: Figure, kind: str) -> bytes:
    """Render a figure reproducibly: equal figures give equal bytes.

    For that, an SVG has no date and its ids have a fixed salt.
    """
    buffer = BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    with house_style(), mpl.rc_context({"svg.hashsalt": "mteditflow"}):
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


def draw_report(*reports: Report) -> Figure:
    """Draw IF, CC and Overall by turn, Marginal by turn, and Marginal by edit type.

    Args:
        *reports: one or more reports of the same chains; the bars show the last one, whose title
            is then part of theirs.

    Raises:
        ValueError: no report is given.
    """
    if not reports:
        raise ValueError("reports: expected at least one, got none")
    report = reports[-1]
    count = 3 if report.edit_types else 2
    of = f"\n{wrapped(report.title)}" if len(reports) > 1 else ""
    title, *others = dict.fromkeys(x.title for x in reversed(reports))
    whole = wrapped(title + "".join(f", against {x}" for x in others), count * TITLE_CHARS)
    legend = "\n".join(wrapped(x.title) for x in reports) if len(reports) > 1 else ""
    lines_more = of.count("\n") + whole.count("\n") + legend.count("\n")
    with house_style():
        size = (4.6 * count, 4.2 + LINE_HEIGHT * lines_more)
        figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
        bars, lines, *types = figure.subplots(1, count)
        _bars(bars, report, of)
        _lines(lines, reports)
        for axes in types:
            _types(axes, report, of)
        figure.suptitle(whole, color=INK)
        figure.canvas.draw()  # lays out while the fonts of the house are set
    return figure


# A bar of value 0 is a line in its color: its outline, drawn over the axis.
BASE: dict[str, Any] = {"linewidth": 2, "clip_on": False}


def _bars(axes: Any, report: Report, of: str) -> None:
    there = {name: how for name, how in BARS.items() if name in report.metrics}
    width, turns = 0.8 / len(there), range(1, report.turns + 1)
    for i, (metric, (label, color)) in enumerate(there.items()):
        if report.turns > FEW_TURNS:  # bars of that many turns would be too thin
            _curve(axes, report, metric, label, color)
            continue
        places = [turn + (i - (len(there) - 1) / 2) * width for turn in turns]
        values, errors = _values(report, metric, turns)
        style = {"color": color, "label": label, "ecolor": INK, "error_kw": {"elinewidth": 1}}
        style |= {"edgecolor": color, **BASE}
        axes.bar(places, values, 0.92 * width, yerr=errors, **style)
    _finish(axes, f"All turns so far, %{of}", turns, [report])
    legend_below(axes, columns=3)


def _curve(axes: Any, report: Report, metric: str, label: str, color: str) -> None:
    """Draw a metric over turns as a line with its interval as a band."""
    turns = range(1, report.turns + 1)
    values, (below, above) = _values(report, metric, turns)
    ends = zip(values, below, above, strict=True)
    low, high = zip(*((v - under, v + over) for v, under, over in ends), strict=True)
    axes.fill_between(turns, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(turns, values, color=color, label=label, marker="o", markersize=3.5)


def draw_survival(*reports: Report) -> Figure:
    """Draw the share of chains that survive each turn, and CR and wear if all reports have them.

    Survival is the Kaplan-Meier estimate with Greenwood's interval; it equals IF if no turn was
    lost.

    Args:
        *reports: one or more reports of any number of turns, one line each.

    Raises:
        ValueError: no report is given, or one of an older version lacks survival.
    """
    if not reports or not all(report.has_survival for report in reports):
        raise ValueError("reports: expected one or more with survival, got one without, or none")
    panels = {SURVIVAL: "Survival: no failure so far, %", COLLAPSE: "Collapsed so far (CR), %"}
    panels |= {WEAR: "Wear: distance to the original"}
    shown = [name for name in panels if all(_has(report, name) for report in reports)]
    with house_style():
        size = (5.4 * len(shown), 4.4)
        figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
        grid = figure.subplots(1, len(shown), squeeze=False).flatten()
        for axes, metric in zip(grid, shown, strict=True):
            colors = [BLUE] if len(reports) == 1 else LINES
            for i, report in enumerate(reports):
                _curve(axes, report, metric, _survived(report), colors[i % len(colors)])
            turns = range(1, max(report.turns for report in reports) + 1)
            _finish(axes, panels[metric], turns, reports, metrics=(metric,))
            if metric == WEAR:  # not in percent
                axes.yaxis.set_major_locator(AutoLocator())
                axes.autoscale(axis="y")
                axes.set_ylim(bottom=0)
        legend_below(grid[0], columns=1)
        figure.canvas.draw()  # lays out while the fonts of the house are set
    return figure


def _has(report: Report, metric: str) -> bool:
    """Whether a report has a value of a metric at some turn."""
    return any(x.metric == metric and x.estimate is not None for x in report.estimates)


def _survived(report: Report) -> str:
    """Return a legend entry: the report's title with its mean number of turns survived."""
    mean = report.find(SURVIVED, MEAN).estimate
    title = report.title if mean is None else f"{report.title}: {mean:.2f} turns on average"
    return wrapped(title)


def _lines(axes: Any, reports: Sequence[Report]) -> None:
    colors = [PURPLE] if len(reports) == 1 else LINES
    for i, report in enumerate(reports):
        turns, color = range(1, report.turns + 1), colors[i % len(colors)]
        if report.turns > FEW_TURNS:
            _curve(axes, report, "marginal", wrapped(report.title), color)
            continue
        values, errors = _values(report, "marginal", turns)
        style = {"color": color, "capsize": 3, "marker": "o"}
        axes.errorbar(turns, values, yerr=errors, label=wrapped(report.title), **style)
    turns = range(1, max(report.turns for report in reports) + 1)
    _finish(axes, "Marginal: this turn alone, %", turns, reports)
    if len(reports) > 1:
        legend_below(axes, columns=1)  # their titles may be long


def _types(axes: Any, report: Report, of: str) -> None:
    found = [report.find("marginal", ALL, name) for name in report.edit_types]
    places, nan = range(len(found)), float("nan")
    for y, x in zip(places, found, strict=True):
        value, low, high = (nan if v is None else v for v in (x.estimate, x.low, x.high))
        axes.barh(
            y,
            value,
            color=PURPLE,
            xerr=[[value - low], [high - value]],
            ecolor=INK,
            edgecolor=PURPLE,
            **BASE,
        )
    labels = [f"{x.edit_type} ({x.count}{', few' * x.few})".replace("_", " ") for x in found]
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_title(f"Marginal by edit type (turns), %{of}", **PANEL_TITLE)
    axes.set_xlim(0, 100)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _values(
    report: Report, metric: str, turns: Sequence[int]
) -> tuple[list[float], list[list[float]]]:
    """Return estimates by turn, and the lengths of their error bars below and above."""
    found, nan = [report.find(metric, turn) for turn in turns], float("nan")
    values, lows, highs = (
        [nan if v is None else v for v in column]
        for column in zip(*((x.estimate, x.low, x.high) for x in found), strict=True)
    )
    below = [max(v - low, 0) for v, low in zip(values, lows, strict=True)]
    return values, [below, [max(high - v, 0) for v, high in zip(values, highs, strict=True)]]


def _finish(
    axes: Any,
    title: str,
    turns: Sequence[int],
    reports: Sequence[Report],
    *,
    metrics: Sequence[str] = METRICS,
) -> None:
    of_all = (x for report in reports for x in report.estimates if x.edit_type is None)
    few = any(x.few for x in of_all if x.metric in metrics)
    label = f"turn (some points over fewer than {FEW_CASES} chains)" if few else "turn"
    axes.set(xlabel=label, ylim=(0, 105))
    axes.set_title(title, **PANEL_TITLE)
    axes.set_xticks(turns_shown(len(turns)))
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
