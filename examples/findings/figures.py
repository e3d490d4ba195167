"""Figures of findings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import TITLES, Results
from .running import Run
from .study import Finding

AFTER, BEFORE = "#2457d6", "#8a94a3"
PANELS = ("overall", "instruction_following", "content_consistency")


def draw_finding(results: Results, finding: Finding, path: Path) -> None:
    """Draw the metrics at turn 3: every seed, means over seeds, and the untrained model."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for x, setting in enumerate(finding.settings):
            values = results.values(setting, metric)
            axes.plot([x] * len(values), values, "o", color=AFTER, alpha=0.35, markersize=4)
            before = results.before(setting, metric)
            axes.plot([x], [float(values.mean())], "s", color=AFTER)
            axes.plot([x - 0.3, x + 0.3], [before, before], ":", color=BEFORE)
        labels = [setting.label.replace(", ", "\n") for setting in finding.settings]
        axes.set_xticks(range(len(labels)), labels, fontsize=8)
        axes.set(title=f"{TITLES[metric]}, %", xlim=(-0.5, len(labels) - 0.5))
        plain(axes)
    figure.savefig(path, dpi=120)


def draw_long(long: Sequence[Run], path: Path) -> None:
    """Draw metrics by turn on longer chains, before and after training: every seed, and means."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    metrics = {"marginal": "Marginal", "content_consistency": "CC", "overall": "Overall"}
    for axes, (metric, title) in zip(figure.subplots(1, 3), metrics.items(), strict=True):
        for when, color in (("before", BEFORE), ("after", AFTER)):
            values = np.array([getattr(run, when).estimates[metric] for run in long])
            turns = range(1, values.shape[1] + 1)
            axes.plot(turns, values.T, color=color, alpha=0.3, linewidth=1)
            axes.plot(turns, values.mean(axis=0), "o-", color=color, markersize=4, label=when)
        axes.set(title=f"{title}, %", xlabel="turn")
        axes.set_xticks(turns)
        plain(axes)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def plain(axes: Axes) -> None:
    """Hide two spines, and show a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.2)
