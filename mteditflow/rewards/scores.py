"""Scores per turn with their validity, as every judge and scorer of this package returns them.

``B`` trajectories, ``N`` turns. A missing score is NaN, never a number. It is either LOST (an
answer was requested and did not arrive, with the reason) or UNMEASURED (there was nothing to
measure, such as content consistency of a turn in which everything was edited). Only a lost score
makes a trajectory invalid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from mteditflow._checks import (
    check_full_precision,
    check_mask,
    check_number,
    check_rank,
    check_values,
)
from mteditflow.advantages.credit import Credit, Signal
from mteditflow.rewards.faults import Lost


class InvalidRewardsError(RuntimeError):
    """Share of invalid rewards in a round above the limit of the run."""


@dataclass(frozen=True, eq=False)
class TurnScores:
    """One score per turn of B trajectories, or the reason why it is lost.

    Args:
        score: scores [B, N], float32 or float64; NaN where there is no score.
        turn_mask: turns that exist, boolean [B, N].
        lost: (trajectory, turn) to the reason why its score was lost; those entries are NaN. A NaN
            that is not listed here means that there was nothing to measure.

    Raises:
        ValueError: shapes differ, an entry is infinite, a padded or lost entry has a number, a
            trajectory has no turn, or ``lost`` contains a turn that does not exist.
        TypeError: a dtype is not the one stated.

    Example:
        >>> from mteditflow import likert_average
        >>> from mteditflow.rewards import Fault, Lost, TurnScores
        >>> score = torch.tensor([[5.0, 3.0], [4.0, torch.nan]])
        >>> lost = {(1, 1): Lost(Fault.timeout, "no answer within 60 s", attempts=4)}
        >>> scores = TurnScores(score, torch.ones(2, 2, dtype=torch.bool), lost)
        >>> value, valid, measured = scores.reward(likert_average)
        >>> value, valid
        (tensor([0.7500,    nan]), tensor([ True, False]))
        >>> scores.invalid_share, scores.reasons
        (0.5, {'time-out': 1})
    """

    score: Tensor
    turn_mask: Tensor
    lost: Mapping[tuple[int, int], Lost]

    def __post_init__(self) -> None:
        check_full_precision(score=self.score)
        check_rank("score", self.score, 2, "[B, N]", maximum=2)
        check_mask("turn_mask", self.turn_mask, self.score.shape, "[B, N]")
        check_values("score", self.score, ~self.score.isinf(), "a finite score, or NaN for none")
        some = self.turn_mask.any(dim=1)
        check_values("turn_mask", some, some, "at least one turn in each trajectory")
        absent = self.turn_mask.logical_not()
        for b, n in self.lost:
            if not (0 <= b < len(self.score) and 0 <= n < self.score.shape[1]) or absent[b, n]:
                raise ValueError(f"lost: expected (trajectory, turn) that exist, got {(b, n)}")
            absent[b, n] = True  # a lost turn must be NaN, just like padding
        check_values("score", self.score, ~absent | self.score.isnan(), "NaN where lost or padded")

    def __len__(self) -> int:
        """Return the number of trajectories, B."""
        return len(self.score)

    @property
    def measured(self) -> Tensor:
        """Turns that have a score, boolean [B, N]."""
        return self.score.isfinite()

    @property
    def lost_mask(self) -> Tensor:
        """Turns whose score was lost, boolean [B, N]."""
        lost = torch.zeros_like(self.turn_mask)
        for place in self.lost:
            lost[place] = True
        return lost

    @property
    def unmeasured(self) -> Tensor:
        """Turns with nothing to measure, boolean [B, N]; these are not lost."""
        return self.turn_mask & ~self.measured & ~self.lost_mask

    @property
    def valid(self) -> Tensor:
        """Trajectories that lost no score, boolean [B].

        A trajectory that lost the score of any turn is invalid, since the mean of its other turns
        would not be comparable within its group. One with nothing to measure is valid but
        unmeasured.
        """
        return ~self.lost_mask.any(dim=1)

    @property
    def invalid_share(self) -> float:
        """Share of trajectories that lost a score."""
        return int((~self.valid).sum()) / len(self)

    @property
    def unmeasured_share(self) -> float:
        """Share of trajectories with nothing to measure in any turn and no lost score.

        Example:
            >>> scores = TurnScores(torch.tensor([[0.9], [torch.nan]]), torch.ones(2, 1) > 0, {})
            >>> scores.unmeasured_share, scores.invalid_share
            (0.5, 0.0)
        """
        return int((self.valid & ~self.measured.any(dim=1)).sum()) / len(self)

    @property
    def reasons(self) -> dict[str, int]:
        """Number of turns whose score was lost by reason, most frequent first."""
        return dict(Counter(lost.fault.value for lost in self.lost.values()).most_common())

    def reward(self, aggregate: Callable[..., Tensor]) -> Signal:
        """Aggregate turns to one reward per trajectory; NaN, with flags, where there is none.

        Args:
            aggregate: function of scores [B', N] and a ``turn_mask`` that returns [B'], such as
                ``mteditflow.likert_average``. It receives only valid trajectories with a measured
                turn, and its mask is true only at measured turns.

        Returns:
            Signal with value [B], float32 (float64 if scores are); valid, boolean [B], True where
            no turn was lost; and measured, True where a valid trajectory has some score.
        """
        valid, turns = self.valid, self.measured
        measured = valid & turns.any(dim=1)
        value = torch.full_like(self.score[:, 0], torch.nan)
        if bool(measured.any()):
            rows = self.score[measured], turns[measured]
            value[measured] = aggregate(rows[0], turn_mask=rows[1]).to(value.dtype)
        return Signal(value, valid, measured)

    def turn_reward(self, normalize: Callable[[Tensor], Tensor]) -> Signal:
        """Normalize every score separately to one reward per turn.

        A turn is valid if it exists and its score was not lost, even if another turn of its
        trajectory lost its score.

        Args:
            normalize: function from scores [K] to rewards [K], such as
                ``mteditflow.normalize_likert``; it receives the measured turns only.

        Returns:
            Signal: value [B, N] in the dtype of the scores, NaN where there is no score; valid and
            measured, boolean [B, N].

        Example:
            >>> from mteditflow import normalize_likert
            >>> scores = TurnScores(torch.tensor([[5.0, 3.0]]), torch.ones(1, 2) > 0, {})
            >>> scores.turn_reward(normalize_likert).value
            tensor([[1.0000, 0.5000]])
        """
        measured, value = self.measured, torch.full_like(self.score, torch.nan)
        value[measured] = normalize(self.score[measured]).to(value.dtype)
        return Signal(value, self.turn_mask & ~self.lost_mask, measured)

    def credited(self, reward: Tensor, credit: Credit) -> Signal:
        """Map per-turn rewards to per-turn credit.

        Args:
            reward: ``turn_reward(...).value``, [B, N].
            credit: rule of credit assignment, such as ``mteditflow.RewardToGo()``.

        Returns:
            Signal [B, N], an argument of ``mteditflow.turn_advantage``.

        Raises:
            ValueError: shapes do not match, or the reward of a measured turn is not finite.

        Example:
            >>> from mteditflow import RewardToGo, normalize_likert
            >>> scores = TurnScores(torch.tensor([[5.0, 3.0]]), torch.ones(1, 2) > 0, {})
            >>> reward = scores.turn_reward(normalize_likert).value
            >>> scores.credited(reward, RewardToGo()).value
            tensor([[0.7500, 0.5000]])
        """
        return credit(
            reward,
            turn_mask=self.turn_mask,
            unmeasured=self.unmeasured,
            lost=self.lost_mask,
        )

    def spread(self, where: Tensor) -> TurnScores:
        """Place the scores in longer chains whose other turns are unmeasured.

        Use it if a scorer received only some turns of a chain, such as those that ask for a change.

        Args:
            where: turns that the scores belong to, in order, boolean [B, N]; all N turns exist.

        Raises:
            ValueError: a trajectory does not have as many such turns as scores.
            TypeError: ``where`` is not boolean.

        Example:
            >>> scores = TurnScores(torch.tensor([[5.0, 3.0]]), torch.ones(1, 2) > 0, {})
            >>> scores.spread(torch.tensor([[True, False, True]])).score
            tensor([[5., nan, 3.]])
        """
        check_mask("where", where, (len(self), *where.shape[1:]), "[B, N]")
        turns, expected = where.sum(dim=1), self.turn_mask.sum(dim=1)
        if not torch.equal(turns, expected):
            raise ValueError(
                f"where: expected {_short(expected)} turns of each trajectory, as there are "
                f"scores, got {_short(turns)}"
            )
        score = torch.full(where.shape, torch.nan, dtype=self.score.dtype, device=self.score.device)
        # Both masks select row by row, in the order of turns, so the n-th score meets its turn.
        score[where] = self.score[self.turn_mask]
        places = dict(
            zip(_places(self.turn_mask), _places(where), strict=True) if self.lost else ()
        )
        lost = {places[place]: reason for place, reason in self.lost.items()}
        return TurnScores(score, torch.ones_like(where), lost)

    def select(self, rows: Sequence[int]) -> TurnScores:
        """Return the scores of some trajectories, in the order given.

        Args:
            rows: indices of trajectories in [0, B), at least one; they may repeat.

        Raises:
            IndexError: a trajectory does not exist.

        Example:
            >>> scores = TurnScores(torch.tensor([[5.0], [3.0]]), torch.ones(2, 1) > 0, {})
            >>> scores.select([1, 0, 1]).score.flatten()
            tensor([3., 5., 3.])
        """
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.score.device)
        lost = {
            (place, n): reason
            for place, b in enumerate(rows)
            for (own, n), reason in self.lost.items()
            if own == b
        }
        return TurnScores(self.score[index], self.turn_mask[index], lost)

    def require(self, *, max_invalid_share: float) -> TurnScores:
        """Return these scores, or raise if too many trajectories lost one.

        Args:
            max_invalid_share: largest share of trajectories that may be invalid, in [0, 1];
                trajectories with nothing to measure are valid.

        Raises:
            InvalidRewardsError: the share is larger; the message has the share, the reasons with
                their counts, and an example of the most frequent one.
        """
        check_number("max_invalid_share", max_invalid_share, low=0.0, high=1.0)
        if self.invalid_share <= max_invalid_share:
            return self
        counts = self.reasons
        reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
        commonest = next(iter(counts))
        example = next(str(x) for x in self.lost.values() if x.fault.value == commonest)
        raise InvalidRewardsError(
            f"{self.invalid_share:.0%} of {len(self)} rewards are invalid, more than the "
            f"{max_invalid_share:.0%} allowed. Turns by reason: {reasons}. For instance {example}"
        )

    @classmethod
    def concatenate(cls, parts: Sequence[TurnScores]) -> TurnScores:
        """Join batches of trajectories in order; N becomes that of the longest.

        Raises:
            ValueError: there is no part.
        """
        score = join([part.score for part in parts], padding=torch.nan)
        mask = join([part.turn_mask for part in parts], padding=False)
        return cls(score, mask, join_lost([(len(part), part.lost) for part in parts]))


def _places(where: Tensor) -> list[tuple[int, int]]:
    """Return the (trajectory, turn) of each true entry, in order."""
    return [(b, n) for b, n in where.nonzero().tolist()]


def _short(counts: Tensor) -> list[int]:
    """Return the first few counts."""
    first: list[int] = counts[:8].tolist()
    return first


def join(parts: Sequence[Tensor], *, padding: float) -> Tensor:
    """Join tensors [B, N] along B, padded to the longest N.

    Raises:
        ValueError: there is no part.

    Example:
        >>> join([torch.ones(1, 1), torch.zeros(1, 2)], padding=torch.nan)
        tensor([[1., nan],
                [0., 0.]])
    """
    if not parts:
        raise ValueError("parts: expected at least one, got none")
    longest = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, longest - part.shape[1]), value=padding) for part in parts])


def join_lost(
    parts: Sequence[tuple[int, Mapping[tuple[int, int], Lost]]],
) -> dict[tuple[int, int], Lost]:
    """Join the lost scores of batches, each given with its number of trajectories.

    The trajectories of a batch are numbered after those of the batches before it.
    """
    lost: dict[tuple[int, int], Lost] = {}
    start = 0
    for size, own in parts:
        lost |= {(start + b, n): reason for (b, n), reason in own.items()}
        start += size
    return lost
