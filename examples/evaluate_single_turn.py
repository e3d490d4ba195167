"""Score a folder of single edits on ImgEdit-Bench or GEdit-Bench, by a judge over HTTP.

    python examples/evaluate_single_turn.py imgedit basic_edit.json edited \
        --judge http://127.0.0.1:8000/v1 --model Qwen/Qwen3-VL-8B-Instruct
    python examples/evaluate_single_turn.py gedit manifest.jsonl edited --judge ... --model ...

What is bad or lost on the way stays out of the averages, is named and counted, and what was lost is
asked for again, alone, by the same command.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import anyio
import typer
from rich.console import Console
from rich.table import Table

from mteditflow._files import write_atomically
from mteditflow._text import escape_controls, escape_markup
from mteditflow.evaluation.benchmarks import (
    BenchmarkReport,
    ItemReading,
    ItemScores,
    gedit_items,
    imgedit_items,
    report_gedit,
    report_imgedit,
    score_gedit,
    score_imgedit,
)
from mteditflow.evaluation.benchmarks.averages import Estimate, Group
from mteditflow.evaluation.benchmarks.gedit import LANGUAGES
from mteditflow.rewards import AnswerCache, ChatClient, RequestOptions
from mteditflow.rewards.command_line import (
    AnswerTokens,
    ChatTemplateKwargs,
    ExtraBody,
    ReasoningTokens,
    request_options,
)

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

File = Annotated[Path, typer.Argument(help="File of the benchmark.")]
Edited = Annotated[Path, typer.Argument(help="Folder of what an editor made.")]
Judges = Annotated[
    list[str], typer.Option("--judge", help="URL that ends in /v1; may be repeated.")
]
Model = Annotated[str, typer.Option(help="Name that the judge is known by.")]
Output = Annotated[Path, typer.Option(help="Where reports and the cache of answers go.")]
Patience = Annotated[
    float, typer.Option(min=0, help="Longest wait for a judge that is down to come back, s.")
]
MaxInvalid = Annotated[
    float, typer.Option(min=0, max=1, help="Share of items without a score that is an error.")
]
DEFAULT_OUTPUT = Path("runs/single_turn")


@dataclass(frozen=True)
class Run:
    """One benchmark, read and scored."""

    name: str  # of the report's files
    reading: ItemReading
    found: ItemScores
    report: BenchmarkReport

    @property
    def invalid_share(self) -> float:
        """Share of all entries of the file that have no score."""
        entries = len(self.reading.items) + len(self.reading.skipped)
        return 1 - len(self.found.scores) / entries


@app.command()
def imgedit(
    file: File,
    edited: Edited,
    judge: Judges,
    model: Model,
    images: Annotated[Path | None, typer.Option(help="Folder of the images before.")] = None,
    output: Output = DEFAULT_OUTPUT,
    answer_tokens: AnswerTokens = None,
    reasoning_tokens: ReasoningTokens = 0,
    chat_template_kwargs: ChatTemplateKwargs = None,
    extra_body: ExtraBody = None,
    patience: Patience = 300.0,
    max_invalid: MaxInvalid = 0.2,
) -> None:
    """ImgEdit-Bench: basic_edit.json, and <key>.png in the folder."""
    with _ending(file):
        reading = imgedit_items(file, edited, images=images)
    request = request_options(answer_tokens, reasoning_tokens, chat_template_kwargs, extra_body)
    with _client(judge, model, output, patience, request) as client:
        run = _run("imgedit", reading, client, score_imgedit, report_imgedit)
    _finish([run], output, client.settings, max_invalid)


@app.command()
def gedit(
    file: File,
    edited: Edited,
    judge: Judges,
    model: Model,
    output: Output = DEFAULT_OUTPUT,
    answer_tokens: AnswerTokens = None,
    reasoning_tokens: ReasoningTokens = 0,
    chat_template_kwargs: ChatTemplateKwargs = None,
    extra_body: ExtraBody = None,
    patience: Patience = 300.0,
    max_invalid: MaxInvalid = 0.2,
) -> None:
    """GEdit-Bench: a manifest in JSON Lines, and <language>/<key>.png in the folder."""
    with _ending(file):
        readings = {x: gedit_items(file, edited, language=x) for x in LANGUAGES}
    present = {x: reading for x, reading in readings.items() if reading.items}
    request = request_options(answer_tokens, reasoning_tokens, chat_template_kwargs, extra_body)
    with _client(judge, model, output, patience, request) as client:
        runs = [
            _run(f"gedit_{language}", reading, client, score_gedit, report_gedit)
            for language, reading in (present or readings).items()
        ]
    _finish(runs, output, client.settings, max_invalid)


def _run(
    name: str,
    reading: ItemReading,
    client: ChatClient,
    score: Callable[..., Awaitable[ItemScores]],
    report: Callable[[ItemScores], BenchmarkReport],
) -> Run:
    if not reading.items:
        raise typer.BadParameter(
            "; ".join(["expected at least one item, got none", *reading.skipped])
        )

    async def ask() -> ItemScores:
        return await score(client, reading.items, progress=Console().is_terminal)

    found = anyio.run(ask)
    return Run(name, reading, found, report(found))


def _finish(runs: list[Run], output: Path, judge: Mapping[str, Any], max_invalid: float) -> None:
    """Print and write the reports; end with 1 if too much is invalid."""
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    for line in dict.fromkeys(line for run in runs for line in left_out(run)):
        console.print(f"left out: {line}", markup=False)
    for run in runs:
        console.print(table(run))
        reasons = ", ".join(f"{count} {why}" for why, count in run.report.reasons.items())
        console.print(
            f"{run.name}: {len(run.found.scores)} of {len(run.reading.items)} items scored, "
            f"{len(run.found.lost)} lost{reasons and f' ({reasons})'}, "
            f"{len(run.found.missing)} without an image, "
            f"{len(run.reading.skipped)} bad entries in the file"
        )
        path = output / f"{run.name}.json"
        write_atomically(path, json.dumps(details(run, judge), indent=1, allow_nan=False).encode())
        write_atomically(path.with_suffix(".md"), markdown(run, judge).encode())
        console.print(f"Every score is in [bold]{escape_markup(str(path))}[/bold].")
    worst = max(run.invalid_share for run in runs)
    if worst > max_invalid:
        console.print(
            f"[red]error:[/red] {worst:.0%} without a score, allowed are {max_invalid:.0%}"
        )
        raise typer.Exit(1)


def left_out(run: Run) -> list[str]:
    """Name everything that has no score, with its reason."""
    missing = [f"{key}: {why}" for key, why in run.found.missing.items()]
    lost = [f"{key}: {why}" for key, why in run.found.lost.items()]
    return [escape_controls(line) for line in (*run.reading.skipped, *missing, *lost)]


def rows(run: Run) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: one for each group, and Overall."""
    groups = {**run.report.groups, "Overall": run.report.overall}
    names = list(run.report.overall.metrics)
    body = [
        [name, *(cell(group.metrics[x]) for x in names), str(group.items), *invalid(group)]
        for name, group in groups.items()
    ]
    return ["", *names, "items", "scored", "lost", "no image"], body


