"""One JSON document with many records: an object of them by name, or an array of them.

A broken entry costs no other one: reading goes on at the next text that begins like an entry.
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
NAME = r'"(?:[^"\\\n]|\\.){0,999}"\s*:\s*'
OPENINGS = {"{": re.compile(NAME + r"(?=[{\[])"), "[": re.compile(r"(?=\{)")}
CLOSING = {"{": "}", "[": "]"}


class Entry(NamedTuple):
    """One record of a document.

    Attributes:
        line: where it begins, from 1.
        name: its name in an object, ``None`` in an array.
        value: parsed, or what is wrong with it.
    """

    line: int
    name: Any
    value: Any


def entries(
    raw: bytes, bracket: str, keys: Collection[str] = (), *, tail: str = ""
) -> Iterator[Entry]:
    """Go from entry to entry; a broken one has an error for its value.

    Args:
        raw: the document.
        bracket: "{" for an object of entries, "[" for an array.
        keys: those that an entry has, by which one is found behind a broken one.
        tail: what follows the closing bracket.
    """
    text = raw.decode("utf-8", errors="surrogateescape")  # a bad byte stays in its entry
    opening = _opening(text, bracket, keys)
    line, start, position = 1, 0, 0
    while True:
        line, start = line + text.count("\n", start, position), position
        try:
            if not position:
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
    """Go past the comma behind an entry; the last entry has none."""
    last = text.startswith(CLOSING[bracket], position)
    return position if last else _pass(text, position, ",")


def _pass_end(text: str, position: int, tail: str) -> None:
    """Raise ChainError unless the tail and the end follow the closing bracket."""
    if text[position + 1 :].strip() != tail:
        expected = f"{tail!r} and the end" if tail else "the end"
        raise ChainError(f"expected {expected}, got {_shown(text, position + 1)}")


def keys_of(value: object) -> frozenset[str]:
    """Return the keys of an entry: its own, or those that every record of a list has."""
    if isinstance(value, list) and value and all(isinstance(x, dict) for x in value):
        return frozenset.intersection(*(frozenset(x) for x in value))
    return frozenset(value) if isinstance(value, dict) else frozenset()


def _entry(text: str, position: int, bracket: str) -> tuple[Any, Any, int]:
    """Parse an entry; return its name, its value, and where what follows begins.

    That is a comma, the end, or an entry for want of a comma; anything else spoils this one.
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
    """Where the next entry begins: one with the keys, or one that opens as the first such entry."""
    for match in OPENINGS[bracket].finditer(text, start):
        opens = opening is not None and opening.match(text, match.end())
        if opens or _parsed(text, match.end(), keys) is not None:
            return match.start()
    return None


def _opening(text: str, bracket: str, keys: Collection[str]) -> re.Pattern[str] | None:
    """Brackets and first key of the first entry that is whole; the others begin alike."""
    for match in OPENINGS[bracket].finditer(text):
        if (value := _parsed(text, match.end(), keys)) is not None:
            first = value[0] if isinstance(value, list) else value
            brackets = r"\[\s*\{" if isinstance(value, list) else r"\{"
            return re.compile(brackets + r"\s*" + re.escape(json.dumps(next(iter(first)))))
    return None


def _parsed(text: str, position: int, keys: Collection[str]) -> Any:
    """The value that begins here if it has the keys, else ``None``."""
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
    """Parse the value that begins here; return it, and where what follows it begins."""
    try:
        value, end = DECODER.raw_decode(text, position)
    except (ValueError, RecursionError) as error:
        raise ChainError(f"expected JSON, got {_shown(text, position)} ({error})") from error
    return value, _pass(text, end, "")


def _pass(text: str, position: int, character: str) -> int:
    """Go past a character, and the white space around it."""
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
    """Make a format with one JSON object of entries, whose names are the ids.

    Args:
        name: as the command line takes it.
        about: what the format is.
        keys: those that show an entry to be of this format.
        decode: name and value of an entry to the native record.
        encode: chain to the value of its entry; either raises ``ChainError`` where it cannot.
        loses: what of a chain it leaves out.
        refuses: which chains it cannot hold.
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
