"""What is wrong with a record or a file of chains, in one line that a user understands."""

from __future__ import annotations

from pydantic import ValidationError

SHOWN = 80  # characters of what came
EXPECTED = {
    "bool_type": "true or false",
    "extra_forbidden": "no such field",
    "string_pattern_mismatch": "text that is not empty",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "text that is not empty",
    "string_type": "text",
    "string_unicode": "valid Unicode text",
    "too_long": "at most {max_length} entries",
    "too_short": "at least one entry",
    "tuple_type": "a list",
}


class ChainError(ValueError):
    """A record is no chain, a file cannot be read, or a format cannot hold a chain."""


def shorten(value: object) -> str:
    """Show a value on one line of bounded length."""
    shown = repr(value)
    return shown if len(shown) <= SHOWN else shown[:SHOWN] + " ..."


def first_error(error: ValidationError) -> str:
    """Say where the first thing is wrong, what was expected and what came.

    Args:
        error: of any pydantic model.

    Example:
        >>> from mteditflow.chains import Chain
        >>> try:
        ...     Chain(id="7", image="7.png", instructions=["Remove the cat", 3])
        ... except ValidationError as error:
        ...     first_error(error)
        'instructions[1]: expected text, got 3'
    """
    first = error.errors(include_url=False)[0]
    place = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in first["loc"])[1:]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "missing":
        return f"{place}: expected this field, got none"
    known = EXPECTED.get(first["type"], "").format(**first.get("ctx", {}))
    expected = known or first["msg"].removeprefix("Input should be ")
    return f"{place}: expected {expected}, got {shorten(first['input'])}"
