"""Compare runs with a judge that loses answers: lost answers left out, or replaced by 0.5.

    python examples/lost_rewards.py

``train_flux.py`` trains the tiny editor with a judge and a consistency server over HTTP, over
several seeds; the results are a page in ``docs/``. Existing runs are kept.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import diffusers
import transformers
import typer
from matplotlib.figure import Figure
from mteditflow_examples.evidence import cell, made_with, seeds_of, signed
from mteditflow_examples.shapes.editor import Family
from mteditflow_examples.shapes.files import COUNTS, write_world
from mteditflow_examples.shapes.held_out import evaluate_held_out
from mteditflow_examples.shapes.served import service
from tqdm import tqdm

from mteditflow._command import program
from mteditflow._exits import refusing
from mteditflow._files import require_folder
from mteditflow.evaluation import Evaluation
from mteditflow.training import Checkpoints, read_metrics, run_report, write_report

HERE = Path(__file__).parent
LOSING = ("--lost-answers", "0.1")
SERVED = """judge_model = "scripted"
thinking = false
terms = "l1"
max_invalid = 0.5"""
KINDS = {"none": (), "invalid": LOSING, "invented": (*LOSING, "--invent")}  # judge options
TITLES = {
    "none": "No answer lost",
    "invalid": "10% lost, left out",
    "invented": "10% lost, 0.5 in their place",
}
COLORS = {"none": "#8a94a3", "invalid": "#2457d6", "invented": "#c0392b"}
WINDOW = 8  # rounds in the moving average of the curve
TURNS = 3

Reports = dict[tuple[str, int], dict[str, Any]]


def main(
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/lost_rewards"),
    docs: Annotated[Path, typer.Option(help="Folder of the page and the figure.")] = Path("docs"),
    workers: Annotated[int, typer.Option(min=1, help="Concurrent runs; they share the cores.")] = 1,
) -> None:
    """Run missing seeds, then write the page and the figure."""
    with refusing():
        numbers = seeds_of(seeds)
        require_folder("runs", runs)
        require_folder("docs", docs)
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    reports = run_all(numbers, runs, workers)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "lost_rewards.md").write_text(document(reports), encoding="utf-8")
    draw(reports, docs / "lost_rewards.png")
    print(f"Written: {docs / 'lost_rewards.md'}")


def run_all(seeds: Sequence[int], runs: Path, workers: int) -> Reports:
    """Run every kind with every seed, ``workers`` at a time; return reports by (kind, seed)."""
    for seed in seeds:
        world_of(seed, runs)
    jobs = [(kind, seed) for kind in KINDS for seed in seeds]
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(lambda job: run(*job, runs, threads), jobs)
        return dict(zip(jobs, tqdm(done, total=len(jobs), unit="run"), strict=True))


def run(
    kind: str,
    seed: int,
    runs: Path,
    threads: int = 1,
    *,
    counts: Sequence[int] = COUNTS,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Train and evaluate unless the report exists; an interrupted run is resumed.

    Args:
        kind: A key of ``KINDS``.
        seed: Seed of chains, adapters and noise.
        runs: Parent of the run's folder ``<kind>-<seed>``.
        threads: Threads of the trainer.
        counts: Number of training chains, and of held-out chains.
        options: Further options of the trainer.

    Returns:
        The report.

    Raises:
        RuntimeError: The trainer failed; the message has the end of its output.
        ValueError: The existing report belongs to another run.
    """
    folder = runs / f"{kind}-{seed}"
    path, config = folder / "report.json", {"judge": list(KINDS[kind])}
    if not path.exists():
        world = world_of(seed, runs, counts)
        train(world, folder, seed, threads, judge_options=KINDS[kind], options=options)
        metrics = read_metrics(folder / "metrics.jsonl")
        evaluations = evaluate(world, folder, seed, rounds=len(metrics))
        report = run_report(*evaluations, metrics, config=config, seed=seed)
        write_report(folder, report | {"following": [m["reward/following"] for m in metrics]})
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if (report["seed"], report.get("config")) != (seed, config):
        raise ValueError(f"{path}: expected a report of {config}, seed {seed}; remove its folder")
    return report


def world_of(seed: int, runs: Path, counts: Sequence[int] = COUNTS) -> Path:
    """Write the editor and the chains of a seed unless they exist; return their folder."""
    world = runs / f"world-{seed}"
    if not (world / "held_out.jsonl").exists():  # written last, so all else is complete
        write_world(world, Family.kontext, seed=seed, counts=counts, turns=TURNS)
    return world


