"""The page of a study of long chains: metrics of each recipe, differences, and curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from mteditflow import collapse_rate
from mteditflow.evaluation import Evaluation, destroyed_below
from mteditflow.evaluation.seeds import mean_interval
from mteditflow.metrics import FEW_CASES
from mteditflow.training.pictures import Strip, draw_strips

from .figures import plain
from .long_chains import STILL, TWENTY
from .page import made_with
from .results import with_range
from .running import Ablations
from .study import THREE, HeldOut, Setting

DESTROYED = 0.5  # consistency with the original below which a picture is destroyed
BEFORE = Setting("before", preset="before")
SHOWN = 2  # chains of twenty turns in the picture
FEW_SEEDS = 3  # seeds from which on a difference has an interval
COLORS = [color for k, color in enumerate(colormaps["tab10"].colors) if k != 7] + ["k"]  # no gray


@dataclass(frozen=True)
class Measure:
    """One column of a table.

    Attributes:
        title: header of the column.
        held_out: chains of the evaluation.
        value: function from an evaluation to the value.
        share: whether the value is a share of the chains, in percent.
    """

    title: str
    held_out: HeldOut
    value: Callable[[Evaluation], float]
    share: bool = False


def success_rate(evaluation: Evaluation, turn: int) -> float:
    """Return SR@k, percent: the share of chains whose turns up to k all succeed."""
    return evaluation.estimates["instruction_following"][turn - 1]


def collapse(evaluation: Evaluation, turn: int) -> float:
    """Return CR@k, percent: the share of chains with two destroyed pictures in a row."""
    flags = destroyed_below(evaluation.terms["consistency"], DESTROYED)
    rate = collapse_rate(flags.score.nan_to_num(0.0), valid=flags.measured)
    return 100 * float(rate[turn - 1])


def wear_at(evaluation: Evaluation, turn: int) -> float:
    """Return the mean absolute error outside all edits at a turn, percent of the range."""
    return 100 * float(evaluation.terms["wear"].score[:, turn - 1].nanmean())


SUCCESS = (
    Measure("IF(3)", THREE, lambda e: success_rate(e, 3), share=True),
    Measure("CC(3)", THREE, lambda e: e.estimates["content_consistency"][2]),
    Measure("Overall(3)", THREE, lambda e: e.estimates["overall"][2]),
    Measure("SR@5", TWENTY, lambda e: success_rate(e, 5), share=True),
    Measure("SR@10", TWENTY, lambda e: success_rate(e, 10), share=True),
    Measure("SR@20", TWENTY, lambda e: success_rate(e, 20), share=True),
)
PRESERVED = (
    Measure("CR@10", TWENTY, lambda e: collapse(e, 10), share=True),
    Measure("wear outside edits at 10", TWENTY, lambda e: wear_at(e, 10)),
    Measure("wear without edits at 10", STILL, lambda e: wear_at(e, 10)),
)
TABLES = (SUCCESS, PRESERVED)


class LongResults:
    """Metrics of the untrained editor and all settings, [settings, seeds], in this order.

    Raises:
        ValueError: no seed is complete.
    """

    def __init__(self, ablations: Ablations) -> None:
        self.seeds = ablations.complete_seeds()
        if not self.seeds:
            raise ValueError(f"{ablations.folder}: expected a seed with all settings, got none")
        study = ablations.study
        self.settings = [BEFORE, *study.settings.values()]
        self.evaluations: dict[HeldOut, list[list[Evaluation]]] = {}
        for held_out in study.held_out:
            rows = [
                [ablations.result(setting, seed, held_out) for seed in self.seeds]
                for setting in study.settings.values()
            ]
            before = [run.before for run in rows[0]]
            after = [[run.after for run in row] for row in rows]
            self.evaluations[held_out] = [before, *after]
        self._tables = {measure.title: self._table(measure) for part in TABLES for measure in part}

    def table(self, measure: Measure) -> Tensor:
        """Return the values of a measure, float64 [settings, seeds]."""
        return self._tables[measure.title]

    def _table(self, measure: Measure) -> Tensor:
        rows = [[measure.value(e) for e in row] for row in self.evaluations[measure.held_out]]
        return torch.tensor(rows, dtype=torch.float64)

    def chains(self, held_out: HeldOut) -> int:
        """Return the number of held-out chains of each seed."""
        return len(self.evaluations[held_out][0][0])

    def row(self, setting: Setting) -> int:
        """Return the row of a trained setting."""
        return [x.name for x in self.settings].index(setting.name)

    def level(self, measure: Measure, row: int) -> str:
        """Return the mean over seeds of one setting, with the lowest and the highest seed."""
        return with_range(self.table(measure)[row])

    def difference(self, measure: Measure, row: int, other: int) -> str:
        """Return one setting minus another, paired by seed.

        Returns:
            The mean with the t-interval of these differences alone; with the lowest and highest
            seed where there are fewer than `FEW_SEEDS`, or where fewer than `FEW_CASES` chains
            succeeded or failed.
        """
        values = self.table(measure)[[row, other]]
        change = values[0] - values[1]
        if len(change) < FEW_SEEDS or self._cases(measure, values) < FEW_CASES:
            return with_range(change, "+.1f")
        return f"{mean_interval(change):+.1f}"

    def _cases(self, measure: Measure, percent: Tensor) -> float:
        """Return how many chains succeeded, or failed if these are fewer; infinity for a mean."""
        if not measure.share:
            return math.inf
        rarer = min(float(percent.sum()), float((100 - percent).sum()))
        return round(rarer / 100 * self.chains(measure.held_out))


def write_long_page(ablations: Ablations, docs: Path, *, command: str) -> Path:
    """Write the page and its figures from the complete seeds; return the page's path."""
    results, study = LongResults(ablations), ablations.study
    docs.mkdir(parents=True, exist_ok=True)
    draw_curves(results).savefig(docs / f"{study.name}.png", dpi=120)
    chains, at = edit_twenty(ablations, results), results.evaluations[TWENTY][0][0].success_at
    title = f"The first {SHOWN} held-out chains of twenty turns, seed {results.seeds[0]}"
    both = draw_strips([x for chain in chains for x in chain], success_at=at, title=title)
    both.savefig(docs / f"{study.name}_twenty.png", dpi=120)
    draw_chain(chains[0], success_at=at).savefig(docs / f"{study.name}_chain.png", dpi=120)
    page = docs / f"{study.name}.md"
    page.write_text(_document(results, ablations, command), encoding="utf-8")
    return page


