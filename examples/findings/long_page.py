"""The page of a study of long chains: metrics of each recipe, differences, and curves."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mteditflow import collapse_rate
from mteditflow.evaluation import Evaluation, destroyed_below
from mteditflow.evaluation.seeds import SeedInterval, difference_interval, mean_interval
from mteditflow.training.pictures import Strip, draw_strips
from mteditflow.training.report import PACKAGES

from .figures import plain
from .long_chains import STILL, TWENTY
from .running import Ablations
from .study import THREE, HeldOut, Setting

DESTROYED = 0.5  # consistency with the original below which a picture is destroyed
BEFORE = Setting("before", preset="before")
SHOWN = 2  # chains of twenty turns in the picture


@dataclass(frozen=True)
class Measure:
    """One column of the table.

    Attributes:
        title: header of the column.
        held_out: chains of the evaluation.
        value: function from an evaluation to the value.
    """

    title: str
    held_out: HeldOut
    value: Callable[[Evaluation], float]


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


MEASURES = (
    Measure("IF(3)", THREE, lambda e: success_rate(e, 3)),
    Measure("CC(3)", THREE, lambda e: e.estimates["content_consistency"][2]),
    Measure("Overall(3)", THREE, lambda e: e.estimates["overall"][2]),
    Measure("SR@5", TWENTY, lambda e: success_rate(e, 5)),
    Measure("SR@10", TWENTY, lambda e: success_rate(e, 10)),
    Measure("SR@20", TWENTY, lambda e: success_rate(e, 20)),
    Measure("CR@10", TWENTY, lambda e: collapse(e, 10)),
    Measure("wear outside edits at 10", TWENTY, lambda e: wear_at(e, 10)),
    Measure("wear without edits at 10", STILL, lambda e: wear_at(e, 10)),
)


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

    def table(self, measure: Measure) -> Tensor:
        """Return the values of a measure, float64 [settings, seeds]."""
        rows = [[measure.value(e) for e in row] for row in self.evaluations[measure.held_out]]
        return torch.tensor(rows, dtype=torch.float64)

    def mean(self, measure: Measure, row: int) -> SeedInterval:
        """Return the mean over seeds of one setting, with its t-interval."""
        return mean_interval(self.table(measure)[row])

    def change(self, measure: Measure, row: int) -> SeedInterval:
        """Return the difference of a setting to the untrained editor, paired by seed."""
        return difference_interval(self.table(measure), row, 0)


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
    study, form = ablations.study, ablations.form
    days = sorted(
        {str(date.fromtimestamp(p.stat().st_mtime)) for p in ablations.folder.glob("*/after*")}
    )
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    titles = [measure.title for measure in MEASURES]
    lines = [
        f"# {study.title}",
        "",
        *([study.answer, ""] if study.answer else []),
        f"Output of `{command}`.",
        "",
        f"- Runs of {' to '.join(dict.fromkeys((days[0], days[-1])))}; python "
        f"{platform.python_version()}, {versions}.",
        f"- Seeds {', '.join(map(str, results.seeds))}; {form.rounds} rounds each. Missing: "
        f"{len(ablations.missing())} of {ablations.total} runs. The base run is {study.about}.",
        f"- Held out: {form.held_out} chains of three turns, half as many of twenty, and a quarter "
        "as many of ten turns that ask for no change; each from its own noise, the same for all "
        "settings of a seed.",
        "- IF(3), SR@k: all turns up to k succeeded, percent. CC(3): consistency with the original "
        "outside all edits. CR@10: two pictures in a row, the first by turn 10, have a consistency "
        f"below {DESTROYED}. Wear: mean absolute difference to the original after ten turns, "
        "percent of the range, outside of all edits of chains of twenty turns, and of all pixels "
        "where no turn asks for a change.",
        "- Means with t-intervals over seeds (95%). Changes: after less before, paired by seed, "
        "the error pooled over all settings.",
        "",
        f"| recipe | {' | '.join(titles)} |",
        f"|---|{'---|' * len(titles)}",
    ]
    for row, setting in enumerate(results.settings):
        cells = [f"{results.mean(measure, row):.1f}" for measure in MEASURES]
        lines.append(f"| {setting.label} | {' | '.join(cells)} |")
    lines += ["", f"![Success and wear turn by turn]({study.name}.png)", ""]
    lines += [f"![A chain of twenty turns before and after]({study.name}_chain.png)", ""]
    lines += [f"![Two such chains, with their scores]({study.name}_twenty.png)", ""]
    lines += [f"| change by | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for row, setting in list(enumerate(results.settings))[1:]:
        cells = [f"{results.change(measure, row):+.1f}" for measure in MEASURES]
        lines.append(f"| {setting.label} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


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
        for row, setting in zip(results.evaluations[held_out], results.settings, strict=True):
            values = np.mean([curve(e) for e in row], axis=0)
            style = {"color": "0.5", "linestyle": ":"} if setting is BEFORE else {}
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
    measure = next(measure for measure in MEASURES if measure.title == "SR@10")
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
