"""Programs in this process, and what it takes to call their end a refusal."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import typer
from typer.testing import CliRunner


class Ended(NamedTuple):
    """How a program ended."""

    code: int
    out: str
    err: str


def call(program: typer.Typer | Callable[[], None], words: Sequence[object]) -> Ended:
    """Call a program with the words of a command line; 0 where it returns."""
    given = list(map(str, words))
    if isinstance(program, typer.Typer):
        done = CliRunner().invoke(program, given)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
        return Ended(done.exit_code, done.stdout, done.stderr)
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["program", *given]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            program()
    except SystemExit as end:
        return Ended(end.code, out.getvalue(), err.getvalue())
    finally:
        sys.argv = before
    return Ended(0, out.getvalue(), err.getvalue())


def files(root: Path) -> dict[Path, int]:
    """Everything under a folder, with the times of its last changes."""
    return {x: x.stat().st_mtime_ns for x in root.rglob("*")}


def refusal(
    program: typer.Typer | Callable[[], None],
    words: Sequence[object],
    *,
    root: Path,
    scratch: Path,
) -> str:
    """The line of a refusal, by a program that wrote nothing.

    Args:
        program: a typer application, or a function that reads ``sys.argv``.
        words: of its command line; ROOT and OUT in them are places in the two folders.
        root: folder of inputs, which may not change.
        scratch: folder that must stay empty.
    """
    texts = [str(w).replace("ROOT", str(root)).replace("OUT", str(scratch / "out")) for w in words]
    before = files(root)
    ended = call(program, texts)
    assert ended.code == 2, ended
    assert ended.err.startswith("error: "), ended
    assert ended.err.count("\n") == 1, ended
    assert not ended.out
    assert files(root) == before
    assert not list(scratch.iterdir())
    return ended.err
