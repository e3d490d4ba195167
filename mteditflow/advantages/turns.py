r"""Aggregation of per-turn scores into trajectory rewards, and broadcast of advantages to steps.

Shapes: ``B`` trajectories, ``N`` turns, ``S`` denoising steps per turn. Chains of unequal length
are padded to N, and a boolean ``turn_mask`` [B, N] marks the turns that exist. Padded entries are
never read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_mask,
    as_real,
    check_choice,
    check_count,
    check_floating,
    check_kind,
    check_no_booleans,
    check_number,
    check_rank,
    check_tensor,
    check_unmasked,
    check_values,
    is_sequence,
    shown,
)
from mteditflow._reduce import in_float64, mean_where, promote

_DENSE = torch.contiguous_format


class PaddedTurns(NamedTuple):
    """Scores of chains of unequal length, padded to N turns.

    Attributes:
        score: [B, N], NaN where ``valid`` is false.
        turn_mask: turns that exist, boolean [B, N].
        valid: turns that exist and have a score, boolean [B, N]. This is ``Signal.measured`` of
            a turn; ``Signal.valid`` means "not lost" and is true for unmeasured turns, too.
        lost: turns whose score was requested and did not arrive, boolean [B, N].

    Example:
        >>> from mteditflow import TurnCredit
        >>> padded = pad_turns([[1.0, None], [float("nan"), 0.5]])
        >>> padded.unmeasured
        tensor([[False, False],
                [ True, False]])
        >>> masks = {name: getattr(padded, name) for name in ("turn_mask", "unmeasured", "lost")}
        >>> TurnCredit()(padded.score, **masks).valid
        tensor([[ True, False],
                [ True,  True]])
    """

    score: Tensor
    turn_mask: Tensor
    valid: Tensor
    lost: Tensor

    @property
    def unmeasured(self) -> Tensor:
        """Turns that exist and had nothing to measure, boolean [B, N]: they were not lost."""
        return self.turn_mask & ~self.valid & ~self.lost


def pad_turns(
    scores: Sequence[Sequence[float | None] | Tensor | np.ndarray[Any, Any]],
    *,
    dtype: torch.dtype = torch.float32,
) -> PaddedTurns:
    """Pad one list of scores per chain to tensors, with masks of existing, valid and lost turns.

    A numpy array or a tensor cannot hold ``None``, and NaN means unmeasured here. Where NaN marks a
    lost score, give lists with ``None`` in its place, or skip this function and pass the mask
    ``lost`` to a ``Credit``.

    Args:
        scores: one list per trajectory of one score per turn, at least one turn each. Scores are
            floats, integers or booleans, ``None`` where a score was lost, and NaN where there was
            nothing to measure.
        dtype: dtype of the scores, float32 or float64.

    Returns:
        PaddedTurns, on the CPU. Pass ``score``, ``turn_mask``, ``unmeasured`` and ``lost`` to a
        ``Credit``, which averages the measured scores and invalidates the credit that lost scores
        affect. An aggregator with ``turn_mask=padded.valid`` averages the remaining turns of a
        chain that lost one; mark such chains invalid by ``valid=~padded.lost.any(dim=1)`` in
        ``group_advantage`` or ``fuse_advantages``. It raises for a chain without any score.

    Raises:
        ValueError: there is no chain, a chain has no turn, a score is infinite, or an integer is
            not exact in ``dtype``.
        TypeError: a score is not a number, or ``dtype`` is neither float32 nor float64.

    Example:
        >>> padded = pad_turns([[1, 0, None], [0.5]])
        >>> padded.score
        tensor([[1.0000, 0.0000,    nan],
                [0.5000,    nan,    nan]])
        >>> padded.turn_mask.sum(dim=1), padded.valid.sum(dim=1), padded.lost.sum(dim=1)
        (tensor([3, 1]), tensor([2, 1]), tensor([1, 0]))

        One reward per chain; the first has none, because it lost a score:

        >>> from mteditflow import TrajectoryCredit, likert_average
        >>> p = pad_turns([[5, 1, None], [3, float("nan")]])
        >>> signal = TrajectoryCredit(likert_average)(
        ...     p.score, turn_mask=p.turn_mask, unmeasured=p.unmeasured, lost=p.lost
        ... )
        >>> signal.value[:, 0], signal.valid[:, 0]
        (tensor([   nan, 0.5000]), tensor([False,  True]))
        >>> likert_average(p.score, turn_mask=p.valid)  # over the turns that are left
        tensor([0.5000, 0.5000])
    """
    if not any(dtype is full for full in (torch.float32, torch.float64)):
        got = dtype if isinstance(dtype, torch.dtype) else type(dtype).__name__
        raise TypeError(f"dtype: expected torch.float32 or torch.float64, got {got}")
    if isinstance(scores, Tensor):
        check_tensor("scores", scores)
    elif not is_sequence(scores):
        check_kind("scores", scores, np.ndarray, "a list of scores for each chain")
    check_unmasked("scores", scores)
    if len(scores) == 0:
        raise ValueError("scores: expected at least one chain, got none")
    rows = [_chain(f"scores[{b}]", row, dtype) for b, row in enumerate(scores)]
    turns = max(map(len, rows))

    numbers = [[math.nan if x is None else x for x in row] for row in rows]
    lost = [[x is None for x in row] for row in rows]

    def padded(rows: list[list[Any]], filling: float, dtype: torch.dtype) -> Tensor:
        filled = [row + [filling] * (turns - len(row)) for row in rows]
        return torch.tensor(filled, dtype=dtype, device="cpu")

    score = padded(numbers, math.nan, dtype)
    exists = padded([[True] * len(row) for row in rows], False, torch.bool)
    return PaddedTurns(score, exists, ~score.isnan(), padded(lost, False, torch.bool))


def _chain(name: str, row: Any, dtype: torch.dtype) -> list[float | None]:
    """Return the scores of a chain, checked."""
    if isinstance(row, Tensor):
        check_tensor(name, row)
    row = row.tolist() if isinstance(row, (Tensor, np.ndarray)) else row  # no masked array is left
    if not is_sequence(row):
        raise TypeError(f"{name}: expected one list of scores, got {type(row).__name__}")
    if not row:
        raise ValueError(f"{name}: expected at least one turn, got none")
    return [None if x is None else _score(f"{name}[{n}]", x, dtype) for n, x in enumerate(row)]


def _score(name: str, x: Any, dtype: torch.dtype) -> float:
    """Return a score as a float: NaN, or a finite number in the range of ``dtype``."""
    one = isinstance(x, np.generic) or (isinstance(x, Tensor) and x.numel() == 1)
    x = x.item() if one else x
    if not isinstance(x, (int, float)):
        raise TypeError(f"{name}: expected a number, or None if lost, got {type(x).__name__}")
    largest = torch.finfo(dtype).max
    if not (math.isnan(x) or -largest <= x <= largest):
        raise ValueError(f"{name}: expected a finite {dtype} number, or NaN, got {shown(x)}")
    if isinstance(x, int) and abs(x) > 1 / torch.finfo(dtype).eps:
        raise ValueError(f"{name}: expected an integer that {dtype} holds exactly, got {x}")
    return float(x)


def binary_and(success: Numbers, *, turn_mask: Numbers | None = None) -> Tensor:
    r"""Strict success of a chain: :math:`\prod_n s_n`, 1 where every turn succeeded.

    Args:
        success: 0 or 1 per turn, [B, N]; boolean, integer or floating point.
        turn_mask: turns that exist, boolean [B, N]; ``None`` means all.

    Returns:
        [B] of 0 or 1, float32 (float64 if given, as lists of floats are). Not meant to carry a
        gradient.

    Raises:
        ValueError: wrong shape, a value other than 0 and 1, or a chain without turns.

    Source: MT-EditFlow (arXiv 2606.01985), turn aggregation.

    Example:
        >>> binary_and(torch.tensor([[1, 1, 1], [1, 0, 1]]))
        tensor([1., 0.])
    """
    scores, mask = _turns("success", success, turn_mask)
    _check_binary(scores, mask)
    return torch.where(mask, scores, 1).prod(dim=1)


def binary_average(success: Numbers, *, turn_mask: Numbers | None = None) -> Tensor:
    r"""Share of turns that succeeded: :math:`\mathrm{mean}_n\, s_n`.

    Args:
        success: 0 or 1 per turn, [B, N]; boolean, integer or floating point.
        turn_mask: turns that exist, boolean [B, N]; ``None`` means all.

    Returns:
        [B] in [0, 1], float32 (float64 if given, as lists of floats are). Not meant to carry a
        gradient.

    Raises:
        ValueError: wrong shape, a value other than 0 and 1, or a chain without turns.

    Source: MT-EditFlow (arXiv 2606.01985), turn aggregation.

    Example:
        >>> binary_average(torch.tensor([[1, 1], [1, 0]]))
        tensor([1.0000, 0.5000])
    """
    scores, mask = _turns("success", success, turn_mask)
    _check_binary(scores, mask)
    return _mean(scores, mask)


def likert_average(
    likert: Numbers, *, normalization: str = "minmax", turn_mask: Numbers | None = None
) -> Tensor:
    r"""Mean Likert score of a chain, normalized: :math:`\mathrm{mean}_n (l_n - 1)/4`.

    Args:
        likert: scores in 1..5 per turn, [B, N]; fractions are fine (averaged votes).
        normalization: "minmax" is (l - 1)/4, in [0, 1]; "max" is l/5, in [0.2, 1].
        turn_mask: turns that exist, boolean [B, N]; ``None`` means all.

    Returns:
        [B], float32 (float64 if given, as lists of floats are). Not meant to carry a gradient.

    Raises:
        ValueError: wrong shape, a score outside 1..5, an unknown normalization, or a chain without
            turns.
        TypeError: ``likert`` holds booleans, or entries that are not numbers.

    Source: MT-EditFlow (arXiv 2606.01985), turn aggregation.

    Example:
        >>> likert_average(torch.tensor([[5, 3, 1]]))
        tensor([0.5000])
        >>> likert_average(torch.tensor([[5, 3, 1]]), normalization="max")
        tensor([0.6000])
    """
    check_no_booleans("likert", likert, "scores in 1..5")
    scores, mask = _turns("likert", likert, turn_mask)
    known = torch.where(mask, scores, 1)  # padded entries may hold anything: give a legal score
    return _mean(normalize_likert(known, normalization=normalization), mask)


def normalize_likert(likert: Numbers, *, normalization: str = "minmax") -> Tensor:
    r"""Map Likert scores elementwise to rewards: :math:`(l - 1)/4`.

    Args:
        likert: scores in 1..5, any shape; fractions are fine (averaged votes).
        normalization: "minmax" is (l - 1)/4, in [0, 1]; "max" is l/5, in [0.2, 1].

    Returns:
        Shape of ``likert``, float32 (float64 if given, as lists of floats are). Not meant to carry
        a gradient.

    Raises:
        ValueError: a score outside 1..5, or an unknown normalization.
        TypeError: ``likert`` holds booleans, or entries that are not numbers.

    Source: MT-EditFlow (arXiv 2606.01985), turn aggregation.

    Example:
        >>> normalize_likert(torch.tensor([5, 3, 1]))
        tensor([1.0000, 0.5000, 0.0000])
    """
    check_choice("normalization", normalization, ("minmax", "max"))
    check_no_booleans("likert", likert, "scores in 1..5")
    (scores,) = promote(as_real("likert", likert))
    check_floating(likert=scores)
    check_values("likert", scores, (scores >= 1) & (scores <= 5), "scores in 1..5")
    return (scores - 1) / 4 if normalization == "minmax" else scores / 5


def turn_average(score: Numbers, *, turn_mask: Numbers | None = None) -> Tensor:
    r"""Mean of any score over the turns that have one, such as content consistency.

    Args:
        score: a finite score per turn, [B, N].
        turn_mask: turns that have a score, boolean [B, N]; ``None`` means all.

    Returns:
        [B], float32 (float64 if given, as lists of floats are). Not meant to carry a gradient.

    Raises:
        ValueError: wrong shape, a score that is not finite, or a chain without scores (give such a
            trajectory a placeholder score here, and mark its reward invalid).

    Source: MT-EditFlow (arXiv 2606.01985), content consistency of a trajectory.

    Example:
        >>> turn_average(torch.tensor([[0.5, 1.0]]))
        tensor([0.7500])
    """
    scores, mask = _turns("score", score, turn_mask)
    check_values("score", scores, ~mask | scores.isfinite(), "finite scores")
    return _mean(scores, mask)


def reward_to_go(
    reward: Numbers, *, discount: float = 1.0, turn_mask: Numbers | None = None
) -> Tensor:
    r"""Return from each turn on: :math:`G_n = \sum_{m \ge n} \gamma^{m-n} r_m`.

    Args:
        reward: finite reward per turn, [B, N].
        discount: gamma in [0, 1]; 0 returns each turn's own reward.
        turn_mask: turns that exist, boolean [B, N]; padded turns add nothing and return 0.

    Returns:
        [B, N], float32 (float64 if given, as lists of floats are). Not meant to carry a gradient.

    Raises:
        ValueError: wrong shape, a reward that is not finite, a chain without turns, a discount
            outside [0, 1].

    Source: the discounted return over turns, an alternative to MT-EditFlow's broadcast
        (arXiv 2606.01985, Eq. 8).

    Example:
        >>> reward_to_go(torch.tensor([[1.0, 2.0, 4.0]]), discount=0.5)
        tensor([[3., 4., 4.]])
    """
    check_number("discount", discount, low=0.0, high=1.0)
    rewards, mask = _turns("reward", reward, turn_mask)
    check_values("reward", rewards, ~mask | rewards.isfinite(), "finite rewards")
    # In float64: the return of a later turn may overflow float32 where that of an earlier turn,
    # discounted or of opposite sign, is in range again.
    exact, exists = in_float64(torch.where(mask, rewards, 0), mask)
    returns = [exact[:, -1]]
    for turn in reversed(range(exact.shape[1] - 1)):
        returns.insert(0, exact[:, turn] + discount * returns[0])
    return torch.where(exists, torch.stack(returns, dim=1), 0).to(rewards)


def stop_after_failure(success: Numbers, *, turn_mask: Numbers | None = None) -> Tensor:
    """Weights that stop a chain's training after its first failed turn.

    The failed turn itself keeps weight 1, since its advantage carries the failure. Later turns edit
    a ruined image and get 0.

    Args:
        success: 0 or 1 per turn, [B, N]; boolean, integer or floating point.
        turn_mask: turns that exist, boolean [B, N]; padded turns get weight 0.

    Returns:
        [B, N] of 0 or 1, float32 (float64 if given, as lists of floats are): multiply a per-turn
        advantage by it, or train only where it is 1.

    Raises:
        ValueError: wrong shape, a value other than 0 and 1, or a chain without turns.

    Source: the trajectory filter of Edit-R2 (arXiv 2606.05950), an alternative to MT-EditFlow's
        broadcast (arXiv 2606.01985, Eq. 8).

    Example:
        >>> stop_after_failure(torch.tensor([[1, 0, 1], [1, 1, 1]]))
        tensor([[1., 1., 0.],
                [1., 1., 1.]])
    """
    scores, mask = _turns("success", success, turn_mask)
    _check_binary(scores, mask)
    succeeded = torch.where(mask, scores, 1)
    # Shifted by one turn: a turn depends on the successes before it, not on its own.
    before = torch.cat([torch.ones_like(scores[:, :1]), succeeded[:, :-1]], dim=1)
    return before.cumprod(dim=1) * mask


def broadcast_to_steps(advantage: Numbers, *, turns: int, steps: int) -> Tensor:
    r"""Give every turn and denoising step the advantage of its trajectory: ``A[b, n, s] = A[b]``.

    Args:
        advantage: per trajectory [B], or per turn [B, N]; integers count as float32.
        turns: N.
        steps: S.

    Returns:
        [B, N, S], a contiguous copy that may be modified in place. Gradient flows through.

    Raises:
        ValueError: the advantage is neither [B] nor [B, N], or a count is not positive.
        TypeError: the advantage is not real, or a count is not an integer.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 8.

    Example:
        >>> broadcast_to_steps(torch.tensor([2.0]), turns=2, steps=3)
        tensor([[[2., 2., 2.],
                 [2., 2., 2.]]])
    """
    advantage = as_real("advantage", advantage)
    check_floating(advantage=advantage)
    check_count("turns", turns)
    check_count("steps", steps)
    if advantage.ndim == 1:
        return repeat(advantage, "b -> b n s", n=turns, s=steps).clone(memory_format=_DENSE)
    if advantage.ndim == 2 and advantage.shape[1] == turns:
        return repeat(advantage, "b n -> b n s", s=steps).clone(memory_format=_DENSE)
    raise ValueError(
        f"advantage: expected shape [B] or [B, N] with N = {turns}, got {list(advantage.shape)}"
    )


def _turns(name: str, score: Numbers, turn_mask: Numbers | None) -> tuple[Tensor, Tensor]:
    (score,) = promote(as_real(name, score))
    check_floating(**{name: score})
    check_rank(name, score, 2, "[B, N]", maximum=2)
    turn_mask = as_mask("turn_mask", turn_mask, score, "[B, N]")
    has_turn = turn_mask.any(dim=1)
    check_values("turn_mask", has_turn, has_turn, "at least one turn in each row")
    return score, turn_mask


def _check_binary(scores: Tensor, mask: Tensor) -> None:
    check_values("success", scores, ~mask | (scores == 0) | (scores == 1), "0 or 1")


def _mean(scores: Tensor, mask: Tensor) -> Tensor:
    return mean_where(scores, mask, dim=1).to(scores.dtype)
