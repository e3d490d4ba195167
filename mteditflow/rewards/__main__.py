"""Command line: check which parts of a request a judge's endpoints support."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import anyio
import typer
from rich.console import Console
from rich.table import Table

from mteditflow._command import OneLineGroup
from mteditflow._text import escape_markup
from mteditflow.rewards.command_line import (
    AnswerTokens,
    ChatTemplateKwargs,
    ExtraBody,
    ReasoningTokens,
    read_secret,
    request_options,
)
from mteditflow.rewards.judge.preflight import EndpointReport, inspect_endpoints
from mteditflow.rewards.judge.prompts import JudgePrompt
from mteditflow.rewards.transport.chat import ChatClient

PATIENCE = 6.0  # s; above the 5 s for which a broken connection takes an endpoint out of rotation

app = typer.Typer(cls=OneLineGroup, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def commands() -> None:
    """Rewards of edited chains."""


@app.command()
def check(
    endpoints: Annotated[list[str], typer.Argument(help="URLs ending in /v1.")],
    model: Annotated[str, typer.Option(help="Name of the model on the endpoints.")],
    images: Annotated[int, typer.Option(min=1, help="Images in one request.")] = 4,
    thinking: Annotated[bool, typer.Option(help="Ask for an analysis before each score.")] = True,
    answer_format: Annotated[
        Literal["json", "text"], typer.Option(help="text: for a server without structured output.")
    ] = "json",
    answer_tokens: AnswerTokens = None,
    reasoning_tokens: ReasoningTokens = 0,
    chat_template_kwargs: ChatTemplateKwargs = None,
    extra_body: ExtraBody = None,
    timeout: Annotated[float, typer.Option(min=0, help="Deadline of one question, s.")] = 120.0,
) -> None:
    """Test by four requests what each endpoint supports.

    The last one is a judge's question with the options of a run. It shows whether the model reasons
    before it answers, and how much of the token limit an answer takes. Exit with code 1 if anything
    is not supported. OPENAI_API_KEY is sent as the key if it is set.
    """
    key = read_secret("OPENAI_API_KEY")
    request = request_options(answer_tokens, reasoning_tokens, chat_template_kwargs, extra_body)
    try:
        client = ChatClient(
            endpoints,
            model,
            api_key=key,
            request=request,
            attempts=2,
            timeout=timeout,
            patience=PATIENCE,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    prompt = JudgePrompt(thinking=thinking, answer_format=answer_format)
    reports = anyio.run(partial(inspect_endpoints, client, images=images, prompt=prompt))
    Console(highlight=False).print(_table(reports))
    if any(report.missing for report in reports):
        raise typer.Exit(1)


def _table(reports: list[EndpointReport]) -> Table:
    """Return a table with a row per part of a request; servers' text is escaped."""
    table = Table(title="Parts of a request that each endpoint honors")
    for title in ("endpoint", "part of a request", "honored"):
        table.add_column(title, overflow="fold")
    for report in reports:
        rows = {part: "yes" if x is None else f"no: {x}" for part, x in report.honors.items()}
        rows |= {"reasoning": report.reasoning, "longest answer": str(report.usage)}
        for part, shown in rows.items():
            table.add_row(*map(escape_markup, (report.endpoint, part, shown)))
    return table


if __name__ == "__main__":
    app(prog_name="python -m mteditflow.rewards")
