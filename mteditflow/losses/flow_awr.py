r"""FlowAWR: regression to the old policy's velocity, displaced by the exponential advantage.

With the displacement :math:`e = v - v_{old}` of the target from the old policy's velocity and the
``softmax_advantage`` A, the density ratio of the reward-tilted policy to the old one is 1 + A at a
clean sample. Its posterior mean given :math:`x_t` is :math:`\alpha(x_t)`, the ratio of the noisy
marginals. The exact velocity of the tilted policy is

.. math:: v_{opt} - v_{old} = E[A\,e \mid x_t] / \alpha(x_t)

``flow_awr_loss`` is minimal at :math:`v_{old} + E[A\,e \mid x_t]`. The direction of this
displacement is exact, and its length is off by the factor :math:`\alpha`. That factor has mean 1
over the old policy's states and tends to 1 at pure noise and for high temperatures.
``exact_flow_awr_loss`` is minimal at :math:`v_{opt}`.

Shapes: ``M`` rows (trajectory, turn, flow time), followed by any latent axes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mteditflow._checks import Numbers, check_values
from mteditflow._reduce import (
    row_displacements,
    row_error,
    row_mean_square,
    rows_mask,
    token_values,
    weighted_mean_square,
)


def flow_awr_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    target: Tensor,
    advantage: float | Numbers,
    *,
    valid: Numbers | None = None,
) -> Tensor:
    r"""Displaced regression, :math:`\mathrm{mean}(v_\theta - v_{old} - A\,(v - v_{old}))^2`.

    It needs no log-prob, no SDE step and no negative branch. An advantage of 1 regresses to the
    sample's own velocity, -1 to its mirror image :math:`2v_{old} - v`, and 0 to the old policy. At
    ``velocity == old_velocity`` the gradient is :math:`-2A\,(v - v_{old})` divided by the number of
    elements. The curvature is 2 over that number, whatever the advantage. With ``nft_beta=1`` and
    r = (1 + A)/2, ``nft_loss`` equals this loss plus a constant.

    Args:
        velocity: velocity of the policy being trained at the re-noised latent, [M, ...].
        old_velocity: velocity of the old policy at the same point; if the policy IS the old one,
            ``velocity.detach()`` saves a forward pass. Treated as a constant.
        target: ``velocity_target(clean, noise)``. Treated as a constant.
        advantage: any finite number per row: a number, [M] or [M, 1, ...], for example from
            ``softmax_advantage``; or one per token, [M, L, 1] or [M, 1, h, w] as
            ``region_advantage`` lays it out, which then applies inside the mean. Treated as a
            constant.
        valid: boolean, [M]; false rows give loss 0 and gradient 0, even if they hold NaN. Mask
            every row that must not be trained: advantage 0 would still pull it to the old policy.

    Returns:
        [M], float32 at least: mean over elements, unreduced over rows. Gradient flows to
        ``velocity`` alone.

    Raises:
        ValueError: shapes differ, an advantage is not finite.
        TypeError: a tensor is not floating point, the advantage is half precision, or the mask is
            not boolean.

    Source: FlowAWR (arXiv 2606.30376). The displaced target is the paper's; the exact form, without
    a weight of the flow time, is known from public code only.

    Example:
        >>> old, target = torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)
        >>> velocity = old.clone().requires_grad_()
        >>> loss = flow_awr_loss(velocity, old, target, torch.tensor([0.5]))
        >>> loss.sum().backward()
        >>> loss.detach(), velocity.grad
        (tensor([1.2500]), tensor([[0.5000, 1.5000]]))
    """
    moved, error = row_displacements(velocity, old_velocity, target, valid)
    advantage = _advantage(advantage, moved, -math.inf, valid)
    # v - v_old - A (target - v_old) = moved + A error, as error is v_old - target.
    return row_mean_square(torch.addcmul(moved, advantage, error)).to(moved.dtype)


def exact_flow_awr_loss(
    velocity: Tensor,
    target: Tensor,
    advantage: float | Numbers,
    *,
    valid: Numbers | None = None,
) -> Tensor:
    r"""Importance-weighted flow matching, :math:`(1 + A)\,\mathrm{mean}(v_\theta - v)^2`.

    It is minimal at the exact velocity of the reward-tilted policy. On-policy its expected gradient
    is that of ``flow_awr_loss``: if the old policy is optimal for its own samples, the 1 in the
    weight contributes no gradient in expectation, only variance. The curvature is 2(1 + A) over the
    number of elements. A sample of advantage -1 is therefore ignored, where ``flow_awr_loss``
    pushes away from it.

    Args:
        velocity: velocity of the policy being trained at the re-noised latent, [M, ...].
        target: ``velocity_target(clean, noise)``. Treated as a constant.
        advantage: one per row or token, >= -1, in the forms of ``flow_awr_loss``; for example from
            ``softmax_advantage`` without a gate. Treated as a constant.
        valid: as in ``flow_awr_loss``.

    Returns:
        [M], >= 0, float32 at least, unreduced over rows. Gradient flows to ``velocity`` alone.

    Raises:
        ValueError: shapes differ, an advantage is below -1 (the loss would have no minimum).
        TypeError: as in ``flow_awr_loss``.

    Source: this library's, from the reward-tilted policy of FlowAWR (arXiv 2606.30376).

    Example:
        >>> velocity = torch.tensor([[1.0, 3.0], [1.0, 3.0]])
        >>> exact_flow_awr_loss(velocity, torch.zeros(2, 2), torch.tensor([0.5, -1.0]))
        tensor([7.5000, 0.0000])
    """
    error = row_error(valid, velocity=velocity, target=target)
    weight = 1 + _advantage(advantage, error, -1.0, valid)
    return weighted_mean_square(error, weight).to(error.dtype)


def _advantage(advantage: float | Numbers, x: Tensor, low: float, valid: Numbers | None) -> Tensor:
    """Return checked, detached advantages per row or token, which broadcast over ``x``."""
    mask = rows_mask(valid, x)
    values = token_values("advantage", advantage, x, low=low, high=math.inf, valid=mask)
    check_values("advantage", values, values.isfinite(), "finite values where valid")
    return values
