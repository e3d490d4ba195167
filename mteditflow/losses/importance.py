r"""Truncated importance weights: correct for a sampler whose numerics differ from training."""

from __future__ import annotations

import torch
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_mask,
    check_full_precision,
    check_number,
    check_same_shape,
)


def truncated_importance_weight(
    old_log_prob: Tensor, sampling_log_prob: Tensor, *, cap: float, valid: Numbers | None = None
) -> Tensor:
    r"""Importance weight of a sample, :math:`\min(\pi_{old} / \pi_{sampler},\, cap)`.

    If the sampler differs from training (quantized or cached weights, stale rollouts), the log-prob
    recorded while sampling is not the log-prob of the old policy as training computes it. Multiply
    an unreduced loss by this weight if its ratio is formed with ``old_log_prob``. The weight is
    exactly 1 where both log-probs agree.

    Args:
        old_log_prob: log-prob of stored steps under the old policy as training computes it, any
            shape; float32 or float64.
        sampling_log_prob: of the same steps as recorded by the sampler, same shape and reduction.
        cap: largest weight, >= 1; 2 is usual.
        valid: boolean, shape of ``old_log_prob``; false entries get weight 0, even if they hold
            NaN.

    Returns:
        Shape of ``old_log_prob``, in [0, cap], detached.

    Raises:
        ValueError: shapes differ, or the cap is below 1.
        TypeError: half precision, or a mask that is not boolean.

    Source: truncated importance sampling (Ionides, 2008), as used between the rollout engine and
        the trainer in reinforcement learning of language models.

    Example:
        >>> import torch
        >>> recorded = torch.tensor([0.0, -1.0, 1.0])
        >>> truncated_importance_weight(torch.zeros(3), recorded, cap=2.0)
        tensor([1.0000, 2.0000, 0.3679])
    """
    check_full_precision(old_log_prob=old_log_prob, sampling_log_prob=sampling_log_prob)
    check_same_shape(old_log_prob=old_log_prob, sampling_log_prob=sampling_log_prob)
    check_number("cap", cap, low=1.0)
    weight = (old_log_prob.detach() - sampling_log_prob.detach()).exp().clamp(max=cap)
    if valid is None:
        return weight
    mask = as_mask("valid", valid, old_log_prob, "of old_log_prob")
    return torch.where(mask, weight, 0)
