"""Repeat the demo over seeds and both objectives, and write what came out into ``docs/``.

    python examples/evidence.py

Runs that are already there are kept, so it can be stopped and started again. Flow-GRPO is also
run for twice as many updates, to see whether it stays up.
"""

from __future__ import annotations

import json
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
from tqdm import tqdm
from train_shapes import RECIPES, Objective

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Kind:
    """How the demo is run."""

    objective: Objective = Objective.nft
    times: int = 1  # the recipe's updates
    options: tuple[str, ...] = ()


KINDS = {
    "nft": Kind(),
    "grpo": Kind(Objective.grpo),
    "grpo-twice": Kind(Objective.grpo, times=2),
}
TITLES = {
    "nft": "DiffusionNFT: `make demo`",
    "grpo": "Flow-GRPO: `make demo OBJECTIVE=grpo`",
    "grpo-twice": "Flow-GRPO, twice as long",
}


def main(
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    runs: Annotated[Path, typer.Option(help="Where the runs are kept.")] = Path("runs/evidence"),
    docs: Annotated[Path, typer.Option(help="Where evidence.md and figures go.")] = Path("docs"),
    workers: Annotated[int, typer.Option(help="Runs at a time; they share the cores.")] = 1,
) -> None:
    """Run what is missing, then write the tables and figures."""
    reports = run_all(KINDS, [int(seed) for seed in seeds.split(",")], runs, workers)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "evidence.md").write_text(document(reports), encoding="utf-8")
    draw_summary(reports, docs / "evidence.png")
    first = next(iter(reports))[1]
    for kind in ("nft", "grpo"):
        for picture in ("chains", "learning_curve"):
            source = folder(runs, kind, first) / f"{picture}.png"
            shutil.copyfile(source, docs / f"demo_{kind}_{picture}.png")
    print(f"Written: {docs / 'evidence.md'}")


def folder(runs: Path, kind: str, seed: int) -> Path:
    """Where a run is kept."""
    return runs / kind.replace("-", f"-{seed}-", 1) if "-" in kind else runs / f"{kind}-{seed}"


def run_all(
    kinds: Mapping[str, Kind], seeds: Sequence[int], runs: Path, workers: int
) -> dict[tuple[str, int], dict[str, Any]]:
    """Run every kind with every seed, some at a time; return the reports by both."""
    jobs = [(name, seed) for name in kinds for seed in seeds]
    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(lambda job: run(kinds[job[0]], job[1], folder(runs, *job), workers), jobs)
        return dict(zip(jobs, tqdm(done, total=len(jobs), unit="run"), strict=True))


def run(kind: Kind, seed: int, output: Path, workers: int) -> dict[str, Any]:
    """Run the demo in a process of its own, unless its report is there; return the report."""
    path = output / "report.json"
    if not path.exists():
        threads = max(1, (os.cpu_count() or 1) // workers)
        objective = kind.objective
        command = [sys.executable, str(HERE / "train_shapes.py"), "--objective", objective.value]
        command += ["--seed", str(seed), "--output", str(output)]
        command += ["--updates", str(kind.times * RECIPES[objective].updates), *kind.options]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True)
        if finished.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    expected = {"objective": kind.objective.value, "seed": seed}
    if {name: report[name] for name in expected} != expected:
        raise ValueError(f"{path}: expected a report of {expected}; remove it to run again")
    return report


