"""The type of a format, and what formats share: parsing of lines, translation of keys."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from mteditflow.chains.record import TASK_TYPES, Chain, ChainError, shorten

#: Fields of the native record with a list of object names per turn that formats share.
OBJECTS = ("unchanged_objects", "available_objects", "all_objects")

Record = dict[str, Any]
#: A line number with the native record that begins there, or with why there is none.
Row = tuple[int, Record | ChainError]


@dataclass(frozen=True)
class Format:
    """One way to keep chains in a file.

    Attributes:
        name: as the command line takes it.
        about: what the format is.
        loses: what of a chain it leaves out.
        refuses: which chains it cannot hold.
        read: yields the rows of an open file (after its byte-order mark), and goes on after a bad
            one.
        encode: writes one chain; raises ``ChainError`` where the format cannot hold it.
        keys: those that show a record to be of this format: columns of a table, keys of a line, of
            an entry of a JSON object, or of the records in the list that is an entry.
        decode: parsed line and its number to the native record, where a record is a line.
        suffixes: others that the images' names may end in, where a record does not name the image.
        head: what the file begins with.
        between: what stands between two chains.
        tail: what the file ends with.
    """

    name: str
    about: str
    loses: str
    refuses: str
    read: Callable[[BinaryIO], Iterator[Row]]
    encode: Callable[[Chain], str]
    keys: frozenset[str]
    decode: Callable[[Record, int], Record] | None = None
    suffixes: tuple[str, ...] = ()
    head: str = ""
    between: str = ""
    tail: str = ""


def attempt(make: Callable[..., Record], *arguments: object) -> Record | ChainError:
    """Return what is made, or the error, so that a generator of rows can go on after it."""
    try:
        return make(*arguments)
    except ChainError as error:
        return error


def numbered_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their number from 1."""
    for number, raw in enumerate(file, start=1):
        if raw.strip():
            yield number, raw


def parse_object(raw: bytes) -> Record:
    """Parse one JSON object, and refuse what Python's parser lets through.

    Raises:
        ChainError: not UTF-8, not JSON (NaN and Infinity are not), a key twice, not an object.
    """
    text = decode_text(raw)
    try:
        value = json.loads(text, **STRICT)
    except (ValueError, RecursionError) as error:
        raise ChainError(f"expected one JSON object, got {shorten_line(raw)} ({error})") from error
    if not isinstance(value, dict):
        raise ChainError(f"expected one JSON object, got {shorten_line(raw)}")
    return value


def decode_text(raw: bytes) -> str:
    """Decode UTF-8.

    Raises:
        ChainError: the bytes are something else.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ChainError(f"expected UTF-8 text, got byte {raw[error.start]:#04x}") from error


def bad_byte(text: str) -> str | None:
    r"""Say which byte of a text, decoded with its bad bytes as surrogates, is not UTF-8.

    Example:
        >>> bad_byte(b"caf\xe9".decode("utf-8", errors="surrogateescape"))
        'expected UTF-8 text, got byte 0xe9'
    """
    match = re.search("[\udc80-\udcff]", text)
    return None if match is None else f"expected UTF-8 text, got byte {ord(match[0]) - 0xDC00:#04x}"


def shorten_line(raw: bytes) -> str:
    """Show a line, or its beginning."""
    return shorten(raw.decode("utf-8", errors="replace").strip())


def single_turn(chain: Chain) -> str:
    """Return the only instruction.

    Raises:
        ChainError: there are several.
    """
    if chain.turns > 1:
        raise ChainError(f"expected a chain of one turn, got {chain.turns} turns")
    return chain.instructions[0]


def as_object(value: object, keys: str) -> Record:
    """Return a parsed value that must be an object.

    Raises:
        ChainError: it is none; the message names the keys.
    """
    if not isinstance(value, dict):
        raise ChainError(f"expected an object with {keys}, got {shorten(value)}")
    return value


def take(record: Record, key: str, kind: type, expected: str) -> Any:
    """Take a key out of a record.

    Raises:
        ChainError: it is not there, or not of the kind.
    """
    if key not in record:
        raise ChainError(f"{key}: expected this field, got none")
    value = record.pop(key)
    if not isinstance(value, kind):
        raise ChainError(f"{key}: expected {expected}, got {shorten(value)}")
    return value


def take_turns(record: Record, prefix: str) -> list[Any]:
    """Take what stands under one key for each turn: prefix and number, from 1 on.

    Raises:
        ChainError: there is none, or a number is left out.

    Example:
        >>> record = {"turn2": "Add a dog", "turn1": "Remove the cat", "id": "7.png"}
        >>> take_turns(record, "turn"), record
        (['Remove the cat', 'Add a dog'], {'id': '7.png'})
    """
    pattern = re.compile(re.escape(prefix) + r"([1-9]\d{0,5})")
    numbers = sorted(int(match[1]) for key in record if (match := pattern.fullmatch(key)))
    if not numbers or numbers[-1] != len(numbers):
        raise ChainError(
            f"{prefix}1, {prefix}2, ...: expected one for each turn, got those of turns {numbers}"
        )
    return [record.pop(f"{prefix}{number}") for number in numbers]


def with_turns(prefix: str, values: Collection[Any], rest: Mapping[str, Any]) -> Record:
    """Return one key for each turn, and further keys: the inverse of ``take_turns``.

    Raises:
        ChainError: a further key would be read as a turn.
    """
    if others := [key for key in rest if re.fullmatch(re.escape(prefix) + r"[1-9]\d{0,5}", key)]:
        raise ChainError(f"{others[0]}: expected no key of this name, which is that of a turn")
    return {f"{prefix}{n}": value for n, value in enumerate(values, start=1)} | dict(rest)


def known_types(key: str, types: object) -> bool:
    """Whether a list of edit types has none but those of ``TASK_TYPES``.

    Raises:
        ChainError: it is no list of text.
    """
    if not isinstance(types, (list, tuple)) or not all(isinstance(x, str) for x in types):
        raise ChainError(f"{key}: expected a list of text, got {shorten(types)}")
    return all(x in TASK_TYPES for x in types)


def with_id(record: Record, number: int) -> Record:
    """Give a record its id as text: its own, or the number of its line if it has none."""
    name = record.get("id", number)
    return {**record, "id": str(name) if type(name) is int else name}


def join(fields: Mapping[str, Any], rest: Mapping[str, Any]) -> Record:
    """Put fields and further keys into one record.

    Raises:
        ChainError: a key is in both, so that one would be lost.
    """
    if both := sorted(fields.keys() & rest.keys()):
        raise ChainError(f"{both[0]}: expected this key once, got it beside the format's own")
    return {**fields, **rest}


def without(chain: Chain, *translated: str) -> Record:
    """Return the record of a chain without the fields that a format names differently."""
    return {key: value for key, value in chain.to_record().items() if key not in translated}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(x for x in keys if keys.count(x) > 1)!r} stands twice")
    return record


def _finite(text: str) -> float:
    """Parse a number; JSON can hold 1e999, a float cannot."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


STRICT: dict[str, Any] = {
    "parse_constant": _refuse_constant,
    "parse_float": _finite,
    "object_pairs_hook": _unique,
}
