"""Measures of long chains: survival, turns survived, destroyed turns, and wear without edits.

``C`` chains of up to ``N`` turns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mteditflow._checks import check_number
from mteditflow.chains import NO_CHANGE, Chain
from mteditflow.evaluation.intervals import interval_of
from mteditflow.evaluation.tabulation import MEAN, MEDIAN, SURVIVAL, SURVIVED, Place
from mteditflow.metrics import (
    Interval,
    interval_difference,
    survival_curve,
    turns_survived,
    wear,
)
from mteditflow.metrics.survival import chains_at_risk
from mteditflow.rewards import TurnScores
from mteditflow.rewards.images import to_rgb


def destroyed_below(consistency: TurnScores, threshold: float) -> TurnScores:
    """Flag the turns whose consistency with the original is below a threshold.

    Args:
        consistency: scores against the reference image, [C, N].
        threshold: consistency below which a turn is destroyed, in the unit of the scores.

    Returns:
        1 where a turn is destroyed, else 0, [C, N]; lost and unmeasured as in ``consistency``.

    Raises:
        ValueError: the threshold is not finite.

    Example:
        >>> scores = TurnScores(torch.tensor([[0.9, 0.4, torch.nan]]), torch.ones(1, 3) > 0, {})
        >>> destroyed_below(scores, 0.5).score
        tensor([[0., 1., nan]])
    """
    check_number("threshold", threshold)
    flags = (consistency.score < threshold).to(consistency.score)
    score = torch.where(consistency.measured, flags, torch.nan)
    return TurnScores(score, consistency.turn_mask, consistency.lost)


def asks_for_no_change(chain: Chain) -> list[bool]:
    """Return for each turn, [N], whether it and all turns before it ask for no change."""
    asked = [name == NO_CHANGE for name in chain.task_types or ("",) * chain.turns]
    return [all(asked[: n + 1]) for n in range(chain.turns)]


def no_change_wear(chains: Sequence[Chain], images: Sequence[Sequence[Image.Image]]) -> TurnScores:
    """Measure wear at the turns up to which a chain has asked for no change.

    Args:
        chains: B chains; turns of the task type ``NO_CHANGE`` ask for no change.
        images: for each chain N + 1 images: the reference, then the result of each turn. An image
            of another size is resized to the reference (Lanczos).

    Returns:
        Mean absolute difference to the reference in [0, 1], [B, N], float32; unmeasured from the
        first turn on whose task type is another one or unknown.

    Raises:
        ValueError: a chain does not have one image more than turns.

    Example:
        >>> from mteditflow.chains import no_change_chains
        >>> gray = [Image.new("L", (8, 8), level) for level in (0, 51, 102)]
        >>> no_change_wear(no_change_chains(["7.png"], turns=2), [gray]).score
        tensor([[0.2000, 0.4000]])
    """
    most = max(chain.turns for chain in chains)
    score = torch.full((len(chains), most), torch.nan, dtype=torch.float32, device="cpu")
    exists = torch.zeros(len(chains), most, dtype=torch.bool, device="cpu")
    for row, (chain, own) in enumerate(zip(chains, images, strict=True)):
        if len(own) != chain.turns + 1:
            raise ValueError(
                f"images of chain {chain.id!r}: expected {chain.turns} after the reference, "
                f"got {len(own) - 1}"
            )
        exists[row, : chain.turns] = True
        original = _pixels(own[0], own[0].size)
        for n, counts in enumerate(asks_for_no_change(chain)):
            if counts:  # one image at a time, so that a long chain is never held as floats
                made = _pixels(own[n + 1], own[0].size)
                score[row, n] = wear(made[None, None], original[None])[0, 0]
    return TurnScores(score, exists, {})


def _pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Return an image resized to ``size`` (width, height) as float32 [3, height, width] in 0..1."""
    shown = to_rgb("image", image)
    if shown.size != size:
        shown = shown.resize(size, Image.Resampling.LANCZOS)
    pixels = torch.as_tensor(np.array(shown), dtype=torch.float32, device="cpu")
    return pixels.permute(2, 0, 1) / 255


SurvivalNumbers = tuple[list[Place], Interval, list[int]]  # names, values, chains, N + 2 of each


def survival_numbers(success: Tensor, judged: Tensor) -> SurvivalNumbers:
    """Compute survival by turn in percent, and mean and median turns survived.

    Args:
        success: turns that were followed, boolean [C, N].
        judged: turns that have a score, boolean [C, N].

    Returns:
        Names, intervals and numbers of chains at risk (for turns survived, those of turn 1).
    """
    turns = success.shape[1]
    places = [Place(SURVIVAL, None, turn) for turn in range(1, turns + 1)]
    places += [Place(SURVIVED, None, name) for name in (MEAN, MEDIAN)]
    at_risk = chains_at_risk(success, judged).long().tolist()
    return places, _survival(success, judged), [*at_risk, at_risk[0], at_risk[0]]


def survival_differences(before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> SurvivalNumbers:
    """Compute the paired differences of the numbers of ``survival_numbers``, after minus before.

    The interval is bootstrapped over chains; where that has no width, it is derived from the
    intervals of both (``interval_difference``). The count is the smaller number at risk.
    """

    def statistic(*samples: Tensor) -> Tensor:
        old, new = (_survival(*pair).estimate for pair in (samples[:2], samples[2:]))
        return new - old

    (places, old, at_risk), (_, new, also_at_risk) = (
        survival_numbers(*pair[:2]) for pair in (before, after)
    )
    found = interval_of(statistic, (*before[:2], *after[:2]))
    wide, flat = interval_difference(new, old), found.low == found.high
    ends = zip(found[1:], wide[1:], strict=True)
    low, high = (torch.where(flat, other, own) for own, other in ends)
    counts = [min(pair) for pair in zip(at_risk, also_at_risk, strict=True)]
    return places, Interval(found.estimate, low, high), counts


def _survival(success: Tensor, judged: Tensor) -> Interval:
    curve, found = survival_curve(success, valid=judged), turns_survived(success, valid=judged)
    ends = zip(curve, found.mean, found.median, strict=True)
    return Interval(*(torch.cat([100 * share, torch.stack(turns)]) for share, *turns in ends))
