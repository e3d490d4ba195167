"""Recognition of a file's format by the keys of its first readable record."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import islice
from typing import BinaryIO

from mteditflow.chains.formats import FORMATS, Format
from mteditflow.chains.formats.base import numbered_lines, parse_object
from mteditflow.chains.formats.entries import entries, keys_of
from mteditflow.chains.formats.lines import is_array
from mteditflow.chains.record import ChainError, shorten

RECORDS = 100  # records examined; the ones before the first readable one may be broken
# First bytes of gzip, zip, zstd, bzip2 and xz.
PACKED = (b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")
KEYS_SHOWN = 12  # keys listed in a message
NEAR = 0.75  # difflib similarity above which a key counts as a misspelling of another


class UnknownFormatError(ChainError):
    """Content of no known format."""


def format_of_content(stream: BinaryIO) -> Format:
    """Recognize the format of an open file that is positioned after its byte-order mark.

    Raises:
        UnknownFormatError: no format matches; the message names the keys and the nearest format.
    """
    start = stream.tell()
    seen: list[frozenset[str]] = []
    for lines, keys in _records(stream):
        known = _match(keys, lines=lines)
        if known is not None:
            return known
        seen.append(keys)
    stream.seek(start)
    if (found := _not_text(stream.read(4096))) is not None:
        raise UnknownFormatError(f"expected UTF-8 text, got {found}")
    raise UnknownFormatError(_unknown(max(seen, key=_nearness, default=frozenset())))


def _not_text(raw: bytes) -> str | None:
    """Describe a file whose first bytes are not UTF-8 text; ``None`` for text."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16 or UTF-32; save it as UTF-8"
    if raw.startswith(PACKED):
        return "a compressed file; unpack it first"
    return "a file with NUL bytes" if b"\0" in raw else None


def format_of_keys(keys: frozenset[str]) -> Format:
    """Recognize a one-record-per-line format by a record's keys; the records may be table rows.

    Raises:
        UnknownFormatError: no format has these keys.
    """
    known = _match(keys, lines=True)
    if known is None:
        raise UnknownFormatError(_unknown(keys))
    return known


def _match(keys: frozenset[str], *, lines: bool) -> Format | None:
    """Return the first format whose required keys are all among these."""
    kinds = [known for known in FORMATS.values() if (known.decode is not None) is lines]
    return next((known for known in kinds if known.keys <= keys), None)


def _records(stream: BinaryIO) -> Iterator[tuple[bool, frozenset[str]]]:
    """Yield the keys of each of the first records, with True for a line or an array's object.

    The flag is False for a header of a table and for an entry of a JSON object.
    """
    start = stream.tell()
    if is_array(stream):
        for entry in islice(entries(stream.read(), "["), RECORDS):
            yield True, keys_of(entry.value)
        return
    for number, raw in islice(numbered_lines(stream), RECORDS):
        if columns := _columns(raw, number):
            yield False, columns
        try:
            yield True, frozenset(parse_object(raw))
        except ChainError:
            continue
    stream.seek(start)
    if re.match(rb"\s*\{", stream.read(4096)):
        stream.seek(start)
        for entry in islice(entries(stream.read(), "{"), RECORDS):
            yield False, keys_of(entry.value)


def _columns(raw: bytes, number: int) -> frozenset[str]:
    """Return the columns if a line is a table's header: the first line, or known columns."""
    columns = frozenset(x.strip('"\r\n ') for x in raw.decode(errors="replace").split(","))
    is_header = number == 1 and len(columns) > 1 and raw.lstrip()[:1] not in (b"{", b"[")
    return columns if is_header or FORMATS["edival"].keys & columns else frozenset()


def _unknown(keys: frozenset[str]) -> str:
    """Return the message: the known formats, the keys that were found, and the nearest format."""
    expected = f"expected content of one of the formats {', '.join(FORMATS)}"
    if not keys:
        return f"{expected}, got no record"
    shown = shorten(sorted(keys)[:KEYS_SHOWN], 400)
    nearest = max(FORMATS.values(), key=lambda known: _share(known, keys))
    if not _share(nearest, keys):
        return f"{expected}, got the keys {shown}"
    missing = sorted(nearest.keys - keys)
    return f"{expected}, got the keys {shown}; the nearest is {nearest.name}, which needs {missing}"


def _nearness(keys: frozenset[str]) -> float:
    return max(_share(known, keys) for known in FORMATS.values())


def _share(known: Format, keys: frozenset[str]) -> float:
    """Return the Jaccard similarity of two key sets; a probable misspelling counts one half."""
    near = [key for key in known.keys - keys if get_close_matches(key, keys, 1, NEAR)]
    return (len(known.keys & keys) + len(near) / 2) / len(known.keys | keys)
