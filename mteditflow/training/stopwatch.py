"""Wall-clock time of a run by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

OTHER = "other"


class Stopwatch:
    """Wall-clock seconds by named phase, which add up to the elapsed time.

    A phase inside another one pauses the outer one. Time outside every phase is "other". A GPU runs
    asynchronously, so end a phase where its result is read.

    Example:
        >>> watch = Stopwatch()
        >>> with watch.phase("sampling"):
        ...     with watch.phase("scoring"):
        ...         time.sleep(0.02)
        >>> seconds = watch.lap()
        >>> sorted(seconds), seconds["scoring"] > 0.01 > seconds["sampling"]
        (['other', 'sampling', 'scoring'], True)
        >>> watch.lap()["other"] < 0.01
        True
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._mark = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block as the phase ``name``."""
        self._credit()
        self._open.append(name)
        try:
            yield
        finally:
            self._credit()
            self._open.pop()

    def read(self) -> dict[str, float]:
        """Return the seconds by phase since the last lap, including an open phase up to now."""
        self._credit()
        return dict(self._seconds)

    def lap(self) -> dict[str, float]:
        """Return the seconds by phase as ``read`` does, and reset them to zero."""
        seconds = self.read()
        self._seconds = {}
        return seconds

    def _credit(self) -> None:
        """Add the time since the last call to the innermost phase."""
        now, name = time.monotonic(), self._open[-1] if self._open else OTHER
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the share of each phase, the longest first; shares add up to 1.

    Example:
        >>> shares({"sampling": 6.0, "updating": 18.0})
        {'updating': 0.75, 'sampling': 0.25}
    """
    total = sum(seconds.values()) or 1.0
    ranked = sorted(seconds.items(), key=lambda item: -item[1])
    return {name: value / total for name, value in ranked}
