"""Ends of a program in one line on standard error: exit code 2 for bad input, 1 for a failure."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from mteditflow._text import escape_controls

BAD_INPUT, FAILED = 2, 1  # exit codes
# Of the machine, not of what it was given: no space, no memory, too many files, a broken disk.
MACHINE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO,
)  # fmt: skip


def refuse(message: object) -> NoReturn:
    r"""Print one line and exit with 2.

    Raises:
        SystemExit: always.

    Example:
        >>> try:
        ...     refuse("seed: expected a number,\n got 'x'")
        ... except SystemExit as end:
        ...     end.code
        2
    """
    _end_with(BAD_INPUT, message)


def _end_with(code: int, message: object) -> NoReturn:
    sys.stderr.write(f"error: {escape_controls(' '.join(str(message).split()))}\n")
    raise SystemExit(code)


@contextmanager
def refusing(*more: type[Exception]) -> Iterator[None]:
    """Refuse what a file or an option made impossible, instead of a traceback.

    An error of the machine, such as a full disk, is a failure, and exits with 1.

    Args:
        *more: exceptions that are bad input, too, beside ``OSError`` and ``ValueError``.
    """
    kinds: tuple[type[Exception], ...] = (OSError, ValueError, *more)
    try:
        yield
    except kinds as error:
        of_machine = isinstance(error, OSError) and error.errno in MACHINE
        _end_with(FAILED if of_machine else BAD_INPUT, error)


@contextmanager
def naming_argument(name: str, *more: type[Exception]) -> Iterator[None]:
    """Begin what the block raises with the argument at fault; errors of the machine stay.

    Args:
        name: such as "FILE" or "--output".
        *more: exceptions that are the argument's fault, too, beside ``OSError``.

    Raises:
        ValueError: the block has raised one of them.

    Example:
        >>> try:
        ...     with naming_argument("FILE"):
        ...         open("no such file")
        ... except ValueError as error:
        ...     print(error)
        FILE: [Errno 2] No such file or directory: 'no such file'
    """
    kinds: tuple[type[Exception], ...] = (OSError, *more)
    try:
        yield
    except kinds as error:
        if isinstance(error, OSError) and error.errno in MACHINE:
            raise
        raise ValueError(f"{name}: {error}") from error


@contextmanager
def failing(*more: type[Exception]) -> Iterator[None]:
    """End with one line and exit code 1 where what was accepted fails while it runs.

    Args:
        *more: exceptions that are failures, too, beside ``OSError``.
    """
    kinds: tuple[type[Exception], ...] = (OSError, *more)
    try:
        yield
    except kinds as error:
        if isinstance(error, BrokenPipeError):
            raise  # of standard output, which is no failure
        _end_with(FAILED, error)
