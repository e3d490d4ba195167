"""The type of a format, with shared parsing of lines and translation of keys."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from mteditflow.chains.record import TASK_TYPES, Chain, ChainError, shorten

#: Fields with a list of object names per turn that other formats have under the same names.
OBJECTS = ("unchanged_objects", "available_objects", "all_objects")

Record = dict[str, Any]
#: A line number with the native record that begins there, or with the error.
Row = tuple[int, Record | ChainError]


@dataclass(frozen=True)
class Format:
    """File format of chains.

    Attributes:
        name: name on the command line and key of ``FORMATS``.
        about: one-line description.
        loses: data of a chain that the format leaves out.
        refuses: chains that the format cannot hold.
        read: reader of an open file (after its byte-order mark) that yields rows and continues
            after a bad one.
        encode: writer of one chain; raises ``ChainError`` if the format cannot hold it.
        keys: keys that identify a record of this format: columns of a table, keys of a line, of an
            entry of a JSON object, or of the records in the list that is an entry.
        decode: function of a parsed line and its number that returns the native record; ``None``
            if a record is not one line.
        suffixes: alternative suffixes of images, for records that do not name their image.
        head: text at the beginning of the file.
        between: text between two chains.
        tail: text at the end of the file.
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
    """Return the record or the error; a generator that raised could not continue after it."""
    try:
        return make(*arguments)
    except ChainError as error:
        return error


def numbered_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield each line that is not blank with its number, from 1."""
    for number, raw in enumerate(file, start=1):
        if raw.strip():
            yield number, raw


def parse_object(raw: bytes) -> Record:
    """Parse one JSON object, more strictly than Python's parser does by default.

    Raises:
        ChainError: it is not UTF-8, not JSON (NaN and Infinity are not), not an object, or has a
            key twice.
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
        ChainError: the bytes are not UTF-8; the message names the first bad one.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ChainError(f"expected UTF-8 text, got byte {raw[error.start]:#04x}") from error


def bad_byte(text: str) -> str | None:
    r"""Return a message for the first bad byte of a text decoded with "surrogateescape".

    ``None`` if every byte was valid UTF-8.

    Example:
        >>> bad_byte(b"caf\xe9".decode("utf-8", errors="surrogateescape"))
        'expected UTF-8 text, got byte 0xe9'
    """
    # surrogateescape maps a bad byte b to U+DC00 + b (PEP 383); bad bytes are 0x80 to 0xff.
    match = re.search("[\udc80-\udcff]", text)
    return None if match is None else f"expected UTF-8 text, got byte {ord(match[0]) - 0xDC00:#04x}"


def shorten_line(raw: bytes) -> str:
    """Return the repr of a line, cut to a message's length."""
    return shorten(raw.decode("utf-8", errors="replace").strip())


def single_turn(chain: Chain) -> str:
    """Return the instruction of a chain of one turn.

    Raises:
        ChainError: the chain has several turns.
    """
    if chain.turns > 1:
        raise ChainError(f"expected a chain of one turn, got {chain.turns} turns")
    return chain.instructions[0]


def as_object(value: object, keys: str) -> Record:
    """Return a parsed value after a check that it is a JSON object.

    Raises:
        ChainError: it is none; the message names the expected keys.
    """
    if not isinstance(value, dict):
        raise ChainError(f"expected an object with {keys}, got {shorten(value)}")
    return value


def take(record: Record, key: str, kind: type, expected: str) -> Any:
    """Remove a key from a record and return its value.

    Raises:
        ChainError: the key is missing, or its value is not of the given type.
    """
    if key not in record:
        raise ChainError(f"{key}: expected this field, got none")
    value = record.pop(key)  # keys that no one takes are unknown ones, which are kept
    if not isinstance(value, kind):
        raise ChainError(f"{key}: expected {expected}, got {shorten(value)}")
    return value


def take_turns(record: Record, prefix: str) -> list[Any]:
    """Remove the keys prefix1, prefix2, ... from a record and return their values in turn order.

    Raises:
        ChainError: there is none, or a number is missing.

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
    """Return a record with one key per turn and further keys: the inverse of ``take_turns``.

    Raises:
        ChainError: a further key has the form of a turn's key.
    """
    if others := [key for key in rest if re.fullmatch(re.escape(prefix) + r"[1-9]\d{0,5}", key)]:
        raise ChainError(f"{others[0]}: expected no key of this name, which is that of a turn")
    return {f"{prefix}{n}": value for n, value in enumerate(values, start=1)} | dict(rest)


def known_types(key: str, types: object) -> bool:
    """Whether every edit type in a list is one of ``TASK_TYPES``.

    Raises:
        ChainError: ``types`` is not a list of strings.
    """
    if not isinstance(types, (list, tuple)) or not all(isinstance(x, str) for x in types):
        raise ChainError(f"{key}: expected a list of text, got {shorten(types)}")
    return all(x in TASK_TYPES for x in types)


def with_id(record: Record, number: int) -> Record:
    """Return the record with a text id: its own, else its line number."""
    name = record.get("id", number)
    return {**record, "id": str(name) if type(name) is int else name}


def join(fields: Mapping[str, Any], rest: Mapping[str, Any]) -> Record:
    """Merge fields and further keys into one record.

    Raises:
        ChainError: a key is in both, and one value would be lost.
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
        raise ValueError(f"the key {next(x for x in keys if keys.count(x) > 1)!r} occurs twice")
    return record


def _finite(text: str) -> float:
    """Parse a number; refuse one such as 1e999, which is valid JSON but overflows a float."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


STRICT: dict[str, Any] = {
    "parse_constant": _refuse_constant,
    "parse_float": _finite,
    "object_pairs_hook": _unique,
}
