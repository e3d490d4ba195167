"""Base of scorers of single turns: threads, layout, lost scores, and checks of what they return."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import NamedTuple, SupportsFloat

import anyio.to_thread
from PIL import Image

from mteditflow.chains import Chain
from mteditflow.rewards import Lost, TurnScores
from mteditflow.rewards.judge.judge import check_images, turn_scores

# Scores of a turn by term, each a number or the reason why it is lost; or that of them all.
Marks = Mapping[str, float | Lost] | Lost


class EditedTurn(NamedTuple):
    """A turn to score.

    Attributes:
        before: input image of the turn.
        after: edited image of the turn.
        instruction: text of the instruction.
        chain: record of its chain.
        turn: index n of the turn on the axis N, from 0: ``chain.instructions[turn]`` is its
            instruction. Names of metrics and files count from 1: "turn_1" is ``turn`` 0.
    """

    before: Image.Image
    after: Image.Image
    instruction: str
    chain: Chain
    turn: int


class TurnScorer(ABC):
    """Base of scorers of single turns: a subclass defines ``terms`` and ``score_turns``.

    Calls run in a worker thread, one at a time, so that a model need not be thread-safe.

    Attributes:
        terms: names of the scores; ``score_turns`` has to return all of them, and no others. A
            trainer refuses weights of other names before it loads a model.

    Example:
        >>> import anyio
        >>> from PIL import Image
        >>> from mteditflow.chains import Chain
        >>> from mteditflow.rewards import Scale
        >>> class Growth(TurnScorer):
        ...     terms = ("following",)
        ...     scale = Scale(0, 1, success=1)
        ...     def score_turns(self, turns):
        ...         return [{"following": float(x.after.width > x.before.width)} for x in turns]
        >>> chain = Chain(id="7", image="7.png", instructions=("Enlarge it",))
        >>> images = [[Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))]]
        >>> anyio.run(Growth().score, [chain], images)["following"].score
        tensor([[1.]])
    """

    terms: tuple[str, ...]

    def __init__(self) -> None:
        self._lock = Lock()

    @abstractmethod
    def score_turns(self, turns: Sequence[EditedTurn]) -> list[Marks]:
        """Return the scores of each turn, in order.

        Args:
            turns: K turns, of several chains.

        Returns:
            For each turn a dictionary with a value of every term: a number, NaN where there is
            nothing to measure, or ``Lost`` where the score could not be obtained. ``Lost`` in place
            of the dictionary: all scores of the turn are lost.
        """

    async def score(
        self, chains: Sequence[Chain], images: Sequence[Sequence[Image.Image]]
    ) -> dict[str, TurnScores]:
        """Score every turn of B chains.

        Args:
            chains: B chains with their instructions.
            images: for each chain N + 1 images: the reference, then the result of each turn.

        Returns:
            Scores by term, each [B, N], float32, with N turns of the longest chain.

        Raises:
            ValueError: there is no chain, its images are too few, too many or unreadable, or
                ``score_turns`` returns another number of turns, other terms or an infinite score.
            TypeError: one of them is not a PIL image, or a score is not a number.
        """
        shown = await anyio.to_thread.run_sync(check_images, chains, images)
        turns = [
            EditedTurn(own[n], own[n + 1], chain.instructions[n], chain, n)
            for chain, own in zip(chains, shown, strict=True)
            for n in range(chain.turns)
        ]
        marks = await anyio.to_thread.run_sync(self._one_at_a_time, turns)
        values = iter(self._values(marks, len(turns)))
        by_chain = [[next(values) for _ in range(chain.turns)] for chain in chains]
        return {
            term: turn_scores(
                chains,
                [
                    [
                        (range(n, n + 1), x if isinstance(x, Lost) else (x,))
                        for n, x in enumerate(turn[term] for turn in own)
                    ]
                    for own in by_chain
                ],
            )
            for term in self.terms
        }

    def _values(self, marks: object, count: int) -> list[dict[str, float | Lost]]:
        """Return the value of every term in each turn, as ``score_turns`` returned them.

        Raises:
            ValueError: there are not ``count`` turns, terms differ, or a score is infinite.
            TypeError: an entry is neither a dictionary nor ``Lost``, or a score is not a number.
        """
        name = f"{type(self).__name__}.score_turns"
        if not isinstance(marks, Sequence) or isinstance(marks, str):
            raise TypeError(
                f"{name}: expected a list with one entry for each turn, got {_kind(marks)}"
            )
        if len(marks) != count:
            raise ValueError(
                f"{name}: expected {count} entries, one for each turn, got {len(marks)}"
            )
        values = []
        for i, entry in enumerate(marks):
            own = dict.fromkeys(self.terms, entry) if isinstance(entry, Lost) else entry
            if not isinstance(own, Mapping):
                raise TypeError(f"{name}[{i}]: expected a dictionary or Lost, got {_kind(own)}")
            if set(own) != set(self.terms):
                raise ValueError(
                    f"{name}[{i}]: expected the terms {list(self.terms)}, as {type(self).__name__} "
                    f"declares, got {list(own)}"
                )
            values.append({term: _value(f"{name}[{i}][{term!r}]", own[term]) for term in own})
        return values

    def _one_at_a_time(self, turns: Sequence[EditedTurn]) -> list[Marks]:
        with self._lock:
            return self.score_turns(turns)


def _value(name: str, value: object) -> float | Lost:
    """Return a score as a float; ``Lost`` as it is.

    Raises:
        TypeError: it is neither a number nor ``Lost``.
        ValueError: it is infinite.
    """
    if isinstance(value, Lost):
        return value
    expected = f"{name}: expected a number, NaN (nothing to measure) or Lost (no answer)"
    if isinstance(value, str) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{expected}, got {_kind(value)}")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # tensors and arrays of several entries
        raise TypeError(f"{expected}, got {_kind(value)}") from error
    if math.isinf(number):
        raise ValueError(f"{expected}, got {number}")
    return number


def _kind(value: object) -> str:
    return f"{type(value).__name__} {' '.join(str(value).split())[:60]}"
