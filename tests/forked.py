"""Programs that an example starts with ``subprocess``, forked from one that has imported much."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from signal import SIGTERM
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace

import pytest

from tests.processes import Process


class Forked(Process):
    """``subprocess.Popen`` of a Python program, its output and errors in pipes or thrown away.

    Args:
        command: "python", as a path, and what stands after it.
        env: its environment.
    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, **_: object
    ) -> None:
        self._left = ExitStack()
        folder = Path(self._left.enter_context(TemporaryDirectory()))
        self._files = [folder / "output", folder / "errors"]
        for file in self._files:
            file.touch()
        output, errors = self._files
        super().__init__(command[1:], env=env, output=output, errors=errors, drawn=False)

    @property
    def stdout(self) -> Forked:
        """Stream of its output: itself."""
        return self

    def readline(self) -> str:
        """Return the first line of its output, once it is there; nothing if it ends before."""
        lines: list[str] = []
        while not lines or not lines[0].endswith("\n"):
            ended = self.poll() is not None
            lines = self._files[0].read_text().splitlines(keepends=True)
            if ended:
                break
            time.sleep(0.02)
        return lines[0] if lines else ""

    def communicate(self) -> tuple[str, str]:
        """Wait until it ends; return its output and its errors."""
        self.wait()
        output, errors = (file.read_text() for file in self._files)
        return output, errors

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(SIGTERM)

    def __exit__(self, *_: object) -> None:
        """Wait until it ends."""
        self.wait()
        self._left.close()


def run(command: Sequence[str], **given: object) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` of a Python program."""
    with Forked(command, **given) as process:
        output, errors = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


@contextmanager
def forking(*modules: ModuleType) -> Iterator[None]:
    """Let modules fork the programs that they would start anew."""
    fork = SimpleNamespace(Popen=Forked, run=run, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "subprocess", fork)
        yield
