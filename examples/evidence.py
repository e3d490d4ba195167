"""Train both objectives and both families over seeds in the shapes world: ``docs/evidence.md``.

    python examples/evidence.py

Existing runs are kept and interrupted ones resumed, so the command can be stopped and started
again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from mteditflow_examples.flux.command_line import parse
from mteditflow_examples.shapes.editor import Family
from mteditflow_examples.shapes.files import write_world
from tqdm import tqdm

from mteditflow._checks import check_count
from mteditflow._command import program
from mteditflow._exits import refusing
from mteditflow._files import require_folder

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Kind:
    """Preset and options of a trainer run."""

    preset: str
    options: tuple[str, ...] = ()

    @property
    def family(self) -> Family:
        """Family of the trained tiny editor."""
        return Family.klein if "klein" in self.preset else Family.kontext

    @property
    def rounds(self) -> int:
        """Number of training rounds."""
        return parse([self.preset]).training.rounds


KINDS = {
    "nft": Kind("shapes-nft"),
    "grpo": Kind("shapes-grpo"),
    "klein-nft": Kind("shapes-klein-nft"),
    "klein-grpo": Kind("shapes-klein-grpo"),
}
TITLES = {
    "nft": "DiffusionNFT: preset `shapes-nft`",
    "grpo": "Flow-GRPO: preset `shapes-grpo`",
    "klein-nft": "DiffusionNFT, klein: preset `shapes-klein-nft`",
    "klein-grpo": "Flow-GRPO, klein under guidance 4: preset `shapes-klein-grpo`",
}
COUNTS = {Family.kontext: (480, 512), Family.klein: (240, 128)}  # training, held-out chains
SHOWN = ("nft", "grpo", "klein-grpo")  # kinds with pictures on the page


def main(
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/evidence"),
    docs: Annotated[Path, typer.Option(help="Folder of evidence.md and figures.")] = Path("docs"),
    workers: Annotated[int, typer.Option(min=1, help="Concurrent runs; they share the cores.")] = 1,
) -> None:
    """Run missing seeds, then write the tables and figures."""
    with refusing():
        numbers = seeds_of(seeds)
        require_folder("runs", runs)
        require_folder("docs", docs)
    reports = run_all(KINDS, numbers, runs, workers)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "evidence.md").write_text(document(reports), encoding="utf-8")
    draw_summary(reports, docs / "evidence.png")
    first = next(iter(reports))[1]
    for kind in SHOWN:
        for picture in ("chains", "curves"):
            source = folder(runs, kind, first) / f"{picture}.png"
            shutil.copyfile(source, docs / f"demo_{kind}_{picture}.png")
    print(f"Written: {docs / 'evidence.md'}")


def seeds_of(text: str) -> list[int]:
    """Parse distinct seeds separated by commas.

    Raises:
        ValueError: a seed is not an integer >= 0, or is repeated.
    """
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise ValueError(f"seeds: expected integers separated by commas, got {text!r}") from error
    for seed in seeds:
        check_count("seeds", seed, low=0)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected each once, got {text!r}")
    return seeds


def folder(runs: Path, kind: str, seed: int) -> Path:
    """Return the folder of a run."""
    return runs / f"{kind}-{seed}"


def run_all(
    kinds: Mapping[str, Kind], seeds: Sequence[int], runs: Path, workers: int
) -> dict[tuple[str, int], dict[str, Any]]:
    """Run every kind with every seed, ``workers`` at a time; return reports by (kind, seed)."""
    worlds = {(kind.family, seed) for kind in kinds.values() for seed in seeds}
    for family, seed in sorted(worlds):
        world = world_of(runs, family, seed)
        if not (world / "held_out.jsonl").exists():  # written last, so all else is complete
            write_world(world, family, seed=seed, counts=COUNTS[family], turns=3)
    jobs = [(name, seed) for name in kinds for seed in seeds]
    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(lambda job: run(kinds[job[0]], job[0], job[1], runs, workers), jobs)
        return dict(zip(jobs, tqdm(done, total=len(jobs), unit="run"), strict=True))


def world_of(runs: Path, family: Family, seed: int) -> Path:
    """Return the folder of a seed's editor and chains."""
    return runs / f"world-{family.value}-{seed}"


