"""Reader of one JSON document with many records: an object of entries by name, or an array.

A broken entry costs no other one: parsing resumes at the next text that begins like an entry.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, BinaryIO, NamedTuple

from mteditflow.chains.formats.base import STRICT, Format, Record, Row, attempt, bad_byte
from mteditflow.chains.record import Chain, ChainError, one_line, shorten

DECODER = json.JSONDecoder(**STRICT)
# The bound on a name's length keeps the search for the next entry linear in broken text.
NAME = r'"(?:[^"\\\n]|\\.){0,999}"\s*:\s*'
OPENINGS = {"{": re.compile(NAME + r"(?=[{\[])"), "[": re.compile(r"(?=\{)")}
CLOSING = {"{": "}", "[": "]"}


class Entry(NamedTuple):
    """One record of a document.

    Attributes:
        line: line on which it begins, from 1.
        name: its key in an object, ``None`` in an array.
        value: parsed JSON value, or a ``ChainError``.
    """

    line: int
    name: Any
    value: Any


def entries(
    raw: bytes, bracket: str, keys: Collection[str] = (), *, tail: str = ""
) -> Iterator[Entry]:
    """Yield entry by entry; the value of a broken one is a ``ChainError``.

    Args:
        raw: the document.
        bracket: "{" for an object of entries, "[" for an array.
        keys: keys of every entry, used to find the next entry after a broken one.
        tail: text that follows the closing bracket.
    """
    text = raw.decode("utf-8", errors="surrogateescape")  # a bad byte spoils its own entry only
    opening = _opening(text, bracket, keys)
    line, start, position = 1, 0, 0
    while True:
        # Newlines are counted from the last position only, so that the whole scan stays linear.
        line, start = line + text.count("\n", start, position), position
        try:
            if not position:  # the opening bracket is still to come
                position = _pass(text, 0, bracket)
            elif text.startswith(CLOSING[bracket], position):
                _pass_end(text, position, tail)
                return
            else:
                name, value, position = _entry(text, start, bracket)
                yield Entry(line, name, _of_bytes(text[start:position]) or value)
                if position < len(text):  # a missing end is reported on the last entry
                    line += text.count("\n", start, position)
                start = position
                position = _pass_comma(text, position, bracket)
        except ChainError as error:
            yield Entry(line, None, _of_bytes(text[start : start + 80]) or error)
            following = _next(text, start + 1, bracket, keys, opening)
            if following is None:
                return
            position = following


def _pass_comma(text: str, position: int, bracket: str) -> int:
    """Return the position after the comma that follows an entry; the last entry has none."""
    last = text.startswith(CLOSING[bracket], position)
    return position if last else _pass(text, position, ",")


def _pass_end(text: str, position: int, tail: str) -> None:
    """Raise ChainError unless the document ends with the closing bracket and the tail."""
    if text[position + 1 :].strip() != tail:
        expected = f"{tail!r} and the end" if tail else "the end"
        raise ChainError(f"expected {expected}, got {_shown(text, position + 1)}")


def keys_of(value: object) -> frozenset[str]:
    """Return the keys of an entry: those of an object, or those common to a list of objects."""
    if isinstance(value, list) and value and all(isinstance(x, dict) for x in value):
        return frozenset.intersection(*(frozenset(x) for x in value))
    return frozenset(value) if isinstance(value, dict) else frozenset()


def _entry(text: str, position: int, bracket: str) -> tuple[Any, Any, int]:
    """Parse an entry; return its name, its value and the position after it.

    A comma, the closing bracket, the next entry (if the comma is missing) or the end of the text
    may follow; anything else makes this entry an error.
    """
    name = None
    if bracket == "{":
        name, position = _scan(text, position)
        position = _pass(text, position, ":")
    value, end = _scan(text, position)
    follows = text.startswith((",", CLOSING[bracket]), end) or OPENINGS[bracket].match(text, end)
    if not follows and end < len(text):
        raise ChainError(f"expected ',', got {_shown(text, end)}")
    return name, value, end


def _next(
    text: str,
    start: int,
    bracket: str,
    keys: Collection[str],
    opening: re.Pattern[str] | None,
) -> int | None:
    """Return where the next entry begins, ``None`` if there is none.

    It has the keys, or it opens like the first whole entry, since it may be broken itself.
    """
    for match in OPENINGS[bracket].finditer(text, start):
        opens = opening is not None and opening.match(text, match.end())
        if opens or _parsed(text, match.end(), keys) is not None:
            return match.start()
    return None


def _opening(text: str, bracket: str, keys: Collection[str]) -> re.Pattern[str] | None:
    """Return a pattern of the first whole entry's brackets and first key; others begin alike."""
    for match in OPENINGS[bracket].finditer(text):
        if (value := _parsed(text, match.end(), keys)) is not None:
            first = value[0] if isinstance(value, list) else value
            brackets = r"\[\s*\{" if isinstance(value, list) else r"\{"
            return re.compile(brackets + r"\s*" + re.escape(json.dumps(next(iter(first)))))
    return None


def _parsed(text: str, position: int, keys: Collection[str]) -> Any:
    """Return the value at a position if it has the keys, else ``None``."""
    try:
        value, _ = _scan(text, position)
    except ChainError:
        return None
    found = keys_of(value)
    return value if found and found.issuperset(keys) else None


def _of_bytes(text: str) -> ChainError | None:
    found = bad_byte(text)
    return None if found is None else ChainError(found)


def _scan(text: str, position: int) -> tuple[Any, int]:
    """Parse the value at a position; return it and the position after it and white space."""
    try:
        value, end = DECODER.raw_decode(text, position)
    except (ValueError, RecursionError) as error:
        raise ChainError(f"expected JSON, got {_shown(text, position)} ({error})") from error
    return value, _pass(text, end, "")


def _pass(text: str, position: int, character: str) -> int:
    """Return the position after a character and the white space around it."""
    match = re.compile(rf"\s*{re.escape(character)}\s*").match(text, position)
    if not match:
        raise ChainError(f"expected {character!r}, got {_shown(text, position)}")
    return match.end()


def _shown(text: str, position: int) -> str:
    return shorten(text[position : position + 80])


def _encode_entry(own: Callable[[Chain], object], chain: Chain) -> str:
    return f"    {json.dumps(chain.id, ensure_ascii=False)}: {one_line(own(chain))}"


def entry_format(
    name: str,
    *,
    about: str,
    keys: Collection[str],
    decode: Callable[[object, object], Record],
    encode: Callable[[Chain], object],
    loses: str = "nothing",
    refuses: str = "none",
) -> Format:
    """Return a format whose file is one JSON object of entries, with the ids as keys.

    Args:
        name: name on the command line.
        about: one-line description.
        keys: keys that identify an entry of this format.
        decode: function of an entry's name and value that returns the native record.
        encode: function of a chain that returns its entry's value; it and ``decode`` raise
            ``ChainError`` for input that they cannot convert.
        loses: data of a chain that the format leaves out.
        refuses: chains that the format cannot hold.
    """
    own = frozenset(keys)
    return Format(
        name,
        about,
        loses,
        refuses,
        read=partial(_read, decode, own),
        encode=partial(_encode_entry, encode),
        keys=own,
        head="{\n",
        between=",\n",
        tail="\n}\n",
    )


def _read(
    decode: Callable[[object, object], Record], keys: frozenset[str], file: BinaryIO
) -> Iterator[Row]:
    for line, name, value in entries(file.read(), "{", keys):
        yield line, value if isinstance(value, ChainError) else attempt(decode, name, value)
