"""One run of a session benchmark: services, answers of the judge, report, and tables."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import anyio
import typer
from rich.console import Console
from rich.table import Table

from mteditflow._command import writing
from mteditflow._exits import failing
from mteditflow._files import write_all_atomically
from mteditflow._text import escape_controls, escape_markup
from mteditflow.evaluation import JudgedBy
from mteditflow.evaluation.benchmarks import Session, SessionReport, UnansweredError
from mteditflow.evaluation.benchmarks.sessions import Measured
from mteditflow.evaluation.provenance import agreed, same_judge
from mteditflow.metrics import FEW_CASES
from mteditflow.rewards import (
    AnswerCache,
    ChatClient,
    ConsistencyClient,
    RequestOptions,
    consistency_identity,
    judge_identity,
    reach_endpoints,
)
from mteditflow.rewards.command_line import (
    QUESTION,
    read_secret,
    require_or_answers,
    require_reachable,
)

Found = TypeVar("Found")
FEW = f"* over fewer than {FEW_CASES}"


@dataclass(frozen=True)
class Service:
    """The judge of a command.

    Attributes:
        urls: URLs of its endpoints.
        model: model name sent to them.
        request: options of all requests.
        patience: longest wait for an unreachable judge, seconds.
    """

    urls: list[str]
    model: str
    request: RequestOptions
    patience: float

    def client(self, cache: AnswerCache | None = None, **options: Any) -> ChatClient:
        """Return a client of the judge; its API key comes from the environment."""
        given = {"api_key": self._key, "request": self.request, "patience": self.patience}
        return ChatClient(self.urls, self.model, cache=cache, **given | options)

    @property
    def _key(self) -> str | None:
        return read_secret("OPENAI_API_KEY")

    def require(self, images: int) -> None:
        """Raise ValueError unless every judge answers a question with ``images`` images."""
        client = self.client(timeout=QUESTION, attempts=2)
        found = anyio.run(partial(reach_endpoints, client, images=images))
        require_reachable("--judge", found)

    def identity(self) -> str | None:
        """Return the identity that the judge's servers report; None: none."""
        return anyio.run(partial(judge_identity, self.urls, self.model, api_key=self._key))


@dataclass(frozen=True)
class Protocol(Generic[Found]):
    """Scoring of a benchmark.

    Attributes:
        name: stem of the report's files.
        judged_by: provenance of the scores, without the identities of servers.
        score: scores sessions by the judge; accepted answers are stored in the cache.
        report: returns the report; raises ``UnansweredError`` if an answer is missing.
        details: returns scores by measure, session and turn.
        consistency: URLs of consistency servers, if used.
    """

    name: str
    judged_by: JudgedBy
    score: Callable[[AnswerCache], Awaitable[Found]]
    report: Callable[[Found], SessionReport]
    details: Callable[[Found], Mapping[str, Any]]
    consistency: Sequence[str] = ()

    def asked(self, service: Service) -> JudgedBy:
        """Return the provenance with the identities that servers report by now."""
        update = {"judge_server": service.identity()}
        if self.consistency:
            token = read_secret("MTEDITFLOW_TOKEN")
            identify = partial(consistency_identity, self.consistency, token=token)
            update["consistency_server"] = anyio.run(identify)
        return self.judged_by.model_copy(update=update)

    def require(self, service: Service, images: int) -> None:
        """Raise ValueError unless every service answers."""
        service.require(images)
        if self.consistency:
            require_reachable(
                "--consistency", anyio.run(consistency_client(self.consistency).reach)
            )


def consistency_client(
    servers: Sequence[str], cache: AnswerCache | None = None
) -> ConsistencyClient:
    """Return a client of consistency servers; its token comes from the environment."""
    token = read_secret("MTEDITFLOW_TOKEN")
    return ConsistencyClient(servers, token=token, cache=cache)


def run(
    protocol: Protocol[Found],
    service: Service,
    sessions: Sequence[Session],
    output: Path,
    as_json: bool,
    stack: ExitStack,
) -> None:
    """Score sessions, write and print the report; errors after all checks exit with code 1.

    Raises:
        ValueError: a URL is invalid, the folder has scores by another judge, or a service does not
            answer.
    """
    service.client()  # refuses a bad URL before anything is asked
    path, answers = output / f"{protocol.name}.json", output / "answers.sqlite"
    judge = same_judge(path, protocol.asked(service))
    images = sessions[0].chain.turns + 1
    require_or_answers(partial(protocol.require, service, images), answers)
    stack.enter_context(writing(output))
    stack.enter_context(failing(ValueError, UnansweredError))
    with AnswerCache(answers) as cache:
        found = anyio.run(protocol.score, cache)
    report = protocol.report(found)
    # A server that was still starting at the first query may report its identity only now.
    judge = agreed(judge, protocol.asked(service))
    whole = {"judged_by": judge.model_dump(), "report": report.model_dump()}
    details = whole | {"scores": protocol.details(found)}
    encoded = json.dumps(details, indent=1, allow_nan=False).encode()
    page = f"{protocol.name}.md"
    write_all_atomically(output, {path.name: encoded, page: markdown(report, judge).encode()})
    if as_json:
        typer.echo(json.dumps(whole, indent=1, allow_nan=False))
        return
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    console.print(table(report))
    for note in report.notes:
        console.print(note, markup=False)
    console.print(f"Judged by: {escape_controls(str(judge))}.", markup=False)
    console.print(f"Every score is in [bold]{escape_markup(str(path))}[/bold].")


def rows(report: SessionReport) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table: one row per turn, and one over all turns if any."""
    names = list(report.by_turn)
    body = [
        [f"{turn + 1}", *(cell(report.by_turn[name][turn]) for name in names)]
        for turn in range(report.turns)
    ]
    if report.all_turns:
        body.append(["all", *(cell(report.all_turns[name]) for name in names)])
    return ["turn", *(f"{name}, %" for name in names)], body


def cell(value: Measured) -> str:
    """Return an estimate in percent with interval and count; an asterisk marks few cases."""
    if value.estimate is None or value.low is None or value.high is None:
        return "none (0)"
    low, high = 100 * value.low, 100 * value.high
    few = " *" * (value.count < FEW_CASES)
    return f"{100 * value.estimate:.1f} [{low:.1f}, {high:.1f}] ({value.count}){few}"


def _title(report: SessionReport) -> str:
    return f"{report.benchmark}: {report.sessions} sessions of {report.turns} turns"


def table(report: SessionReport) -> Table:
    """Return the table for the terminal."""
    head, body = rows(report)
    shown = Table(title=escape_markup(f"{_title(report)} [95% interval] (count; {FEW})"))
    for column in head:
        shown.add_column(column, justify="right")
    for row in body:
        shown.add_row(*map(escape_markup, row))
    return shown


def markdown(report: SessionReport, judge: JudgedBy) -> str:
    """Return the report as Markdown."""
    head, body = rows(report)
    lines = [head, ["---:"] * len(head), *body]
    parts = [
        f"# {_title(report)}",
        f"Judged by: {judge}; prompts of mteditflow. [95% interval over sessions] (count; {FEW}).",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        *report.notes,
    ]
    return "\n\n".join(parts) + "\n"
