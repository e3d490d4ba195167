"""Options of the evaluation commands: their names in errors, and conflicts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from typer import Context

from mteditflow._exits import refusing
from mteditflow.chains import Skipped

# Options by field of the trainer, if their names differ.
OPTIONS = {"rewards.judge_model": "--model"}
EDITOR = ("lora", "call", "dtype", "seed", "batch", "history", "noise")  # only affect an editor
JUDGE = (  # only affect a judge or a consistency server
    "model", "thinking", "answer_tokens", "reasoning_tokens", "chat_template_kwargs", "extra_body",
    "terms", "concurrency",
)  # fmt: skip
SHOWN = 3  # most chains that a message lists


@contextmanager
def refusing_options() -> Iterator[None]:
    """Refuse like ``refusing``, with options such as ``--scorer`` for fields in the message."""
    with refusing():
        try:
            yield
        except ValueError as error:
            raise ValueError(_by_option(str(error))) from error


def _by_option(message: str) -> str:
    """Replace fields of the trainer in a message by the command's options.

    Example:
        >>> _by_option("rewards.scorer: expected module:name, got 'x'")
        "--scorer: expected module:name, got 'x'"
        >>> _by_option("rewards.scorer: expected a scale, such as mteditflow.rewards.LIKERT")
        '--scorer: expected a scale, such as mteditflow.rewards.LIKERT'
    """
    for field, option in OPTIONS.items():
        message = message.replace(field, option)
    if not message.startswith(("rewards.", "--")):
        return message
    return re.sub(r"(?<![\w.])rewards\.", "--", message)  # not in mteditflow.rewards.X


def refuse_ignored(context: Context, other: str, names: tuple[str, ...]) -> None:
    """Raise ValueError if an option was given that has no effect beside ``other``."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{other}: expected no {option} beside it, which would have no effect")


def few(reasons: Mapping[str, str]) -> str:
    """Return text on the first left-out items with their reasons, and the number of others."""
    shown = [f"{name}: {why}" for name, why in list(reasons.items())[:SHOWN]]
    more = [f"... and {len(reasons) - SHOWN} more"] * (len(reasons) > SHOWN)
    return "; ".join([*shown, *more])


def few_lines(skipped: Sequence[Skipped]) -> str:
    """Return text on the first reasons of skipped lines, each with its first line and count."""
    lines: dict[str, list[int]] = {}
    for found in skipped:
        lines.setdefault(found.reason, []).append(found.line)
    return few(
        {
            f"line {own[0]}" + f" and {len(own) - 1} more" * (len(own) > 1): reason
            for reason, own in lines.items()
        }
    )
