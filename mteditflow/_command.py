"""Typer commands with one-line usage errors, whose standard output may be closed early."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from mteditflow._exits import BAD_INPUT, refuse
from mteditflow._locks import sole_writer
from mteditflow._pipes import reader_may_leave

# typer may vendor its own copy of click, and does not export this base class of usage errors.
USAGE = next(x for x in typer.BadParameter.__mro__ if x.__name__ == "ClickException")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder inside the context; a stale lock gives a warning.

    Raises:
        InUseError: another process writes into the folder; the message names it.
        OSError: the lock cannot be made.
    """
    with sole_writer(folder) as stale:
        if stale is not None:
            sys.stderr.write(f"warning: {folder}: going on after {stale}, which was killed\n")
        yield


def _run(run: Callable[..., Any], *arguments: Any, standalone: bool, **options: Any) -> Any:
    """Run a command, and exit with its code; usage errors are printed in one line.

    If not ``standalone``, return the command's result and raise its errors, as click does.
    """
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
        _exit_for_usage(error)
    raise SystemExit(code if isinstance(code, int) else 0)


def _exit_for_usage(error: Any) -> NoReturn:
    """Exit with 2 for a usage error: with the help if no argument was given, else one line."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        raise SystemExit(BAD_INPUT) from None
    refuse(error.format_message())


def _unwrapped(help_text: str | None) -> str | None:
    r"""Join the lines of each paragraph, since typer keeps those after the first; code stays.

    Example:
        >>> _unwrapped("Train.\n\nIt takes\nhours.\n\n    train \\\n        --help")
        'Train.\n\nIt takes hours.\n\n    train \\\n        --help'
    """
    if help_text is None:
        return None
    parts = inspect.cleandoc(help_text).split("\n\n")
    return "\n\n".join(x if x.startswith((" ", "\b")) else " ".join(x.split()) for x in parts)


class OneLineGroup(TyperGroup):
    """Group of commands for ``typer.Typer(cls=...)``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for command in (self, *self.commands.values()):
            command.help = _unwrapped(command.help)

    def main(self, *arguments: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run the group; usage errors are printed in one line, with exit code 2."""
        return _run(super().main, *arguments, standalone=standalone_mode, **options)


class OneLineCommand(TyperCommand):
    """Single command for ``app.command(cls=...)``."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.help = _unwrapped(self.help)

    def main(self, *arguments: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run the command; usage errors are printed in one line, with exit code 2."""
        return _run(super().main, *arguments, standalone=standalone_mode, **options)


def program(main: Callable[..., None]) -> typer.Typer:
    """Return the application of a program with a single command."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=OneLineCommand)(main)
    return app
