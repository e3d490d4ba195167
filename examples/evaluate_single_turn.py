r"""Score single edits on ImgEdit-Bench or GEdit-Bench by a judge over HTTP.

    python examples/evaluate_single_turn.py imgedit basic_edit.json edited \
        --judge http://127.0.0.1:8000/v1 --model Qwen/Qwen3-VL-8B-Instruct
    python examples/evaluate_single_turn.py gedit manifest.jsonl edited --judge ... --model ...

Invalid items and lost scores are listed, counted, and left out of the averages; the same command
requests only lost scores again.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import anyio
import typer
from rich.console import Console
from rich.table import Table

from mteditflow._command import OneLineGroup, writing
from mteditflow._exits import failing, refusing
from mteditflow._files import write_atomically
from mteditflow._images import BOMBS, UNREADABLE, check_image
from mteditflow._text import escape_controls, escape_markup
from mteditflow.evaluation import JudgedBy
from mteditflow.evaluation.benchmarks import (
    BenchmarkReport,
    ItemReading,
    ItemScores,
    Rubric,
    gedit_items,
    imgedit_items,
    report_gedit,
    report_imgedit,
    score_gedit,
    score_imgedit,
)
from mteditflow.evaluation.benchmarks.averages import Group
from mteditflow.evaluation.benchmarks.gedit import CONSISTENCY, LANGUAGES, QUALITY
from mteditflow.evaluation.benchmarks.imgedit import rubrics_of
from mteditflow.evaluation.provenance import agreed, same_judge, version_of
from mteditflow.metrics import FEW_CASES
from mteditflow.rewards import (
    AnswerCache,
    ChatClient,
    RequestOptions,
    Scale,
    judge_identity,
    reach_endpoints,
)
from mteditflow.rewards.command_line import (
    QUESTION,
    AnswerTokens,
    ChatTemplateKwargs,
    ExtraBody,
    ReasoningTokens,
    read_secret,
    request_options,
    require_or_answers,
    require_reachable,
)

app = typer.Typer(
    cls=OneLineGroup, help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False
)

File = Annotated[Path, typer.Argument(help="File of the benchmark.")]
Edited = Annotated[Path, typer.Argument(help="Folder of an editor's images.")]
Judges = Annotated[
    list[str], typer.Option("--judge", help="URL that ends in /v1; may be repeated.")
]
Model = Annotated[str, typer.Option(help="Model name sent to the judge.")]
Output = Annotated[Path, typer.Option(help="Folder of reports and the cache of answers.")]
Patience = Annotated[
    float, typer.Option(min=0, help="Longest wait for an unreachable judge, seconds.")
]
MaxInvalid = Annotated[
    float,
    typer.Option(min=0, max=1, help="Share of items without a score above which exit code is 1."),
]
Outside = Annotated[
    bool, typer.Option("--allow-outside", help="Allow source images outside their folder.")
]
FEW = f"* over fewer than {FEW_CASES}"
DEFAULT_OUTPUT = Path("runs/single_turn")


@dataclass(frozen=True)
class Run:
    """One benchmark, read and scored."""

    name: str  # stem of the report's files
    reading: ItemReading
    found: ItemScores
    report: BenchmarkReport
    judged_by: JudgedBy

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
    images: Annotated[Path | None, typer.Option(help="Folder of the source images.")] = None,
    allow_outside: Outside = False,
    output: Output = DEFAULT_OUTPUT,
    answer_tokens: AnswerTokens = None,
    reasoning_tokens: ReasoningTokens = 0,
    chat_template_kwargs: ChatTemplateKwargs = None,
    extra_body: ExtraBody = None,
    patience: Patience = 300.0,
    max_invalid: MaxInvalid = 0.2,
) -> None:
    """ImgEdit-Bench: basic_edit.json or UGE_edit.json, and <key>.png in the folder."""
    with refusing(), ExitStack() as stack:
        request = request_options(answer_tokens, reasoning_tokens, chat_template_kwargs, extra_body)
        reading = imgedit_items(file, edited, images=images, allow_outside=allow_outside)
        readings = {"imgedit": reading}
        bench = Benchmark(score_imgedit, report_imgedit, rubrics_of(reading.items))
        runs = _runs(readings, bench, judge, model, output, patience, request, stack)
        _finish(runs, output, max_invalid)


@app.command()
def gedit(
    file: File,
    edited: Edited,
    judge: Judges,
    model: Model,
    allow_outside: Outside = False,
    output: Output = DEFAULT_OUTPUT,
    answer_tokens: AnswerTokens = None,
    reasoning_tokens: ReasoningTokens = 0,
    chat_template_kwargs: ChatTemplateKwargs = None,
    extra_body: ExtraBody = None,
    patience: Patience = 300.0,
    max_invalid: MaxInvalid = 0.2,
) -> None:
    """GEdit-Bench: a manifest in JSON Lines; images are fullset/<group>/<language>/<key>.png."""
    with refusing(), ExitStack() as stack:
        request = request_options(answer_tokens, reasoning_tokens, chat_template_kwargs, extra_body)
        read = partial(gedit_items, file, edited, allow_outside=allow_outside)
        readings = {f"gedit_{x}": read(language=x) for x in LANGUAGES}
        readings = {name: x for name, x in readings.items() if x.items} or readings
        bench = Benchmark(score_gedit, report_gedit, (CONSISTENCY, QUALITY))
        runs = _runs(readings, bench, judge, model, output, patience, request, stack)
        _finish(runs, output, max_invalid)


class Benchmark(NamedTuple):
    """Scoring function, report function and judge rubrics of a benchmark."""

    score: Callable[..., Awaitable[ItemScores]]
    report: Callable[[ItemScores], BenchmarkReport]
    rubrics: Sequence[Rubric]

    def judged_by(
        self, judges: Sequence[str], model: str, key: str | None, request: RequestOptions
    ) -> JudgedBy:
        """Return the provenance of the scores; queries the judge for its identity."""
        asked = [x.request("Instruction A", ["image:0", "image:1"]) for x in self.rubrics]
        low, high = self.rubrics[0].low, self.rubrics[0].high
        return JudgedBy(
            judge=model,
            judge_server=anyio.run(partial(judge_identity, judges, model, api_key=key)),
            prompt=version_of(asked),
            request=request.stated,
            scope="turn",
            scale=Scale(low, high, success=high, whole=True),
            checks="rubric",
        )


def _runs(
    readings: Mapping[str, ItemReading],
    benchmark: Benchmark,
    judges: list[str],
    model: str,
    output: Path,
    patience: float,
    request: RequestOptions,
    stack: ExitStack,
) -> list[Run]:
    """Score readings by name; accepted answers are stored in the output folder.

    After all checks, the folder is locked, and errors exit with code 1 instead of 2, until
    ``stack`` is closed.

    Raises:
        ValueError: a reading has no item or no image, a URL is invalid, the folder has scores by
            another judge, or the judge does not answer.
    """
    key = read_secret("OPENAI_API_KEY")
    options = {"api_key": key, "patience": patience, "request": request}
    ChatClient(judges, model, **options)  # refuses a bad URL before anything is written
    for reading in readings.values():
        _require_items(reading)
    ask = partial(benchmark.judged_by, judges, model, key, request)
    judge, runs = ask(), []
    for name in readings:
        judge = same_judge(output / f"{name}.json", judge)
    answers = output / "answers.sqlite"
    require_or_answers(partial(_require_judge, judges, model, key, request), answers)
    stack.enter_context(writing(output))
    stack.enter_context(failing(ValueError))
    with AnswerCache(answers) as cache:
        client = ChatClient(judges, model, cache=cache, **options)
        for name, reading in readings.items():
            score = partial(benchmark.score, progress=Console().is_terminal)
            found = anyio.run(score, client, reading.items)
            runs.append(Run(name, reading, found, benchmark.report(found), judge))
    now = agreed(judge, ask())  # the judge may return its identity only after it has started
    return [replace(run, judged_by=now) for run in runs]


def _require_judge(judges: list[str], model: str, key: str | None, request: RequestOptions) -> None:
    """Raise ValueError unless every judge answers one small question."""
    client = ChatClient(judges, model, api_key=key, request=request, timeout=QUESTION, attempts=2)
    require_reachable("--judge", anyio.run(partial(reach_endpoints, client, images=2)))


def _require_items(reading: ItemReading) -> None:
    """Raise ValueError unless at least one item has both images."""
    if not reading.items:
        raise ValueError("; ".join(["expected at least one item, got none", *reading.skipped[:3]]))
    first = reading.items[0]
    if not any(readable(x.source) and readable(x.edited) for x in reading.items):
        raise ValueError(
            f"expected at least one item with both images, got none, as of {first.key}: "
            f"{first.source} and {first.edited}"
        )


def readable(path: Path) -> bool:
    """Whether a file exists and has a valid image header."""
    try:
        check_image(path)
        return True
    except (*UNREADABLE, *BOMBS):
        return False


def _finish(runs: list[Run], output: Path, max_invalid: float) -> None:
    """Write and print the reports.

    Raises:
        typer.Exit: code 1 if more than ``max_invalid`` of the entries have no score.
    """
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    for run in runs:  # write before printing: stdout may be a closed pipe
        path = output / f"{run.name}.json"
        write_atomically(path, json.dumps(details(run), indent=1, allow_nan=False).encode())
        write_atomically(path.with_suffix(".md"), markdown(run).encode())
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
        console.print(f"Judged by: {escape_controls(str(run.judged_by))}.", markup=False)
        console.print(
            f"Every score is in [bold]{escape_markup(str(output / run.name))}.json[/bold]."
        )
    worst = max(run.invalid_share for run in runs)
    if worst > max_invalid:
        console.print(
            f"[red]error:[/red] {worst:.0%} without a score, allowed are {max_invalid:.0%}"
        )
        raise typer.Exit(1)


def left_out(run: Run) -> list[str]:
    """Return one line per entry without a score, with its reason."""
    missing = [f"{key}: {why}" for key, why in run.found.missing.items()]
    lost = [f"{key}: {why}" for key, why in run.found.lost.items()]
    return [escape_controls(line) for line in (*run.reading.skipped, *missing, *lost)]


def rows(run: Run) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table: one row per group, and Overall."""
    groups = {**run.report.groups, "Overall": run.report.overall}
    names = list(run.report.overall.metrics)
    body = [
        [name, *(cell(group, x) for x in names), str(group.items), *invalid(group)]
        for name, group in groups.items()
    ]
    return ["", *names, "items", "scored", "lost", "no image"], body


