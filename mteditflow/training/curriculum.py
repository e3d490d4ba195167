"""Number of turns over the rounds of a run: by a schedule, or as fast as the editor allows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mteditflow._checks import check_count, check_number


def scheduled_turns(done: int, *, first: int, every: int, most: int) -> int:
    """Return the turns of a round's chains: ``min(first + done // every, most)``.

    Args:
        done: rounds that are done, >= 0.
        first: turns of the first round, in [1, most].
        every: rounds after which chains get one turn more, >= 1.
        most: turns at which they stop growing, >= 1.

    Returns:
        Turns, in [first, most].

    Raises:
        ValueError: a number is out of range.
        TypeError: a number is not an integer.

    Example:
        >>> [scheduled_turns(done, first=2, every=3, most=4) for done in (0, 2, 3, 6, 9)]
        [2, 2, 3, 4, 4]
    """
    check_count("done", done, low=0)
    check_count("every", every)
    check_count("most", most)
    check_count("first", first, high=most)
    return min(first + done // every, most)


@dataclass(frozen=True)
class DepthCurriculum:
    """Turns that grow by one whenever the editor has kept pictures still for long enough.

    After each round it is given the mean absolute change of the pixels, in 0 to 255, over turns
    whose instruction asks for no change. A change at or below the threshold counts the round; one
    above it counts from 0 again, and so does each new turn.

    Args:
        depth: turns now, in [1, most].
        most: turns at which it stops growing, >= 1.
        threshold: change up to which a round counts, >= 0, in the units of pixels.
        patience: rounds in a row that have to count, >= 1.
        streak: rounds that have counted so far, in [0, patience).

    Raises:
        ValueError: a number is out of range.
        TypeError: a count is not an integer.

    Source: MT-OPSD (arXiv 2609.35611), depths 2 to 10, thresholds 9 and 10, 10 steps in a row.

    Example:
        >>> curriculum = DepthCurriculum(depth=2, most=10, threshold=9.0, patience=2)
        >>> for change in (8.0, 9.0, 9.5, 8.0):
        ...     curriculum = curriculum.update(change)
        >>> curriculum.depth, curriculum.streak
        (3, 1)
    """

    depth: int
    most: int
    threshold: float
    patience: int = 10
    streak: int = 0

    def __post_init__(self) -> None:
        check_count("most", self.most)
        check_count("depth", self.depth, high=self.most)
        check_number("threshold", self.threshold, low=0.0)
        check_count("patience", self.patience)
        check_count("streak", self.streak, low=0, high=self.patience - 1)

    def update(self, change: float) -> DepthCurriculum:
        """Return the curriculum after a round with this mean change.

        Skip a round without any turn that asks for no change.

        Raises:
            ValueError: the change is negative or not finite.
        """
        check_number("change", change, low=0.0)
        streak = self.streak + 1 if change <= self.threshold else 0
        if streak < self.patience:
            return replace(self, streak=streak)
        return replace(self, depth=min(self.depth + 1, self.most), streak=0)

    def resumed(self, depth: int, streak: int) -> DepthCurriculum:
        """Return this curriculum at a depth and streak that a checkpoint holds.

        Both are brought into the limits of this one, which may be others than the run began with.
        """
        return replace(self, depth=min(depth, self.most), streak=min(streak, self.patience - 1))