def document(reports: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Write the evidence as Markdown."""
    some = next(iter(reports.values()))
    lines = [
        "# Evidence: the demo over seeds",
        "",
        "Output of `make evidence` (`python examples/evidence.py`); nothing here is written by "
        "hand.",
        "",
        *made_with(reports),
        f"- Each run: {some['held_out_chains']} held-out chains of three turns, which share no "
        "picture and no chain with pre-training or RL; before and after from equal noise.",
        "- Minutes are those of the machine as it was, not always idle, with the threads given.",
        "- Percent, with 95% bootstrap intervals over chains. IF(3): all three turns succeeded. "
        "Overall(3) = sqrt(IF(3) CC(3)).",
        "- Kept: Marginal(3) / Marginal(1), the share of turn-1 success that turn 3 keeps: low "
        "means exposure bias. Once for following the instruction, once for the whole picture.",
        "",
        "![Overall and whole pictures right, turn by turn](evidence.png)",
    ]
    for kind, title in TITLES.items():
        chosen = [(seed, report) for (name, seed), report in reports.items() if name == kind]
        lines += ["", f"## {title}", "", *_gains(chosen), "", *_exposure(chosen), ""]
        lines += _turns(chosen)
    lines += ["", "## What a run looks like", ""]
    for kind in ("nft", "grpo"):
        lines += [f"![Rewards, {kind}](demo_{kind}_learning_curve.png)", ""]
        lines += [f"![Chains before and after, {kind}](demo_{kind}_chains.png)", ""]
    return "\n".join(lines)


def made_with(reports: Mapping[tuple[str, int], dict[str, Any]]) -> list[str]:
    """When and with what."""
    some = next(iter(reports.values()))
    versions = ", ".join(f"{name} {value}" for name, value in some["versions"].items())
    dates = sorted({report["date"] for report in reports.values()})
    return [
        f"- Date: {' to '.join(dict.fromkeys((dates[0], dates[-1])))}",
        f"- Versions: {versions}",
    ]


def _gains(runs: list[tuple[int, dict[str, Any]]]) -> list[str]:
    rows = [
        "| seed | updates | minutes | threads | Overall(3) before | after | paired difference | "
        "CC(3), difference | invalid rewards |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, report in runs:
        gain = report["difference_at_last_turn"]
        invalid = 100 * report["invalid_reward_share"]
        rows.append(
            f"| {seed} | {report['updates']} | {report['seconds'] / 60:.1f} | "
            f"{report['threads']} | {cell(report['before'], 'overall')} | "
            f"{cell(report['after'], 'overall')} | **{signed(gain, 'overall')}** | "
            f"{signed(gain, 'content_consistency')} | {invalid:.0f}% |"
        )
    return rows


def _exposure(runs: list[tuple[int, dict[str, Any]]]) -> list[str]:
    rows = [
        "| seed | kept before | after | difference | whole picture: kept before | after | "
        "difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed, report in runs:
        gain = report["difference_at_last_turn"]
        cells = []
        for name in ("kept", "strict_kept"):
            cells += [_share(value) for value in gain[name]]
            cells.append(signed(gain, f"{name}_difference"))
        rows.append(f"| {seed} | {' | '.join(cells)} |")
    return rows


def _turns(runs: list[tuple[int, dict[str, Any]]]) -> list[str]:
    names = {
        "instruction_following": "IF",
        "marginal": "Marginal",
        "content_consistency": "CC",
        "overall": "Overall",
        "strict_marginal": "whole picture right",
    }
    rows = [
        f"| turns 1, 2, 3 | {' | '.join(names.values())} |",
        f"|---|{'---|' * len(names)}",
    ]
    for seed, report in runs:
        for when in ("before", "after"):
            cells = [", ".join(f"{value:.1f}" for value in report[when][name]) for name in names]
            rows.append(f"| seed {seed}, {when} | {' | '.join(cells)} |")
    return rows


def cell(summary: dict[str, list], name: str) -> str:
    """A metric at the last turn with its interval."""
    low, high = summary[f"{name}_interval"][-1]
    return f"{summary[name][-1]:.1f} [{low:.1f}, {high:.1f}]"


def signed(gain: dict[str, Any], name: str) -> str:
    """A paired difference with its interval."""
    low, high = gain[f"{name}_interval"]
    return "none" if gain[name] is None else f"{gain[name]:+.1f} [{low:+.1f}, {high:+.1f}]"


def _share(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.0f}%"


def draw_summary(reports: dict[tuple[str, int], dict[str, Any]], path: Path) -> None:
    """Draw Overall and whole-picture success over turns, every seed before and after."""
    panels = {"overall": "Overall, so far", "strict_marginal": "Whole picture right, this turn"}
    colors = {"before": "#8a94a3", "after": "#2457d6"}
    figure = Figure(figsize=(3.6 * len(TITLES), 6.4), layout="constrained")
    grid = figure.subplots(len(panels), len(TITLES), sharex=True, sharey="row", squeeze=False)
    for column, kind in enumerate(TITLES):
        for row, (name, title) in enumerate(panels.items()):
            axes = grid[row][column]
            axes.spines[["top", "right"]].set_visible(False)
            for (other, _), report in reports.items():
                if other != kind:
                    continue
                for when, color in colors.items():
                    values = report[when][name]
                    turns = range(1, len(values) + 1)
                    low, high = zip(*report[when][f"{name}_interval"], strict=True)
                    axes.fill_between(turns, low, high, color=color, alpha=0.1, linewidth=0)
                    axes.plot(turns, values, "o-", color=color, markersize=4, label=when)
            axes.set(ylim=(0, 100), xticks=[1, 2, 3])
            if row == 0:
                axes.set_title(TITLES[kind].split(":")[0], fontsize=11)
            else:
                axes.set_xlabel("turn")
            if column == 0:
                axes.set_ylabel(f"{title}, %")
    handles, labels = grid[0][0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    grid[0][0].legend(unique.values(), unique.keys(), frameon=False, loc="lower left")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    typer.run(main)
