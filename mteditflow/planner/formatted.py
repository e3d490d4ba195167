"""The way back from a formatted instruction to its edit."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from mteditflow.chains.errors import first_error
from mteditflow.planner.edits import EDITS, Edit


def parse_formatted(text: str) -> Edit:
    """Read a formatted instruction: the inverse of ``Edit.formatted``.

    Case, outer quotes, a full stop at the end, and brackets around a position do not matter.

    Args:
        text: such as "Change the count of [cup] to [3]".

    Returns:
        The edit, of the class of its type.

    Raises:
        ValueError: the text has none of the forms, or a slot is not what it must be.

    Source: EdiVal-Bench (arXiv 2509.13399).

    Example:
        >>> parse_formatted("Change the background to [beach], remain the [dog] unchanged")
        BackgroundChange(background='beach', kept=('dog',))
    """
    line = unquoted(text).removesuffix(".")
    for kind, regex in _FORMS:
        if match := regex.fullmatch(line):
            return _build(kind, match.groupdict(), text)
    raise ValueError(f"formatted instruction: expected a form of the nine edit types, got {text!r}")


def _build(kind: type[Edit], slots: dict[str, Any], text: str) -> Edit:
    if "position" in slots:
        slots["position"] = slots["position"].lower()
    if "kept" in slots:
        slots["kept"] = _names(slots["kept"])
    try:
        return kind.model_validate(slots, strict=False)
    except ValidationError as error:
        raise ValueError(f"formatted instruction {text!r}: {first_error(error)}") from error


def unquoted(text: str) -> str:
    """Return a text as one line, without quotes that stand around the whole of it."""
    line = " ".join(text.split())
    for quotes in ('""', "''", "\u201c\u201d", "\u2018\u2019"):
        inner = line[1:-1]
        if line[:1] + line[-1:] == quotes and not set(quotes) & set(inner):
            return inner.strip()
    return line


def _names(listed: str) -> tuple[str, ...]:
    """Names in brackets, or between commas and "and" where there are none."""
    bracketed = re.findall(r"\[([^\[\]]+)\]", listed)
    return tuple(bracketed or re.split(r"\s*,\s*(?:and\s+)?|\s+and\s+", listed))


def _regex(pattern: str) -> re.Pattern[str]:
    """Turn a pattern into what matches it: the text between slots is literal."""
    special = {
        "position": r"\[?(?P<position>left|right|above|below)\]?",
        "kept": r"(?P<kept>\S.*?)",
    }
    parts = re.split(r"\[?\{(\w+)\}\]?", pattern)
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = (special.get(x, rf"\[(?P<{x}>[^\[\]]+)\]") for x in parts[1::2])
    return re.compile("".join(parts), re.IGNORECASE)


_FORMS = [(kind, _regex(pattern)) for kind in EDITS.values() for pattern in kind.patterns]
