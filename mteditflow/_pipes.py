"""Standard output that a reader may close early, as ``| head -1`` does, or whose disk is full."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Allow the reader of standard output to close it early; the rest of the output is dropped.

    Raises:
        SystemExit: with code 1 after one line, if standard output goes to a disk that is full.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        broken = isinstance(error, BrokenPipeError)
        # rich turns a BrokenPipeError into a SystemExit with code 1, which would be a failure.
        if not broken and not isinstance(error.__context__, BrokenPipeError):
            raise
        _drop_output()
        # The flush failed while the program was exiting: keep its own exit code.
        if isinstance(error.__context__, SystemExit):
            raise error.__context__ from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _drop_output()
        sys.stderr.write(f"error: standard output: {error.strerror}\n")
        raise SystemExit(1) from None


def _drop_output() -> None:
    """Redirect standard output to the null device, since Python flushes it again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
