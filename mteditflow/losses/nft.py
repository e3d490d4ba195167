r"""DiffusionNFT: RL on the forward process, without log-probs or a special sampler.

Draw a flow time and fresh noise, re-noise the rollout's clean latent, and pull the velocity toward
that sample or push it away, according to the sample's optimality r. With ``b = nft_beta``:

.. math:: v_+ = (1 - b)\,v_{old} + b\,v_\theta, \qquad v_- = (1 + b)\,v_{old} - b\,v_\theta

Shapes: ``M`` rows (trajectory, turn, flow time), followed by any latent axes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_real,
    check_full_precision,
    check_number,
)
from mteditflow._reduce import (
    in_float64,
    row_displacements,
    row_mean_absolute,
    row_mean_square,
    row_squared_error,
    row_values,
    rows_mask,
    token_values,
    weighted_mean_square,
)


def optimality_probability(advantage: Numbers, *, advantage_max: float = 5.0) -> Tensor:
    r"""Probability that a sample is optimal.

    .. math:: r = 1/2 + 1/2\,\mathrm{clip}(A / A_{max}, -1, 1)

    Args:
        advantage: any shape, float32 or float64, or lists of numbers; integers count as float32.
            Treated as a constant.
        advantage_max: A_max > 0, the advantage at which r saturates.

    Returns:
        Shape of ``advantage``, in [0, 1], detached; 1/2 where the advantage is 0.

    Raises:
        ValueError: ``advantage_max`` is not positive.
        TypeError: half precision.

    Source: DiffusionNFT (arXiv 2509.16117); MT-EditFlow (arXiv 2606.01985), Eq. 23.

    Example:
        >>> optimality_probability(torch.tensor([-9.0, 0.0, 2.5]))
        tensor([0.0000, 0.5000, 0.7500])
    """
    advantage = as_real("advantage", advantage)
    check_full_precision(advantage=advantage)
    check_number("advantage_max", advantage_max, low=0.0, open_low=True)
    # In float64, because an A_max > 0 may be 0 in float32.
    (exact,) = in_float64(advantage.detach())
    return (0.5 + 0.5 * (exact / advantage_max).clamp(-1, 1)).to(advantage)


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    target: Tensor,
    r: float | Numbers,
    *,
    nft_beta: float,
    valid: Numbers | None = None,
) -> Tensor:
    r"""Plain NFT loss, :math:`r\,\lVert v_+ - v\rVert^2 + (1 - r)\,\lVert v_- - v\rVert^2`.

    Computed by completing the square. With the old policy's error :math:`e = v_{old} - v` and
    :math:`c = 2r - 1` the loss is

    .. math:: b^2\,\lVert v_\theta - v_{old} + (c/b)\,e \rVert^2 + (1 - c^2)\,\lVert e \rVert^2

    so the policy regresses to the old policy displaced by :math:`-(c/b)\,e`: toward the sample for
    r > 1/2, away from it for r < 1/2. At ``velocity == old_velocity`` the gradient is
    :math:`2b(2r - 1)\,e` divided by the number of elements. At r = 1/2 only the pull to the old
    policy remains.

    Args:
        velocity: velocity of the policy being trained at the re-noised latent, [M, ...].
        old_velocity: velocity of the old policy at the same point; if the policy IS the old one,
            ``velocity.detach()`` saves a forward pass. Treated as a constant.
        target: ``velocity_target(clean, noise)``. Treated as a constant.
        r: optimality probability in [0, 1], one per row: a number, [M] or [M, 1, ...]; or one per
            token, [M, L, 1] or [M, 1, h, w] as ``region_advantage`` lays it out, which then applies
            inside the means. Treated as a constant.
        nft_beta: b > 0, mixing weight of the two policies; at 1 v_+ is the current policy.
        valid: boolean, [M]; false rows give loss 0 and gradient 0, even if they hold NaN. Mask
            every row that must not be trained: r = 1/2 would still pull it to the old policy.

    Returns:
        [M], float32 at least: mean over elements, unreduced over rows. Gradient flows to
        ``velocity`` alone.

    Raises:
        ValueError: shapes differ, r lies outside [0, 1], or ``nft_beta`` is not positive.
        TypeError: a tensor is not floating point, or the mask is not boolean.

    Source: DiffusionNFT (arXiv 2509.16117); MT-EditFlow (arXiv 2606.01985), Eq. 5, 23-25.

    Example:
        >>> old, target = torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)
        >>> velocity = old.clone().requires_grad_()
        >>> loss = nft_loss(velocity, old, target, torch.tensor([1.0]), nft_beta=1.0)
        >>> loss.sum().backward()
        >>> loss.detach(), velocity.grad
        (tensor([5.]), tensor([[1., 3.]]))
    """
    moved, error, weight = _prepare(velocity, old_velocity, target, r, nft_beta, valid)
    if torch.compiler.is_compiling():
        # Fused by the compiler, the two branches cost one pass and keep no extra tensor for the
        # backward pass. The completed square would keep its argument.
        step = nft_beta * moved
        toward = weighted_mean_square(error + step, weight)
        return (toward + weighted_mean_square(error - step, 1 - weight)).to(moved.dtype)
    constant = 4 * weighted_mean_square(error, weight * (1 - weight))  # 4 r (1 - r) = 1 - c^2
    to_goal = torch.addcmul(moved, (2 * weight - 1) / nft_beta, error)
    return (nft_beta**2 * row_mean_square(to_goal) + constant).to(moved.dtype)


def adaptive_nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    target: Tensor,
    r: float | Numbers,
    sigma: float | Numbers,
    *,
    nft_beta: float,
    advantage_max: float = 5.0,
    floor: float = 1e-5,
    valid: Numbers | None = None,
) -> Tensor:
    r"""NFT loss in clean space, each branch divided by its own detached mean absolute error.

    For a branch velocity u the error of the clean estimate is :math:`\sigma (v - u)`. While its
    mean absolute value is above the floor, a branch contributes
    :math:`\sigma\,\mathrm{mean}(v - u)^2 / \mathrm{mean}|v - u|`, which limits the dependence on
    the flow time. The sum, weighted by r and 1 - r, is multiplied by :math:`A_{max} / b`. The
    reference implementation trains with this loss.

    Args:
        velocity: velocity of the policy being trained at the re-noised latent, [M, ...].
        old_velocity: velocity of the old policy at the same point. Treated as a constant.
        target: ``velocity_target(clean, noise)``. Treated as a constant.
        r: optimality probability of each row or token, as in ``nft_loss``; each branch is still
            divided by one number per row. Treated as a constant.
        sigma: flow time of each row in [0, 1]: a number, [M] or [M, 1, ...]. Treated as a constant.
        nft_beta: b > 0, as in ``nft_loss``.
        advantage_max: A_max > 0; use the value given to ``optimality_probability``.
        floor: lower bound of the mean absolute clean-space error in the divisor, > 0.
        valid: as in ``nft_loss``.

    Returns:
        [M], float32 at least, unreduced over rows. Gradient flows to ``velocity`` alone.

    Raises:
        ValueError: shapes differ, r or sigma lies outside [0, 1], a number is not positive.
        TypeError: a tensor is not floating point, or the mask is not boolean.

    Source: DiffusionNFT (arXiv 2509.16117), adaptive weighting; MT-EditFlow (arXiv 2606.01985).

    Example:
        >>> old, target = torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)
        >>> adaptive_nft_loss(old, old, target, torch.tensor([1.0]), 0.5, nft_beta=1.0)
        tensor([6.2500])
    """
    check_number("advantage_max", advantage_max, low=0.0, open_low=True)
    check_number("floor", floor, low=0.0, open_low=True)
    moved, error, weight = _prepare(velocity, old_velocity, target, r, nft_beta, valid)
    s = row_values("sigma", sigma, moved, valid=rows_mask(valid, moved)).detach()
    step = nft_beta * moved
    toward = _scale_free(error + step, weight, s, floor)
    away = _scale_free(error - step, 1 - weight, s, floor)
    return ((toward + away) * (advantage_max / nft_beta)).to(moved.dtype)


def velocity_kl(
    velocity: Tensor, reference_velocity: Tensor, *, valid: Numbers | None = None
) -> Tensor:
    r"""Distance to the reference policy, :math:`\mathrm{mean}\,\lVert v_\theta - v_{ref}\rVert^2`.

    Args:
        velocity: velocity of the policy being trained, [M, ...].
        reference_velocity: velocity of the reference at the same point. Treated as a constant.
        valid: boolean, [M]; false rows give loss 0 and gradient 0, even if they hold NaN.

    Returns:
        [M], float32 at least: mean over elements; multiply by ``kl_coef`` and add to a loss.
        Gradient flows to ``velocity`` alone.

    Raises:
        ValueError: shapes differ or there is no latent axis.
        TypeError: a tensor is not floating point, or the mask is not boolean.

    Source: DiffusionNFT (arXiv 2509.16117), its KL term; MT-EditFlow (arXiv 2606.01985).

    Example:
        >>> velocity_kl(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))
        tensor([5.])
    """
    return row_squared_error(valid, velocity=velocity, reference_velocity=reference_velocity)


def _prepare(
    velocity: Tensor,
    old_velocity: Tensor,
    target: Tensor,
    r: float | Numbers,
    nft_beta: float,
    valid: Numbers | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return velocity minus old velocity, old velocity minus target, and r.

    All are checked and float32 at least. The first two are 0 in rows that are not valid; r
    broadcasts over them.
    """
    moved, error = row_displacements(velocity, old_velocity, target, valid)
    check_number("nft_beta", nft_beta, low=0.0, open_low=True)
    weight = token_values("r", r, moved, low=0.0, high=1.0, valid=rows_mask(valid, moved))
    return moved, error, weight


def _scale_free(error: Tensor, weight: Tensor, sigma: Tensor, floor: float) -> Tensor:
    """Weighted mean square of the clean-space error over its detached mean absolute value."""
    # clean = x - sigma v: clean-space errors are sigma times velocity-space errors.
    scale = (sigma * row_mean_absolute(error)).clamp(min=floor)
    return sigma.square() * weighted_mean_square(error, weight) / scale
