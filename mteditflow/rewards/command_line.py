"""Options that every command with a judge has in common."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


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
