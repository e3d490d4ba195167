"""A bar on a terminal, and now and then a plain line where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable

from tqdm import tqdm

LINE_EVERY = 30.0  # seconds between plain lines, at least


class Bar:
    """Progress of one thing; ``RunLog.bar`` makes them.

    Args:
        name: what is counted, such as "rollout".
        total: how many there will be.
        unit: of what, in the plural.
        done: how many there are already.
        shown: the bar on the terminal, if there is one.
        line: takes a plain line, at most one every 30 seconds.
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
        """Count what has been done."""
        self.done += count
        if self._shown is not None:
            self._shown.update(count)
        now = time.monotonic()
        if now - self._said >= LINE_EVERY:
            self._said = now
            self._line(self._text(now - self._started))

    def note(self, text: str) -> None:
        """Show a few words beside the bar, such as the last rewards."""
        self._note = text
        if self._shown is not None:
            self._shown.set_postfix_str(text)

    def _text(self, seconds: float) -> str:
        left = seconds * (self.total - self.done) / max(self.done - self._first, 1)
        taken, left = (tqdm.format_interval(max(x, 0)) for x in (seconds, left))
        note = f"; {self._note}" if self._note else ""
        return (
            f"{self.name}: {self.done} of {self.total} {self.unit}, {taken} gone, {left} left{note}"
        )