def _document(results: LongResults, ablations: Ablations, command: str) -> str:
    study, first = ablations.study, results.seeds[0]
    base = results.row(study.base)
    every = range(len(results.settings))
    lines = [
        f"# {study.title}",
        "",
        *([study.answer, ""] if study.answer else []),
        f"Output of `{command}`.",
        "",
        *_method(results, ablations),
        "",
        "## Results",
        "",
        *_tables(results, every, results.level),
        f"![Success and wear turn by turn]({study.name}.png)",
        "",
        "Means over seeds, turn by turn.",
        "",
        f"![A chain of twenty turns before and after]({study.name}_chain.png)",
        "",
        f"![Two such chains, with their scores]({study.name}_twenty.png)",
        "",
        f"The first {SHOWN} held-out chains of seed {first}, whatever their scores, edited before "
        "training and by the recipe with the highest mean SR@10 above. Frames: green, followed; "
        "amber, at least half of the score; red, less.",
        "",
        "## Change by training",
        "",
        "After minus before.",
        "",
        *_tables(results, every[1:], lambda m, row: results.difference(m, row, 0)),
        f"## Recipes beside {study.base.label}",
        "",
        f"Recipe minus {study.base.label}, both after training.",
        "",
        *_tables(
            results,
            [row for row in every[1:] if row != base],
            lambda m, row: results.difference(m, row, base),
        ),
    ]
    return "\n".join(lines)


def _method(results: LongResults, ablations: Ablations) -> Iterator[str]:
    study = ablations.study
    yield f"- {made_with(ablations)}"
    yield (
        f"- Seeds {', '.join(map(str, results.seeds))}; {ablations.form.rounds} rounds each. "
        f"Missing: {len(ablations.missing())} of {ablations.total} runs. The base run is "
        f"{study.about}."
    )
    yield (
        f"- Held out for each seed: {results.chains(THREE)} chains of three turns, "
        f"{results.chains(TWENTY)} of twenty, and {results.chains(STILL)} of ten turns that ask "
        "for no change; each from its own noise, the same for all recipes of a seed."
    )
    yield (
        "- IF(3), SR@k: all turns up to k succeeded, percent. CC(3): consistency with the original "
        "outside all edits, percent. Overall(3) = sqrt(IF(3) CC(3)). CR@10: two pictures in a row, "
        f"the first by turn 10, have a consistency below {DESTROYED}, percent; lower is better. "
        "Wear: mean absolute difference to the original after ten turns, percent of the range, "
        "outside of all edits of chains of twenty turns, and of all pixels where no turn asks for "
        "a change; lower is better."
    )
    yield "- Means over seeds; in parentheses, the lowest and the highest seed."
    yield (
        "- Differences are paired by seed. In brackets, the 95% t-interval of a recipe's own "
        "differences: recipes vary between seeds by different amounts, so no error is pooled over "
        f"them. With fewer than {FEW_SEEDS} seeds, or fewer than "
        f"{FEW_CASES} chains that succeeded (or failed), the t-distribution does not fit; "
        "parentheses then hold the lowest and the highest seed, which is no interval of "
        "confidence. No correction is made for the number of differences: of forty intervals, two "
        "would leave out 0 on average if no recipe differed."
    )


