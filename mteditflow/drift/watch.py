"""Bands from the early rounds of a run, and an alarm for statistics that leave them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from mteditflow._checks import check_count, check_number

ROBUST = 1.4826  # std over median absolute deviation of a normal distribution


class Reading(NamedTuple):
    """Value of one statistic in a round.

    Attributes:
        value: mean over the generated images.
        reference: mean over the images that they edit; NaN if there are none, as for text to image
            or for diversity within groups.
        error: standard error of ``value - reference`` over chains of the round, or of ``value``
            without a reference; NaN if unknown, as with one chain per round.
    """

    value: float
    reference: float = math.nan
    error: float = math.nan


class Band(NamedTuple):
    """Range of a statistic in a round that raises no alarm.

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
        name: name of the statistic.
        value: median change over the last rounds, plus this round's reference if there is one.
        band: range without an alarm in this round.
    """

    name: str
    value: float
    band: Band

    @property
    def below(self) -> bool:
        """Whether the value lies below its band."""
        return self.value < self.band.low

    def __str__(self) -> str:
        """Return the alarm as a sentence."""
        side = "below" if self.below else "above"
        low, high = (f"{end:.3g}" for end in self.band)
        return f"{self.name}: {self.value:.3g}, {side} its band of {low} to {high}"


class DriftWatch:
    r"""Monitor of image statistics of a run, each against a band from its own early rounds.

    The monitored quantity is :math:`\delta = v - r`, value minus reference, so that the content of
    a round's chains cancels. Without a reference it is :math:`v`. The first K rounds give the
    center :math:`m = \operatorname{median} \delta` and the spread :math:`s`, the larger of
    :math:`1.4826 \operatorname{median} |\delta - m|` and the median standard error. The band is
    :math:`m \pm \max(w s, \ell \operatorname{median} |v|)`. With a reference it is extended to
    include :math:`\delta = 0`, because images that become more similar to their inputs are no
    drift. An alarm is raised if the median of the last rounds lies outside.

    Five rounds alone estimate the spread poorly. On normal noise, 23% of series raise a false alarm
    within 100 rounds at the defaults if no standard error is known, and none of 1,000 if it is.
    Without standard errors ``baseline=10, width=12`` gives 0.1%.

    Args:
        baseline: number K of early rounds that define the band, at least 3.
        width: half-width w of the band, in spreads, above 0.
        window: number of last rounds whose median is compared with the band, at least 1.
        least: smallest half-width :math:`\ell`, as a share of the median early value, at least 0.

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
        """Bands of all statistics with complete early rounds, at the last round's references.

        A band moves with the reference of each round; ``band_around`` computes it for another one.
        """
        return {
            name: self.band_around(name, self._recent[name][-1].reference)
            for name, early in self._early.items()
            if len(early) == self._baseline
        }

    @property
    def outside(self) -> frozenset[str]:
        """Names of the statistics that are currently outside their bands."""
        return frozenset(self._outside)

    def check(self, readings: Mapping[str, Reading]) -> list[DriftAlarm]:
        """Add the statistics of a round; readings whose value is not finite are ignored.

        Args:
            readings: readings by name, such as "saturation/turn_3".

        Returns:
            Alarms of the statistics that left their bands in this round.
        """
        alarms = []
        for name, reading in readings.items():
            if not math.isfinite(reading.value):
                continue
            early = self._early.setdefault(name, [])
            recent = [*self._recent.get(name, []), reading][-self._window :]
            self._recent[name] = recent
            if len(early) < self._baseline:
                early.append(reading)  # fixed once complete: a slow drift must not move its band
                continue
            band = self.band_around(name, reading.reference)
            # The median is over changes, so shift it and the band to this round's reference.
            value = _level(reading.reference) + median(map(_change, recent))
            if band.low <= value <= band.high:
                self._outside.discard(name)
            elif name not in self._outside:
                self._outside.add(name)
                alarms.append(DriftAlarm(name, value, band))
        return alarms

    def band_around(self, name: str, reference: float = math.nan) -> Band:
        """Return the band of a statistic in a round whose reference images have this value.

        Args:
            name: name of a statistic.
            reference: its value over the reference images; NaN if there are none.

        Raises:
            KeyError: fewer than ``baseline`` rounds of it have been checked.
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
        """Return the state as JSON-compatible lists and dictionaries."""
        kept = {"early": self._early, "recent": self._recent}
        return {
            **{k: {n: [_stored(r) for r in x] for n, x in v.items()} for k, v in kept.items()},
            "outside": sorted(self._outside),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a watch with the same arguments."""
        self._early, self._recent = (
            {name: [_loaded(x) for x in rows] for name, rows in state[kind].items()}
            for kind in ("early", "recent")
        )
        self._outside = set(state["outside"])


def _level(reference: float) -> float:
    return reference if math.isfinite(reference) else 0.0


def _change(reading: Reading) -> float:
    """Return value minus reference, or the value if there is no reference."""
    return reading.value - _level(reading.reference)


def _stored(reading: Reading) -> list[float | None]:
    # JSON has no NaN: null stands for it.
    return [x if math.isfinite(x) else None for x in reading]


def _loaded(numbers: list[float | None]) -> Reading:
    return Reading(*(math.nan if x is None else x for x in numbers))
