"""Number of turns over the rounds of a run: by a schedule, or by the progress of the editor."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mteditflow._checks import check_count, check_number


def scheduled_turns(done: int, *, first: int, every: int, most: int) -> int:
    """Return the number of turns of a round's chains: ``min(first + done // every, most)``.

    Args:
        done: completed rounds, >= 0.
        first: turns in the first round, in [1, most].
        every: rounds after which chains get one more turn, >= 1.
        most: largest number of turns, >= 1.

    Returns:
        Number of turns, in [first, most].

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
    """Curriculum that adds a turn after several rounds in a row with little unwanted change.

    ``update`` takes the mean absolute change of pixels, on the scale 0 to 255, over the turns of a
    round whose instruction asks for no change. A change at or below the threshold extends the
    streak; a larger one resets it to 0, and so does each added turn.

    Args:
        depth: current number of turns, in [1, most].
        most: largest number of turns, >= 1.
        threshold: largest change that extends the streak, >= 0, on the scale 0 to 255.
        patience: length of a streak after which a turn is added, >= 1.
        streak: current length of the streak, in [0, patience).

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

        Do not call it for a round in which no turn asks for no change.

        Raises:
            ValueError: the change is negative or not finite.
        """
        check_number("change", change, low=0.0)
        streak = self.streak + 1 if change <= self.threshold else 0
        if streak < self.patience:
            return replace(self, streak=streak)
        return replace(self, depth=min(self.depth + 1, self.most), streak=0)

    def resumed(self, depth: int, streak: int) -> DepthCurriculum:
        """Return this curriculum at the depth and streak of a checkpoint.

        Both are clamped to the limits of this curriculum, which may have changed since.
        """
        return replace(self, depth=min(depth, self.most), streak=min(streak, self.patience - 1))
