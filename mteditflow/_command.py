"""Typer commands whose usage errors take one line, and whose reader may close standard output."""

from __future__ import annotations

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

# typer may have a copy of click of its own, of whose exceptions it exports some alone.
USAGE = next(x for x in typer.BadParameter.__mro__ if x.__name__ == "ClickException")


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