def invalid(group: Group) -> list[str]:
    """Return the numbers of scored, lost and missing items of a row."""
    return [str(count) for count in (group.scored, group.lost, group.missing)]


def cell(group: Group, metric: str) -> str:
    """Return an estimate with its interval as text; an asterisk marks few items."""
    value = group.metrics[metric]
    if value.estimate is None:
        return "none"
    ends = "" if value.low is None else f" [{value.low:.2f}, {value.high:.2f}]"
    return f"{value.estimate:.2f}{ends}{' *' * (group.scored < FEW_CASES)}"


def table(run: Run) -> Table:
    """Return the table for the terminal."""
    head, body = rows(run)
    title = f"{run.report.benchmark} ({run.name}) [95% interval over items; {FEW}]"
    shown = Table(title=escape_markup(title))
    for column in head:
        shown.add_column(column, justify="right" if column else "left")
    for row in body:
        shown.add_row(*map(escape_markup, row))
    return shown


def markdown(run: Run) -> str:
    """Return the report as Markdown, with a list of what is left out."""
    head, body = rows(run)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    missing = run.report.absent_groups
    parts = [
        f"# {run.report.benchmark} ({run.name})",
        f"Judged by: {run.judged_by}; prompts of mteditflow. "
        f"95% bootstrap intervals over items; {FEW}.",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        f"Groups without an item: {', '.join(missing)}." if missing else "",
        "\n".join(f"- left out: {line}" for line in left_out(run)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def details(run: Run) -> dict[str, Any]:
    """Return the report with every item's scores, or the reason for their absence, for JSON."""
    return {
        "judged_by": run.judged_by.model_dump(),
        "report": run.report.model_dump(),
        "skipped": run.reading.skipped,
        "scores": run.found.scores,
        "lost": {key: str(why) for key, why in run.found.lost.items()},
        "missing": run.found.missing,
    }


if __name__ == "__main__":
    app()
