"""Promotion of a student to teacher: outcomes of held-out sessions, and the rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mteditflow._checks import check_count, check_mask, check_rank
from mteditflow.metrics.long_chains import collapsed

SLACK = 1  # sessions by which one measure may get worse while the other one wins


class SessionCounts(NamedTuple):
    """Outcomes of sessions up to a turn.

    Attributes:
        successes: sessions in which every turn up to that turn succeeded.
        collapses: sessions that had collapsed by that turn.
    """

    successes: int
    collapses: int


def count_sessions(success: Tensor, degraded: Tensor, turn: int) -> SessionCounts:
    """Count the sessions that succeeded up to a turn, and those that had collapsed by it.

    A session collapses at the first of two degraded turns in a row, and stays collapsed. The count
    therefore depends on one turn more than ``turn``, unless that is the last.

    Args:
        success: turns whose instruction was followed, boolean [C, N] for C sessions.
        degraded: turns whose image is degraded, boolean [C, N].
        turn: turn to count up to, in [1, N].

    Raises:
        ValueError: shapes differ, or the turn is out of range.
        TypeError: a tensor is not boolean.

    Source: SR@k and CR@k of LME-Bench (arXiv 2609.35611); two degraded turns in a row are its rule
        for the promotion of a teacher.

    Example:
        >>> success = torch.tensor([[True, True, False], [True, False, True]])
        >>> degraded = torch.tensor([[False, False, True], [False, True, True]])
        >>> count_sessions(success, degraded, 2)
        SessionCounts(successes=1, collapses=1)
    """
    check_rank("success", success, 2, "[C, N]", maximum=2)
    check_mask("success", success, success.shape, "[C, N]")
    check_mask("degraded", degraded, success.shape, "[C, N]")
    check_count("turn", turn, high=success.shape[1])
    gone, _ = collapsed(degraded.long(), torch.ones_like(degraded))
    succeeded = success[:, :turn].all(dim=1)
    return SessionCounts(int(succeeded.sum()), int(gone[:, turn - 1].sum()))


class SessionGain(NamedTuple):
    """Gain of a student over its teacher up to a turn, in sessions.

    Attributes:
        successes: additional successes.
        collapses: avoided collapses, so that positive is better here, too.
    """

    successes: int
    collapses: int


def session_gain(student: SessionCounts, teacher: SessionCounts) -> SessionGain:
    """Return the gain of a student over its teacher on the same sessions.

    Example:
        >>> session_gain(SessionCounts(9, 2), SessionCounts(7, 5))
        SessionGain(successes=2, collapses=3)
    """
    return SessionGain(student.successes - teacher.successes, teacher.collapses - student.collapses)


Verdict = Literal["promote", "reject", "inconclusive"]


def promotion_at(
    gain: SessionGain, *, success_margin: int = 2, collapse_margin: int = 3
) -> Verdict:
    r"""Judge a student by its gain up to one turn.

    With :math:`\Delta SR` additional successes, :math:`\Delta CR` avoided collapses and margins
    :math:`\alpha` and :math:`\beta`:

    - inconclusive: :math:`-1 \le \Delta SR < \alpha` and :math:`-1 \le \Delta CR < \beta`
    - promote: :math:`\Delta SR \ge \alpha` and :math:`\Delta CR \ge -1`, or
      :math:`\Delta CR \ge \beta` and :math:`\Delta SR \ge -1`
    - reject: otherwise

    The paper's public code requires :math:`|\Delta SR| \le 1` in the second case of a promotion. It
    thus rejects students with :math:`2 \le \Delta SR < \alpha` and :math:`\Delta CR \ge \beta`,
    which the paper and this function promote.

    Args:
        gain: gain of the student over the teacher.
        success_margin: :math:`\alpha`, sessions, >= 1. The paper, with 23 sessions, has 2 for Qwen
            and FLUX, 3 for FireRed.
        collapse_margin: :math:`\beta`, sessions, >= 1. The paper has 3 for FLUX, 5 for Qwen and
            FireRed.

    Raises:
        ValueError: a margin is below 1.
        TypeError: a number is not an integer.

    Source: MT-OPSD (arXiv 2609.35611).

    Example:
        >>> [promotion_at(SessionGain(*x)) for x in ((2, -1), (1, 2), (1, -2))]
        ['promote', 'inconclusive', 'reject']
    """
    check_count("success_margin", success_margin)
    check_count("collapse_margin", collapse_margin)
    for name, value in zip(("successes", "collapses"), gain, strict=True):
        check_count(f"gain.{name}", value, low=-(2**31))
    more, fewer = gain
    if -SLACK <= more < success_margin and -SLACK <= fewer < collapse_margin:
        return "inconclusive"
    wins = more >= success_margin and fewer >= -SLACK
    lasts = fewer >= collapse_margin and more >= -SLACK
    return "promote" if wins or lasts else "reject"


def promotes(
    gains: Sequence[SessionGain], *, success_margin: int = 2, collapse_margin: int = 3
) -> bool:
    """Return whether a student replaces its teacher.

    The first conclusive verdict decides. If all are inconclusive, the teacher stays.

    Args:
        gains: gain up to each turn that is compared, in order of precedence: turns 10, 8 and 5 in
            the paper.
        success_margin: as in ``promotion_at``.
        collapse_margin: as in ``promotion_at``.

    Raises:
        ValueError: there is no gain, or a margin is below 1.
        TypeError: a number is not an integer.

    Source: MT-OPSD (arXiv 2609.35611).

    Example:
        >>> promotes([SessionGain(1, 0), SessionGain(2, 1), SessionGain(-5, -5)])
        True
    """
    if not gains:
        raise ValueError("gains: expected one for each turn that is compared, got none")
    margins = {"success_margin": success_margin, "collapse_margin": collapse_margin}
    verdicts = (promotion_at(gain, **margins) for gain in gains)
    return next((x for x in verdicts if x != "inconclusive"), "reject") == "promote"
