"""Log of a run: metrics of every round, messages, progress bars, wall-clock time by phase."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from mteditflow._files import append_line, cut_half_line
from mteditflow.training.metrics_file import SECONDS, MetricsFile, read_metrics
from mteditflow.training.stopwatch import Stopwatch

LINE_EVERY = 30.0  # least seconds between plain lines of progress
# Counts come first: a narrow terminal cuts off the end.
BAR = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}] {bar}"
YELLOW, RESET = "\x1b[33m", "\x1b[0m"
_CONTROL = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # a link or a title for the terminal
    r"|\x1b\[[0-?]*[ -/]*[@-~]"  # a color, or a movement of the cursor
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


class RunLog:
    r"""Log of a run: metrics in ``metrics.jsonl``, messages in ``log.txt`` and on the terminal.

    Trackers such as TensorBoard belong to the caller: pass them the result of ``record``. Lines are
    written whole or not at all. A full disk raises ``OSError``, and the same folder can be used
    again once there is space.

    Args:
        folder: folder of the run, created if missing.
        console: whether messages, warnings and progress also go to standard error. Bars are drawn
            on a terminal only; elsewhere progress is a plain line, at most one every 30 seconds.
        main: whether this is rank 0; other ranks write and print nothing.

    Attributes:
        stopwatch: wall-clock time by phase, as in ``with log.stopwatch.phase("sampling")``.

    Example:
        >>> import tempfile
        >>> log = RunLog(Path(tempfile.mkdtemp()), console=False, main=True)
        >>> with log.bar("rollout", 2, unit="chains") as bar, log.stopwatch.phase("sampling"):
        ...     for _ in range(2):
        ...         bar.advance()
        >>> sorted(log.record(1, {"reward/following": 0.5}))
        ['reward/following', 'seconds/other', 'seconds/sampling']
        >>> log.warning("one group had equal rewards")
        >>> (log.folder / "log.txt").read_text()[20:]
        'warning: one group had equal rewards\n'
    """

    def __init__(self, folder: Path, *, console: bool, main: bool) -> None:
        self.folder, self.main = folder, main
        self.stopwatch = Stopwatch()
        self._on_console = console and main
        self._metrics = MetricsFile(folder / "metrics.jsonl") if main else None
        if main:
            cut_half_line(folder / "log.txt")

    @property
    def metrics(self) -> list[dict[str, float]]:
        """Return the numbers of all recorded rounds, read from the file, on any rank.

        Raises:
            ValueError: a line of the file is damaged, as in ``read_metrics``.
        """
        return read_metrics(self.folder / "metrics.jsonl")

    def record(self, round_number: int, numbers: Mapping[str, float]) -> dict[str, float]:
        """Write the numbers of a round, with the seconds by phase since the last round.

        Args:
            round_number: round after that of the last line; ``rewind`` first to repeat rounds.
            numbers: numbers by name, such as "reward/following"; a number that is not finite is
                written as ``null``.

        Returns:
            The numbers with "seconds/<phase>", flat, for ``Accelerator.log``.

        Raises:
            ValueError: there is a line of this round or of a later one.
            OSError: the line cannot be written; the file is as it was.
        """
        seconds = {f"{SECONDS}{name}": x for name, x in self.stopwatch.lap().items()}
        flat = dict(numbers) | seconds
        if self._metrics is not None:
            self._metrics.append(round_number, flat)
        return flat

    def rewind(self, round_number: int) -> None:
        """Drop the numbers of this round and of later ones, which a resumed run repeats."""
        if self._metrics is not None:
            self._metrics.rewind(round_number)

    def message(self, text: str, *, aloud: bool = True) -> None:
        """Log a message, plain text of any number of lines.

        Args:
            text: the message.
            aloud: whether it also goes to the terminal; False for what is printed there already.
        """
        self._write(text, aloud=aloud)

    def warning(self, text: str) -> None:
        """Log a warning."""
        self._write(f"warning: {text}", aloud=True, color=YELLOW)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Log Python's warnings, and records of libraries from WARNING on, inside the context."""
        handler, root = _ToLog(self), logging.getLogger()
        logging.captureWarnings(True)
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)
            logging.captureWarnings(False)

    @contextmanager
    def bar(self, name: str, total: int, *, unit: str, done: int = 0) -> Iterator[Bar]:
        """Show the progress of the block; bars may be nested.

        Args:
            name: name of the phase, such as "rollout".
            total: number of units in all.
            unit: the unit in the plural, such as "chains".
            done: number of units done before, in a resumed run.
        """
        shown = None
        if self._on_console and sys.stderr.isatty():
            shown = tqdm(
                desc=name,
                total=total,
                bar_format=BAR,
                initial=done,
                leave=None,
                dynamic_ncols=True,
            )
        try:
            yield Bar(name, total, unit, done=done, shown=shown, line=self._progress)
        finally:
            if shown is not None:
                shown.close()

    def _progress(self, text: str) -> None:
        """Log a line of progress; on a terminal the bar shows it instead."""
        self._write(text, aloud=not sys.stderr.isatty())

    def _write(self, text: str, *, aloud: bool, color: str = "") -> None:
        if not self.main:
            return
        now = datetime.now().isoformat(sep=" ", timespec="seconds")
        stamped = "".join(f"{now} {line}\n" for line in _CONTROL.sub("", text).split("\n"))
        # The console first: the message may be about the full disk on which the file write fails.
        if self._on_console and aloud:
            colored = color if sys.stderr.isatty() else ""
            # A closed terminal must not end the run.
            with suppress(OSError), tqdm.external_write_mode(file=sys.stderr):
                sys.stderr.write(f"{colored}{stamped}{RESET if colored else ''}")
                sys.stderr.flush()
        append_line(self.folder / "log.txt", stamped.encode(errors="replace"), sync=False)


class _ToLog(logging.Handler):
    """Handler that passes log records of libraries on to the log of a run."""

    def __init__(self, log: RunLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a full disk must not raise inside the library that logs
            self._log.warning(f"{record.name}: {record.getMessage()}")


class Bar:
    """Progress of one phase; ``RunLog.bar`` returns it.

    Args:
        name: name of the phase, such as "rollout".
        total: number of units in all.
        unit: the unit in the plural, such as "chains".
        done: number of units done before.
        shown: the bar on the terminal; None: there is none.
        line: receives a plain line of progress, at most one every 30 seconds.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        *,
        done: int,
        shown: tqdm | None,
        line: Callable[[str], None],
    ) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self._first, self._note = done, ""
        self._shown, self._line = shown, line
        self._started = self._said = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """Add to the units done; ``count=0`` only writes a line of progress if one is due."""
        self.done += count
        if self._shown is not None:
            self._shown.update(count)
        now = time.monotonic()
        if now - self._said >= LINE_EVERY:
            self._said = now
            self._line(self._text(now - self._started))

    def note(self, text: str) -> None:
        """Show a short note beside the bar, such as the last rewards."""
        self._note = text
        if self._shown is not None:
            self._shown.set_postfix_str(text)

    def _text(self, seconds: float) -> str:
        # The rate is that of this process: units of the run before a resume took none of its time.
        done, taken = self.done - self._first, tqdm.format_interval(seconds)
        left = seconds * max(self.total - self.done, 0) / done if done > 0 else None
        ahead = "" if left is None else f", {tqdm.format_interval(left)} left"
        note = f"; {self._note}" if self._note else ""
        return f"{self.name}: {self.done} of {self.total} {self.unit}, {taken} gone{ahead}{note}"