def _tables(
    results: LongResults, rows: Sequence[int], cell: Callable[[Measure, int], str]
) -> Iterator[str]:
    """Yield the lines of one table of success and one of preservation."""
    for measures in TABLES:
        yield f"| recipe | {' | '.join(measure.title for measure in measures)} |"
        yield f"|---|{'---|' * len(measures)}"
        for row in rows:
            cells = [cell(measure, row) for measure in measures]
            yield f"| {results.settings[row].label} | {' | '.join(cells)} |"
        yield ""


def draw_curves(results: LongResults) -> Figure:
    """Draw SR@k, success and wear by turn."""
    figure = Figure(figsize=(17, 3.6), layout="constrained")
    panels: Sequence[tuple[str, HeldOut, Callable[[Evaluation], Sequence[float]]]] = (
        ("SR@k, %", TWENTY, lambda e: e.estimates["instruction_following"]),
        ("Marginal(k), %", TWENTY, lambda e: e.estimates["marginal"]),
        ("wear outside edits, % of the range", TWENTY, _wear_by_turn),
        ("wear without edits, % of the range", STILL, _wear_by_turn),
    )
    columns = figure.subplots(1, len(panels))
    for axes, (title, held_out, curve) in zip(columns, panels, strict=True):
        for row, setting in enumerate(results.settings):
            values = np.mean([curve(e) for e in results.evaluations[held_out][row]], axis=0)
            style = {"color": "0.5", "linestyle": ":"} if row == 0 else {"color": COLORS[row - 1]}
            axes.plot(range(1, len(values) + 1), values, label=setting.label, **style)
        axes.set(title=title, xlabel="turn")
        plain(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right", fontsize=8, frameon=False)
    return figure


def edit_twenty(ablations: Ablations, results: LongResults) -> list[list[Strip]]:
    """Edit the first held-out chains of the first seed by the start and the best recipe at SR@10.

    Returns:
        For each chain the strip of the start and that of the recipe. The chains are the first,
        whatever their scores are.
    """
    measure = next(measure for measure in SUCCESS if measure.title == "SR@10")
    best = int(results.table(measure).mean(dim=1)[1:].argmax()) + 1
    seed, policies = results.seeds[0], []
    for row in (0, best):
        setting, evaluation = results.settings[row], results.evaluations[TWENTY][row][0]
        images = ablations.images(setting if row else None, seed, TWENTY, range(SHOWN))
        terms = {"following": evaluation.terms["following"]}
        policies.append(
            [
                Strip(*chain, images[k], terms, k, setting.label)
                for k, chain in enumerate(
                    zip(evaluation.chain_ids[:SHOWN], evaluation.instructions, strict=False)
                )
            ]
        )
    return [list(chain) for chain in zip(*policies, strict=True)]


def draw_chain(strips: Sequence[Strip], *, success_at: float) -> Figure:
    """Draw the strips of one chain on few lines: numbered images in the frames of their turns."""
    turns = len(strips[0].instructions)
    columns = turns // 2 + 1
    figure = Figure(figsize=(1.2 * columns + 0.3, 5.9), layout="constrained")
    grid = figure.subplots(2 * len(strips), columns)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, first in enumerate((0, columns)):
        for row, strip in enumerate(strips):
            cells = grid[line * len(strips) + row]
            for turn in range(first, min(first + columns, turns + 1)):
                axes = cells[turn - first]
                axes.set_axis_on()
                axes.imshow(strip.images[turn], interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                frame = strip.frame(turn - 1, success_at) if turn else {"color": "0.6"}
                for spine in axes.spines.values():
                    spine.set(**frame | {"linewidth": 2.5})
                if row == 0:
                    words = f"{turn}. {strip.instructions[turn - 1]}" if turn else "reference"
                    axes.set_title(fill(words, 17), fontsize=7.5)
            cells[0].set_ylabel(fill(strip.label, 16), fontsize=9)
    return figure


def _wear_by_turn(evaluation: Evaluation) -> Sequence[float]:
    return (100 * evaluation.terms["wear"].score.nanmean(dim=0)).tolist()