def run(kind: Kind, name: str, seed: int, runs: Path, workers: int) -> dict[str, Any]:
    """Train in a subprocess unless the report exists; return the report.

    Raises:
        RuntimeError: the trainer failed.
        ValueError: the existing report has another seed or number of rounds.
    """
    output, world = folder(runs, name, seed), world_of(runs, kind.family, seed)
    path = output / "report.json"
    if not path.exists():
        threads = max(1, (os.cpu_count() or 1) // workers)
        command = [sys.executable, str(HERE / "train_flux.py"), kind.preset]
        command += ["--model.path", str(world / "model"), "--data.chains", f"{world}/train.jsonl"]
        command += ["--data.held-out", f"{world}/held_out.jsonl", "--training.seed", str(seed)]
        command += ["--output.folder", str(output)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        finished = subprocess.run(
            [*command, *kind.options], env=environment, capture_output=True, text=True
        )
        if finished.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    expected = (seed, kind.rounds)
    if (report["seed"], report["rounds"]) != expected:
        raise ValueError(f"{path}: expected seed and rounds {expected}; remove it to run again")
    return report


def document(reports: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Write the evidence as Markdown."""
    some = next(iter(reports.values()))
    lines = [
        "# Evidence: the shapes world over seeds",
        "",
        "Output of `make evidence` (`python examples/evidence.py`); nothing here is written by "
        "hand.",
        "",
        *made_with(reports),
        f"- Each run: {some['held_out_chains']} held-out chains of three turns "
        f"({COUNTS[Family.klein][1]} for klein, whose pipeline takes one at a time), which share "
        "no picture and no chain with pre-training or RL; before and after from equal noise.",
        "- Minutes are wall-clock time on a machine that was not always idle.",
        "- Percent, with 95% intervals over chains. IF(3): all three turns succeeded. "
        "Overall(3) = sqrt(IF(3) CC(3)).",
        "- Marginal(3) / Marginal(1), in percent: low means exposure bias. It is given for "
        "following the instruction and for the whole picture. It is a ratio of shares of all "
        "chains, not the share of turn-1 successes that succeed at turn 3 too.",
        "- Whole picture right: the target and everything else, this turn alone, in percent.",
        "",
        "![Overall and whole pictures right, turn by turn](evidence.png)",
    ]
    for kind, title in TITLES.items():
        chosen = [(seed, report) for (name, seed), report in reports.items() if name == kind]
        lines += ["", f"## {title}", "", *_gains(chosen), "", *_ratios(chosen), ""]
        lines += [*_conditional(chosen), ""]
        lines += _turns(chosen)
    lines += ["", "## What a run looks like", ""]
    for kind in SHOWN:
        lines += [f"![Curves, {kind}](demo_{kind}_curves.png)", ""]
        lines += [f"![Chains before and after, {kind}](demo_{kind}_chains.png)", ""]
    return "\n".join(lines)


def made_with(reports: Mapping[tuple[str, int], dict[str, Any]]) -> list[str]:
    """Return lines with the dates and package versions of the runs."""
    some = next(iter(reports.values()))
    versions = ", ".join(f"{name} {value}" for name, value in some["versions"].items())
    dates = sorted({report["date"] for report in reports.values()})
    return [
        f"- Date: {' to '.join(dict.fromkeys((dates[0], dates[-1])))}",
        f"- Versions: {versions}",
    ]


def _gains(runs: list[tuple[int, dict[str, Any]]]) -> list[str]:
    rows = [
        "| seed | rounds | minutes | threads | Overall(3) before | after | paired difference | "
        "CC(3), difference | invalid rewards |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, report in runs:
        gain = report["difference_at_last_turn"]
        invalid = 100 * report["invalid_reward_share"]
        rows.append(
            f"| {seed} | {report['rounds']} | {report['seconds'] / 60:.1f} | "
            f"{report['threads']} | {cell(report['before'], 'overall')} | "
            f"{cell(report['after'], 'overall')} | **{signed(gain, 'overall')}** | "
            f"{signed(gain, 'content_consistency')} | {invalid:.0f}% |"
        )
    return rows


def _ratios(runs: list[tuple[int, dict[str, Any]]]) -> list[str]:
    rows = [
        "| seed | Marginal(3) / Marginal(1) before | after | difference | whole picture: before | "
        "after | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed, report in runs:
        gain = report["difference_at_last_turn"]
        cells = []
        for name in ("marginal", "strict"):
            ratio = gain["marginal_ratio"][name]
            cells += [_share(ratio[when]) for when in ("before", "after")]
            cells.append(signed(ratio, "difference", factor=100))
        rows.append(f"| {seed} | {' | '.join(cells)} |")
    return rows


def _conditional(runs: list[tuple[int, dict[str, Any]]]) -> list[str]:
    rows = [
        r"| seed | P(success at 3 \| success at 1) before | after | difference |",
        "|---|---|---|---|",
    ]
    for seed, report in runs:
        given = report["difference_at_last_turn"]["conditional_success"]
        cells = ["none" if given[x] is None else f"{given[x]:.0f}%" for x in ("before", "after")]
        rows.append(f"| {seed} | {' | '.join(cells)} | {signed(given, 'difference')} |")
    return rows


def _turns(runs: list[tuple[int, dict[str, Any]]]) -> list[str]:
    names = {
        "instruction_following": "IF",
        "marginal": "Marginal",
        "content_consistency": "CC",
        "overall": "Overall",
        "strict": "whole picture right",
    }
    rows = [
        f"| turns 1, 2, 3 | {' | '.join(names.values())} |",
        f"|---|{'---|' * len(names)}",
    ]
    for seed, report in runs:
        for when in ("before", "after"):
            cells = [
                ", ".join(f"{scale(name) * value:.1f}" for value in report[when][name])
                for name in names
            ]
            rows.append(f"| seed {seed}, {when} | {' | '.join(cells)} |")
    return rows


def scale(name: str) -> int:
    """Return the factor that makes a metric percent."""
    return 100 if name == "strict" else 1


def cell(summary: dict[str, list], name: str) -> str:
    """Return a metric at the last turn with its interval, as text."""
    value, ends = summary[name][-1], summary[f"{name}_interval"][-1]
    if None in ends:
        return f"{value:.1f} (no interval)"
    low, high = ends
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def signed(gain: dict[str, Any], name: str, *, factor: int = 1) -> str:
    """Return a paired difference with its interval, times ``factor``, as text."""
    if gain[name] is None:
        return "none"
    value, ends = gain[name], gain[f"{name}_interval"]
    if None in ends:
        return f"{factor * value:+.1f} (no interval)"
    low, high = ends
    return f"{factor * value:+.1f} [{factor * low:+.1f}, {factor * high:+.1f}]"


def _share(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.0f}%"


def draw_summary(reports: dict[tuple[str, int], dict[str, Any]], path: Path) -> None:
    """Draw Overall and whole-picture success over turns, every seed before and after."""
    panels = {"overall": "Overall, so far", "strict": "Whole picture right, this turn"}
    colors = {"before": "#8a94a3", "after": "#2457d6"}
    figure = Figure(figsize=(3.4 * len(TITLES), 6.4), layout="constrained")
    grid = figure.subplots(len(panels), len(TITLES), sharex=True, sharey="row", squeeze=False)
    for column, kind in enumerate(TITLES):
        for row, (name, title) in enumerate(panels.items()):
            axes = grid[row][column]
            axes.spines[["top", "right"]].set_visible(False)
            for (other, _), report in reports.items():
                if other != kind:
                    continue
                for when, color in colors.items():
                    values = [scale(name) * x for x in report[when][name]]
                    turns = range(1, len(values) + 1)
                    ends = report[when][f"{name}_interval"]
                    low, high = (
                        [math.nan if x is None else scale(name) * x for x in side]
                        for side in zip(*ends, strict=True)
                    )
                    axes.fill_between(turns, low, high, color=color, alpha=0.1, linewidth=0)
                    axes.plot(turns, values, "o-", color=color, markersize=4, label=when)
            axes.set(ylim=(0, 100), xticks=[1, 2, 3])
            if row == 0:
                axes.set_title(TITLES[kind].split(":")[0], fontsize=10)
            else:
                axes.set_xlabel("turn")
            if column == 0:
                axes.set_ylabel(f"{title}, %")
    handles, labels = grid[0][0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    grid[0][0].legend(unique.values(), unique.keys(), frameon=False, loc="lower left")
    figure.savefig(path, dpi=150)


app = program(main)

if __name__ == "__main__":
    app()
