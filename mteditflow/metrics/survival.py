r"""Survival of chains: turns that succeed before the first failure, with lost turns censored.

If every turn has a score, the Kaplan-Meier estimate S(k) is IF(k), also called SR@k. If turns were
lost, it also uses the turns of a chain before the loss, and its failure if that came first.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from mteditflow._checks import Numbers, check_number
from mteditflow.metrics.intervals import Interval, alike_interval, wilson_interval
from mteditflow.metrics.shares import success_and_mask


class TurnsSurvived(NamedTuple):
    """Number of turns that succeed before the first failure, at most N; scalars, float64.

    Attributes:
        mean: the restricted mean, in [0, N].
        median: largest number of turns that at least half of the chains survive, in 0..N; N means N
            or more.
    """

    mean: Interval
    median: Interval


def survival_curve(
    success: Numbers, *, valid: Numbers | None = None, confidence: float = 0.95
) -> Interval:
    r"""Kaplan-Meier estimate of the share of chains that survive turns 1 to k.

    With :math:`n_t` chains at risk at turn t, of which :math:`d_t` fail there,

    .. math:: S(k) = \prod_{t \le k} \Big(1 - \frac{d_t}{n_t}\Big), \qquad
        v(k) = \sum_{t \le k} \frac{d_t}{n_t (n_t - d_t)}

    and the interval is Greenwood's on the scale of :math:`\log(-\log S)`:
    :math:`S^{\exp(\pm z \sqrt v / \log S)}`.

    If S is 0 or 1, that interval does not exist. It is then Wilson's interval of S over the chains
    whose outcome by turn k is known.

    Args:
        success: 0 or 1 per turn, [C, N]; boolean, integer or floating point.
        valid: boolean, [C, N]. A chain is at risk at a valid turn if all earlier turns were valid
            and succeeded. Its first invalid turn censors it. The loss of a score must be
            independent of success. A chain shorter than N is censored at its end.
        confidence: mass of the interval, between 0 and 1.

    Returns:
        Interval of shares in [0, 1], each [N], float64. The estimate is non-increasing, and equals
        IF if all turns are valid. NaN from the first turn at which no chain is at risk, unless S is
        already 0.

    Raises:
        ValueError: wrong shape, a value other than 0 and 1, or a number out of range.
        TypeError: ``valid`` is not boolean.

    Source: Kaplan and Meier, J. Am. Stat. Assoc. 53:457 (1958); Kalbfleisch and Prentice, The
        Statistical Analysis of Failure Time Data (1980), for the transformed interval.

    Example:
        >>> success = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 0]])
        >>> valid = torch.tensor([[True, True], [True, True], [True, False], [True, True]])
        >>> survival_curve(success, valid=valid).estimate  # 3/4; 3/4 * 1/2
        tensor([0.7500, 0.3750], dtype=torch.float64)
    """
    check_number("confidence", confidence, low=0.0, high=1.0, open_low=True, open_high=True)
    at_risk, failed = _at_risk(success, valid)
    return _curve(at_risk, failed, confidence)


def turns_survived(
    success: Numbers, *, valid: Numbers | None = None, confidence: float = 0.95
) -> TurnsSurvived:
    r"""Mean and median number of turns that succeed before the first failure, at most N.

    The mean is :math:`\sum_{k=1}^N S(k)` with the Kaplan-Meier estimate S; its variance is
    :math:`\sum_t \big(\sum_{k \ge t} S(k)\big)^2 d_t / (n_t (n_t - d_t))`. The median is the
    largest k with S(k) >= 1/2; its interval is that of the ends of the interval of S (Brookmeyer
    and Crowley).

    Args:
        success: 0 or 1 per turn, [C, N]; boolean, integer or floating point.
        valid: boolean, [C, N], as in ``survival_curve``.
        confidence: mass of the intervals, between 0 and 1.

    Returns:
        Both with intervals, scalars, float64, in turns. The interval of the mean lies in [0, N]. If
        its variance is 0, a normal interval would have no width, and the interval of a bounded mean
        is used. NaN if S is not known at a turn that is needed.

    Raises:
        ValueError: wrong shape, a value other than 0 and 1, or a number out of range.
        TypeError: ``valid`` is not boolean.

    Source: Klein and Moeschberger, Survival Analysis (2003), section 4.5; Brookmeyer and Crowley,
        Biometrics 38:29 (1982).

    Example:
        >>> found = turns_survived(torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1]]))
        >>> float(found.mean.estimate), float(found.median.estimate)  # 2, 1, 3 and 0 turns
        (1.5, 2.0)
    """
    check_number("confidence", confidence, low=0.0, high=1.0, open_low=True, open_high=True)
    at_risk, failed = _at_risk(success, valid)
    curve = _curve(at_risk, failed, confidence)
    return TurnsSurvived(
        _mean(curve.estimate, at_risk, failed, confidence),
        Interval(*(_median(part) for part in curve)),
    )


def chains_at_risk(success: Numbers, valid: Numbers | None = None) -> Tensor:
    """Count the chains at risk at each turn of ``survival_curve``, [N], float64."""
    return _at_risk(success, valid)[0]


def _at_risk(success: Numbers, valid: Numbers | None) -> tuple[Tensor, Tensor]:
    """Count the chains at risk at each turn, and those of them that fail there: [N], float64."""
    score, mask = success_and_mask("success", success, valid)
    survived = torch.where(mask, score, torch.zeros_like(score)).double()
    before = torch.cat([torch.ones_like(survived[:, :1]), survived[:, :-1]], dim=1).cumprod(dim=1)
    at_risk = before * mask
    return at_risk.sum(dim=0), (at_risk * (1 - survived)).sum(dim=0)


def _curve(at_risk: Tensor, failed: Tensor, confidence: float) -> Interval:
    nobody = at_risk == 0
    share = torch.where(nobody, 1, 1 - failed / at_risk).cumprod(dim=0)
    share = torch.where(nobody & (share > 0), torch.nan, share)
    log_share = share.log()
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    stretch = z * _greenwood(at_risk, failed).cumsum(dim=0).sqrt() / log_share.abs()
    # S^exp(+-z sqrt(v) / |log S|): S < 1, so the larger exponent gives the lower end.
    low, high = (share ** (sign * stretch).exp() for sign in (1, -1))
    known = _known(at_risk, failed)
    edge, (_, least, most) = (share == 0) | (share == 1), _share_interval(share, known, confidence)
    low, high = torch.where(edge, least, low), torch.where(edge, most, high)
    return Interval(share, *(torch.where(share.isnan(), share, x) for x in (low, high)))


def _greenwood(at_risk: Tensor, failed: Tensor) -> Tensor:
    """Terms of Greenwood's sum; 0 where no chain fails, and where all do (S is 0 from there on)."""
    none = (failed == 0) | (failed == at_risk)
    return torch.where(none, 0, failed / (at_risk * (at_risk - failed)))


