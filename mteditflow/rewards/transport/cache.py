"""Cache of accepted answers on disk, by the content of the request."""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import anyio.to_thread
from pydantic import ValidationError

from mteditflow._text import escape_controls
from mteditflow.rewards.faults import AnswerError, Lost

T = TypeVar("T")

LOG = logging.getLogger(__name__)
APPLICATION = 0x4D544546  # "MTEF", the application id in the file's header
APPLICATION_PLACE = slice(68, 72)  # bytes of the application id in SQLite's file format
PAGE = 4096  # bytes; the first page holds the header and the schema
BUSY_TIMEOUT = 20.0  # s, longest wait for writes of other processes
REST = 60.0  # s without another attempt after the file was locked for BUSY_TIMEOUT
FAILURES = (sqlite3.DatabaseError, UnicodeDecodeError)
SCHEMA = "CREATE TABLE answers (key TEXT PRIMARY KEY, value TEXT NOT NULL, digest TEXT NOT NULL)"


def request_key(request: Mapping[str, Any]) -> str:
    """Return the cache key of a request, a digest of its content.

    Args:
        request: JSON values that determine the answer; the endpoint is not one of them.

    Returns:
        SHA-256 of the canonical JSON, in hexadecimal.

    Raises:
        ValueError: a number is not finite.
        TypeError: a value is not JSON.

    Example:
        >>> request_key({"seed": 0, "model": "m"}) == request_key({"model": "m", "seed": 0})
        True
    """
    text = json.dumps(request, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode()).hexdigest()


class AnswerCache:
    """Answers by key in one SQLite file, which several processes and threads may share.

    A failure of the cache is a miss: if the file is damaged, full, locked or read-only, ``get``
    returns nothing, ``put`` stores nothing, and the log has one warning for each of the two. Writes
    are atomic, even if the process is killed. Every answer is verified by a digest when it is read,
    so a corrupted one is a miss and never another answer; the next ``put`` of its key replaces it.
    The file must be on a local disk (SQLite's write-ahead log does not work across a network).

    Args:
        path: path of the file; it is created if missing, with its folders.

    Raises:
        ValueError: the file cannot be opened, or is not a cache; it is left unchanged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, AnswerCache(f"{folder}/answers") as cache:
        ...     cache.put("key", "an answer")
        ...     cache.get("key"), cache.get("another key"), len(cache)
        ('an answer', None, 1)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = Lock()
        self._failures: Counter[str] = Counter()
        self._rests_until: dict[str, float] = {}
        self._prepared = False
        try:
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
            )
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from error
        try:
            self._prepare()
        except FAILURES as error:
            # A damaged cache must not stop a run, but another file must never be written to.
            if not _is_ours(self.path):
                self._connection.close()
                raise self._unusable(error) from error
            self._failed("written", error)

    @property
    def failures(self) -> int:
        """Number of failed reads and writes of the file."""
        return self._failures.total()

    def get(self, key: str) -> str | None:
        """Return an answer, or ``None`` if there is none or it is unreadable."""

        def read(connection: sqlite3.Connection) -> str | None:
            query = "SELECT value, digest FROM answers WHERE key = ?"
            row = connection.execute(query, (key,)).fetchone()
            if row is None:
                return None
            value, digest = row
            if not isinstance(value, str) or _digest(key, value) != digest:
                raise sqlite3.DatabaseError(f"the answer to {key} is not what was written")
            return value

        return self._access("read", read, otherwise=None)

    def put(self, key: str, value: str) -> None:
        """Store an answer if the file is writable; replace one with the same key."""

        def write(connection: sqlite3.Connection) -> None:
            self._prepare()
            row = (key, value, _digest(key, value))
            connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", row)

        self._access("written", write, otherwise=None)

    def __len__(self) -> int:
        """Return the number of answers, damaged ones included; 0 if the file is unreadable."""

        def count(connection: sqlite3.Connection) -> int:
            return int(connection.execute("SELECT count(*) FROM answers").fetchone()[0])

        return self._access("read", count, otherwise=0)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()
        if self.failures > 1:
            counts = ", ".join(f"{count} not {how}" for how, count in self._failures.items())
            LOG.warning("%s: answers that the cache failed on: %s", self.path, counts)
            self._failures.clear()

    def __enter__(self) -> AnswerCache:
        """Return the cache."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self.close()

    def _access(self, how: str, action: Callable[[sqlite3.Connection], T], *, otherwise: T) -> T:
        """Return the result of an action on the connection, ``otherwise`` if the file fails."""
        with self._lock:
            if time.monotonic() < self._rests_until.get(how, -math.inf):
                self._failures[how] += 1
                return otherwise
            try:
                return action(self._connection)
            except sqlite3.ProgrammingError:  # the cache is closed: a bug of the caller
                raise
            except FAILURES as error:
                self._failed(how, error)
                return otherwise

    def _failed(self, how: str, error: Exception) -> None:
        self._failures[how] += 1
        # Each access to a locked file waits for BUSY_TIMEOUT; a pause spares the next ones that.
        if "locked" in str(error):
            self._rests_until[how] = time.monotonic() + REST
        if self._failures[how] == 1:
            came = escape_controls(str(error))
            LOG.warning("%s: answers cannot be %s, continuing without: %s", self.path, how, came)

    def _prepare(self) -> None:
        if not self._prepared:
            _prepare(self._connection)
            self._prepared = True

    def _unusable(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path}: not usable as a cache of answers: {error}")


async def cached(
    cache: AnswerCache | None,
    request: Mapping[str, Any],
    *,
    read: Callable[[str], T],
    ask: Callable[[], Awaitable[tuple[str, T] | Lost]],
) -> T | Lost:
    """Return the cached answer to a request; else call ``ask`` and store an accepted answer.

    Args:
        cache: the cache; ``None`` always calls ``ask``.
        request: as in ``request_key``.
        read: parser of the text of a cached answer; if it raises ``AnswerError`` or pydantic's
            ``ValidationError``, the cached answer is ignored.
        ask: function that returns the text of an answer and its parsed value, or ``Lost``.
    """
    if cache is None:
        result = await ask()
        return result if isinstance(result, Lost) else result[1]
    key = await anyio.to_thread.run_sync(request_key, request)
    stored = await anyio.to_thread.run_sync(cache.get, key)
    if stored is not None:
        # An older version may have accepted an answer that the present parser refuses.
        with suppress(AnswerError, ValidationError):
            return read(stored)
    result = await ask()
    if isinstance(result, Lost):
        return result
    text, value = result
    await anyio.to_thread.run_sync(cache.put, key, text)
    return value


def _prepare(connection: sqlite3.Connection) -> None:
    """Create the table in a new file; refuse another application's file and leave it unchanged."""
    # The write lock comes before the check, or two processes could both create the table.
    connection.execute("BEGIN IMMEDIATE")
    try:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables == 0:
            connection.execute(SCHEMA)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
        elif application != APPLICATION:
            raise sqlite3.DatabaseError("it is another application's database")
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    # Not within a transaction, where SQLite cannot switch to the write-ahead log.
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")  # safe with WAL, without a sync per answer


def _is_ours(path: Path) -> bool:
    """Return whether a file on which SQLite fails is a damaged cache, or empty.

    The application id or the schema on its first page identifies it, unless both are damaged.
    """
    try:
        with path.open("rb") as file:
            page = file.read(PAGE)
    except OSError:
        return False
    mark = page[APPLICATION_PLACE] == APPLICATION.to_bytes(4, "big")
    return not page or mark or SCHEMA.encode() in page


def _digest(key: str, value: str) -> str:
    return sha256(f"{key}\n{value}".encode()).hexdigest()
