"""Reader of a folder that ``datasets`` saved: Arrow files with one record per row.

Needs the extra ``mteditflow[arrow]``. A row is read as a line of JSON whose keys are the columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mteditflow.chains.formats.base import Format, Record, Row, attempt
from mteditflow.chains.record import ChainError, one_line

STATE = "state.json"  # in the folder of one split; lists its files
SPLITS = "dataset_dict.json"  # in the folder of several splits


def is_stored(folder: Path) -> bool:
    """Whether a path is a folder that ``datasets`` saved, of one split or of several."""
    return (folder / STATE).is_file() or (folder / SPLITS).is_file()


def stored_columns(folder: Path) -> frozenset[str]:
    """Return the columns of the data set.

    Raises:
        ChainError: the folder holds several splits, or is damaged; or the extra is missing.
        OSError: a file cannot be read.
    """
    return frozenset(name for path in _files(folder)[:1] for name in _columns(path))


def stored_rows(known: Format, folder: Path) -> Iterator[Row]:
    """Yield each row's number, from 1, with its native record or its error.

    Raises:
        ChainError: as in ``stored_columns``.
        OSError: a file cannot be read.
    """
    number = 0
    for path in _files(folder):
        for row in _records(path):
            number += 1
            yield number, attempt(_decode, known, row, number)


def _decode(known: Format, row: Record, number: int) -> Record:
    """Return the native record of a row, whose empty columns are dropped."""
    assert known.decode is not None
    record = {key: _plain(key, value) for key, value in row.items() if value is not None}
    one_line(record)  # refuses NaN and bytes, which no line of JSON could hold
    return known.decode(record, number)


def _plain(key: str, value: Any) -> Any:
    """Replace a cell of an image column by its path; return any other value unchanged."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        if value["bytes"] is not None:
            raise ChainError(
                f"{key}: expected the path of an image, got the image itself; write it to a file"
            )
        return value["path"]
    return value


def _files(folder: Path) -> list[Path]:
    try:
        if not (folder / STATE).is_file():
            splits = json.loads((folder / SPLITS).read_bytes())["splits"]
            raise ChainError(f"{folder}: expected the folder of one split, one of {splits}")
        state = json.loads((folder / STATE).read_bytes())
        return [folder / Path(each["filename"]).name for each in state["_data_files"]]
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ChainError(f"{folder}: expected a folder that datasets saved, got {error}") from error


def _columns(path: Path) -> list[str]:
    with _one_error(path), _stream(path) as reader:
        return list(reader.schema.names)


def _records(path: Path) -> Iterator[Record]:
    with _one_error(path), _stream(path) as reader:
        for batch in reader:
            batch.validate(full=True)  # reading a damaged batch could crash the process
            yield from batch.to_pylist()


def _stream(path: Path) -> Any:
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.OSFile(str(path)))


@contextmanager
def _one_error(path: Path) -> Iterator[None]:
    """Turn errors of pyarrow on a damaged file, and its absence, into ChainError."""
    try:
        import pyarrow
    except ImportError as error:
        raise ChainError(
            f"{path.parent}: a folder of datasets needs pyarrow: pip install 'mteditflow[arrow]'"
        ) from error
    try:
        yield
    except (pyarrow.ArrowException, MemoryError, OSError, UnicodeDecodeError) as error:
        raise ChainError(f"{path}: expected an Arrow file, got {error}") from error
