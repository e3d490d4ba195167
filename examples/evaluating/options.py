"""Options of the evaluation commands: errors by their names, and what does not go together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from typer import Context

from mteditflow._exits import refusing
from mteditflow.chains import Skipped

# Fields that the commands share with the trainer, by the names of their options.
OPTIONS = {"rewards.judge_model": "--model"}
EDITOR = ("lora", "call", "dtype", "seed", "batch", "history")  # act on an editor alone
JUDGE = (  # act on a judge or a consistency server alone
    "model", "thinking", "answer_tokens", "reasoning_tokens", "chat_template_kwargs", "extra_body",
    "terms", "concurrency",
)  # fmt: skip
SHOWN = 3  # chains that a message names


@contextmanager
def refusing_options() -> Iterator[None]:
    """``refusing``, with ``--scorer`` for ``rewards.scorer`` in the line."""
    with refusing():
        try:
            yield
        except ValueError as error:
            raise ValueError(_by_option(str(error))) from error


def _by_option(message: str) -> str:
    """Name an option of a command where a message names the field that it sets.

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
    return re.sub(r"(?<![\w.])rewards\.", "--", message)  # not those of a module


def refuse_ignored(context: Context, other: str, names: tuple[str, ...]) -> None:
    """Raise ValueError if an option was given that another one makes meaningless."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{other}: expected no {option} beside it, which would have no effect")


def few(reasons: Mapping[str, str]) -> str:
    """Name a few of what was left out, with the reason, and how many more there are."""
    shown = [f"{name}: {why}" for name, why in list(reasons.items())[:SHOWN]]
    more = [f"... and {len(reasons) - SHOWN} more"] * (len(reasons) > SHOWN)
    return "; ".join([*shown, *more])


def few_lines(skipped: Sequence[Skipped]) -> str:
    """Name a few reasons of lines that hold no chain, each once: its first line and a count."""
    lines: dict[str, list[int]] = {}
    for found in skipped:
        lines.setdefault(found.reason, []).append(found.line)
    return few(
        {
            f"line {own[0]}" + f" and {len(own) - 1} more" * (len(own) > 1): reason
            for reason, own in lines.items()
        }
    )