def train(
    world: Path,
    folder: Path,
    seed: int,
    threads: int,
    *,
    judge_options: Sequence[str],
    options: Sequence[str],
) -> None:
    """Run both services and the trainer, each in its own process.

    Raises:
        RuntimeError: The trainer failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "served.toml").write_text(settings(), encoding="utf-8")
    with service("judge", *judge_options) as judge, service("consistency") as consistency:
        command = [sys.executable, str(HERE / "train_flux.py"), str(folder / "served.toml")]
        command += ["--rewards.judge", judge, "--rewards.consistency", consistency]
        command += ["--model.path", str(world / "model"), "--data.chains", f"{world}/train.jsonl"]
        command += ["--data.held-out", "None", "--training.seed", str(seed)]
        command += ["--output.folder", str(folder), *options]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode:
        words = (finished.stdout + finished.stderr)[-2000:]
        raise RuntimeError(f"{' '.join(command)} failed:\n{words}")


def settings() -> str:
    """Return the TOML of the preset ``shapes-nft`` with services in place of the scorer."""
    preset = (HERE / "flux" / "presets" / "shapes-nft.toml").read_text(encoding="utf-8")
    exact = 'scorer = "mteditflow_examples.shapes.scoring:ExactRewards"'
    return preset.replace(exact, SERVED)


def evaluate(world: Path, folder: Path, seed: int, *, rounds: int) -> list[Evaluation]:
    """Evaluate the untrained model, and the adapter of the last checkpoint, by exact rewards."""
    files = (world / "model", world / "held_out.jsonl")
    adapter = Checkpoints(folder / "checkpoints").find("auto").path / "lora"
    before = evaluate_held_out(*files, seed=seed)
    return [before, evaluate_held_out(*files, seed=seed, adapter=adapter, rounds=rounds)]


def document(reports: Reports) -> str:
    """Write the page as Markdown."""
    some = next(iter(reports.values()))
    lines = [
        "# Lost answers: left out, or invented",
        "",
        "Output of `make lost-rewards` (`python examples/lost_rewards.py`); nothing here is "
        "written by hand.",
        "",
        *made_with(reports),
        f"- The preset `shapes-nft`, {some['rounds']} rounds, but every picture goes over HTTP: "
        "instruction following is asked of a scripted judge, which answers from the exact rewards "
        "and spoils a share of its answers (refused, cut off, a score too few, one out of range); "
        "content consistency comes from the server of the library, with a detector by rule and "
        "the L1 terms. Four attempts for each answer; a spoilt one stays spoilt.",
        f"- {some['held_out_chains']} held-out chains, scored exactly, before and after, from "
        "equal noise. Percent, 95% intervals over chains.",
        "- Lost: share of the judge's answers that the trainer counts as lost; where 0.5 is put "
        "in their place, it counts none. Invalid: share of rewards that were left out of "
        "statistics and training.",
        "",
        "![Rewards in training, and Overall after it](lost_rewards.png)",
        "",
        "| | seed | lost | invalid | Overall(3) before | after | paired difference | CC(3), "
        "difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(name, seed, report) for (name, seed), report in reports.items()]
    lines += [
        "",
        "| mean over seeds | Overall(3), difference | CC(3), difference |",
        "|---|---|---|",
    ]
    lines += [_mean_row(name, reports) for name in KINDS]
    lines += ["", "Why answers were lost, all runs together:", ""]
    lines += [f"- {reason}: {count}" for reason, count in _reasons(reports).items()]
    return "\n".join([*lines, ""])


def _row(name: str, seed: int, report: dict[str, Any]) -> str:
    gain = report["difference_at_last_turn"]
    cells = [
        TITLES[name],
        str(seed),
        f"{report['lost_answers']['share']:.1%}",
        f"{report['invalid_reward_share']:.1%}",
        cell(report["before"], "overall"),
        cell(report["after"], "overall"),
        f"**{signed(gain, 'overall')}**",
        signed(gain, "content_consistency"),
    ]
    return f"| {' | '.join(cells)} |"


def _mean_row(name: str, reports: Reports) -> str:
    gains = [r["difference_at_last_turn"] for (own, _), r in reports.items() if own == name]
    means = (fmean(gain[of] for gain in gains) for of in ("overall", "content_consistency"))
    return f"| {TITLES[name]} | {' | '.join(f'{mean:+.1f}' for mean in means)} |"


def _reasons(reports: Reports) -> dict[str, int]:
    total: dict[str, int] = {}
    for report in reports.values():
        for reason, count in report["lost_answers"]["reasons"].items():
            total[reason] = total.get(reason, 0) + count
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def draw(reports: Reports, path: Path) -> None:
    """Draw rewards over updates, mean over seeds, and Overall after training, every seed."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curve, turns = figure.subplots(1, 2, width_ratios=(1.4, 1))
    for name, title in TITLES.items():
        own = [report for (kind, _), report in reports.items() if kind == name]
        values = [100 * fmean(x) for x in zip(*(r["following"] for r in own), strict=True)]
        smooth = [fmean(values[max(0, i - WINDOW) : i]) for i in range(1, len(values) + 1)]
        rounds, color = range(1, len(values) + 1), COLORS[name]
        curve.plot(rounds, values, color=color, alpha=0.2, linewidth=1)
        curve.plot(rounds, smooth, color=color, linewidth=2.2, label=title)
        for report in own:
            after = report["after"]["overall"]
            turns.plot(range(1, len(after) + 1), after, "o-", color=color, markersize=4)
    before = [report["before"]["overall"] for report in reports.values()]
    for values in before:
        turns.plot(range(1, len(values) + 1), values, ":", color="#1f2933", linewidth=1)
    curve.set(
        xlabel="round", ylabel="percent", title="Instruction following, as the trainer saw it"
    )
    curve.legend(frameon=False, loc="lower right")
    turns.set(xlabel="turn", ylim=(0, 100), title="Overall on held-out chains (dotted: before)")
    turns.set_xticks(range(1, len(before[0]) + 1))
    for axes in (curve, turns):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


app = program(main)

if __name__ == "__main__":
    app()
