"""Programs in processes of their own, forked from one that has imported the heavy libraries.

A trainer needs longer to import torch, transformers and diffusers than for its rounds, and the
suite starts dozens. A forked process is killed, signaled and waited for as any other; a few tests
start the interpreter anew, as a user does.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
START_METHOD = "forkserver"  # a fork of this process, with its threads, may hang
CONTEXT = multiprocessing.get_context(START_METHOD)
CONTEXT.set_forkserver_preload(["tests.preloaded"])


class Process:
    """A Python program with the interface of ``subprocess.Popen``.

    Args:
        program: what stands after ``python``: a file, "-m" and a module, or "-c" and code; then
            arguments.
        env: its environment; None means that of this process.
        output: file of its standard output; None means that it is thrown away.
        errors: file of its standard error, likewise.
        drawn: whether a run in it draws its pictures.
    """

    def __init__(
        self,
        program: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        output: Path | str | None = None,
        errors: Path | str | None = None,
        drawn: bool = True,
    ) -> None:
        self.args = [str(word) for word in program]
        files = [str(file or os.devnull) for file in (output, errors)]
        given = (self.args, dict(os.environ if env is None else env), files, drawn)
        self._process = CONTEXT.Process(target=_become, args=given, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """Exit code, minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it ends, and return the exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Process:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until it ends."""
        self.wait()


class Ended(NamedTuple):
    """How a program ended."""

    code: int
    out: str
    err: str


def ended(program: Sequence[str], folder: Path) -> Ended:
    """Wait for the end of a program; the folder gets the files of its output."""
    output, errors = folder / "output", folder / "errors"
    code = Process(program, output=output, errors=errors).wait(300)
    return Ended(code, output.read_text(), errors.read_text())


def free_port() -> int:
    """A port of the loopback that nobody uses at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _become(program: list[str], env: dict[str, str], files: list[str], drawn: bool) -> None:
    """Be a program, from its first line to its exit functions."""
    for number, name in zip((1, 2), files, strict=True):
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    if not drawn:
        from tests.undrawn import undraw_for_good

        undraw_for_good()
    try:
        if program[0] == "-m":
            sys.argv = program[1:]
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        elif program[0] == "-c":
            sys.argv = ["-c", *program[2:]]
            exec(compile(program[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = program
            sys.path.insert(0, str(Path(program[0]).parent))
            runpy.run_path(program[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
