r"""Flow-DPPO: a trust region on the exact divergence in place of a clipped ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_mask,
    check_full_precision,
    check_number,
    check_same_shape,
    check_values,
)
from mteditflow._reduce import broadcast_rows


def divergence_gated_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: float | Numbers,
    divergence: Tensor,
    *,
    threshold: float,
    valid: Numbers | None = None,
) -> Tensor:
    r"""Policy gradient :math:`-\rho A`, dropped where it leads further out of the trust region.

    A ratio is a single noisy sample of how far the policy has moved, whereas the divergence of two
    Gaussian steps is known exactly. A term is 0 where ``divergence > threshold`` AND the ratio has
    already moved in the direction of the advantage (above 1 for A > 0, below 1 for A < 0). Terms
    that lead back toward the old policy are always kept, and ratios are not clipped. If the
    threshold is never exceeded, the loss is :math:`-\rho A`, and its on-policy gradient is exactly
    ``-advantage``.

    Args:
        log_prob: log-prob of stored steps under the policy being trained, any shape such as
            [B, N, S] or rows [M]; float32 or float64.
        old_log_prob: log-prob of the same steps under the sampling policy, shape of ``log_prob``.
            Treated as a constant.
        advantage: one per step, shape of ``log_prob``; or a number; or one per row, in a leading
            part of that shape such as [B], with or without trailing axes of size one. Treated as a
            constant.
        divergence: ``gaussian_kl(mean, old_mean, std)`` of each step with the same reduction as the
            log-prob, shape of ``log_prob``. Treated as a constant.
        threshold: largest divergence of the trust region, >= 0; 1e-7 .. 1e-5 for means over
            elements.
        valid: boolean, shape of ``log_prob``; false entries give loss 0 and gradient 0, even if
            they hold NaN.

    Returns:
        Shape of ``log_prob``, unreduced. Gradient flows to ``log_prob`` alone.

    Raises:
        ValueError: shapes differ, the threshold is negative or not finite, a divergence is negative
            or NaN.
        TypeError: half precision, or a mask that is not boolean.

    Source: Flow-DPPO (arXiv 2606.11025), Eq. 17-18.

    Example:
        >>> log_prob = torch.tensor([0.1, 0.1], requires_grad=True)
        >>> loss = divergence_gated_loss(
        ...     log_prob,
        ...     torch.zeros(2),
        ...     torch.tensor([2.0, -2.0]),
        ...     torch.tensor([1e-3, 1e-3]),
        ...     threshold=1e-6,
        ... )
        >>> loss.sum().backward()
        >>> loss.detach(), log_prob.grad
        (tensor([0.0000, 2.2103]), tensor([0.0000, 2.2103]))
    """
    tensors = {"log_prob": log_prob, "old_log_prob": old_log_prob, "divergence": divergence}
    check_full_precision(**tensors)
    check_same_shape(**tensors)
    check_number("threshold", threshold, low=0.0)
    advantage = broadcast_rows("advantage", advantage, log_prob).detach()
    check_full_precision(advantage=advantage)
    log_ratio = log_prob - old_log_prob.detach()
    out = (divergence > threshold) & (log_ratio.sign() * advantage > 0)
    mask = as_mask("valid", valid, log_prob, "of log_prob")
    check_values("divergence", divergence, ~mask | (divergence >= 0), "values >= 0")
    dropped = out | ~mask
    # exp(0) where the ratio is not used: an infinite ratio times an advantage of 0 would be NaN,
    # and so would its gradient behind a mask.
    ratio = torch.where(dropped | (advantage == 0), 0, log_ratio).exp()
    loss = torch.where(dropped, 0, -ratio * advantage)
    # Under compilation values cannot be checked, and NaN > threshold is false: without this a NaN
    # divergence would count as inside the trust region.
    return torch.where(mask & divergence.isnan(), torch.nan, loss)
