"""EdiVal-Bench's CSV: one row per image and cumulative prefix, lists as Python literals."""

from __future__ import annotations

import ast
import codecs
import csv
import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from mteditflow.chains.formats.base import OBJECTS, Format, Record, Row, join, known_types
from mteditflow.chains.record import Chain, ChainError, shorten

# Columns with one entry for each turn so far, and what the native record calls them.
PREFIXES = {
    "task_type": "task_types",
    "instructions": "instructions",
    "format_instructions": "formatted_instructions",
}
COLUMNS = ("image_index", "turns", *PREFIXES, "bg_consistency", *OBJECTS)
BOOLEANS = {"true": True, "false": False}

Cells = Mapping[str, str]


def _read(file: BinaryIO) -> Iterator[Row]:
    """Gather the rows of each image, in whatever order they come, then make its chain."""
    images: dict[str, list[tuple[int, Cells]]] = {}
    reader = csv.reader(codecs.iterdecode(file, "utf-8"), strict=True)
    rows = (row for row in reader if "".join(row).strip())
    line = 1
    try:
        columns = _header(next(rows, []))
        line = reader.line_num + 1
        for row in rows:
            if len(row) == len(columns):
                cells = dict(zip(columns, row, strict=True))
                images.setdefault(cells["image_index"], []).append((line, cells))
            else:
                yield line, ChainError(f"expected {len(columns)} cells, got {len(row)}")
            line = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError, ChainError) as error:
        yield line, ChainError(str(error))
    for index, own in images.items():
        yield _chain(index, own)


def _header(columns: list[str]) -> list[str]:
    if missing := [column for column in COLUMNS if column not in columns]:
        raise ChainError(f"expected a header with the column {missing[0]}, got {shorten(columns)}")
    if len(set(columns)) < len(columns):
        raise ChainError(f"expected each column once, got {shorten(columns)}")
    return columns


def _chain(index: str, rows: list[tuple[int, Cells]]) -> Row:
    """Make one chain of the rows of an image; the row of a turn is the authority on that turn."""
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
    if not cells["turns"].strip().isdecimal():
        raise ChainError(f"turns: expected the number of a turn, got {cells['turns']!r}")
    return int(cells["turns"])


def _state(cells: Cells, turn: int) -> Record:
    """Fields of a row's own turn, under native names; unknown columns are kept."""
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
            warnings.simplefilter("ignore")  # of a backslash that escapes nothing
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

    Example:
        >>> unquoted('"Change the count of cup to 3"'), unquoted("Add text 'A' on the image")
        ('Change the count of cup to 3', "Add text 'A' on the image")
    """
    line = text.strip()
    if line.count('"') == 1:
        return line.strip('"').strip()
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
    """Return the chain's record if EdiVal can hold it."""
    if not chain.id.isdecimal():
        raise ChainError(f"id: expected a number, as EdiVal's image_index, got {chain.id!r}")
    if (name := PurePosixPath(chain.image).name) != _image(chain.id):
        raise ChainError(f"image: expected a file {_image(chain.id)!r}, got {name!r}")
    record = chain.to_record()
    unknown = record.get("task_type")  # where an edit type is none of the nine
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
    about="EdiVal-Bench's CSV, one row per image and turn; images are <id>_input_raw.jpg",
    loses="turn_unchanged_objects, unknown keys, the folder of the images",
    refuses="a missing field; an id that is no number; an image of another name",
    read=_read,
    encode=_encode,
    head=",".join(COLUMNS) + "\n",
)
