"""EdiVal-Bench's CSV: one row per image and cumulative prefix, lists as Python literals."""

from __future__ import annotations

import ast
import csv
import io
import re
import warnings
from bisect import bisect
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from mteditflow.chains.formats.base import (
    OBJECTS,
    Format,
    Record,
    Row,
    bad_byte,
    join,
    known_types,
)
from mteditflow.chains.record import Chain, ChainError, shorten

# Columns with one entry for each turn so far, and their names in the native record.
PREFIXES = {
    "task_type": "task_types",
    "instructions": "instructions",
    "format_instructions": "formatted_instructions",
}
COLUMNS = ("image_index", "turns", *PREFIXES, "bg_consistency", *OBJECTS)
BOOLEANS = {"true": True, "false": False}
LINES_MAX = 64  # lines that one row may span, so that an open quote does not swallow the file
INDEX_MAX = 4096  # characters of a bad row that are searched for its image index
ALIKE = 20  # chains shorter than the rest are truncated if they are at most 1 in 20 of all
SUFFIXES = (".png", ".jpeg", ".webp")  # alternatives to .jpg

Cells = Mapping[str, str]


class _Bad(NamedTuple):
    """A row that cannot be read, with its image index if that is legible."""

    line: int
    error: ChainError
    image: str | None


def _read(file: BinaryIO) -> Iterator[Row]:
    """Collect the rows of each image, in any order, and yield its chain.

    A bad row costs its own image, whose error it becomes.
    """
    lines = [raw.decode("utf-8", errors="surrogateescape") for raw in file]
    start = next((n for n, text in enumerate(lines) if text.strip()), len(lines))
    try:
        columns = _header(_cells(lines[start]) if start < len(lines) else [])
    except ChainError as error:
        yield min(start, len(lines) - 1) + 1 if lines else 1, error
        return
    images: dict[str, list[tuple[int, Cells]]] = {}
    bad: list[_Bad] = []
    for line, cells in _rows(lines, start + 1, columns):
        if isinstance(cells, _Bad):
            bad.append(cells)
        else:
            images.setdefault(cells["image_index"], []).append((line, cells))
    # In the order of the file, by the line of each image's first row.
    yield from sorted(_chains(images, bad), key=lambda row: row[0])


def _chains(images: dict[str, list[tuple[int, Cells]]], bad: list[_Bad]) -> Iterator[Row]:
    """Yield the chain or the error of each image, and bad rows whose image is unknown."""
    costs: dict[str, Row] = {}  # image index to its first bad row
    beside = _CutBeside(images)
    for row in bad:
        index = row.image if row.image is not None else beside(row.line)
        if index is None:
            yield row.line, row.error
        else:
            costs.setdefault(index, (row.line, row.error))
    yield from costs.values()
    made = {index: _chain(index, own) for index, own in images.items() if index not in costs}
    yield from _without_cut(made)


class _CutBeside:
    """Search for the owner of a bad row: an adjacent image with fewer rows than the longest."""

    def __init__(self, images: Mapping[str, list[tuple[int, Cells]]]) -> None:
        longest = max((len(own) for own in images.values()), default=0)
        self._short = {index for index, own in images.items() if len(own) < longest}
        self._rows = sorted((line, index) for index, own in images.items() for line, _ in own)

    def __call__(self, line: int) -> str | None:
        place = bisect(self._rows, (line, ""))
        beside = self._rows[max(place - 1, 0) : place + 1]
        return next((index for _, index in beside if index in self._short), None)


def _without_cut(made: Mapping[str, Row]) -> Iterator[Row]:
    """Replace the few chains that are shorter than the others by errors: their rows are cut off."""
    turns = {
        index: len(record["instructions"])
        for index, (_, record) in made.items()
        if not isinstance(record, ChainError)
    }
    longest = max(turns.values(), default=0)
    short = {index for index, count in turns.items() if count < longest}
    for index, (line, record) in made.items():
        if index in short and len(short) * ALIKE <= len(turns):
            expected = f"expected rows of turns 1..{longest}, as of the other images"
            yield line, ChainError(f"turns: {expected}, got 1..{turns[index]}: the file is cut")
        else:
            yield line, record


