"""Options and checks shared by commands that use a judge, a server or a detector."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mteditflow._text import parse_json
from mteditflow.rewards.faults import Lost
from mteditflow.rewards.request_options import RequestOptions

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

QUESTION = 60.0  # s, longest wait for the answer of a service in a reachability check


def read_secret(variable: str) -> str | None:
    r"""Return a key or token from the environment without a final line break, None if unset.

    Example:
        >>> os.environ["SOME_KEY"] = "secret\n"
        >>> read_secret("SOME_KEY"), read_secret("ANOTHER_KEY")
        ('secret', None)
        >>> del os.environ["SOME_KEY"]
    """
    value = os.environ.get(variable)
    return None if value is None else value.rstrip("\r\n")


def check_source(name: str, source: str, file: str) -> None:
    """Check that a model's source is a folder with its configuration, or has the form of a hub id.

    Args:
        name: name of the option.
        source: path or hub id.
        file: name of the configuration file in the folder.

    Raises:
        ValueError: the folder has no such file, or the text is neither a folder nor a hub id.

    Example:
        >>> check_source("detector", "nowhere/at/all", "config.json")
        Traceback (most recent call last):
        ValueError: detector: expected a folder with config.json or a hub id, got 'nowhere/at/all'
    """
    is_path = os.path.exists(source)  # unlike Path.exists, false for a name that no file can have
    there = os.path.isfile(Path(source) / file) if is_path else HUB_ID.fullmatch(source) is not None
    if not there:
        raise ValueError(f"{name}: expected a folder with {file} or a hub id, got {source!r}")


def check_device(name: str, device: str) -> None:
    """Check that a device of torch exists on this machine.

    Raises:
        ValueError: there is no such device.

    Example:
        >>> check_device("device", "abacus")
        Traceback (most recent call last):
        ValueError: device: expected a device of torch that is here, such as cpu, got 'abacus'
    """
    try:  # torch.device alone accepts the index of a device that is not there
        torch.empty(0, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"{name}: expected a device of torch that is here, such as cpu, got {device!r}"
        ) from error


def require_reachable(name: str, found: Mapping[str, Lost | None]) -> None:
    """Check that every endpoint answered.

    Args:
        name: name of the option that gives the endpoints.
        found: result of ``reach_endpoints`` or ``ConsistencyClient.reach``.

    Raises:
        ValueError: an endpoint did not answer; the message has the reason.
    """
    for url, lost in found.items():
        if lost is not None:
            raise ValueError(f"{name}: expected an answer from {url}, got {lost}")


def require_or_answers(require: Callable[[], None], answers: Path) -> None:
    """Check that services answer; only warn if there are cached answers, which may suffice.

    Args:
        require: check that raises ``ValueError`` if a service does not answer.
        answers: file of cached answers of earlier runs.

    Raises:
        ValueError: a service does not answer, and the file does not exist.
    """
    try:
        require()
    except ValueError as error:
        if not answers.exists():
            raise
        typer.echo(f"warning: {error}; going on with the answers in {answers}", err=True)


def json_object(text: str) -> dict[str, Any]:
    """Parse the value of an option as a JSON object.

    Raises:
        typer.BadParameter: the text is not a JSON object.

    Example:
        >>> json_object('{"enable_thinking": false}')
        {'enable_thinking': False}
    """
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"expected a JSON object, got {text!r}")
    return value


AnswerTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Token limit of an answer. Default: set by each question."),
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
        typer.BadParameter: ``RequestOptions`` refuses a value.
    """
    try:
        return RequestOptions(
            answer_tokens, reasoning_tokens, chat_template_kwargs or {}, extra_body or {}
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
