"""Bands of the early rounds, and an alarm for what leaves them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from mteditflow._checks import check_count, check_number

ROBUST = 1.4826  # median absolute deviation to standard deviation, of a normal distribution


class Reading(NamedTuple):
    """One statistic of a round's pictures.

    Attributes:
        value: mean over the pictures that were made.
        reference: mean over the pictures that they were made of; NaN where there are none, as for
            text to image or for variety inside groups.
        error: standard error of ``value - reference`` over chains of the round, or of ``value``
            without a reference; NaN where it is not known, as with one chain a round.
    """

    value: float
    reference: float = math.nan
    error: float = math.nan


class Band(NamedTuple):
    """Values that are no alarm, for a statistic of a round.

    Attributes:
        low: lower end, in units of the statistic.
        high: upper end.
    """

    low: float
    high: float


@dataclass(frozen=True)
class DriftAlarm:
    """A statistic that has left its band.

    Attributes:
        name: of the statistic.
        value: median over the last rounds.
        band: values that are no alarm, as they are in this round.
    """

    name: str
    value: float
    band: Band

    @property
    def below(self) -> bool:
        """Whether it lies below its band."""
        return self.value < self.band.low

    def __str__(self) -> str:
        """Return the alarm in words."""
        side = "below" if self.below else "above"
        low, high = (f"{end:.3g}" for end in self.band)
        return f"{self.name}: {self.value:.3g}, {side} its band of {low} to {high}"


class DriftWatch:
    r"""Watches statistics of a run's pictures, each against a band of its own early rounds.

    What is watched is :math:`\delta = v - r`, value minus reference, so that the content of a
    round's chains cancels; where there is no reference it is :math:`v`. From the first K rounds
    come the center :math:`m = \operatorname{median} \delta` and the spread :math:`s`, the larger of
    :math:`1.4826 \operatorname{median} |\delta - m|` and the median standard error. The band is
    :math:`m \pm \max(w s, \ell \operatorname{median} |v|)`, and with a reference it reaches to
    :math:`\delta = 0`: pictures that become more like those they were made of are no drift. An
    alarm is raised where the median of the last rounds is outside.

    Five rounds alone make a poor spread: over normal noise, 23% of series raise a false alarm
    within 100 rounds at the defaults where no standard error is known, and none of 1,000 where it
    is. Without standard errors ``baseline=10, width=12`` has 0.1%.

    Args:
        baseline: early rounds K that make the band, at least 3.
        width: half-width w of the band, in spreads, above 0.
        window: rounds whose median is compared.
        least: smallest half-width, as a share of the early values, at least 0.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> watch = DriftWatch(baseline=3, window=1)
        >>> [watch.check({"edges": Reading(0.5, error=0.02)}) for _ in range(3)], watch.bands
        ([[], [], []], {'edges': Band(low=0.4, high=0.6)})
        >>> [str(alarm) for alarm in watch.check({"edges": Reading(0.25)})]
        ['edges: 0.25, below its band of 0.4 to 0.6']
        >>> watch.check({"edges": Reading(0.25)})  # reported once, until it comes back
        []
    """

    def __init__(
        self, *, baseline: int = 5, width: float = 5.0, window: int = 3, least: float = 0.05
    ) -> None:
        check_count("baseline", baseline, low=3)
        check_number("width", width, low=0.0, open_low=True)
        check_count("window", window)
        check_number("least", least, low=0.0)
        self._baseline, self._width, self._window, self._least = baseline, width, window, least
        self._early: dict[str, list[Reading]] = {}
        self._recent: dict[str, list[Reading]] = {}
        self._outside: set[str] = set()

    @property
    def bands(self) -> dict[str, Band]:
        """Bands at the references of the last round, of the statistics whose early rounds are over.

        A band moves with the reference of each round; ``band_around`` places it at another one.
        """
        return {
            name: self.band_around(name, self._recent[name][-1].reference)
            for name, early in self._early.items()
            if len(early) == self._baseline
        }

    @property
    def outside(self) -> frozenset[str]:
        """Names of the statistics that are outside their bands now."""
        return frozenset(self._outside)

    def check(self, readings: Mapping[str, Reading]) -> list[DriftAlarm]:
        """Take in the statistics of a round; one whose value is not finite is left out.

        Args:
            readings: by name, such as "saturation/turn_3".

        Returns:
            Alarms of the statistics that have left their bands in this round.
        """
        alarms = []
        for name, reading in readings.items():
            if not math.isfinite(reading.value):
                continue
            early = self._early.setdefault(name, [])
            recent = [*self._recent.get(name, []), reading][-self._window :]
            self._recent[name] = recent
            if len(early) < self._baseline:
                early.append(reading)
                continue
            band = self.band_around(name, reading.reference)
            value = _level(reading.reference) + median(map(_change, recent))
            if band.low <= value <= band.high:
                self._outside.discard(name)
            elif name not in self._outside:
                self._outside.add(name)
                alarms.append(DriftAlarm(name, value, band))
        return alarms

    def band_around(self, name: str, reference: float = math.nan) -> Band:
        """Return the band of a statistic in a round whose reference pictures have this value.

        Args:
            name: of a statistic.
            reference: its value over the reference pictures; NaN where there are none.

        Raises:
            KeyError: its early rounds are not over.
        """
        early = self._early.get(name, [])
        if len(early) < self._baseline:
            raise KeyError(f"{name}: expected {self._baseline} early rounds, got {len(early)}")
        center = median(map(_change, early))
        spread = ROBUST * median(abs(_change(x) - center) for x in early)
        errors = [x.error for x in early if math.isfinite(x.error)]
        spread = max([spread, *([median(errors)] if errors else [])])
        half = max(self._width * spread, self._least * median(abs(x.value) for x in early))
        low, high = center - half, center + half
        if math.isfinite(reference):
            low, high = min(low, 0.0) + reference, max(high, 0.0) + reference
        return Band(low, high)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed watch needs; JSON can hold it."""
        kept = {"early": self._early, "recent": self._recent}
        return {
            **{k: {n: [_stored(r) for r in x] for n, x in v.items()} for k, v in kept.items()},
            "outside": sorted(self._outside),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another watch of the same arguments was."""
        self._early, self._recent = (
            {name: [_loaded(x) for x in rows] for name, rows in state[kind].items()}
            for kind in ("early", "recent")
        )
        self._outside = set(state["outside"])


def _level(reference: float) -> float:
    return reference if math.isfinite(reference) else 0.0


def _change(reading: Reading) -> float:
    """Return what is watched: value minus reference, or the value alone."""
    return reading.value - _level(reading.reference)


def _stored(reading: Reading) -> list[float | None]:
    return [x if math.isfinite(x) else None for x in reading]


def _loaded(numbers: list[float | None]) -> Reading:
    return Reading(*(math.nan if x is None else x for x in numbers))
