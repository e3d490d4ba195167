"""Distributions of the rewards of a round, over trajectories and within groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from mteditflow.advantages.credit import Signal
from mteditflow.evaluation.figures import (
    AMBER,
    BLUE,
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

COLORS = {"following": BLUE, "consistency": AMBER}
SPARE = (GOOD, PURPLE, SOFT, TEAL, PINK, LIME)  # colors of other terms

# Layout: sizes in inches, lines and marks in points.
PANEL_TITLE = {"loc": "left", "fontsize": 11}
WIDTH, LEAST_WIDTH, HEIGHT, HEIGHTS = 6.2, 8.0, 6.6, (1, 1.15)
BARS = {"bins": 24, "alpha": 0.85, "rwidth": 0.9}
MEAN = {"color": INK, "linewidth": 1.2, "linestyle": ":"}
TICKS, GROUP_TICKS = 5, 8
THIN_FROM = 40  # number of groups above which marks shrink; a size is (fixed part, shrinking part)
SPAN_WIDTH, MEMBER_SIZE, MEAN_SIZE, MEAN_EDGE = (0.6, 3), (1, 5), (3, 9), (0.4, 1.8)
MEMBER = {"marker": "o", "linestyle": "", "alpha": 0.45, "markeredgewidth": 0}
GROUP_MEAN = {"marker": "_", "linestyle": "", "color": INK}
SIDE, ROOM = 0.7, 0.05  # margin beside the outer groups, in groups; above and below, of the range
STEPS = 20  # steps per unit of reward; an axis ends at a step


def color_of(name: str, position: int) -> str:
    """Return the color of a term; terms other than IF and CC have one by position."""
    return COLORS.get(name, SPARE[position % len(SPARE)])


def draw_histograms(rewards: Mapping[str, Signal], group: Tensor, *, title: str) -> Figure:
    """Draw each reward's distribution over trajectories, and its spread within each group.

    In the lower panels a column is a group, with its members, their range and their mean. Groups
    are ordered by mean. A group of equal rewards has no gradient.

    Args:
        rewards: rewards by name, one per trajectory, [B]; lost and unmeasured ones are excluded,
            and counted in the title.
        group: integer group ids, [B].
        title: title of the figure.

    Example:
        >>> from mteditflow import Signal
        >>> reward = Signal(torch.tensor([0.2, 0.4, 0.9, 0.5]), torch.ones(4) > 0)
        >>> figure = draw_histograms({"following": reward}, torch.tensor([0, 0, 1, 1]), title="")
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['following: mean 0.500 of 4', 'spread in groups: std 0.150; equal in 0 of 2']
    """
    with house_style():
        figure = titled_figure(max(WIDTH * len(rewards), LEAST_WIDTH), HEIGHT, title)
        panels = figure.subplots(2, len(rewards), squeeze=False, height_ratios=HEIGHTS)
        for i, (name, reward) in enumerate(rewards.items()):
            color, value = color_of(name, i), reward.value[reward.measured].double()
            ends = _range(value)
            _draw_histogram(panels[0, i], name, reward, ends, color)
            _draw_groups(panels[1, i], value, group[reward.measured], ends, color)
            panels[0, i].set_ylabel("trajectories" if i == 0 else "")
            panels[1, i].set_ylabel("reward" if i == 0 else "")
    return figure


def _draw_histogram(
    axes: Any, name: str, reward: Signal, ends: tuple[float, float], color: str
) -> None:
    value = reward.value[reward.measured].tolist()
    axes.hist(value, range=ends, color=color, **BARS)
    missing = {"lost": ~reward.valid, "not measured": reward.valid & ~reward.measured}
    words = f"{name}: none measured"
    if value:
        mean = math.fsum(value) / len(value)
        axes.axvline(mean, **MEAN)
        words = f"{name}: mean {mean:.3f} of {len(value)}"
    words += "".join(f", {int(x.sum())} {what}" for what, x in missing.items() if bool(x.any()))
    axes.set_title(words, **PANEL_TITLE)
    axes.set(xlim=ends, xlabel="reward")
    axes.yaxis.set_major_locator(MaxNLocator(TICKS, integer=True))


def _draw_groups(
    axes: Any, value: Tensor, group: Tensor, ends: tuple[float, float], color: str
) -> None:
    members = sorted(
        (value[group == g] for g in torch.unique(group)), key=lambda x: float(x.mean())
    )
    span, member, wide, thick = (
        _thinned(size, len(members)) for size in (SPAN_WIDTH, MEMBER_SIZE, MEAN_SIZE, MEAN_EDGE)
    )
    for place, x in enumerate(members, start=1):
        axes.vlines(place, float(x.min()), float(x.max()), color=FAINT, linewidth=span)
        axes.plot([place] * len(x), x.tolist(), color=color, markersize=member, **MEMBER)
    means = [float(x.mean()) for x in members]
    places = range(1, len(members) + 1)
    axes.plot(places, means, markersize=wide, markeredgewidth=thick, **GROUP_MEAN)
    spread = [float(x.std(correction=0)) for x in members]
    words = "spread in groups: none measured"
    if spread:
        mean, equal = math.fsum(spread) / len(spread), sum(bool((x == x[0]).all()) for x in members)
        words = f"spread in groups: std {mean:.3f}; equal in {equal} of {len(members)}"
    axes.set_title(words, **PANEL_TITLE)
    axes.set(xlabel="groups, by their mean", ylim=_padded(ends))
    axes.set_xlim(1 - SIDE, len(members) + SIDE)
    axes.xaxis.set_major_locator(MaxNLocator(GROUP_TICKS, integer=True))


def _thinned(size: tuple[float, float], count: int) -> float:
    least, rest = size
    return rest * min(1.0, THIN_FROM / max(count, 1)) + least


def _range(value: Tensor) -> tuple[float, float]:
    """Return the ends of the axis: the values' range, extended to the next steps."""
    if not len(value):
        return 0.0, 1.0
    low = math.floor(STEPS * float(value.min())) / STEPS
    high = math.ceil(STEPS * float(value.max())) / STEPS
    return (low, high) if high > low else (low - 1 / STEPS, high + 1 / STEPS)


def _padded(ends: tuple[float, float]) -> tuple[float, float]:
    room = ROOM * (ends[1] - ends[0])
    return ends[0] - room, ends[1] + room
