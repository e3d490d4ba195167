r"""Diagnostics of a training run: ratios, clipping, group spread, balance of rewards."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_mask,
    as_real,
    as_rewards,
    check_full_precision,
    check_number,
    check_rank,
    check_rewards,
    check_same_shape,
)
from mteditflow._reduce import in_float64, masked_mean
from mteditflow.advantages.group import group_advantage, group_std


@dataclass(frozen=True)
class RatioCheck:
    r"""Verdict on the ratios of a fresh rollout.

    Attributes:
        deviation: largest \|ratio - 1\| of each denoising step, [S], float64; NaN where no entry
            is valid, infinite where a log-prob is NaN.
        tolerance: the deviation allowed.
        ok: whether every step is within the tolerance.
        verdict: the same as a sentence, with likely causes if it fails.
    """

    deviation: Tensor
    tolerance: float
    ok: bool
    verdict: str


@torch.no_grad()
def check_ratio(
    log_prob: Tensor,
    old_log_prob: Tensor,
    *,
    clip: float,
    valid: Numbers | None = None,
    share: float = 0.1,
) -> RatioCheck:
    r"""Check that the ratio is 1 before the first update.

    Replay a fresh rollout with the policy that sampled it, and compare log-probs. If the deviation
    reaches the clip range, the surrogate clips numerical noise. The verdict lists the usual causes.

    Args:
        log_prob: replayed log-prob, [..., S] with the denoising steps last.
        old_log_prob: log-prob stored by the rollout, shape of ``log_prob``.
        clip: the smaller clip range of the loss, > 0.
        valid: boolean, shape of ``log_prob``: steps that exist and have a density.
        share: allowed deviation, as a share of ``clip``, >= 0.

    Returns:
        RatioCheck.

    Raises:
        ValueError: shapes differ, there is no axis of steps, a number is out of range, or no entry
            is valid.
        TypeError: half precision, or a mask that is not boolean.

    Source: Flow-GRPO (arXiv 2505.05470): the ratio at the first update.

    Example:
        >>> stored = torch.zeros(2, 3)
        >>> check_ratio(stored, stored, clip=1e-4).ok
        True
        >>> check_ratio(stored + torch.tensor([0.0, 0.0, 1e-3]), stored, clip=1e-4).ok
        False
    """
    log_ratio, mask = _log_ratio(log_prob, old_log_prob, valid)
    check_rank("log_prob", log_prob, 1, "[..., S]")
    check_number("clip", clip, low=0.0, open_low=True)
    check_number("share", share, low=0.0)
    distance = log_ratio.expm1().abs()
    # NaN is the worst deviation; comparisons with it would be false and pass.
    distance = torch.where(distance.isnan(), torch.inf, distance)
    distance = torch.where(mask, distance, -1).reshape(-1, log_prob.shape[-1]).amax(dim=0)
    if bool((distance < 0).all()):
        raise ValueError("valid: expected at least one valid entry, got none")
    deviation = torch.where(distance < 0, torch.nan, distance)
    worst, step = float(distance.max()), int(distance.argmax())
    tolerance = share * clip
    ok = worst <= tolerance
    verdict = f"largest |ratio - 1| is {worst:.3g} at step {step}; allowed is {tolerance:.3g}"
    if not ok:
        verdict += (
            ". The replay is not the rollout: look for another solver, noise level or reduction, "
            "latents rounded after the log-prob, another dtype or attention kernel, dropout, "
            "another batch composition, a missing guidance branch, or weights changed since the "
            "rollout"
        )
    return RatioCheck(deviation, tolerance, ok, verdict)


@torch.no_grad()
def clip_fraction(
    log_prob: Tensor,
    old_log_prob: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    valid: Numbers | None = None,
) -> tuple[Tensor, Tensor]:
    """Shares of steps whose ratio lies below and above the clip range.

    Args:
        log_prob: log-prob under the policy being trained, any shape.
        old_log_prob: log-prob under the sampling policy, same shape.
        clip_low: as in ``clipped_surrogate_loss``.
        clip_high: as in ``clipped_surrogate_loss``.
        valid: boolean, same shape.

    Returns:
        (below, above), scalars in [0, 1]; 0 without a valid entry, NaN if a valid log-prob is NaN.
        The loss clips only those steps whose advantage would move the ratio further out.

    Raises:
        ValueError: shapes differ, or a clip range is out of bounds.
        TypeError: half precision, or a mask that is not boolean.

    Example:
        >>> log_ratio = torch.tensor([-0.5, 0.0, 0.0, 0.5])
        >>> clip_fraction(log_ratio, torch.zeros(4), clip_low=0.2, clip_high=0.2)
        (tensor(0.2500), tensor(0.2500))
    """
    check_number("clip_low", clip_low, low=0.0, high=1.0, open_high=True)
    check_number("clip_high", clip_high, low=0.0)
    log_ratio, mask = _log_ratio(log_prob, old_log_prob, valid)
    shares = (
        masked_mean(torch.where(log_ratio.isnan(), torch.nan, outside.double()), mask).to(log_prob)
        for outside in (log_ratio < math.log1p(-clip_low), log_ratio > math.log1p(clip_high))
    )
    below, above = shares
    return below, above


@torch.no_grad()
def approximate_kl(
    log_prob: Tensor, old_log_prob: Tensor, *, valid: Numbers | None = None
) -> Tensor:
    r"""Estimate of KL(old || current) from the old policy's samples.

    It is the mean of :math:`\rho - 1 - \log\rho`, which is never negative. For "sum" log-probs it
    is an unbiased estimate of the joint KL. For "mean" log-probs it is no KL, since :math:`\rho` is
    then a geometric mean of ratios over elements; it is small, and only its trend is informative.

    Args:
        log_prob: log-prob under the policy being trained, any shape.
        old_log_prob: log-prob under the sampling policy, same shape.
        valid: boolean, same shape.

    Returns:
        Scalar, >= 0; 0 without a valid entry.

    Raises:
        ValueError: shapes differ.
        TypeError: half precision, or a mask that is not boolean.

    Source: the k3 estimator, http://joschu.net/blog/kl-approx.html.

    Example:
        >>> approximate_kl(torch.tensor([0.0, 1.0]), torch.zeros(2))
        tensor(0.3591)
    """
    log_ratio, mask = _log_ratio(log_prob, old_log_prob, valid)
    return masked_mean(log_ratio.expm1() - log_ratio, mask).to(log_prob)


@torch.no_grad()
def zero_variance_share(reward: Numbers, group: Numbers, *, valid: Numbers | None = None) -> Tensor:
    """Share of valid trajectories in uninformative groups, whose rewards are all equal.

    Args:
        reward: [B], float32 or float64, finite where valid.
        group: integer group ids, [B].
        valid: boolean, [B].

    Returns:
        Scalar in [0, 1]; groups with fewer than two valid members count as uninformative. 0 without
        a valid trajectory.

    Raises:
        ValueError: shapes do not match, a valid reward is not finite.
        TypeError: a dtype is not the one stated.

    Example:
        >>> zero_variance_share(torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1]))
        tensor(0.5000)
    """
    reward, group, valid = as_rewards(reward, group, valid)
    (exact,) = in_float64(reward)
    std = group_std(exact, group, valid=valid.to(exact.device)).to(reward.device)
    return masked_mean(torch.where(std.isnan(), std, (std == 0).to(std)), valid).to(reward)


@torch.no_grad()
def variance_ratio(
    reward: Numbers, other: Numbers, group: Numbers, *, valid: Numbers | None = None
) -> Tensor:
    """Ratio of the within-group variances of two rewards.

    If it is far from 1, one reward dominates the other in reward-level fusion. The paper reports
    5.8 for instruction following over content consistency.

    Args:
        reward: numerator, [B], float32 or float64, finite where valid.
        other: denominator, [B].
        group: integer group ids, [B].
        valid: boolean, [B].

    Returns:
        Scalar >= 0; infinite where only ``other`` is constant, NaN where both are.

    Raises:
        ValueError: shapes do not match, a valid reward is not finite.
        TypeError: a dtype is not the one stated.

    Source: MT-EditFlow (arXiv 2606.01985), its comparison of fusion levels.

    Example:
        >>> reward, other = torch.tensor([0.0, 4.0]), torch.tensor([1.0, 3.0])
        >>> variance_ratio(reward, other, torch.tensor([0, 0]))
        tensor(4.)
    """
    a, b = _deviations(reward, other, group, valid)
    # Both sums run over the same entries, so their counts cancel in the ratio.
    top, bottom = (_root_mean_square(x) for x in (a, b))
    return (top / bottom).square().to(as_real("reward", reward))


@torch.no_grad()
def advantage_correlation(
    reward: Numbers, other: Numbers, group: Numbers, *, valid: Numbers | None = None
) -> Tensor:
    """Correlation of two rewards within groups: negative if one rises at the other's expense.

    Args:
        reward: [B], float32 or float64, finite where valid.
        other: [B].
        group: integer group ids, [B].
        valid: boolean, [B].

    Returns:
        Scalar in [-1, 1], of the rewards' deviations from their group means; NaN if a reward is
        constant in every group.

    Raises:
        ValueError: shapes do not match, a valid reward is not finite.
        TypeError: a dtype is not the one stated.

    Example:
        >>> reward, other = torch.tensor([0.0, 1.0]), torch.tensor([0.9, 0.7])
        >>> advantage_correlation(reward, other, torch.tensor([0, 0]))
        tensor(-1.)
    """
    a, b = (x / _root_mean_square(x) for x in _deviations(reward, other, group, valid))
    return (a * b).mean().to(as_real("reward", reward))


def _deviations(
    reward: Numbers, other: Numbers, group: Numbers, valid: Numbers | None
) -> tuple[Tensor, Tensor]:
    """Deviations of two rewards from their group means, 0 where invalid, in float64."""
    first, ids, mask = as_rewards(reward, group, valid)
    like = first if isinstance(reward, Tensor) else None
    pair = {"reward": first, "other": as_real("other", other, like=like)}
    check_rewards(pair, ids, mask)
    exact = in_float64(ids, mask, *pair.values())
    a, b = (group_advantage(x, exact[0], valid=exact[1], std="none") for x in exact[2:])
    return a, b


def _root_mean_square(x: Tensor) -> Tensor:
    """Root mean square of all entries."""
    # In units of the largest entry, whose square may overflow.
    peak = x.abs().max()
    return peak * (x / torch.where(peak > 0, peak, 1)).square().mean().sqrt()


def _log_ratio(
    log_prob: Tensor, old_log_prob: Tensor, valid: Numbers | None
) -> tuple[Tensor, Tensor]:
    """Return the checked log-ratio and mask.

    In float64, because ``exp(l) - 1 - l``, about ``l^2 / 2``, cancels in float32 for tiny l.
    """
    check_full_precision(log_prob=log_prob, old_log_prob=old_log_prob)
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob)
    mask = as_mask("valid", valid, log_prob, "of log_prob")
    new, old, mask = in_float64(log_prob, old_log_prob, mask)
    return new - old, mask
