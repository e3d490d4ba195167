"""Exits of a program with one line on standard error: code 2 for bad input, 1 for a failure."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from mteditflow._text import escape_controls

BAD_INPUT, FAILED = 2, 1  # exit codes
# Faults of the machine, not of the input: no space, no memory, too many open files, a broken disk.
MACHINE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO,
)  # fmt: skip


def refuse(message: object) -> NoReturn:
    r"""Print a message as one line on standard error, and exit with 2.

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
    """Exit with one line and code 2 if the block raises an error of a file or an option.

    An error of the machine, such as a full disk, is a failure, and exits with 1.

    Args:
        *more: exceptions that also count as bad input, besides ``OSError`` and ``ValueError``.

    Raises:
        SystemExit: in place of such an error.
    """
    kinds: tuple[type[Exception], ...] = (OSError, ValueError, *more)
    try:
        yield
    except kinds as error:
        of_machine = isinstance(error, OSError) and error.errno in MACHINE
        _end_with(FAILED if of_machine else BAD_INPUT, error)


@contextmanager
def naming_argument(name: str, *more: type[Exception]) -> Iterator[None]:
    """Prefix errors of the block with the argument at fault; errors of the machine are unchanged.

    Args:
        name: name of the argument, such as "FILE" or "--output".
        *more: exceptions that are also the argument's fault, besides ``OSError``.

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
    """Exit with one line and code 1 if the block fails, after its input has been accepted.

    Args:
        *more: exceptions that also count as failures, besides ``OSError``.

    Raises:
        SystemExit: in place of such an error.
        BrokenPipeError: standard output was closed, which is no failure.
    """
    kinds: tuple[type[Exception], ...] = (OSError, *more)
    try:
        yield
    except kinds as error:
        if isinstance(error, BrokenPipeError):
            raise  # standard output was closed; ``reader_may_leave`` handles it
        _end_with(FAILED, error)
