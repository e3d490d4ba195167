"""Standard output whose reader may leave early, as ``| head -1`` does, or whose disk is full."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Let the reader of standard output close it early; what is left to print is dropped.

    Raises:
        SystemExit: with 1, after one line, where what is printed goes to a disk that is full.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        broken = isinstance(error, BrokenPipeError)
        if not broken and not isinstance(error.__context__, BrokenPipeError):  # as rich ends it
            raise
        _drop_output()
        if isinstance(error.__context__, SystemExit):
            raise error.__context__ from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _drop_output()
        sys.stderr.write(f"error: standard output: {error.strerror}\n")
        raise SystemExit(1) from None


def _drop_output() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
