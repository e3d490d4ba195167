"""``metrics.jsonl``: one line of numbers per round; a kill at any moment leaves whole lines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from mteditflow._checks import check_count
from mteditflow._files import append_line, cut_half_line, write_atomically
from mteditflow._text import parse_json

ROUND = "round"  # name of the column with the round
# Prefixes of columns.
REWARD, SECONDS, LOST, UNMEASURED = "reward/", "seconds/", "lost/", "unmeasured/"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the rounds of a run, which may still be running.

    ``null`` becomes NaN. An incomplete last line, which a writer or a kill may leave, is ignored.

    Returns:
        One dictionary per round, in order; none if there is no file.

    Raises:
        ValueError: a line is no object of numbers with a round, or rounds do not increase, as after
            two processes have written. The message names file and line.
    """
    text = path.read_bytes() if path.exists() else b""
    lines = text[: text.rfind(b"\n") + 1].splitlines()
    rounds = [_parse(path, number, line) for number, line in enumerate(lines, start=1)]
    for number, (before, after) in enumerate(pairwise(rounds), start=2):
        if after[ROUND] <= before[ROUND]:
            raise ValueError(
                f"{path}:{number}: expected a round after {before[ROUND]}, that of the line "
                f"before, got {after[ROUND]}"
            )
    return rounds


class MetricsFile:
    r"""Writer of a metrics file; opening cuts off an incomplete last line that a kill has left.

    Args:
        path: path of the file, created with its folder if missing.

    Raises:
        ValueError: a line is damaged, as in ``read_metrics``.

    Example:
        >>> import tempfile
        >>> file = MetricsFile(Path(tempfile.mkdtemp()) / "metrics.jsonl")
        >>> file.append(1, {"reward/following": 0.5, "kl": math.nan})
        >>> file.append(2, {"reward/following": 0.75, "kl": 0.0})
        >>> file.rewind(2)
        >>> file.path.read_text()
        '{"round": 1, "reward/following": 0.5, "kl": null}\n'
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        cut_half_line(path)
        self._last = max((line[ROUND] for line in read_metrics(path)), default=-1)

    def append(self, round_number: int, numbers: Mapping[str, float]) -> None:
        """Write the line of a round in one piece, and wait until it is on the disk.

        Args:
            round_number: round after that of the last line.
            numbers: numbers by name; one that is not finite is written as ``null``.

        Raises:
            ValueError: there is a line of this round or a later one.
            OSError: the line cannot be written; the file is as it was.
        """
        check_count("round_number", round_number, low=0)
        if round_number <= self._last:
            raise ValueError(
                f"round_number: expected one after {int(self._last)}, the last in {self.path}, got "
                f"{round_number}; rewind first"
            )
        append_line(self.path, _line(round_number, numbers), sync=True)
        self._last = round_number

    def rewind(self, round_number: int) -> None:
        """Drop the lines of this round and of later ones, which will be repeated."""
        check_count("round_number", round_number, low=0)
        kept = [line for line in read_metrics(self.path) if line[ROUND] < round_number]
        text = b"".join(_line(int(line.pop(ROUND)), line) for line in kept)
        write_atomically(self.path, text)
        self._last = max((line[ROUND] for line in read_metrics(self.path)), default=-1)


def _line(round_number: int, numbers: Mapping[str, float]) -> bytes:
    finite = {name: float(x) if math.isfinite(x) else None for name, x in numbers.items()}
    return json.dumps({ROUND: round_number, **finite}).encode() + b"\n"


def _parse(path: Path, number: int, line: bytes) -> dict[str, float]:
    try:
        record = parse_json(line)
        numbers = {name: math.nan if x is None else float(x) for name, x in record.items()}
        return numbers | {ROUND: int(record[ROUND])}
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{path}:{number}: expected an object of numbers with a round, got {line[:80]!r}"
        ) from error
