"""Accepted answers on disk, by the content of the request."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import anyio.to_thread

from mteditflow.rewards.faults import AnswerError, Lost

T = TypeVar("T")

APPLICATION = 0x4D544546  # "MTEF", in the file's header
BUSY_TIMEOUT = 60.0  # s; for other processes' writes
SCHEMA = "CREATE TABLE answers (key TEXT PRIMARY KEY, value TEXT NOT NULL, digest TEXT NOT NULL)"


def request_key(request: Mapping[str, Any]) -> str:
    """Return the cache key of a request, a digest of its content.

    Args:
        request: JSON values: everything that determines the answer, so not the endpoint.

    Returns:
        sha256 of the canonical JSON, in hexadecimal.

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

    Writes are atomic, also when the process is killed. Every answer is checked against a digest
    when it is read: one that the disk has changed is an error, not another answer. The file must be
    on a local disk (SQLite's write-ahead log does not work across a network).

    Args:
        path: the file; created if missing, with its folders.

    Raises:
        ValueError: the file is damaged, is something else, or cannot be written.

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
        with self._errors():
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
            )
            try:
                _prepare(self._connection)
            except BaseException:
                self._connection.close()
                raise

    def get(self, key: str) -> str | None:
        """Return an answer, or ``None`` if there is none."""
        with self._access() as connection:
            query = "SELECT value, digest FROM answers WHERE key = ?"
            row = connection.execute(query, (key,)).fetchone()
            if row is None:
                return None
            value, digest = row
            if _digest(key, value) != digest:
                raise sqlite3.DatabaseError(f"the answer to {key} is not what was written")
            return str(value)

    def put(self, key: str, value: str) -> None:
        """Store an answer; one with the same key is replaced."""
        with self._access() as connection:
            row = (key, value, _digest(key, value))
            connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", row)

    def __len__(self) -> int:
        """Return the number of answers."""
        with self._access() as connection:
            return int(connection.execute("SELECT count(*) FROM answers").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> AnswerCache:
        """Return the cache."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self.close()

    @contextmanager
    def _access(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            yield self._connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError:  # it is closed
            raise
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path}: not usable as a cache of answers: {error}") from error


async def cached(
    cache: AnswerCache | None,
    request: Mapping[str, Any],
    *,
    read: Callable[[str], T],
    ask: Callable[[], Awaitable[tuple[str, T] | Lost]],
) -> T | Lost:
    """Return the cached answer to a request; otherwise ask, and store an accepted answer.

    Args:
        cache: ``None`` asks always.
        request: as in ``request_key``.
        read: parses the text of a cached answer; where it raises ``AnswerError``, ask again.
        ask: returns the text of an answer and its parsed value, or why there is none.
    """
    if cache is None:
        result = await ask()
        return result if isinstance(result, Lost) else result[1]
    key = await anyio.to_thread.run_sync(request_key, request)
    stored = await anyio.to_thread.run_sync(cache.get, key)
    if stored is not None:
        with suppress(AnswerError):  # accepted once, by a parser that was less strict
            return read(stored)
    result = await ask()
    if isinstance(result, Lost):
        return result
    text, value = result
    await anyio.to_thread.run_sync(cache.put, key, text)
    return value


def _prepare(connection: sqlite3.Connection) -> None:
    """Create the table in a new file; refuse another application's file without touching it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables == 0:
            connection.execute(SCHEMA)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
        elif application != APPLICATION:
            raise sqlite3.DatabaseError("it is another application's database")
    finally:
        connection.execute("COMMIT")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")


def _digest(key: str, value: str) -> str:
    return sha256(f"{key}\n{value}".encode()).hexdigest()
