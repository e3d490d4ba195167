"""Steps of a check: commands, their time and result, and the table at the end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass
class Steps:
    """Steps that were done.

    Attributes:
        rows: what was done, with what, its result, and seconds.
        failed: whether any step failed.
    """

    rows: list[tuple[str, str, str, float]] = field(default_factory=list)
    failed: bool = False

    def run(
        self,
        name: str,
        command: Sequence[object],
        *,
        using: str = "",
        folder: Path = ROOT,
        env: dict[str, str] | None = None,
    ) -> str | None:
        """Run a command, print its output if it fails, and note the result.

        Args:
            name: of the row.
            command: program and arguments.
            using: versions or tool, for the row.
            folder: to run in.
            env: more variables.

        Returns:
            Standard output; None where the command failed.
        """
        print(f"... {name}", flush=True)
        start = time.monotonic()
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | (env or {})
        done = subprocess.run(
            [str(word) for word in command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        result = "passed" if done.returncode == 0 else f"FAILED ({done.returncode})"
        self.note(name, using, result, time.monotonic() - start)
        if done.returncode == 0:
            return done.stdout
        print(f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}{done.stderr[-6000:]}")
        return None

    def note(self, name: str, using: str, result: str, seconds: float = 0.0) -> None:
        """Add a row; a result that begins with FAILED fails the check."""
        self.rows.append((name, using, result, seconds))
        self.failed |= result.startswith("FAILED")

    def end(self) -> None:
        """Print the table and end the program.

        Raises:
            SystemExit: always, with 1 if a step failed.
        """
        print("\n| step | with | result | s |\n|---|---|---|---|")
        for name, using, result, seconds in self.rows:
            print(f"| {name} | {using} | {result} | {seconds:.0f} |")
        sys.exit(1 if self.failed else 0)


def fresh_environment(folder: Path, python: str = sys.executable) -> Path:
    """Make an empty virtual environment, and return its interpreter."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    return folder / "bin" / "python"


def megabytes(folder: Path) -> int:
    """Return the size of a folder's files in MB (10^6 bytes), links not followed."""
    files = (x for x in folder.rglob("*") if x.is_file() and not x.is_symlink())
    return round(sum(x.stat().st_size for x in files) / 1e6)


def pip(python: Path, *words: object) -> list[object]:
    """Return the command that installs into an environment."""
    return [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
