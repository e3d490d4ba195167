"""Learning-rate schedules over the rounds of a run: warm-up, then constant, linear or cosine."""

from __future__ import annotations

import math
from typing import Literal, get_args

from mteditflow._checks import check_choice, check_count, check_number

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate_share(
    done: int, rounds: int, *, schedule: Schedule = "linear", warmup: int = 0, final: float = 1.0
) -> float:
    r"""Return the share of the peak learning rate in a round.

    With :math:`w` rounds of warm-up the share is :math:`(k + 1) / (w + 1)` in rounds :math:`k < w`,
    so that no round has learning rate 0. From round :math:`w`, the first at the peak, to the last
    round it goes from 1 to :math:`f`. With :math:`p = (k - w) / (rounds - 1 - w)`:

    - constant: 1
    - linear: :math:`1 - (1 - f)\,p`
    - cosine: :math:`f + (1 - f)\,(1 + \cos \pi p) / 2`

    Args:
        done: completed rounds :math:`k`, in [0, rounds).
        rounds: rounds of the whole run, >= 1.
        schedule: "constant", "linear" or "cosine".
        warmup: rounds of warm-up, in [0, rounds).
        final: share :math:`f` in the last round, in [0, 1]; must be 1 for "constant".

    Returns:
        Share in [0, 1], a plain number.

    Raises:
        ValueError: a number is out of range, there is no such schedule, or ``final`` is below 1 for
            a constant one.

    Source: Loshchilov and Hutter (2017), arXiv 1608.03983, eq. 5, for the cosine.

    Example:
        >>> [learning_rate_share(k, 5, warmup=1, final=0.25) for k in range(5)]
        [0.5, 1.0, 0.75, 0.5, 0.25]
        >>> [round(learning_rate_share(k, 3, schedule="cosine", final=0.0), 3) for k in range(3)]
        [1.0, 0.5, 0.0]
    """
    check_choice("schedule", schedule, get_args(Schedule))
    check_count("rounds", rounds, low=1)
    check_count("warmup", warmup, low=0, high=rounds - 1)
    check_count("done", done, low=0, high=rounds - 1)
    check_number("final", final, low=0.0, high=1.0)
    if schedule == "constant" and final != 1:
        raise ValueError(f"final: expected 1 for a constant schedule, got {final!r}")
    if done < warmup:
        return (done + 1) / (warmup + 1)
    # The guard is for a single round after the warm-up, which is trained at the peak.
    progress = (done - warmup) / max(rounds - 1 - warmup, 1)
    if schedule == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
    return 1 - (1 - final) * progress
