"""Text of others (servers, models, data files): made safe to print and log, and read as JSON."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

SPACES = ("Zs",)  # categories of white space that takes no other effect than its width


def escape_controls(text: str) -> str:
    r"""Escape every character that acts on a terminal or a log instead of being shown.

    Those are control characters (line breaks and ESC among them), direction and other invisible
    format characters, and lone surrogates.

    Example:
        >>> escape_controls("red\x1b[31m\nline 2 \u202e")
        'red\\x1b[31m\\nline 2 \\u202e'
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or unicodedata.category(c) in SPACES else _escaped(c) for c in text
    )


def escape_markup(text: str) -> str:
    r"""Escape control characters, and the markup of ``rich``: the text is printed as it stands.

    Example:
        >>> escape_markup("[link=http://a]no[/link]")
        '\\[link=http://a]no\\[/link]'
    """
    from rich.markup import escape  # only commands have it

    return escape(escape_controls(text))


def parse_json(text: str | bytes) -> Any:
    """Parse JSON as Python's parser does, of whose errors one is no ``ValueError``.

    Raises:
        ValueError: it is no JSON, is nested without end, or holds a number of thousands of digits.

    Example:
        >>> parse_json(100_000 * "[")
        Traceback (most recent call last):
        ValueError: expected JSON, got too many brackets within each other
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("expected JSON, got too many brackets within each other") from None


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
