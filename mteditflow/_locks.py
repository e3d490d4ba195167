"""Locks that allow one writer at a time, with a record of the process that holds them."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from mteditflow._text import parse_json

UNKNOWN = "an unknown process"


class InUseError(OSError):
    """Another process writes to the same folder or file; the message names it."""


@contextmanager
def sole_writer(folder: Path, name: str = "") -> Iterator[str | None]:
    """Hold the lock of a folder, or of one file in it, inside the context.

    The operating system releases the lock whenever its process ends. A record beside it describes
    the process. A record that a killed process has left is stale; its description is yielded.

    Args:
        folder: folder of the lock, created if missing.
        name: name of the file; "" is the whole folder. Links are followed, so that the lock is
            beside the file that is written, whatever its name here.

    Returns:
        Description of a process that ended without releasing the lock; None if none did.

    Raises:
        InUseError: another process holds the lock.
        OSError: the lock cannot be created.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name, sole_writer(Path(name)) as stale:
        ...     print(stale)
        None
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = _record(Path(os.path.realpath(folder / name)), of_file=bool(name))
    lock = FileLock(record.with_suffix(".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InUseError(
            f"{folder / name}: expected no other writer, got {_holder(record) or UNKNOWN}; wait "
            "until it ends, or choose another place"
        ) from error
    try:
        # The lock is ours, so whoever wrote a record that is still there was killed.
        stale = _holder(record)
        record.write_text(json.dumps(_this_process()), encoding="utf-8")
        yield stale
    finally:
        record.unlink(missing_ok=True)
        lock.release()


def _record(place: Path, *, of_file: bool) -> Path:
    """Return the path of the record for the lock of a file, or of a folder."""
    if of_file:
        return place.with_name(f".{place.name}.writer.json")
    return place / ".folder.writer.json"


def _this_process() -> dict[str, str | int]:
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    program = Path(sys.argv[0]).name
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": now, "program": program}


def _holder(record: Path) -> str | None:
    """Return a description of the process in a record; None if there is no record."""
    try:
        who = parse_json(record.read_bytes())
        return f"process {who['pid']} ({who['program']}) on {who['host']}, since {who['since']}"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return UNKNOWN
