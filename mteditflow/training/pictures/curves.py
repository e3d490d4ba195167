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
    FAINT,
    GOOD,
    PURPLE,
    SOFT,
    house_style,
    legend_below,
    titled_figure,
)
from mteditflow.metrics import FEW_CASES
from mteditflow.training.metrics_file import ROUND, SECONDS
from mteditflow.training.pictures.histograms import color_of
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
PHASES = (BLUE, GOOD, AMBER, PURPLE, BAD, "#0e7490")

Panel = Callable[[Any], None]


def draw_curves(
    metrics: Sequence[Mapping[str, float]], evaluations: Sequence[Evaluation], *, title: str
) -> Figure:
    """Draw the curves of a run, in up to six panels; a panel without data is left out.

    Rewards per term, raw and as the mean over the last rounds; IF, Marginal, CC and Overall of
    held-out chains at the last turn over rounds, with 95% intervals; Overall and Marginal by turn,
    first evaluation against the last; share of invalid rewards; seconds by phase.

    Args:
        metrics: ``RunLog.metrics``: "round", "reward/<term>", "invalid_share", "seconds/<phase>".
        evaluations: of the same chains, in the order of their rounds.
        title: of the figure.

    Raises:
        ValueError: there is nothing to draw.

    Example:
        >>> rounds = [{"round": i, "reward/following": i / 10} for i in range(1, 9)]
        >>> [axes.get_title(loc="left") for axes in draw_curves(rounds, [], title="A run").axes]
        ['Rewards in training']
    """
    panels = _panels(metrics, evaluations)
    if not panels:
        raise ValueError("metrics: expected rewards of some round, or an evaluation, got neither")
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    with house_style():
        figure = titled_figure(max(4.9 * columns, 7.5), 3.7 * rows + 0.5, title)
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, panel in zip(grid, panels, strict=False):
            panel(axes)
        for axes in grid[len(panels) :]:
            axes.remove()
    return figure


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last ``window`` values at each place, without those that are NaN.

    Example:
        >>> smooth([1.0, math.nan, 2.0, 4.0], window=2)
        [1.0, 1.0, 2.0, 3.0]
    """
    recent = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    finite = [[x for x in last if math.isfinite(x)] for last in recent]
    return [math.fsum(last) / len(last) if last else math.nan for last in finite]


def _panels(
    metrics: Sequence[Mapping[str, float]], evaluations: Sequence[Evaluation]
) -> list[Panel]:
    names = {name: None for line in metrics for name in line}
    rewards = [name for name in names if name.startswith(REWARD)]
    phases = [name for name in names if name.startswith(SECONDS)]
    panels: list[Panel] = []
    if rewards:
        panels.append(partial(_draw_rewards, metrics=metrics, names=rewards))
    if evaluations:
        panels.append(partial(_draw_held_out, evaluations=evaluations))
        shown = [name for name in BY_TURN if name in evaluations[0].metrics]
        panels += [partial(_draw_turns, evaluations=evaluations, name=name) for name in shown]
    if INVALID in names:
        panels.append(partial(_draw_invalid, metrics=metrics))
    if phases:
        panels.append(partial(_draw_time, metrics=metrics, names=phases))
    return panels


def _draw_rewards(
    axes: Any, *, metrics: Sequence[Mapping[str, float]], names: Sequence[str]
) -> None:
    rounds, window = _column(metrics, ROUND), max(8, len(metrics) // 12)
    every: list[float] = []
    for i, name in enumerate(names):
        values, term = _column(metrics, name), name.removeprefix(REWARD)
        color = color_of(term, i)
        every += [x for x in values if math.isfinite(x)]
        axes.plot(rounds, values, color=color, alpha=0.25, linewidth=1)
        axes.plot(rounds, smooth(values, window), color=color, linewidth=2.2, label=term)
    _over_rounds(axes, "Rewards in training")
    axes.set_xlabel(f"round (bold: mean of the last {window})")
    if every and min(every) >= 0 and max(every) <= 1:
        axes.set_ylim(0, 1.04)
    legend_below(axes)


def _draw_held_out(axes: Any, *, evaluations: Sequence[Evaluation]) -> None:
    rounds = [evaluation.round for evaluation in evaluations]
    for name, (label, color) in HELD_OUT.items():
        if name in evaluations[0].metrics:
            last = [[float(x[-1]) for x in e.metrics[name]] for e in evaluations]
            estimate, low, high = zip(*last, strict=True)
            axes.fill_between(rounds, low, high, color=color, alpha=0.13, linewidth=0)
            axes.vlines(rounds, low, high, color=color, alpha=0.4, linewidth=1.2)
            count = evaluations[-1].counts[name][-1]
            label += f" ({count}, few)" if count < FEW_CASES else f" ({count})"
            axes.plot(rounds, estimate, "o-", color=color, linewidth=2.2, ms=4.5, label=label)
    _over_rounds(axes, f"Held out, turn {evaluations[-1].turns}, percent (over chains)")
    axes.set_ylim(0, 104)
    if len(rounds) == 1:
        axes.set_xlim(rounds[0] - 1, rounds[0] + 1)
    legend_below(axes)


def _draw_turns(axes: Any, *, evaluations: Sequence[Evaluation], name: str) -> None:
    """One metric by turn, at the first and the last evaluation."""
    first, last = evaluations[0], evaluations[-1]
    turns = range(1, first.turns + 1)
    looks = [(last, BLUE, "o-")]
    if len(evaluations) > 1:
        looks = [(first, SOFT, "o--"), (last, BLUE, "o-")]
    for evaluation, color, line in looks:
        estimate, low, high = (x.tolist() for x in evaluation.metrics[name])
        other = (last if evaluation is first else first).metrics[name].estimate.tolist()
        axes.fill_between(turns, low, high, color=color, alpha=0.14, linewidth=0)
        label = f"round {evaluation.round}"
        axes.plot(turns, estimate, line, color=color, linewidth=2.2, label=label)
        for turn, value, there in zip(turns, estimate, other, strict=True):
            if math.isfinite(value):
                above = value > there or (value == there and evaluation is last)
                _annotate(axes, turn, value, color, above=above)
    axes.set(xlabel="turn", ylim=(0, 108), xticks=list(turns))
    axes.set_title(BY_TURN[name], loc="left", fontsize=11)
    axes.margins(x=0.14)
    legend_below(axes)


def _annotate(axes: Any, turn: int, value: float, color: str, *, above: bool) -> None:
    axes.annotate(
        f"{value:.0f}",
        (turn, value),
        xytext=(0, 7) if above or value < 10 else (0, -16),
        textcoords="offset points",
        ha="center",
        color=color,
        fontsize=10,
    )


def _draw_invalid(axes: Any, *, metrics: Sequence[Mapping[str, float]]) -> None:
    rounds, share = _column(metrics, ROUND), [100 * x for x in _column(metrics, INVALID)]
    worst = max((x for x in share if math.isfinite(x)), default=0.0)
    axes.fill_between(rounds, 0, share, color=BAD, alpha=0.2, linewidth=0)
    axes.plot(rounds, share, color=BAD, linewidth=1.6)
    _over_rounds(axes, "Invalid rewards, percent of trajectories")
    axes.set_ylim(0, max(5.0, 1.15 * worst))
    if not worst:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color=SOFT)


def _draw_time(axes: Any, *, metrics: Sequence[Mapping[str, float]], names: Sequence[str]) -> None:
    columns = {name: [x if x == x else 0.0 for x in _column(metrics, name)] for name in names}
    total = shares({name: math.fsum(values) for name, values in columns.items()})
    # The longest below, and on top what belongs to no phase.
    order = sorted(total, key=lambda name: name == f"{SECONDS}{OTHER}")
    named = [name for name in names if name != f"{SECONDS}{OTHER}"]
    colors = [PHASES[named.index(x) % len(PHASES)] if x in named else FAINT for x in order]
    labels = [f"{name.removeprefix(SECONDS)} {total[name]:.0%}" for name in order]
    values = [columns[name] for name in order]
    rounds = _column(metrics, ROUND)
    axes.stackplot(rounds, values, labels=labels, colors=colors, alpha=0.8, linewidth=0, step="mid")
    _over_rounds(axes, "Seconds of a round, by phase")
    axes.set_ylim(bottom=0)
    legend_below(axes)


def _over_rounds(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))


def _column(metrics: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [line.get(name, math.nan) for line in metrics]
