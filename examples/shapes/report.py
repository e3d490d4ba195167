"""What a run leaves behind: progress on the terminal, a table, report.json and two pictures."""

from __future__ import annotations

import json
import platform
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import matplotlib as mpl
import torch
import transformers
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

import mteditflow

from .evaluate import compare, summarise
from .rewards import Scored, Scores
from .world import Chain, draw

INK, SOFT, GOOD, BAD = "#1f2933", "#8a94a3", "#1a7f4b", "#c0392b"
COLORS = {"following": "#2457d6", "consistency": "#d97706", "chains": GOOD}


class Log:
    """Rewards of every update, shown by a progress bar while they come in."""

    def __init__(self, objective: str, seed: int) -> None:
        self.objective, self.seed = objective, seed
        self.started = time.monotonic()
        self.rewards: list[dict[str, float]] = []
        self.invalid = self.scored = 0
        self.lost: Counter[str] = Counter()
        self._bar: tqdm | None = None

    def progress(self, updates: int) -> Iterator[int]:
        """Count the updates of a run."""
        with tqdm(total=updates, desc=f"RL ({self.objective})", unit="update") as self._bar:
            for update in range(updates):
                yield update
                self._bar.update()

    def add(self, scores: Scored, rewards: dict[str, Tensor], valid: Tensor) -> None:
        """Take in one update's scores ``[B, N]``, rewards ``[B]``, and which are valid ``[B]``."""
        entry = {name: float(reward[valid].mean()) for name, reward in rewards.items()}
        best = scores.following.score[valid] == 5
        entry["chains"] = float(best.all(dim=1).float().mean())
        self.lost.update(scores.lost)
        self.invalid += int((~valid).sum())
        self.scored += len(valid)
        self.rewards.append(entry)
        if self._bar is not None:
            recent = self.smooth(entry)
            self._bar.set_postfix_str(
                f"following {recent['following']:.2f}, consistency {recent['consistency']:.2f}, "
                f"whole chains {recent['chains']:.0%}",
                refresh=False,
            )

    def smooth(self, names: Sequence[str] | dict[str, float], window: int = 8) -> dict[str, float]:
        """Return the mean of the last entries."""
        last = self.rewards[-window:]
        return {name: sum(entry[name] for entry in last) / len(last) for name in names}


def write_report(
    output: Path,
    log: Log,
    recipe: dict[str, Any],
    chains: Sequence[Chain],
    before: tuple[Scores, Tensor],
    after: tuple[Scores, Tensor],
) -> dict[str, Any]:
    """Write ``report.json``, ``learning_curve.png`` and ``chains.png``; print the table.

    Args:
        output: The folder; made if it is missing.
        log: The run's rewards.
        recipe: Its hyperparameters.
        chains: The held-out chains that ``before`` and ``after`` are about.
        before: Scores and pictures of the editor as shipped.
        after: The same after training, from the same initial noise.

    Returns:
        What ``report.json`` holds.
    """
    report = {
        "objective": log.objective,
        "seed": log.seed,
        "updates": len(log.rewards),
        "seconds": round(time.monotonic() - log.started, 1),
        "held_out_chains": len(chains),
        "invalid_reward_share": log.invalid / max(log.scored, 1),
        "lost_answers": {
            "share": log.lost.total() / max(log.scored, 1),
            "reasons": dict(log.lost.most_common()),
        },
        "before": summarise(before[0]),
        "after": summarise(after[0]),
        "difference_at_last_turn": compare(before[0], after[0]),
        "recipe": recipe,
        "rewards": log.rewards,
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "mteditflow": mteditflow.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2) + "\n"
    (output / "report.json").write_text(text, encoding="utf-8")
    draw_learning_curve(report, output / "learning_curve.png")
    draw_chains(chains, before, after, output / "chains.png")
    print_table(report)
    Console().print(f"\nWritten to [bold]{output}[/bold]: report.json and two pictures.")
    return report


def print_table(report: dict[str, Any]) -> None:
    """Print before and after, turn by turn, with 95% intervals."""
    names = {
        "instruction_following": "IF: all turns so far",
        "marginal": "Marginal: this turn",
        "content_consistency": "CC",
        "overall": "Overall",
        "strict": "whole picture right so far",
    }
    table = Table(title=f"{report['held_out_chains']} held-out chains, percent [95% interval]")
    table.add_column("")
    turns = len(report["before"]["overall"])
    for turn in range(turns):
        table.add_column(f"turn {turn + 1}", justify="right")
    for name, title in names.items():
        for when in ("before", "after"):
            cells = [
                f"{value:.1f} [{low:.1f}, {high:.1f}]"
                for value, (low, high) in zip(
                    report[when][name], report[when][f"{name}_interval"], strict=True
                )
            ]
            style = "bold" if when == "after" else "dim"
            table.add_row(f"{title} {when}", *cells, style=style, end_section=when == "after")
    gain, lost = report["difference_at_last_turn"], report["lost_answers"]
    low, high = gain["overall_interval"]
    kept = ["nothing" if share is None else f"{100 * share:.0f}%" for share in gain["kept"]]
    console = Console(width=None if Console().is_terminal else 110)
    console.print(table)
    console.print(
        f"Overall at turn {turns}: [bold]{gain['overall']:+.1f}[/bold] points "
        f"[{low:+.1f}, {high:+.1f}], paired.  CC: {gain['content_consistency']:+.1f}.  "
        f"Of turn 1's success, turn {turns} keeps {kept[1]} (before: {kept[0]})."
    )
    if lost["reasons"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in lost["reasons"].items())
        invalid = report["invalid_reward_share"]
        console.print(
            f"The judge lost {lost['share']:.1%} of its answers ({reasons}); {invalid:.1%} of the "
            "rewards were invalid and left out."
        )


