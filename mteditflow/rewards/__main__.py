"""Command line: check which parts of a request a judge's endpoints support."""

from __future__ import annotations

import os
from functools import partial
from typing import Annotated

import anyio
import typer
from rich.console import Console
from rich.table import Table

from mteditflow.rewards.judge.preflight import EndpointReport, inspect_endpoints
from mteditflow.rewards.transport.chat import ChatClient

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def commands() -> None:
    """Rewards of edited chains."""


@app.command()
def check(
    endpoints: Annotated[list[str], typer.Argument(help="URLs ending in /v1.")],
    model: Annotated[str, typer.Option(help="Name of the model on the endpoints.")],
    images: Annotated[int, typer.Option(min=1, help="Images in one request.")] = 4,
    timeout: Annotated[float, typer.Option(min=0, help="Deadline of one question, s.")] = 120.0,
) -> None:
    """Ask each endpoint three small questions that prove what it supports.

    Exits with 1 if anything is not supported. OPENAI_API_KEY is sent as the key if it is set.
    """
    key = os.environ.get("OPENAI_API_KEY")
    try:
        client = ChatClient(endpoints, model, api_key=key, attempts=2, timeout=timeout)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    reports = anyio.run(partial(inspect_endpoints, client, images=images))
    Console(highlight=False).print(_table(reports))
    if any(report.missing for report in reports):
        raise typer.Exit(1)


def _table(reports: list[EndpointReport]) -> Table:
    table = Table(title="What is honoured")
    for title in ("endpoint", "part of a request", "honoured"):
        table.add_column(title, overflow="fold")
    for report in reports:
        for part, lost in report.honours.items():
            table.add_row(report.endpoint, part, "yes" if lost is None else f"no: {lost}")
    return table


if __name__ == "__main__":
    app(prog_name="python -m mteditflow.rewards")