def _rows(lines: list[str], start: int, columns: list[str]) -> Iterator[tuple[int, Cells | _Bad]]:
    """Yield row by row; consecutive bad lines without a legible image are reported once."""
    places, follows = [columns.index(x) for x in ("image_index", "turns")], False
    while start < len(lines):
        if not lines[start].strip(", \r\n"):
            start += 1
            continue
        line, (start, found) = start + 1, _row(lines, start, len(columns))
        if isinstance(found, list):
            yield line, dict(zip(columns, found, strict=True))
            follows = False
        else:
            index = _index(lines[line - 1], places)
            if index is not None or not follows:
                yield line, _Bad(line, found, index)
            follows = True


def _row(lines: list[str], start: int, width: int) -> tuple[int, list[str] | ChainError]:
    """Return the start of the next row and the cells of the row that begins at ``start``.

    A quoted cell may span lines. After a bad row, the next line is tried as a row of its own.
    """
    end, last = start, min(start + LINES_MAX, len(lines))
    while True:
        end += 1
        text = "".join(lines[start:end])
        try:
            cells = _cells(text)
        except _OpenQuoteError as open_quote:
            if end < last:
                continue
            return start + 1, open_quote
        except ChainError as malformed:
            return start + 1, malformed
        if len(cells) != width:
            return start + 1, ChainError(f"expected {width} cells, got {len(cells)}")
        bad = bad_byte(text)
        return end, cells if bad is None else ChainError(bad)


class _OpenQuoteError(ChainError):
    """Text that ends within a quoted cell."""


def _cells(text: str) -> list[str]:
    """Split the text of one row.

    Raises:
        ChainError: it is not a row of CSV; ``_OpenQuoteError`` if a quote is not closed.
    """
    try:
        (row,) = csv.reader([text], strict=True)
    except csv.Error as error:
        # csv has one error type; its text alone tells an open quote from malformed cells.
        kind = _OpenQuoteError if "unexpected end of data" in str(error) else ChainError
        raise kind(f"expected a row of CSV, got {shorten(text.strip())} ({error})") from error
    return row


def _index(text: str, places: list[int]) -> str | None:
    """Return the image index of a bad row, ``None`` unless index and turn are both numbers."""
    try:
        cells = next(csv.reader([text[:INDEX_MAX]]), [])
    except csv.Error:
        return None
    index, turn = (cells[place].strip() if place < len(cells) else "" for place in places)
    return index if index.isdecimal() and turn.isdecimal() else None


def _header(columns: list[str]) -> list[str]:
    if missing := [column for column in COLUMNS if column not in columns]:
        raise ChainError(f"expected a header with the column {missing[0]}, got {shorten(columns)}")
    if len(set(columns)) < len(columns):
        raise ChainError(f"expected each column once, got {shorten(columns)}")
    return columns


def _chain(index: str, rows: list[tuple[int, Cells]]) -> Row:
    """Return the chain of an image's rows; each turn's fields come from the row of that turn."""
    line, turns = rows[0][0], dict[int, Record]()
    try:
        for number, cells in rows:
            line = number
            turn = _turn(cells)
            state = _state(cells, turn)
            if turns.setdefault(turn, state) != state:
                raise ChainError(f"turns: expected one row of turn {turn}, got a different one")
        line = rows[0][0]
        if sorted(turns) != list(range(1, len(turns) + 1)):
            raise ChainError(f"turns: expected rows of turns 1, 2, ..., got {sorted(turns)}")
        states = [turns[turn] for turn in sorted(turns)]
        record = {field: [state[field] for state in states] for field in states[0]}
        if not known_types("task_type", record["task_types"]):
            record["task_type"] = record.pop("task_types")
        return line, join({"id": index, "image": _image(index)}, record)
    except ChainError as error:
        return line, error


def _turn(cells: Cells) -> int:
    if not re.fullmatch(r"\s*\d{1,6}\s*", cells["turns"]):
        raise ChainError(f"turns: expected the number of a turn, got {shorten(cells['turns'])}")
    return int(cells["turns"])


