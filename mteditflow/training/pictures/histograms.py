"""Distributions of the rewards of a round, over trajectories and inside groups."""

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
    PURPLE,
    SOFT,
    house_style,
    titled_figure,
)

BINS = 24
COLORS = {"following": BLUE, "consistency": AMBER}
SPARE = (GOOD, PURPLE, SOFT)  # of other terms


def color_of(name: str, position: int) -> str:
    """Color of a term; others than IF and CC go by their position."""
    return COLORS.get(name, SPARE[position % len(SPARE)])


def draw_histograms(rewards: Mapping[str, Signal], group: Tensor, *, title: str) -> Figure:
    """Draw each reward's distribution over trajectories, and its spread in each group.

    Below, a column is a group: its members, from the worst to the best, and its mean; groups are
    in the order of their means. A group of equal rewards has no gradient.

    Args:
        rewards: by name, one per trajectory, [B]; lost and unmeasured ones are left out, and
            counted apart.
        group: integer group ids, [B].
        title: of the figure.

    Example:
        >>> from mteditflow import Signal
        >>> reward = Signal(torch.tensor([0.2, 0.4, 0.9, 0.5]), torch.ones(4) > 0)
        >>> figure = draw_histograms({"following": reward}, torch.tensor([0, 0, 1, 1]), title="")
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['following: mean 0.500 of 4', 'spread in groups: std 0.150; none in 0 of 2']
    """
    with house_style():
        figure = titled_figure(max(6.2 * len(rewards), 8.0), 6.6, title)
        panels = figure.subplots(2, len(rewards), squeeze=False, height_ratios=(1, 1.15))
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
    axes.hist(value, bins=BINS, range=ends, color=color, alpha=0.85, rwidth=0.9)
    missing = {"lost": ~reward.valid, "not measured": reward.valid & ~reward.measured}
    words = f"{name}: mean {math.fsum(value) / max(len(value), 1):.3f} of {len(value)}"
    words += "".join(f", {int(x.sum())} {what}" for what, x in missing.items() if bool(x.any()))
    axes.set_title(words, loc="left", fontsize=11)
    axes.axvline(math.fsum(value) / max(len(value), 1), color=INK, linewidth=1.2, linestyle=":")
    axes.set(xlim=ends, xlabel="reward")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def _draw_groups(
    axes: Any, value: Tensor, group: Tensor, ends: tuple[float, float], color: str
) -> None:
    members = sorted(
        (value[group == g] for g in torch.unique(group)), key=lambda x: float(x.mean())
    )
    thin = min(1.0, 40 / max(len(members), 1))
    for i, x in enumerate(members):
        axes.vlines(i + 1, float(x.min()), float(x.max()), color=FAINT, linewidth=3 * thin + 0.6)
        axes.plot(
            [i + 1] * len(x), x.tolist(), "o", color=color, alpha=0.45, ms=5 * thin + 1, mew=0
        )
    means = [float(x.mean()) for x in members]
    places = range(1, len(members) + 1)
    axes.plot(places, means, "_", color=INK, ms=9 * thin + 3, mew=1.8 * thin + 0.4)
    spread = [float(x.std(correction=0)) for x in members]
    mean, none = math.fsum(spread) / max(len(spread), 1), sum(x == 0 for x in spread)
    axes.set_title(
        f"spread in groups: std {mean:.3f}; none in {none} of {len(spread)}",
        loc="left",
        fontsize=11,
    )
    axes.set(xlabel="groups, by their mean", ylim=_padded(ends), xlim=(0.3, len(members) + 0.7))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def _range(value: Tensor) -> tuple[float, float]:
    """Ends of the axis: the values' own, out to the next twentieth."""
    if not len(value):
        return 0.0, 1.0
    low, high = math.floor(20 * float(value.min())) / 20, math.ceil(20 * float(value.max())) / 20
    return (low, high) if high > low else (low - 0.05, high + 0.05)


def _padded(ends: tuple[float, float]) -> tuple[float, float]:
    room = 0.05 * (ends[1] - ends[0])
    return ends[0] - room, ends[1] + room
