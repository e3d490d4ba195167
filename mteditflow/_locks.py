"""One writer at a time: locks on what long programs write, which name who holds them."""

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

UNKNOWN = "a process that is not known"


class InUseError(OSError):
    """Another process writes the same folder or file; the message names it."""


@contextmanager
def sole_writer(folder: Path, name: str = "") -> Iterator[str | None]:
    """Hold the lock of a folder, or of one file in it, while the block lasts.

    The operating system releases the lock when its process ends, however that ends. Who holds it
    is written beside it. A record left by a process that was killed is stale, and returned.

    Args:
        folder: made if missing; the lock lies in it.
        name: of the file; "" is the whole folder. Links are followed: the lock lies beside the
            file that is written, whatever it is called here.

    Returns:
        The process that ended without releasing the lock, in words; None if none did.

    Raises:
        InUseError: another process holds it.
        OSError: the lock cannot be made.

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
        stale = _holder(record)
        record.write_text(json.dumps(_this_process()), encoding="utf-8")
        yield stale
    finally:
        record.unlink(missing_ok=True)
        lock.release()


def _record(place: Path, *, of_file: bool) -> Path:
    """Where it is written who holds the lock of a file, or of a folder."""
    if of_file:
        return place.with_name(f".{place.name}.writer.json")
    return place / ".folder.writer.json"


def _this_process() -> dict[str, str | int]:
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    program = Path(sys.argv[0]).name
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": now, "program": program}


def _holder(record: Path) -> str | None:
    """Return who holds a lock, or held it last and did not release it, in words."""
    try:
        who = parse_json(record.read_bytes())
        return f"process {who['pid']} ({who['program']}) on {who['host']}, since {who['since']}"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return UNKNOWN
