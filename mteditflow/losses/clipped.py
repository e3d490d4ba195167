r"""The clipped surrogate of GRPO, on log-probs of denoising steps."""

from __future__ import annotations

import torch
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_mask,
    check_full_precision,
    check_same_shape,
)
from mteditflow._reduce import broadcast_rows, clipped_surrogate


def clipped_surrogate_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: float | Numbers,
    *,
    clip_low: float,
    clip_high: float,
    valid: Numbers | None = None,
) -> Tensor:
    r"""Clipped surrogate, :math:`-\min(\rho A, \mathrm{clip}(\rho, 1 - low, 1 + high)\,A)`.

    With :math:`\rho = \exp(log\_prob - old\_log\_prob)`. On-policy (:math:`\rho = 1`) the gradient
    with respect to ``log_prob`` is exactly ``-advantage``. Where clipping acts it is exactly 0:
    above 1 + high for an advantage > 0, below 1 - low for one < 0. Clipping acts on the log-ratio,
    before the exponential, so that an overflowing ratio cannot turn a clipped entry into NaN. Add
    ``kl_coef * gaussian_kl(...)`` and reduce with ``masked_mean(loss, valid)``.

    Args:
        log_prob: log-prob of stored steps under the policy being trained, any shape such as
            [B, N, S] or rows [M]; float32 or float64.
        old_log_prob: log-prob of the same steps under the sampling policy, with the same reduction
            over elements ("mean" or "sum"), shape of ``log_prob``. Treated as a constant.
        advantage: one per step, shape of ``log_prob``; or a number; or one per row, in a leading
            part of that shape such as [B], with or without trailing axes of size one. Treated as a
            constant.
        clip_low: how far the ratio may fall below 1, in [0, 1). 1e-4 .. 1e-5 goes with mean-reduced
            log-probs, 0.1 .. 0.2 with summed ones.
        clip_high: how far the ratio may rise above 1, >= 0.
        valid: boolean, shape of ``log_prob``; false entries give loss 0 and gradient 0, even if
            they hold NaN.

    Returns:
        Shape of ``log_prob``, unreduced. Gradient flows to ``log_prob`` alone.

    Raises:
        ValueError: shapes differ, or a clip range is out of bounds.
        TypeError: half precision, in which a ratio of 1 + 1e-4 rounds to 1, or a mask that is not
            boolean.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 4, 20-22; Flow-GRPO (arXiv 2505.05470).

    Example:
        >>> log_prob = torch.tensor([0.0, 0.3], requires_grad=True)
        >>> advantage = torch.tensor([2.0, 2.0])
        >>> loss = clipped_surrogate_loss(
        ...     log_prob, torch.zeros(2), advantage, clip_low=0.2, clip_high=0.2
        ... )
        >>> loss.sum().backward()
        >>> loss.detach(), log_prob.grad
        (tensor([-2.0000, -2.4000]), tensor([-2.,  0.]))
    """
    check_full_precision(log_prob=log_prob, old_log_prob=old_log_prob)
    check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob)
    advantage = broadcast_rows("advantage", advantage, log_prob)
    check_full_precision(advantage=advantage)
    old_log_prob, advantage = old_log_prob.detach(), advantage.detach()
    if valid is not None:
        valid = as_mask("valid", valid, log_prob, "of log_prob")
        log_prob, old_log_prob, advantage = (
            torch.where(valid, x, 0) for x in (log_prob, old_log_prob, advantage)
        )
    return clipped_surrogate(log_prob - old_log_prob, advantage, clip_low, clip_high)