def invalid(group: Group) -> list[str]:
    """Denominator of a row, and what is not in it."""
    return [str(count) for count in (group.scored, group.lost, group.missing)]


def cell(value: Estimate) -> str:
    """An estimate with its interval."""
    if value.estimate is None:
        return "none"
    ends = "" if value.low is None else f" [{value.low:.2f}, {value.high:.2f}]"
    return f"{value.estimate:.2f}{ends}"


def table(run: Run) -> Table:
    """For the terminal."""
    head, body = rows(run)
    title = f"{run.report.benchmark} ({run.name}) [95% interval over items]"
    shown = Table(title=escape_markup(title))
    for column in head:
        shown.add_column(column, justify="right" if column else "left")
    for row in body:
        shown.add_row(*map(escape_markup, row))
    return shown


def markdown(run: Run, judge: Mapping[str, Any]) -> str:
    """Write the table with what it leaves out."""
    head, body = rows(run)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    missing = run.report.absent_groups
    options = ", ".join(f"{name} {value}" for name, value in judge.items() if name != "model")
    also = f" ({options})" if options else ""
    parts = [
        f"# {run.report.benchmark} ({run.name})",
        f"Judge: `{judge['model']}`{also}; prompts of mteditflow. "
        "95% bootstrap intervals over items.",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        f"Groups without an item: {', '.join(missing)}." if missing else "",
        "\n".join(f"- left out: {line}" for line in left_out(run)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def details(run: Run, judge: Mapping[str, Any]) -> dict[str, Any]:
    """The report, and every item's scores or why there are none."""
    return {
        "judge": judge,
        "report": run.report.model_dump(),
        "skipped": run.reading.skipped,
        "scores": run.found.scores,
        "lost": {key: str(why) for key, why in run.found.lost.items()},
        "missing": run.found.missing,
    }


@contextmanager
def _client(
    judges: list[str], model: str, output: Path, patience: float, request: RequestOptions
) -> Iterator[ChatClient]:
    """A client whose accepted answers stay in the output folder; its key is OPENAI_API_KEY."""
    key = os.environ.get("OPENAI_API_KEY")
    with _ending(output), AnswerCache(output / "answers.sqlite") as cache:
        yield ChatClient(
            judges, model, api_key=key, cache=cache, request=request, patience=patience
        )


@contextmanager
def _ending(path: Path) -> Iterator[None]:
    """End with a message, not a traceback, where a file or a URL is not usable."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise typer.BadParameter(escape_controls(f"{path}: {error}")) from error


if __name__ == "__main__":
    app()
