r"""Centered reward distillation: regression of group-centered implicit rewards to rewards."""

from __future__ import annotations

from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_real,
    as_row_ids,
    check_floating,
    check_full_precision,
    check_kind,
    check_number,
    check_rank,
    check_same_shape,
)
from mteditflow._reduce import (
    group_mean,
    in_float64,
    promote,
    row_mean_absolute,
    row_mean_square,
    row_numbers,
    rows_mask,
    valid_rows,
)


def crd_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    target: Tensor,
    advantage: float | Numbers,
    group: Numbers,
    *,
    crd_beta: float = 1.0,
    advantage_max: float = 5.0,
    adaptive: bool = False,
    floor: float = 1e-5,
    valid: Numbers | None = None,
) -> Tensor:
    r"""Squared error of centered implicit rewards, :math:`(A_{max}/b)\,(b\,q'_i - a'_i)^2`.

    The implicit reward of a row is the old policy's matching loss minus the current one,

    .. math:: q = \mathrm{mean}(v_{old} - v)^2 - \mathrm{mean}(v_\theta - v)^2,
        \qquad a = 1/2 + 1/2\,\mathrm{clip}(A / A_{max}, -1, 1)

    and a prime denotes the difference from the mean over the row's group. For an optimal policy,
    b q equals the reward up to the log of a normalizing constant that all rows of a prompt share.
    Centering removes it, so adding a constant to q or to A (away from the clip) changes nothing.
    The mean of q is detached; summed over a group, the gradient is the same as without the detach.
    The loss is 0 where b q' equals a'. At ``velocity == old_velocity`` it is A_max / b times the
    squared a'. Without ``adaptive`` its gradient there is that of
    :math:`(A_i - \mathrm{mean}\,A)\,l_i` with the matching loss
    :math:`l = \mathrm{mean}(v_\theta - v)^2`, as in advantage-weighted matching, for any b and
    A_max (while no A is clipped).

    Args:
        velocity: velocity of the policy being trained at re-noised latents, [M, ...].
        old_velocity: velocity of the old policy at the same points; if the policy IS the old one,
            ``velocity.detach()`` saves a forward pass. Treated as a constant.
        target: ``velocity_target(clean, noise)`` of each row. Treated as a constant.
        advantage: one per row, [M] or [M, 1, ...], or a number; float32 or float64. Treated as a
            constant.
        group: integer id of the rows that are centered together, [M], of any integer width: the
            rows of one prompt, turn, flow time and noise. Equal ids center over the whole batch.
        crd_beta: b > 0, reward per unit of implicit reward; a large b keeps the policy near the old
            one.
        advantage_max: A_max > 0, the advantage at which a saturates.
        adaptive: whether both errors in q are divided by their own detached mean absolute error,
            which makes q less dependent on the flow time.
        floor: lower bound of that divisor, > 0; used only if ``adaptive``.
        valid: boolean, [M]; false rows give loss 0 and gradient 0, even if they hold NaN, and are
            excluded from the means of their groups.

    Returns:
        [M], >= 0, float32 at least, unreduced over rows. Gradient flows to ``velocity`` alone.

    Raises:
        ValueError: shapes differ or a number is out of range.
        TypeError: a tensor is not floating point, the ids are not integers, or the mask not
            boolean.

    Source: CRD (arXiv 2603.14128), which centers by prompt. The scales, the division by mean
        absolute errors and its floor are known from a public implementation only. That
        implementation centers over all gathered rows; its other centering sets (by sign or by
        softmax of advantages) are not offered here. The limits are derived here.

    Example:
        >>> import torch
        >>> old, target = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
        >>> velocity = old.clone().requires_grad_()
        >>> loss = crd_loss(velocity, old, target, [1.0, -1.0], [0, 0])
        >>> loss.sum().backward()  # 5 * 0.1 ** 2; the advantages times 2 * velocity
        >>> loss.detach(), velocity.grad.flatten()
        (tensor([0.0500, 0.0500]), tensor([ 2., -4.]))
    """
    check_floating(velocity=velocity, old_velocity=old_velocity, target=target)
    check_same_shape(velocity=velocity, old_velocity=old_velocity, target=target)
    check_rank("velocity", velocity, 2, "[M, ...]")
    check_number("crd_beta", crd_beta, low=0.0, open_low=True)
    check_number("advantage_max", advantage_max, low=0.0, open_low=True)
    check_number("floor", floor, low=0.0, open_low=True)
    check_kind("adaptive", adaptive, bool, "True or False")
    mask, ids = rows_mask(valid, velocity), as_row_ids(group, velocity)
    v, v_old, v_target = promote(velocity, old_velocity.detach(), target.detach())
    a = row_numbers("advantage", advantage, v.flatten(1)[:, 0], valid=mask).detach()
    wanted = (a / (2 * advantage_max)).clamp(-0.5, 0.5)  # a - 1/2: the 1/2 cancels in a'
    q = -_error(valid_rows(mask, v - v_target), adaptive, floor)
    q = q + _error(valid_rows(mask, v_old - v_target), adaptive, floor)
    residual = crd_beta * (q - group_mean(q.detach(), ids, mask)) - (
        wanted - group_mean(wanted, ids, mask)
    )
    # The scale makes the gradient at the old policy independent of b and A_max.
    loss = residual.square() * (advantage_max / crd_beta)
    return (loss if mask is None else loss.where(mask, 0)).to(v.dtype)


def kl_coef_by_reward(
    advantage: Numbers, *, kl_coef: float, kl_floor: float = 1e-4, advantage_max: float = 5.0
) -> Tensor:
    r"""Per-row weight of the KL, growing with the row's reward from ``kl_floor`` to ``kl_coef``.

    .. math:: c_i = c_{min} + a_i\,(c - c_{min}), \qquad
        a_i = 1/2 + 1/2\,\mathrm{clip}(A_i / A_{max}, -1, 1)

    Good rows are held near the reference more strongly than bad ones, which have to move.

    Args:
        advantage: any shape, float32 or float64, or lists of numbers; integers count as float32.
            Treated as a constant.
        kl_coef: weight of the best rows, >= ``kl_floor``; 0.1 in public code.
        kl_floor: weight of the worst rows, >= 0.
        advantage_max: A_max > 0, the advantage at which the weight saturates.

    Returns:
        Shape of ``advantage``, in [kl_floor, kl_coef], detached.

    Raises:
        ValueError: a number is out of range.
        TypeError: half precision.

    Source: the reward-adaptive KL of CRD (arXiv 2603.14128), in the form of a public
        implementation, whose KL is to the pretrained velocity under classifier-free guidance.

    Example:
        >>> import torch
        >>> kl_coef_by_reward(torch.tensor([-9.0, 0.0, 5.0]), kl_coef=0.5, kl_floor=0.1)
        tensor([0.1000, 0.3000, 0.5000])
    """
    advantage = as_real("advantage", advantage)
    check_full_precision(advantage=advantage)
    check_number("kl_floor", kl_floor, low=0.0)
    check_number("kl_coef", kl_coef, low=kl_floor)
    check_number("advantage_max", advantage_max, low=0.0, open_low=True)
    (exact,) = in_float64(advantage.detach())
    share = 0.5 + 0.5 * (exact / advantage_max).clamp(-1, 1)
    return (kl_floor + share * (kl_coef - kl_floor)).to(advantage)


def _error(error: Tensor, adaptive: bool, floor: float) -> Tensor:
    """Mean square of each row, divided by its detached mean absolute value if ``adaptive``."""
    mean_square = row_mean_square(error)
    return mean_square / row_mean_absolute(error).clamp(min=floor) if adaptive else mean_square
