"""Report of a run: ``report.json``, and its summary on the terminal."""

from __future__ import annotations

import io
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mteditflow._files import write_atomically
from mteditflow._pipes import reader_may_leave
from mteditflow._text import escape_markup
from mteditflow.evaluation.comparison import BeforeAfter, compare
from mteditflow.evaluation.evaluation import Evaluation
from mteditflow.metrics import FEW_CASES, Interval
from mteditflow.training.metrics_file import LOST, REWARD, SECONDS
from mteditflow.training.stopwatch import shares

PACKAGES = ("mteditflow", "torch", "diffusers", "transformers", "peft", "accelerate")
TITLES = {
    "instruction_following": "IF: all turns so far",
    "marginal": "Marginal: this turn alone",
    "content_consistency": "CC",
    "overall": "Overall: IF and CC",
}
WIDTH = 110  # of a console that is no terminal


def run_report(
    before: Evaluation,
    after: Evaluation,
    metrics: Sequence[Mapping[str, float]],
    *,
    config: Mapping[str, Any],
    seed: int,
    changes: Sequence[Mapping[str, Any]] = (),
    alarms: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return the results, settings and environment of a run as JSON values.

    Args:
        before: evaluation of the base model; if there is none, the first evaluation, whose round
            the summary then names.
        after: evaluation of the same chains after training.
        metrics: ``RunLog.metrics``, with the names of ``RoundRewards.numbers``.
        config: settings of the run at its end, JSON values (paths and enumerations become text).
        seed: seed of the run.
        changes: settings that a resumed run changed: "after_round", "option", "was" and "is" of
            each.
        alarms: image statistics that left their bands: "round", "statistic", "value", "low",
            "high" and "picture" of each.

    Returns:
        "before" and "after": metrics per turn, with the ends of their intervals as
        "<metric>_interval"; "difference_at_last_turn": as ``comparison_report``; "seconds", the
        total, and "time", seconds and share by phase; "invalid_reward_share"; "lost_answers" by
        reason; "rounds_without_reward", the number of rounds without any value, by reward;
        "drift_alarms"; "config" and "changed_options"; and date, devices and versions. ``None`` is
        a missing number.
    """
    report = {
        "seed": seed,
        "rounds": len(metrics),
        "held_out_chains": len(before),
        "before": evaluation_report(before),
        "after": evaluation_report(after),
        "difference_at_last_turn": comparison_report(before, after),
        **_totals(metrics),
        "drift_alarms": alarms,
        "config": config,
        "changed_options": changes,
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "devices": _devices(),
        "versions": {"python": platform.python_version(), **_versions()},
    }
    return {name: _plain(value) for name, value in report.items()}


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write ``report.json`` into the run's folder, atomically."""
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / "report.json", text.encode())


def evaluation_report(evaluation: Evaluation) -> dict[str, Any]:
    """Return the rounded metrics of an evaluation per turn, with their intervals, and the judge.

    Further entries are "chains", the denominators by metric and turn; "chains_with_lost_scores";
    "lost_scores", turns by reason; and "unmeasured_turns" by term.
    """
    counts = {
        "round": evaluation.round,
        "judged_by": str(evaluation.provenance.judged_by),
        "chains": evaluation.counts,
        "chains_with_lost_scores": int((~evaluation.complete).sum()),
        "lost_scores": evaluation.lost,
        "unmeasured_turns": evaluation.unmeasured,
    }
    return counts | _with_intervals(evaluation.metrics)


