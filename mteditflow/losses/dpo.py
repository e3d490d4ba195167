r"""Direct preference optimization of a flow, from pairs of a better and a worse sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mteditflow._checks import (
    Numbers,
    as_mask,
    as_numbers,
    check_floating,
    check_integers,
    check_number,
    check_rank,
    check_same_shape,
    check_step_values,
)
from mteditflow._reduce import row_squared_error


def dpo_loss(
    velocity: Tensor,
    reference_velocity: Tensor,
    target: Tensor,
    winner: Numbers,
    loser: Numbers,
    *,
    dpo_beta: float,
    valid: Numbers | None = None,
) -> Tensor:
    r"""Logistic loss of implicit rewards, :math:`-\log\mathrm{sigmoid}(r_w - r_l)`.

    The implicit reward of a row compares its matching loss with that of the reference,

    .. math:: r = (b / 2)\,(\mathrm{mean}(v_{ref} - v)^2 - \mathrm{mean}(v_\theta - v)^2)

    At ``velocity == reference_velocity`` the loss is log 2 and its gradient b/4 times that of the
    winner's flow-matching loss minus the loser's. A loss below log 2 means that the policy prefers
    the winner more than the reference does. Give both rows of a pair the same flow time and noise.
    The mean of the loss over flow times, noises and turns is an upper bound of the loss of the mean
    implicit reward (Jensen's inequality).

    Args:
        velocity: velocity of the policy being trained at re-noised latents, [M, ...]: winners and
            losers in any order. A row that belongs to several pairs is needed only once.
        reference_velocity: velocity of the reference at the same points. Treated as a constant.
        target: ``velocity_target(clean, noise)`` of each row. Treated as a constant.
        winner: row of the better sample of each pair, integer [P] of any width, P >= 1.
        loser: row of the worse sample of each pair, integer [P].
        dpo_beta: b > 0, strength of the implicit KL to the reference; 2000 and more are usual for
            means over elements.
        valid: boolean, [P]; false pairs give loss 0 and gradient 0. Rows that only such pairs use
            may hold NaN.

    Returns:
        [P], float32 at least, unreduced over pairs. Gradient flows to ``velocity`` alone.

    Raises:
        ValueError: shapes differ, an index is out of range, or ``dpo_beta`` is not positive.
        TypeError: a tensor is not floating point, an index not integer, or the mask not boolean.

    Source: Diffusion-DPO (arXiv 2311.12908); for flows with one beta for all flow times, Flow-DPO
        (arXiv 2501.13918).

    Example:
        >>> velocity = torch.tensor([[1.0], [1.0]], requires_grad=True)
        >>> winner, loser = torch.tensor([0]), torch.tensor([1])
        >>> loss = dpo_loss(
        ...     velocity, velocity.detach(), torch.zeros(2, 1), winner, loser, dpo_beta=4.0
        ... )
        >>> loss.sum().backward()
        >>> loss.detach(), velocity.grad.flatten()
        (tensor([0.6931]), tensor([ 2., -2.]))
    """
    check_floating(velocity=velocity, reference_velocity=reference_velocity, target=target)
    check_same_shape(velocity=velocity, reference_velocity=reference_velocity, target=target)
    check_rank("velocity", velocity, 2, "[M, ...]")
    check_number("dpo_beta", dpo_beta, low=0.0, open_low=True)
    winner, loser = (_rows(n, x, velocity) for n, x in (("winner", winner), ("loser", loser)))
    check_same_shape(winner=winner, loser=loser)
    mask = None if valid is None else as_mask("valid", valid, winner, "[P]")
    used = None if mask is None else _used_rows(mask, winner, loser, len(velocity))
    error = row_squared_error(used, velocity=velocity, target=target)
    reference_error = row_squared_error(used, reference_velocity=reference_velocity, target=target)
    reward = dpo_beta / 2 * (reference_error.detach() - error)
    margin = reward[winner] - reward[loser]
    # softplus(-m) = -log sigmoid(m), without overflow for large margins.
    return softplus(-margin) if mask is None else torch.where(mask, softplus(-margin), 0)


def _used_rows(valid: Tensor, winner: Tensor, loser: Tensor, rows: int) -> Tensor:
    """Mask of rows that a valid pair uses, boolean [M]."""
    pairs = torch.cat([winner, loser])
    used = torch.zeros(rows, dtype=torch.int64, device=valid.device)
    return used.index_add(0, pairs, valid.long().repeat(2)) > 0


def _rows(name: str, index: Numbers, velocity: Tensor) -> Tensor:
    """Return checked row numbers as int64, because torch treats a uint8 index as a mask."""
    index = as_numbers(name, index, device=velocity.device)
    check_integers(name, index, "row numbers")
    check_rank(name, index, 1, "[P]", maximum=1)
    index, rows = index.long(), len(velocity)
    check_step_values(name, index, (index >= 0) & (index < rows), f"rows in 0..{rows - 1}")
    return index
