"""Untrusted text of servers, models and data files: escaping for terminals, and JSON parsing."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

SPACES = ("Zs",)  # Unicode categories of white space without an effect other than its width


def escape_controls(text: str) -> str:
    r"""Escape every character that would act on a terminal or a log instead of being displayed.

    These are control characters (including line breaks and ESC), text direction and other invisible
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
    r"""Escape control characters and the markup of ``rich``, so that a text is printed literally.

    Example:
        >>> escape_markup("[link=http://a]no[/link]")
        '\\[link=http://a]no\\[/link]'
    """
    from rich.markup import escape  # rich is installed for commands only

    return escape(escape_controls(text))


def parse_json(text: str | bytes) -> Any:
    """Parse JSON, with a ``ValueError`` also for the ``RecursionError`` of Python's parser.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or has a number with thousands of digits.

    Example:
        >>> parse_json(100_000 * "[")
        Traceback (most recent call last):
        ValueError: expected JSON, got brackets that are nested too deeply
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("expected JSON, got brackets that are nested too deeply") from None


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
