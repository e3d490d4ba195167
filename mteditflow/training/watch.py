"""Early stop of a run whose rewards collapse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mteditflow._checks import check_count, check_number


class RewardCollapseError(RuntimeError):
    """A reward has fallen far below the best level of the run."""


class RewardWatch:
    r"""Check that compares each reward's moving mean with the best such mean of the run.

    In a policy collapse all rewards fall. In reward hacking one reward rises at the expense of
    another: instruction following improves while backgrounds disappear. In both cases some reward
    falls over many rounds.

    Args:
        drop: largest allowed fall below the best mean, in (0, 1], as a share of the largest
            magnitude of this reward's means. 0.3 stops a run whose positive reward is below 70% of
            its best, and one whose reward has risen from -0.5 to -0.3 and then falls below -0.45.
            1 never stops.
        window: number of rounds in a mean.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> watch = RewardWatch(drop=0.5, window=1)
        >>> watch.check({"following": 0.6, "consistency": 0.9})
        >>> watch.check({"following": 0.8, "consistency": 0.4})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        mteditflow.training.watch.RewardCollapseError: consistency: mean 0.400 ...
    """

    def __init__(self, *, drop: float, window: int) -> None:
        check_number("drop", drop, low=0.0, high=1.0, open_low=True)
        check_count("window", window)
        self._drop, self._window = drop, window
        self._recent: dict[str, list[float]] = {}
        self._best: dict[str, float] = {}
        self._size: dict[str, float] = {}  # largest magnitude of a mean

    def check(self, rewards: Mapping[str, float]) -> None:
        """Add the mean of each reward in a round, and compare; one that is not finite is skipped.

        Raises:
            RewardCollapseError: a reward has fallen too far; the message suggests what to do.
        """
        for name, reward in rewards.items():
            if not math.isfinite(reward):
                continue
            recent = [*self._recent.get(name, []), reward][-self._window :]
            self._recent[name] = recent
            if len(recent) < self._window:
                continue
            # The fall is relative to a magnitude, not to the best mean, which may be 0 or negative.
            mean = sum(recent) / len(recent)
            best, size = self._best.get(name, mean), self._size.get(name, abs(mean))
            self._best[name], self._size[name] = max(best, mean), max(size, abs(mean))
            if self._drop < 1 and mean < best - self._drop * size:
                raise RewardCollapseError(
                    f"{name}: mean {mean:.3f} of the last {self._window} rounds, best "
                    f"{best:.3f}; a fall of more than {self._drop:.0%} of {size:.3f}. Look at the "
                    "strips of chains; then lower the learning rate, raise kl_coef or this term's "
                    "weight, and resume from the best checkpoint"
                )

    def restart(self) -> None:
        """Drop the history of all rewards, as when the task changes."""
        self._recent, self._best, self._size = {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        recent = {name: list(values) for name, values in self._recent.items()}
        return {"recent": recent, "best": dict(self._best), "size": dict(self._size)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that ``state_dict`` returned."""
        self._recent = {name: list(values) for name, values in state["recent"].items()}
        self._best = dict(state["best"])
        # Older checkpoints have no sizes: the best magnitude is right unless means were negative.
        self._size = dict(state.get("size", {k: abs(best) for k, best in self._best.items()}))
