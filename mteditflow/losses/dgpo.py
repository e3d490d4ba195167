r"""Direct group preference optimization: the better members of a group against the worse ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_row_ids,
    check_floating,
    check_number,
    check_rank,
    check_same_shape,
)
from mteditflow._reduce import group_mean, row_numbers, row_squared_error, rows_mask


def dgpo_loss(
    velocity: Tensor,
    reference_velocity: Tensor,
    target: Tensor,
    advantage: float | Numbers,
    group: Numbers,
    *,
    dgpo_beta: float,
    old_velocity: Tensor | None = None,
    ratio_clip: float | None = None,
    valid: Numbers | None = None,
) -> Tensor:
    r"""Advantage-weighted matching loss times a weight per group: :math:`\sigma(S_g)\,A_i\,l_i`.

    With the matching losses :math:`l = \mathrm{mean}(v_\theta - v)^2` and :math:`l_{ref}` of the
    reference, the weight is the sigmoid of a score of how badly the policy still ranks the group,

    .. math:: S_g = b \, \mathrm{mean}_{i \in g}\, A_i\,(l_i - l_{ref,i})

    The weight is detached. It is below 1/2 if the policy separates good from bad members better
    than the reference does, and near 0 once the group is solved. Summed over a group of G the
    gradient is G / b times that of :math:`-\log\mathrm{sigmoid}(-S_g)`, the Bradley-Terry loss of
    the better against the worse members; the factor b is left to the learning rate. In a group of
    two with advantages 1 and -1 the mean loss has 1 / b times the gradient of ``dpo_loss`` at
    ``dpo_beta = b``. At the reference the weight is 1/2, and the gradient is half that of
    advantage-weighted matching. With b near 0 the weight stays there; with a large b only groups
    that are ranked wrongly are trained.

    Advantages should sum to 0 in each group. The normalizing constants of the better and the worse
    members then cancel, and a constant added to the reference's losses changes nothing.
    ``group_advantage`` ensures this; a clamp afterwards violates it slightly. Give all rows of a
    group the same flow time and noise.

    Args:
        velocity: velocity of the policy being trained at re-noised latents, [M, ...].
        reference_velocity: velocity of the reference at the same points. Treated as a constant.
        target: ``velocity_target(clean, noise)`` of each row. Treated as a constant.
        advantage: one per row, [M] or [M, 1, ...], or a number; float32 or float64. Treated as a
            constant. The formulas assume the population std, as in ``group_advantage``.
        group: integer id of each row's group, [M], of any integer width. Rows of different turns,
            flow times or noises belong to different groups.
        dgpo_beta: b >= 0; the paper uses 100 for GenEval and OCR, 10 for PickScore. With a
            reference that follows the policy, thousands are usual.
        old_velocity: velocity of the sampling policy at the same points, for ``ratio_clip``.
            Treated as a constant.
        ratio_clip: half width, in (0, 1), of the range of :math:`\exp(l_{old} - l)` around 1.
            Outside it a good row is not pulled closer and a bad row not pushed further away.
            ``None``: no bound.
        valid: boolean, [M]; false rows give loss 0 and gradient 0, even if they hold NaN, and are
            excluded from the means of their groups.

    Returns:
        [M], float32 at least, unreduced over rows. Gradient flows to ``velocity`` alone. Where the
        bound applies, the gradient is 0 and the value is kept.

    Raises:
        ValueError: shapes differ, a number is out of range, or one of ``old_velocity`` and
            ``ratio_clip`` comes without the other.
        TypeError: a tensor is not floating point, the ids are not integers, or the mask not
            boolean.

    Source: DGPO (arXiv 2510.08425). The bound on the ratio is known only from the authors' public
        code, which added it after the paper. The relations to DPO and to advantage-weighted
        matching are derived here.

    Example:
        >>> velocity = torch.tensor([[1.0], [1.0]], requires_grad=True)
        >>> loss = dgpo_loss(
        ...     velocity, velocity.detach(), torch.zeros(2, 1), [1.0, -1.0], [0, 0], dgpo_beta=4.0
        ... )
        >>> loss.mean().backward()
        >>> loss.detach(), velocity.grad.flatten()
        (tensor([ 0.5000, -0.5000]), tensor([ 0.5000, -0.5000]))
    """
    check_floating(velocity=velocity, reference_velocity=reference_velocity, target=target)
    check_same_shape(velocity=velocity, reference_velocity=reference_velocity, target=target)
    check_rank("velocity", velocity, 2, "[M, ...]")
    check_number("dgpo_beta", dgpo_beta, low=0.0)
    mask, ids = rows_mask(valid, velocity), as_row_ids(group, velocity)
    error = row_squared_error(mask, velocity=velocity, target=target)
    reference_error = row_squared_error(mask, reference_velocity=reference_velocity, target=target)
    a = row_numbers("advantage", advantage, error, valid=mask).detach()
    behind = group_mean(a * (error - reference_error).detach(), ids, mask)
    weight = torch.sigmoid(dgpo_beta * behind).to(error)  # sigma(S_g), equal for all of a group
    if ratio_clip is not None:
        check_number("ratio_clip", ratio_clip, low=0.0, high=1.0, open_low=True, open_high=True)
    if (old_velocity is None) != (ratio_clip is None):
        raise ValueError(
            "old_velocity, ratio_clip: expected both or neither, got only "
            + ("old_velocity" if ratio_clip is None else "ratio_clip")
        )
    if old_velocity is not None and ratio_clip is not None:
        check_same_shape(velocity=velocity, old_velocity=old_velocity)
        old_error = row_squared_error(mask, old_velocity=old_velocity, target=target)
        log_ratio = (old_error - error).detach()
        too_near, too_far = log_ratio > math.log1p(ratio_clip), log_ratio < math.log1p(-ratio_clip)
        # Detach instead of zeroing: the value of the loss stays comparable between updates.
        error = torch.where(torch.where(a > 0, too_near, too_far), error.detach(), error)
    return weight * a * error
