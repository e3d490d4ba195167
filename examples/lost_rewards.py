"""What becomes of a run whose judge loses answers: left out, or replaced by 0.5.

    python examples/lost_rewards.py

The demo is trained through a judge and a consistency server over HTTP, over several seeds, and what
came out is written into ``docs/``. Runs that are already there are kept.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from evidence import Kind, cell, made_with, run_all, signed
from matplotlib.figure import Figure

SERVED = ("--rewards", "served")
LOSING = (*SERVED, "--lost-answers", "0.1")
KINDS = {
    "none": Kind(options=SERVED),
    "invalid": Kind(options=LOSING),
    "invented": Kind(options=(*LOSING, "--invent")),
}
TITLES = {
    "none": "No answer lost",
    "invalid": "10% lost, left out",
    "invented": "10% lost, 0.5 in their place",
}
COLORS = {"none": "#8a94a3", "invalid": "#2457d6", "invented": "#c0392b"}
WINDOW = 8  # updates that a point of the curve is the mean of

Reports = dict[tuple[str, int], dict[str, Any]]


def main(
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    runs: Annotated[Path, typer.Option(help="Where the runs are kept.")] = Path(
        "runs/lost_rewards"
    ),
    docs: Annotated[Path, typer.Option(help="Where the page and the figure go.")] = Path("docs"),
    workers: Annotated[int, typer.Option(help="Runs at a time; they share the cores.")] = 1,
) -> None:
    """Run what is missing, then write the page and the figure."""
    reports = run_all(KINDS, [int(seed) for seed in seeds.split(",")], runs, workers)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "lost_rewards.md").write_text(document(reports), encoding="utf-8")
    draw(reports, docs / "lost_rewards.png")
    print(f"Written: {docs / 'lost_rewards.md'}")


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
        f"- The demo, DiffusionNFT, {some['updates']} updates, but every picture goes over HTTP: "
        "instruction following is asked of a scripted judge, which answers from the exact rewards "
        "and spoils a share of its answers (refused, cut off, a score too few, one out of range); "
        "content consistency comes from the server of the library, with a detector by rule and "
        "the L1 terms. Two attempts for each answer; a spoilt one stays spoilt.",
        f"- {some['held_out_chains']} held-out chains, scored exactly, before and after, from "
        "equal noise. Percent, 95% bootstrap intervals over chains.",
        "- Lost: share of the judge's answers. Invalid: share of rewards that were left out of "
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
        rewards = [[update["following"] for update in report["rewards"]] for report in own]
        values = [100 * fmean(update) for update in zip(*rewards, strict=True)]
        smooth = [fmean(values[max(0, i - WINDOW) : i]) for i in range(1, len(values) + 1)]
        updates, color = range(1, len(values) + 1), COLORS[name]
        curve.plot(updates, values, color=color, alpha=0.2, linewidth=1)
        curve.plot(updates, smooth, color=color, linewidth=2.2, label=title)
        for report in own:
            after = report["after"]["overall"]
            turns.plot(range(1, len(after) + 1), after, "o-", color=color, markersize=4)
    before = [report["before"]["overall"] for report in reports.values()]
    for values in before:
        turns.plot(range(1, len(values) + 1), values, ":", color="#1f2933", linewidth=1)
    curve.set(
        xlabel="update", ylabel="percent", title="Instruction following, as the trainer saw it"
    )
    curve.legend(frameon=False, loc="lower right")
    turns.set(xlabel="turn", ylim=(0, 100), title="Overall on held-out chains (dotted: before)")
    turns.set_xticks(range(1, len(before[0]) + 1))
    for axes in (curve, turns):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    typer.run(main)
