r"""Advantage weighted matching: the flow-matching loss is the log-prob of a sample."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mteditflow._checks import Numbers, check_choice
from mteditflow._reduce import full_precision, row_squared_error, row_values, rows_mask

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

    Advantage weighted matching is the clipped surrogate of it: with the old policy's value at the
    SAME flow time and noise the ratio is the exponential of the old matching loss minus the new.
    On-policy the gradient of that surrogate is exactly the advantage times the gradient of W.
    Where the policy IS the old one, the detached value is the old one and saves a forward pass. No
    solver and no density of steps is involved. With the matching loss :math:`l`, :math:`W(l)` is

    - "uniform": :math:`l`;
    - "sigma": :math:`\sigma\,l`;
    - "sigma_squared": :math:`\sigma^2 l`, the squared error of the clean estimate;
    - "huber": :math:`\sigma\,(\sqrt{l + \epsilon} - \sqrt\epsilon)`, the error's size;
    - "general_huber": :math:`\sigma\,((l + \epsilon)^p - \epsilon^p)/p` with p = 1/4.

    Here :math:`\epsilon = 10^{-10}`. The last two weigh a row the less the worse it is matched.

    Args:
        velocity: of a policy at the re-noised latent, [M, ...].
        target: ``velocity_target(clean, noise)``. Treated as a constant.
        weighting: W, one of the above.
        sigma: flow time of each row in [0, 1]: a number, [M] or [M, 1, ...]; ``None`` for
            "uniform", which has no use for it. Treated as a constant.
        valid: boolean, [M]; false rows give 0 with gradient 0, even if they hold NaN.

    Returns:
        [M], <= 0, float32 at least. Gradient flows to ``velocity`` alone.

    Raises:
        ValueError: shapes differ or there is no latent axis, the weighting has another name, or
            sigma is missing, out of range, or without use.
        TypeError: a tensor is not floating point, sigma is half precision, or the mask is not
            boolean.

    Source: Advantage Weighted Matching (arXiv 2509.25050); the weightings but "uniform" are known
    from public code.

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
    check_choice("weighting", weighting, WEIGHTINGS)
    loss = row_squared_error(valid, velocity=velocity, target=target)
    if weighting == "uniform":
        if sigma is not None:
            raise ValueError(
                "sigma: expected None for weighting 'uniform', which has no use for it"
            )
        return -loss
    if sigma is None:
        raise ValueError(f"sigma: expected flow times for weighting {weighting!r}, got None")
    rows = loss[:, None]
    own = full_precision("sigma", sigma, velocity)
    s = row_values("sigma", own, rows, valid=rows_mask(valid, rows)).detach()
    if weighting == "sigma":
        return -s * loss
    if weighting == "sigma_squared":
        return -s.square() * loss
    power = _POWERS[weighting]
    smoothing = torch.full_like(loss, _SMOOTHING)
    bent = (loss + smoothing).pow(power) - smoothing.pow(power)  # the same pow: 0 is exactly 0
    return -s * (bent if weighting == "huber" else bent / power)
