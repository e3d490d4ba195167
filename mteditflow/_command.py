"""Commands that end with one line on standard error: exit code 2 for bad input, 1 for a failure.

Standard output may be closed by its reader, as ``| head -1`` does, without ending a command.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from mteditflow._locks import sole_writer
from mteditflow._pipes import reader_may_leave
from mteditflow._text import escape_controls

BAD_INPUT, FAILED = 2, 1  # exit codes
# typer may have a copy of click of its own, of whose exceptions it exports some alone.
USAGE = next(x for x in typer.BadParameter.__mro__ if x.__name__ == "ClickException")


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

    Args:
        *more: exceptions that are bad input, too, beside ``OSError`` and ``ValueError``.
    """
    kinds: tuple[type[Exception], ...] = (OSError, ValueError, *more)
    try:
        yield
    except kinds as error:
        refuse(error)


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


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder while the block lasts; a stale one is a warning.

    Raises:
        InUseError: another process writes into the folder; the message names it.
        OSError: the lock cannot be made.
    """
    with sole_writer(folder) as stale:
        if stale is not None:
            sys.stderr.write(f"warning: {folder}: going on after {stale}, which was killed\n")
        yield


def _ended(run: Callable[..., Any], *arguments: Any, standalone: bool, **options: Any) -> Any:
    """Run a command; usage errors take one line, help for a bare command stays as it is."""
    if not standalone:
        return run(*arguments, standalone_mode=False, **options)
    code = 0
    try:
        with reader_may_leave():
            code = run(*arguments, standalone_mode=False, **options)
    except typer.Abort:
        sys.stderr.write("stopped\n")
        raise SystemExit(1) from None
    except Exception as error:
        if not isinstance(error, USAGE):
            raise
        _end(error)
    raise SystemExit(code if isinstance(code, int) else 0)


def _end(error: Any) -> NoReturn:
    """End for a usage error: with the help where nothing was given, else with one line."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        raise SystemExit(BAD_INPUT) from None
    refuse(error.format_message())


class OneLineGroup(TyperGroup):
    """Group of commands for ``typer.Typer(cls=...)``."""

    def main(self, *arguments: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run; usage errors take one line and exit with 2."""
        return _ended(super().main, *arguments, standalone=standalone_mode, **options)


class OneLineCommand(TyperCommand):
    """Single command for ``app.command(cls=...)``."""

    def main(self, *arguments: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run; usage errors take one line and exit with 2."""
        return _ended(super().main, *arguments, standalone=standalone_mode, **options)


def program(main: Callable[..., None]) -> typer.Typer:
    """Return the application of a program of one command."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=OneLineCommand)(main)
    return app