def comparison_report(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Return the rounded paired differences at the last turn N, with their intervals.

    "chains" is the number of chains that have each metric in both evaluations. "marginal_ratio" is,
    by metric, the value at turn N divided by the value at turn 1. "conditional_success" is
    P(success at N | success at 1) in percent. The last two have "before", "after" and "difference",
    and "chains", the denominators before and after.
    """
    found = compare(before, after)

    def pair(x: BeforeAfter, counts: Sequence[int]) -> dict[str, Any]:
        return {**_with_intervals(x._asdict()), "chains": list(counts)}

    ratios = {name: (x, 2 * [found.ratio_chains[name]]) for name, x in found.marginal_ratio.items()}
    return {
        "turn": found.turn,
        "chains": found.chains,
        **_with_intervals(found.difference),
        "marginal_ratio": {name: pair(*own) for name, own in ratios.items()},
        "conditional_success": pair(found.conditional_success, found.conditional_chains),
    }


def print_summary(
    report: Mapping[str, Any], folder: Path, *, console: Console | None = None
) -> None:
    """Print the summary of a run from its report.

    Args:
        report: result of ``run_report``, or ``report.json`` read back.
        folder: folder of the run, printed with the names of its files.
        console: console to print to; None: standard output.

    Example:
        >>> import torch
        >>> from mteditflow.rewards import TurnScores
        >>> scores = TurnScores(torch.tensor([[5.0, 1.0]]), torch.ones(1, 2) > 0, {})
        >>> same = Evaluation(0, ["1"], [["a", "b"]], {"following": scores}, success_at=5)
        >>> report = run_report(same, same, [], config={}, seed=0)
        >>> print_summary(report, Path("run"), console=Console(width=90))  # doctest: +ELLIPSIS
        1 held-out chain, percent [95% interval]...
        Written to run.
    """
    if console is None:
        console = Console(width=None if Console().is_terminal else WIDTH)
    with reader_may_leave():
        console.print(summary_table(report))
        for line in summary_lines(report):
            console.print(line, highlight=False)
        _print_files(folder, console)


def summary_text(report: Mapping[str, Any], folder: Path) -> str:
    """Return the output of ``print_summary`` as plain text.

    Args:
        report: result of ``run_report``, or ``report.json`` read back.
        folder: folder of the run.
    """
    text = io.StringIO()
    print_summary(report, folder, console=Console(file=text, width=WIDTH))
    return text.getvalue()


def _print_files(folder: Path, console: Console) -> None:
    """Print the folder of a run, and the names of its files and, with a slash, of its folders."""
    names = sorted(
        f"{path.name}/" if path.is_dir() else path.name
        for path in folder.glob("*")
        if path.name[0] != "." and not path.name.endswith(("-shm", "-wal"))
    )
    there = f": {', '.join(names)}" if names else ""
    console.print(
        f"Written to [bold]{escape_markup(str(folder))}[/bold]{escape_markup(there)}.",
        highlight=False,
    )


def summary_table(report: Mapping[str, Any]) -> Table:
    """Return the metrics before and after, turn by turn, with 95% intervals."""
    chains = _many(report["held_out_chains"], "held-out chain")
    tables = (report[when]["chains"] for when in ("before", "after"))
    few = any(_few(n) for counts in tables for row in counts.values() for n in row)
    mark = f"; * over fewer than {FEW_CASES}" if few else ""
    table = Table(title=f"{chains}, percent \\[95% interval]{mark}", title_justify="left")
    table.add_column("")
    table.add_column("")
    metrics = [name for name in report["before"] if f"{name}_interval" in report["before"]]
    for turn in range(len(report["before"][metrics[0]])):
        table.add_column(f"turn {turn + 1}", justify="right")
    for name in metrics:
        digits = 1 if name in TITLES else 3
        for when in ("before", "after"):
            cells = _cells(report[when], name, digits)
            title = TITLES.get(name, f"{escape_markup(name)}, mean") if when == "before" else ""
            style = "bold" if when == "after" else "dim"
            table.add_row(title, when, *cells, style=style, end_section=when == "after")
    return table


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the sentences below the table: differences, lost scores, time, lost answers."""
    gain = report["difference_at_last_turn"]
    first = report["before"]["round"]
    since = [f"Before is round {first}: there is no evaluation of round 0."] if first else []
    lines = [*since, _difference(gain), *(_since_turn_1(gain) if gain["turn"] > 1 else ())]
    for when in ("before", "after"):
        lost = report[when]["chains_with_lost_scores"]
        if lost:
            reasons = _counts(report[when]["lost_scores"])
            lines.append(
                f"{when.capitalize()}, {lost} of {report['held_out_chains']} held-out chains lost "
                f"a score (turns lost: {reasons}); they count where they have one."
            )
        nothing = ", ".join(f"{k} {n}" for k, n in report[when]["unmeasured_turns"].items())
        if nothing:
            what = f"turns with nothing to measure (not lost): {escape_markup(nothing)}"
            lines.append(f"{when.capitalize()}, {what}.")
    if report["time"]:
        split = ", ".join(f"{name} {share:.0%}" for name, (_, share) in report["time"].items())
        took = timedelta(seconds=round(report["seconds"]))
        what = "with evaluations, without loading and what a resumed run repeated"
        lines.append(f"{_many(report['rounds'], 'round')} took {took} ({what}): {split}.")
    lost = report["lost_answers"]
    if lost["reasons"]:
        lines.append(
            f"{lost['share']:.1%} of training trajectories lost an answer "
            f"({_counts(lost['reasons'])})."
        )
    if report["invalid_reward_share"]:
        share = f"{report['invalid_reward_share']:.1%}"
        lines.append(f"{share} of training rewards were invalid; they trained nothing.")
    for name, count in report["rounds_without_reward"].items():
        rounds = f"{count} of {_many(report['rounds'], 'round')}"
        lines.append(f"No trajectory had the reward {escape_markup(name)} in {rounds}.")
    lines += [_changed_option(change) for change in report.get("changed_options", ())]
    return lines + [_alarm(alarm) for alarm in report.get("drift_alarms", ())]


def _changed_option(change: Mapping[str, Any]) -> str:
    """Return a sentence on a setting that a resumed run changed, with markup escaped.

    Example:
        >>> _changed_option({"after_round": 3, "option": "training.rounds", "was": 3, "is": 5})
        'After round 3, training.rounds was changed from 3 to 5.'
    """
    what = f"{change['option']} was changed from {change['was']} to {change['is']}"
    return f"After round {change['after_round']}, {escape_markup(what)}."


def _alarm(alarm: Mapping[str, Any]) -> str:
    """Describe a statistic that left its band, in one sentence."""
    low, high = (f"{alarm[end]:.3g}" for end in ("low", "high"))
    name = escape_markup(str(alarm["statistic"]))
    return (
        f"Drift alarm of round {alarm['round']}: {name} {alarm['value']:.3g} outside {low} to "
        f"{high}; see {escape_markup(str(alarm['picture']))}."
    )


def _with_intervals(metrics: Mapping[str, Interval]) -> dict[str, Any]:
    """Return each metric as a number or a list, with [low, high] or a list of these beside it."""
    flat: dict[str, Any] = {}
    for name, interval in metrics.items():
        ends = torch.stack([interval.low, interval.high], dim=-1)
        flat[name], flat[f"{name}_interval"] = _rounded(interval.estimate), _rounded(ends)
    return flat


def _totals(metrics: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return totals over rounds: time by phase, invalid rewards, and lost answers by reason."""
    count = math.fsum(_known(line, "trajectories") for line in metrics)
    invalid = math.fsum(
        _known(line, "invalid_share") * _known(line, "trajectories") for line in metrics
    )
    seconds = _sums(metrics, SECONDS)
    lost = {name: int(total) for name, total in _sums(metrics, LOST).items()}
    return {
        "seconds": math.fsum(seconds.values()),
        "time": {name: [seconds[name], share] for name, share in shares(seconds).items()},
        "invalid_reward_share": invalid / max(count, 1),
        "lost_answers": {"share": sum(lost.values()) / max(count, 1), "reasons": lost},
        "rounds_without_reward": _without_reward(metrics),
    }


def _without_reward(metrics: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """Count the rounds in which no trajectory had a reward that was trained on."""
    absent = [
        n for line in metrics for n, x in line.items() if n.startswith(REWARD) and math.isnan(x)
    ]
    return {name.removeprefix(REWARD): count for name, count in Counter(absent).items()}


def _sums(metrics: Sequence[Mapping[str, float]], prefix: str) -> dict[str, float]:
    """Return the total of each number with this prefix, the largest first, without the prefix."""
    names = dict.fromkeys(name for line in metrics for name in line if name.startswith(prefix))
    totals = {name: math.fsum(_known(line, name) for line in metrics) for name in names}
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    return {name.removeprefix(prefix): total for name, total in ranked}


def _known(line: Mapping[str, float], name: str) -> float:
    """Return a number of a round; 0 if it is missing or not finite."""
    value = line.get(name, 0.0)
    return value if math.isfinite(value) else 0.0


def _rounded(x: Tensor) -> Any:
    """Return the numbers rounded to four decimals."""
    return ((1e4 * x.double()).round() / 1e4).tolist()


def _devices() -> list[str]:
    """Return the names of the CUDA devices of this process, or else the CPU's."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return names or [f"{platform.machine()}, {os.cpu_count()} cores"]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES if find_spec(name)}


def _plain(value: Any) -> Any:
    """Convert to JSON values: ``None`` for numbers that are not finite, text for other types."""
    if isinstance(value, Mapping):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _difference(gain: Mapping[str, Any]) -> str:
    """Return a sentence with the paired differences of the metrics, in percentage points."""
    counts = {name: gain["chains"][name] for name in TITLES if gain.get(name) is not None}
    if not counts:
        return f"At turn {gain['turn']} no chain can be compared."
    parts, equal = [], len(set(counts.values())) == 1
    for name, count in counts.items():
        ends = _interval(gain[f"{name}_interval"])
        over = "" if equal else f" over {count}"
        parts.append(f"{TITLES[name].split(':')[0]} {gain[name]:+.1f} {ends}{_few(count)}{over}")
    over = f" over {_many(next(iter(counts.values())), 'chain')}" if equal else ""
    return f"At turn {gain['turn']}, paired{over}: {', '.join(parts)} points."


def _since_turn_1(gain: Mapping[str, Any]) -> Iterator[str]:
    """Yield sentences on the last turn against the first: ratios, and conditional success."""
    last = gain["turn"]
    for name, ratio in gain["marginal_ratio"].items():
        label = "Marginal" if name == "marginal" else escape_markup(name)
        yield f"{label}({last}) / {label}(1) {_before_after(ratio, 2)}."
    given = _before_after(gain["conditional_success"], 1, "%", " points")
    yield f"P(success at turn {last} | success at turn 1) {given}."


def _before_after(x: Mapping[str, Any], digits: int, unit: str = "", points: str = "") -> str:
    """Return a number after and before with interval and denominator, and the difference."""
    counts = x.get("chains", (None, None))  # reports of older versions have none
    before, after = (
        f"{_with_ends(x, when, f'.{digits}f', unit)}"
        + ("" if count is None else f" of {_many(count, 'chain')}{_few(count)}")
        for when, count in zip(("before", "after"), counts, strict=True)
    )
    change = ""
    if x["difference"] is not None:
        change = f"; {_with_ends(x, 'difference', f'+.{digits}f')}{points}"
    return f"= {after} (before: {before}{change})"


def _with_ends(x: Mapping[str, Any], name: str, form: str, unit: str = "") -> str:
    """Return a number with its interval, or "none"."""
    if x[name] is None:
        return "none"
    return f"{x[name]:{form}}{unit} {_interval(x[f'{name}_interval'], form)}"


def _cells(rows: Mapping[str, Any], name: str, digits: int) -> list[str]:
    columns = rows[name], rows[f"{name}_interval"], rows["chains"][name]
    return [
        f"none of {count}"
        if value is None
        else f"{value:.{digits}f} {_interval(ends, f'.{digits}f')}{_few(count)}"
        for value, ends, count in zip(*columns, strict=True)
    ]


def _few(count: int) -> str:
    """Return the mark of an estimate over few chains, or nothing."""
    return " *" if 0 < count < FEW_CASES else ""


def _interval(ends: Sequence[float | None], form: str = "+.1f") -> str:
    """Return the ends of an interval; a term without a range has none if all chains are equal."""
    known = ["none" if end is None else format(end, form) for end in ends]
    return f"\\[{'none: all alike' if set(known) == {'none'} else ', '.join(known)}]"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())
