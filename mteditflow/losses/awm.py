r"""Advantage weighted matching: minus the flow-matching loss stands in for a log-prob."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from mteditflow._checks import Numbers, check_choice
from mteditflow._reduce import (
    clipped_surrogate,
    full_precision,
    row_error,
    row_mean,
    row_mean_square,
    row_squared_error,
    row_values,
    rows_mask,
    token_values,
    weighted_mean_square,
)

Weighting = Literal["uniform", "sigma", "sigma_squared", "huber", "general_huber"]
WEIGHTINGS = ("uniform", "sigma", "sigma_squared", "huber", "general_huber")
_POWERS = {"huber": 0.5, "general_huber": 0.25}
_SMOOTHING = 1e-10  # keeps the gradient of a root finite where the loss is 0


def matching_log_prob(
    velocity: Tensor,
    target: Tensor,
    *,
    weighting: Weighting = "uniform",
    sigma: float | Numbers | None = None,
    valid: Numbers | None = None,
) -> Tensor:
    r"""Surrogate for the log-prob of a clean sample, :math:`-W(\mathrm{mean}(v_\theta - v)^2)`.

    Advantage weighted matching uses it in the clipped surrogate. With the old policy's value at the
    SAME flow time and noise, the ratio is the exponential of the old matching loss minus the new
    one. On-policy the gradient of that surrogate is exactly the advantage times the gradient of W.
    If the policy IS the old one, the detached value serves as the old log-prob and saves a forward
    pass. No solver and no transition density is involved. With the matching loss :math:`l`,
    :math:`W(l)` is

    - "uniform": :math:`l`;
    - "sigma": :math:`\sigma\,l`;
    - "sigma_squared": :math:`\sigma^2 l`, the squared error of the clean estimate;
    - "huber": :math:`\sigma\,(\sqrt{l + \epsilon} - \sqrt\epsilon)`, the error's size;
    - "general_huber": :math:`\sigma\,((l + \epsilon)^p - \epsilon^p)/p` with p = 1/4.

    Here :math:`\epsilon = 10^{-10}`. Under the last two, the gradient weight of a row falls as its
    matching loss grows.

    Args:
        velocity: policy's velocity at the re-noised latent, [M, ...].
        target: ``velocity_target(clean, noise)``. Treated as a constant.
        weighting: W, one of the above.
        sigma: flow time of each row in [0, 1]: a number, [M] or [M, 1, ...]; ``None`` for
            "uniform", which does not use it. Treated as a constant.
        valid: boolean, [M]; false rows give 0 with gradient 0, even if they hold NaN.

    Returns:
        [M], <= 0, float32 at least. Gradient flows to ``velocity`` alone.

    Raises:
        ValueError: shapes differ or there is no latent axis, the weighting is unknown, or sigma is
            missing, out of range, or given for "uniform".
        TypeError: a tensor is not floating point, sigma is half precision, or the mask is not
            boolean.

    Source: Advantage Weighted Matching (arXiv 2509.25050); the weightings other than "uniform" are
    known from public code only.

    Example:
        >>> import torch
        >>> from mteditflow import clipped_surrogate_loss
        >>> velocity = torch.tensor([[1.0, 3.0]], requires_grad=True)
        >>> log_prob = matching_log_prob(velocity, torch.zeros(1, 2))
        >>> loss = clipped_surrogate_loss(
        ...     log_prob, log_prob.detach(), torch.tensor([2.0]), clip_low=1e-4, clip_high=1e-4
        ... )
        >>> loss.sum().backward()
        >>> log_prob.detach(), velocity.grad
        (tensor([-5.]), tensor([[2., 6.]]))
        >>> matching_log_prob(velocity, torch.zeros(1, 2), weighting="sigma", sigma=0.5).detach()
        tensor([-2.5000])
    """
    loss = row_squared_error(valid, velocity=velocity, target=target)
    return _log_prob(loss, weighting, sigma, valid)


def matching_surrogate_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    target: Tensor,
    advantage: float | Numbers,
    *,
    clip_low: float,
    clip_high: float,
    weighting: Weighting = "uniform",
    sigma: float | Numbers | None = None,
    valid: Numbers | None = None,
) -> Tensor:
    r"""Clipped surrogate on matching losses, with one advantage per row or per token.

    With one advantage per row it is ``clipped_surrogate_loss`` of the two ``matching_log_prob``.
    With one per token the ratio is still one number per row, and tokens of positive and of negative
    advantage are clipped separately, each at its side of the range. With :math:`A = A^+ + A^-`
    token by token,

    .. math:: L = -\sum_\pm \min(\rho\,\bar A^\pm, \mathrm{clip}(\rho)\,\bar A^\pm),
        \qquad \nabla \rho \to \rho\,\nabla \log p^\pm

    where the bar is the mean over tokens. The value of :math:`\log p^\pm` is the row's log-prob.
    Its gradient is that of the matching loss with tokens weighted in proportion to :math:`A^\pm`.
    On-policy the gradient is that of :math:`W'(l)\,\mathrm{mean}_p\,A(p)\,(v_\theta - v)_p^2`. An
    advantage that is equal over tokens gives the value and the gradient of the per-row form. In
    general the gradient is not the derivative of the returned value, because the value uses the
    row's ratio.

    Args:
        velocity: velocity of the policy being trained at the re-noised latent, [M, ...].
        old_velocity: velocity of the sampling policy at the same point. Treated as a constant.
        target: ``velocity_target(clean, noise)``. Treated as a constant.
        advantage: one per row: a number, [M] or [M, 1, ...]; or one per token, [M, L, 1] or
            [M, 1, h, w] as ``region_advantage`` lays it out. Treated as a constant.
        clip_low: how far the ratio may fall below 1, in [0, 1).
        clip_high: how far it may rise above 1, >= 0.
        weighting: as in ``matching_log_prob``.
        sigma: as in ``matching_log_prob``.
        valid: boolean, [M]; false rows give loss 0 and gradient 0, even if they hold NaN.

    Returns:
        [M], float32 at least, unreduced over rows. Gradient flows to ``velocity`` alone.

    Raises:
        ValueError: as in ``matching_log_prob``; an advantage is not finite, or a bound is out of
            range.
        TypeError: as in ``matching_log_prob``, or the advantage is half precision.

    Source: Advantage Weighted Matching (arXiv 2509.25050). One ratio per row with per-token
    advantages follows GSPO-token (arXiv 2507.18071), carried over to latents by this library.

    Example:
        >>> import torch
        >>> velocity = torch.ones(1, 4, 1, requires_grad=True)  # four tokens
        >>> advantage = torch.tensor([[[8.0], [0.0], [0.0], [-4.0]]])
        >>> loss = matching_surrogate_loss(
        ...     velocity, velocity.detach(), torch.zeros(1, 4, 1), advantage,
        ...     clip_low=1e-4, clip_high=1e-4,
        ... )
        >>> loss.sum().backward()
        >>> loss.detach(), velocity.grad.flatten()
        (tensor([-1.]), tensor([ 4.,  0.,  0., -2.]))
    """
    error = row_error(valid, velocity=velocity, target=target)
    with torch.no_grad():
        old_loss = row_squared_error(valid, old_velocity=old_velocity, target=target)
    loss, mask = row_mean_square(error).to(error.dtype), rows_mask(valid, error)
    old_log_prob = _log_prob(old_loss, weighting, sigma, valid)

    def surrogate(own: Tensor, values: Tensor) -> Tensor:
        log_ratio = _log_prob(own, weighting, sigma, valid) - old_log_prob
        loss = clipped_surrogate(log_ratio, values, clip_low, clip_high)
        return loss if mask is None else torch.where(mask, loss, 0)

    values = token_values("advantage", advantage, error, low=-math.inf, high=math.inf, valid=mask)
    if values.numel() == len(values):
        return surrogate(loss, values.flatten())
    # A+ and A- apart: one mean advantage could be near 0 while both signs need their own clip.
    total = torch.zeros_like(loss)
    for part in (values.clamp(min=0), values.clamp(max=0)):
        mean = row_mean(part).to(part)
        # Token weights of mean 1, >= 0 for either sign; all 0 where the row has no such token.
        share = part / torch.where(mean == 0, 1, mean).reshape(-1, *(1,) * (part.ndim - 1))
        weighted = weighted_mean_square(error, share).to(loss)
        # Straight-through: the row's loss as value, for the ratio, with the weighted gradient.
        total = total + surrogate(loss.detach() + (weighted - weighted.detach()), mean)
    return total


def _log_prob(
    loss: Tensor, weighting: Weighting, sigma: float | Numbers | None, valid: Numbers | None
) -> Tensor:
    """Map matching losses [M] to surrogate log-probs ``-W(l)``."""
    check_choice("weighting", weighting, WEIGHTINGS)
    if weighting == "uniform":
        if sigma is not None:
            raise ValueError(
                "sigma: expected None for weighting 'uniform', which has no use for it"
            )
        return -loss
    if sigma is None:
        raise ValueError(f"sigma: expected flow times for weighting {weighting!r}, got None")
    rows = loss[:, None]
    own = full_precision("sigma", sigma, rows)
    s = row_values("sigma", own, rows, valid=rows_mask(valid, rows)).detach()
    if weighting == "sigma":
        return -s * loss
    if weighting == "sigma_squared":
        return -s.square() * loss
    power = _POWERS[weighting]
    smoothing = torch.full_like(loss, _SMOOTHING)
    # Both terms by the same pow kernel, so that a loss of 0 gives exactly 0.
    robust = (loss + smoothing).pow(power) - smoothing.pow(power)
    return -s * (robust if weighting == "huber" else robust / power)