def _state(cells: Cells, turn: int) -> Record:
    """Return the fields of a row's own turn under native names; unknown columns are kept."""
    state: Record = {native: _last(column, cells, turn) for column, native in PREFIXES.items()}
    state["background_consistency"] = _boolean(cells["bg_consistency"])
    state |= {column: _list(column, cells) for column in OBJECTS}
    return join(state, {column: x for column, x in cells.items() if column not in COLUMNS})


def _last(column: str, cells: Cells, turn: int) -> object:
    """Return a turn's own entry, without stray quotes around it."""
    entries = _list(column, cells)
    if len(entries) != turn:
        raise ChainError(f"{column}: expected {turn} entries at turn {turn}, got {len(entries)}")
    return unquoted(entries[-1]) if isinstance(entries[-1], str) else entries[-1]


def _list(column: str, cells: Cells) -> list[Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarning: invalid escape sequence
            value = ast.literal_eval(cells[column].strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        got = shorten(cells[column])
        raise ChainError(f"{column}: expected a Python list, got {got}") from error
    if not isinstance(value, list):
        raise ChainError(f"{column}: expected a Python list, got {shorten(value)}")
    return value


def _boolean(cell: str) -> bool:
    if cell.strip().lower() not in BOOLEANS:
        raise ChainError(f"bg_consistency: expected True or False, got {cell!r}")
    return BOOLEANS[cell.strip().lower()]


def unquoted(text: str) -> str:
    """Remove one stray double quote at an end, or a pair of quotes around the whole.

    A single double quote at the end, after a digit, is an inch mark and is kept.

    Example:
        >>> unquoted('"Change the count of cup to 3"'), unquoted("Add text 'A' on the image")
        ('Change the count of cup to 3', "Add text 'A' on the image")
    """
    line = text.strip()
    if line.count('"') == 1:
        return line if re.search(r'\d"$', line) else line.strip('"').strip()
    for quote in "\"'":
        if line.count(quote) == 2 and line.startswith(quote) and line.endswith(quote):
            return line[1:-1].strip()
    return line


def _image(index: str) -> str:
    return f"{index}_input_raw.jpg"


def _encode(chain: Chain) -> str:
    record = _complete(chain)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    for turn in range(1, chain.turns + 1):
        prefixes = [list(record[field][:turn]) for field in PREFIXES.values()]
        objects = [list(record[field][turn - 1]) for field in OBJECTS]
        background = record["background_consistency"][turn - 1]
        writer.writerow([chain.id, turn, *prefixes, background, *objects])
    return table.getvalue()


def _complete(chain: Chain) -> Record:
    """Return the chain's record with every field that EdiVal needs.

    Raises:
        ChainError: a field is missing, or EdiVal's CSV cannot hold it.
    """
    if not chain.id.isdecimal():
        raise ChainError(f"id: expected a number, as EdiVal's image_index, got {chain.id!r}")
    name, expected = PurePosixPath(chain.reference).name, PurePosixPath(_image(chain.id))
    if name not in (expected.name, *(expected.with_suffix(x).name for x in SUFFIXES)):
        raise ChainError(f"image: expected a file {expected.name!r}, got {name!r}")
    record = chain.to_record()
    unknown = record.get("task_type")  # as read, with an edit type outside TASK_TYPES
    if "task_types" not in record and isinstance(unknown, list) and len(unknown) == chain.turns:
        record["task_types"] = unknown
    for field in (*PREFIXES.values(), "background_consistency", *OBJECTS):
        if field not in record:
            raise ChainError(f"{field}: expected this field, which EdiVal needs, got none")
    for field in PREFIXES.values():
        if quoted := [text for text in record[field] if unquoted(str(text)) != text]:
            raise ChainError(f"{field}: expected no quotes around text, got {quoted[0]!r}")
    return record


EDIVAL = Format(
    "edival",
    about="EdiVal-Bench's CSV, one row per image and turn; images are <id>_input_raw.jpg, or .png",
    loses="references, turn_unchanged_objects, unknown keys, the folder of the images",
    refuses="a missing field; an id that is no number; an image of another name",
    read=_read,
    encode=_encode,
    keys=frozenset(COLUMNS),
    suffixes=SUFFIXES,
    head=",".join(COLUMNS) + "\n",
)
