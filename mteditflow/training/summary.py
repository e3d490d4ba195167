"""The end of a run on the terminal: a table before and after, and the rest in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

TITLES = {
    "instruction_following": "IF: all turns so far",
    "marginal": "Marginal: this turn alone",
    "content_consistency": "CC",
    "overall": "Overall: IF and CC",
}
WIDTH = 110  # of a console that is no terminal
Rows = Mapping[str, Any]  # a part of report.json


def print_summary(
    report: Mapping[str, Any], folder: Path, *, console: Console | None = None
) -> None:
    """Print what a run has reached, from its report.

    Args:
        report: of ``run_report``, or ``report.json`` read back.
        folder: of the run, to be named with its files.
        console: where to; standard output if not given.

    Example:
        >>> import torch
        >>> from mteditflow.rewards import TurnScores
        >>> from mteditflow.evaluation.evaluation import Evaluation
        >>> from mteditflow.training.report import run_report
        >>> scores = TurnScores(torch.tensor([[5.0, 1.0]]), torch.ones(1, 2) > 0, {})
        >>> same = Evaluation(0, ["1"], [["a", "b"]], {"following": scores}, success_at=5)
        >>> report = run_report(same, same, [], config={}, seed=0)
        >>> print_summary(report, Path("run"), console=Console(width=90))  # doctest: +ELLIPSIS
        1 held-out chain, percent [95% interval]...
        Written to run.
    """
    if console is None:
        console = Console(width=None if Console().is_terminal else WIDTH)
    console.print(summary_table(report))
    for line in summary_lines(report):
        console.print(line, highlight=False)
    files = sorted(
        path.name
        for path in folder.glob("*")
        if path.is_file() and path.name[0] != "." and not path.name.endswith(("-shm", "-wal"))
    )
    there = f": {', '.join(files)}" if files else ""
    console.print(f"Written to [bold]{escape(str(folder))}[/bold]{escape(there)}.", highlight=False)


def summary_table(report: Mapping[str, Any]) -> Table:
    """Return the metrics before and after, turn by turn, with 95% intervals."""
    chains = _many(report["held_out_chains"], "held-out chain")
    table = Table(title=f"{chains}, percent \\[95% interval]", title_justify="left")
    table.add_column("")
    table.add_column("")
    metrics = [name for name in report["before"] if f"{name}_interval" in report["before"]]
    for turn in range(len(report["before"][metrics[0]])):
        table.add_column(f"turn {turn + 1}", justify="right")
    for name in metrics:
        digits = 1 if name in TITLES else 3
        for when in ("before", "after"):
            cells = _cells(report[when], name, digits)
            title = TITLES.get(name, f"{escape(name)}, mean") if when == "before" else ""
            style = "bold" if when == "after" else "dim"
            table.add_row(title, when, *cells, style=style, end_section=when == "after")
    return table


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the rest in words: paired differences, chains left out, time, lost answers."""
    lines = [_difference(report["difference_at_last_turn"]), *_kept(report)]
    for when in ("before", "after"):
        left_out = report["held_out_chains"] - report[when]["counted_chains"]
        if left_out:
            lost = _counts(report[when]["lost_scores"])
            lines.append(
                f"{when.capitalize()}, {left_out} of {report['held_out_chains']} held-out chains "
                f"could not be scored and were left out{f' (turns lost: {lost})' if lost else ''}."
            )
    if report["time"]:
        split = ", ".join(f"{name} {share:.0%}" for name, (_, share) in report["time"].items())
        took = timedelta(seconds=round(report["seconds"]))
        lines.append(f"{_many(report['rounds'], 'round')} took {took}: {split}.")
    lost = report["lost_answers"]
    if lost["reasons"]:
        lines.append(
            f"{lost['share']:.1%} of training trajectories lost an answer "
            f"({_counts(lost['reasons'])})."
        )
    if report["invalid_reward_share"]:
        share = f"{report['invalid_reward_share']:.1%}"
        lines.append(f"{share} of training rewards were invalid; they trained nothing.")
    return lines


def _difference(gain: Rows) -> str:
    """Paired differences of the metrics in percent, in one sentence."""
    parts = []
    for name, title in TITLES.items():
        if gain.get(name) is not None:
            ends = _interval(gain[f"{name}_interval"])
            parts.append(f"{title.split(':')[0]} {gain[name]:+.1f} {ends}")
    if not parts:
        return f"At turn {gain['turn']} no chain can be compared."
    return (
        f"At turn {gain['turn']}, paired over {_many(gain['chains'], 'chain')}: "
        f"{', '.join(parts)} points."
    )


def _kept(report: Rows) -> list[str]:
    """How much of the first turn's success the last one keeps."""
    gain = report["difference_at_last_turn"]
    if gain["turn"] == 1:
        return []
    lines = []
    for name, ends in gain["kept"].items():
        before, after = ("nothing" if share is None else f"{share:.0%}" for share in ends)
        what = "success" if name == "marginal" else f"'{escape(name)}'"
        more, ends = gain[f"{name}_kept_difference"], gain[f"{name}_kept_difference_interval"]
        points = "" if more is None else f"; {more:+.1f} {_interval(ends)} points"
        lines.append(
            f"Of {what} at turn 1, turn {gain['turn']} keeps {after} (before: {before}{points})."
        )
    return lines


def _cells(rows: Rows, name: str, digits: int) -> list[str]:
    values: Sequence[float | None] = rows[name]
    return [
        "none" if value is None else f"{value:.{digits}f} \\[{low:.{digits}f}, {high:.{digits}f}]"
        for value, (low, high) in zip(values, rows[f"{name}_interval"], strict=True)
    ]


def _interval(ends: Sequence[float]) -> str:
    return f"\\[{ends[0]:+.1f}, {ends[1]:+.1f}]"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())
