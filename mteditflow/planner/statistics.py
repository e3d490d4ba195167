"""Statistics of planned chains: steps per edit type, chains per object category, turns per chain.

The category of an object is the head noun of its name in the singular: "red wooden chairs" and
"chair by the window" both have the category "chair". A chain counts once for each category among
all its names, both those of the image and those that edits introduce.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mteditflow._text import escape_markup
from mteditflow.chains import Chain

UNKNOWN = "unknown"
CATEGORIES_SHOWN = 16
INK, SOFT, BAR = "#1f2933", "#5b6675", "#2457d6"
PANELS = ("steps per edit type", "chains per object category", "turns per chain")

# Words that follow the head noun: the rest of the name begins with one of these.
PREPOSITIONS = (
    *("of", "in", "on", "with", "at", "by", "for", "from", "behind", "beside", "near", "next"),
    *("under", "over", "above", "below", "between", "against", "without", "and", "to", "that"),
    *("holding", "wearing", "made", "covered", "full", "inside", "around"),
)
IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "feet": "foot",
    "mice": "mouse",
    "geese": "goose",
    "leaves": "leaf",
    "shelves": "shelf",
    "knives": "knife",
    "tomatoes": "tomato",
    "potatoes": "potato",
    "buses": "bus",
    "cookies": "cookie",
}


@dataclass(frozen=True)
class ChainStatistics:
    """Counts over some chains, the most frequent first (``turns`` in ascending order).

    Attributes:
        steps: number of turns by edit type.
        categories: number of chains that have an object of a category, by category.
        turns: number of chains by their number of turns.
    """

    steps: Mapping[str, int]
    categories: Mapping[str, int]
    turns: Mapping[int, int]


def statistics(chains: Iterable[Chain]) -> ChainStatistics:
    """Count edit types, object categories and turns.

    Args:
        chains: the chains; task types or object names that a chain lacks count as "unknown".

    Source: MT-EditFlow (arXiv 2606.01985), Fig. 9, for the choice of counts.

    Example:
        >>> chain = Chain(
        ...     id="1",
        ...     image="1.png",
        ...     instructions=("Remove the cat", "Add a dog"),
        ...     task_types=("subject_remove", "subject_add"),
        ...     all_objects=(("black cat", "sofa"), ("black cat", "sofa", "dog")),
        ... )
        >>> counted = statistics([chain])
        >>> counted.steps, counted.turns
        ({'subject_add': 1, 'subject_remove': 1}, {2: 1})
        >>> counted.categories
        {'cat': 1, 'dog': 1, 'sofa': 1}
    """
    steps: Counter[str] = Counter()
    categories: Counter[str] = Counter()
    turns: Counter[int] = Counter()
    for chain in chains:
        steps.update(chain.task_types or [UNKNOWN] * chain.turns)
        categories.update({category(name) for name in _names(chain)} or {UNKNOWN})
        turns[chain.turns] += 1
    return ChainStatistics(_ranked(steps), _ranked(categories), dict(sorted(turns.items())))


def category(name: str) -> str:
    """Return the head noun of an object's name, in the singular and in lower case.

    Example:
        >>> [category(name) for name in ("red Wooden chairs", "cup of tea", "2 women", "glasses")]
        ['chair', 'cup', 'woman', 'glass']
    """
    words = re.findall(r"[^\W_]+(?:['\u2019-][^\W_]+)*", name.lower())
    head = next((i for i, word in enumerate(words) if i and word in PREPOSITIONS), len(words))
    return _singular(words[head - 1]) if words else name.lower()


def statistics_table(counted: ChainStatistics) -> Table:
    """Return the three counts as one table for the terminal."""
    chains, steps = sum(counted.turns.values()), sum(counted.steps.values())
    table = Table(title=f"{chains} chains, {steps} steps")
    table.add_column("")
    table.add_column("count", justify="right")
    table.add_column("share", justify="right")
    totals = (steps, chains, chains)
    for panel, counts, total in zip(PANELS, _panels(counted), totals, strict=True):
        table.add_section()
        table.add_row(f"[bold]{panel}[/bold]", "", "")
        for label, count in counts.items():
            table.add_row(f"  {escape_markup(label)}", str(count), f"{count / total:.1%}")
    return table


def draw_statistics(counted: ChainStatistics, path: Path) -> None:
    """Draw the three counts side by side.

    Args:
        counted: counts over some chains.
        path: file of the figure; its suffix sets the format.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = _panels(counted)
    rows = max(9, *map(len, panels))
    layout = ConstrainedLayoutEngine(w_pad=0.2, h_pad=0.15)
    figure = Figure(figsize=(12, 1.0 + 0.24 * rows), layout=layout)
    columns = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    for axes, title, counts in zip(columns, PANELS, panels, strict=True):
        _draw_bars(axes, title, counts, rows)
    figure.savefig(path, dpi=120)


def _draw_bars(axes: Any, title: str, counts: Mapping[str, int], rows: int) -> None:
    """Draw one panel; bars are as thick as in a panel with ``rows`` bars."""
    bars = axes.barh(list(counts), list(counts.values()), color=BAR, height=0.66)
    axes.bar_label(bars, padding=4, color=SOFT, fontsize=9)
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold", pad=8)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.margins(x=0.16)
    axes.tick_params(length=0, labelcolor=INK, labelsize=9.5)
    axes.xaxis.set_visible(False)
    axes.spines[:].set_visible(False)


def _panels(counted: ChainStatistics) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Return labels and counts of the three panels, with the most frequent categories only."""
    shown = dict(list(counted.categories.items())[:CATEGORIES_SHOWN])
    turns = {f"{n} turns" if n > 1 else "1 turn": count for n, count in counted.turns.items()}
    return {x.replace("_", " "): count for x, count in counted.steps.items()}, shown, turns


def _names(chain: Chain) -> tuple[str, ...]:
    return chain.all_objects[-1] if chain.all_objects else ()


def _ranked(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda x: (-x[1], x[0])))


def _singular(noun: str) -> str:
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if re.search(r"[^aeiou]ies$", noun) and len(noun) > 4:
        return f"{noun[:-3]}y"
    if re.search(r"(?:ss|x|ch|sh|z)es$", noun):
        return noun[:-2]
    # Short words and those such as glass, cactus and iris are singular already.
    return noun if re.search(r"(?:^.{1,2}|ss|us|is)$", noun) else noun.removesuffix("s")
