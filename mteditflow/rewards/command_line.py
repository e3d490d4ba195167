"""Options that every command with a judge has in common."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from mteditflow.rewards.request_options import RequestOptions


def json_object(text: str) -> dict[str, Any]:
    """Parse the value of an option that takes a JSON object.

    Raises:
        typer.BadParameter: it is none.

    Example:
        >>> json_object('{"enable_thinking": false}')
        {'enable_thinking': False}
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"expected a JSON object, got {text!r}")
    return value


AnswerTokens = Annotated[
    int | None, typer.Option(min=1, help="Token limit of an answer; else the question's own.")
]
ReasoningTokens = Annotated[
    int, typer.Option(min=0, help="Tokens for a thinking model's reasoning, beyond the answer's.")
]
ChatTemplateKwargs = Annotated[
    dict[str, Any] | None,
    typer.Option(
        parser=json_object,
        metavar="JSON",
        help='Arguments of the chat template, such as {"enable_thinking": false}.',
    ),
]
ExtraBody = Annotated[
    dict[str, Any] | None,
    typer.Option(
        parser=json_object,
        metavar="JSON",
        help='Further parameters of each request, such as {"top_p": 0.8}.',
    ),
]


def request_options(
    answer_tokens: int | None,
    reasoning_tokens: int,
    chat_template_kwargs: dict[str, Any] | None,
    extra_body: dict[str, Any] | None,
) -> RequestOptions:
    """Combine the four options of a command.

    Raises:
        typer.BadParameter: one of them cannot be sent.
    """
    try:
        return RequestOptions(
            answer_tokens, reasoning_tokens, chat_template_kwargs or {}, extra_body or {}
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