def _known(at_risk: Tensor, failed: Tensor) -> Tensor:
    """Count the chains whose survival to each turn is known, [N]."""
    # Those that failed by then, and those at risk that did not fail.
    return failed.cumsum(dim=0) + at_risk - failed


def _share_interval(share: Tensor, known: Tensor, confidence: float) -> Interval:
    """Wilson's interval of shares over ``known`` chains."""
    return wilson_interval(share.nan_to_num() * known, known, confidence=confidence)


def _mean(share: Tensor, at_risk: Tensor, failed: Tensor, confidence: float) -> Interval:
    mean, turns = share.sum(), len(share)
    later = share.flip(0).cumsum(dim=0).flip(0)  # sum over k >= t of S(k)
    variance = (later.square() * _greenwood(at_risk, failed)).sum()
    half = NormalDist().inv_cdf((1 + confidence) / 2) * variance.sqrt()
    alike = alike_interval(
        mean, _known(at_risk, failed)[-1], (0.0, float(turns)), confidence=confidence
    )
    low, high = ((mean + sign * half).clamp(0, turns) for sign in (-1, 1))
    flat = variance == 0
    return Interval(mean, torch.where(flat, alike.low, low), torch.where(flat, alike.high, high))


def _median(share: Tensor) -> Tensor:
    """Count the leading turns whose share is at least 1/2; NaN if an unknown share decides it."""
    rounding = len(share) * torch.finfo(share.dtype).eps  # error bound of a product of N factors
    enough, unknown = share >= 0.5 - rounding, share.isnan()
    count = enough.long().cumprod(dim=0).sum().double()
    open_end = ((enough | unknown).long().cumprod(dim=0).bool() & unknown).any()
    return torch.where(open_end, torch.nan, count)