def draw_learning_curve(report: dict[str, Any], path: Path) -> None:
    """Draw rewards over updates, and before against after on held-out chains."""
    with mpl.rc_context(_style()):
        figure = Figure(figsize=(12.5, 4.1), layout="constrained")
        curve, *panels = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
        labels = {
            "consistency": "content consistency",
            "following": "instruction following",
            "chains": "all three edits right",
        }
        for name, label in labels.items():
            values = [100 * entry[name] for entry in report["rewards"]]
            recent = [values[max(0, i - 7) : i + 1] for i in range(len(values))]
            updates = range(1, len(values) + 1)
            curve.plot(updates, values, color=COLORS[name], alpha=0.2, linewidth=1)
            means = [sum(last) / len(last) for last in recent]
            curve.plot(updates, means, color=COLORS[name], linewidth=2.2, label=label)
        curve.set(xlabel="update", ylabel="percent", ylim=(0, 103), title="Rewards in training")
        curve.legend(frameon=False, loc="center left", bbox_to_anchor=(0, 0.34), fontsize=10)
        titles = {"overall": "Overall, so far", "strict_marginal": "Whole picture right"}
        for axes, (name, title) in zip(panels, titles.items(), strict=True):
            _draw_turns(axes, report, name)
            axes.set(xlabel="turn", ylim=(0, 103), title=title)
        panels[0].legend(frameon=False)
        figure.suptitle(
            f"{report['objective'].upper()}, seed {report['seed']}: rewards, and "
            f"{report['held_out_chains']} held-out chains with 95% intervals",
            color=INK,
        )
        figure.savefig(path, dpi=150)


def draw_chains(
    chains: Sequence[Chain],
    before: tuple[Scores, Tensor],
    after: tuple[Scores, Tensor],
    path: Path,
    count: int = 4,
) -> None:
    """Draw some chains, before above after, with instructions and whether each was followed.

    Chosen are chains that training repaired, if there are any: the picture shows what a repair
    looks like; the table tells how many there are.
    """
    repaired = after[0].strict.sum(dim=1) - before[0].strict.sum(dim=1)
    chosen = repaired.argsort(descending=True, stable=True)[:count].tolist()
    turns = len(chains[0].edits)
    with mpl.rc_context(_style()):
        figure = Figure(figsize=(3.3 * (turns + 1), 3.75 * -(-len(chosen) // 2) + 0.4))
        figure.suptitle(
            "Chains that training repaired, before and after, from equal noise.  "
            "A green frame: the whole picture is right.",
            fontsize=12,
            color=INK,
            y=0.99,
        )
        blocks = figure.add_gridspec(
            -(-len(chosen) // 2), 2, wspace=0.1, hspace=0.34, left=0.03, right=0.99, top=0.86,
            bottom=0.015,
        )  # fmt: skip
        for block, row in zip(blocks, chosen, strict=False):
            grid = block.subgridspec(2, turns + 1, wspace=0.08, hspace=0.06)
            runs = {"before": before, "after": after}
            for j, (when, (scores, pictures)) in enumerate(runs.items()):
                first = figure.add_subplot(grid[j, 0])
                _show(first, draw(chains[row].initial), SOFT)
                first.set_ylabel(when, fontsize=12, color=INK, labelpad=6)
                if j == 0:
                    first.set_title("reference", fontsize=10, color=SOFT)
                for turn in range(turns):
                    axes = figure.add_subplot(grid[j, turn + 1])
                    right = bool(scores.strict[row, turn])
                    _show(axes, pictures[row, turn], GOOD if right else BAD)
                    if j == 0:
                        text = textwrap.fill(chains[row].instructions[turn], 19)
                        axes.set_title(text, fontsize=9.5, color=INK)
        figure.savefig(path, dpi=130)


def _draw_turns(axes: Any, report: dict[str, Any], name: str) -> None:
    """One metric over turns, before and after, with its intervals."""
    turns = range(1, len(report["before"][name]) + 1)
    for when, color, style in (("before", SOFT, "o--"), ("after", COLORS["following"], "o-")):
        low, high = zip(*report[when][f"{name}_interval"], strict=True)
        axes.fill_between(turns, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(turns, report[when][name], style, color=color, linewidth=2.2, label=when)
        for turn, value in zip(turns, report[when][name], strict=True):
            above = when == "after" or value < 12
            axes.annotate(
                f"{value:.0f}",
                (turn, value),
                xytext=(0, 9 if above else -17),
                textcoords="offset points",
                ha="center",
                color=color,
                fontsize=10,
            )
    axes.set_xticks(list(turns))
    axes.margins(x=0.12)


def _show(axes: Any, picture: Tensor, color: str) -> None:
    axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=color, linewidth=3)


def _style() -> dict[str, Any]:
    return {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": SOFT,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.grid": False,
    }
