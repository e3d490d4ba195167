r"""Advantage weighted matching: the flow-matching loss is the log-prob of a sample."""

from __future__ import annotations

from torch import Tensor

from mteditflow._checks import Numbers
from mteditflow._reduce import row_squared_error


def matching_log_prob(velocity: Tensor, target: Tensor, *, valid: Numbers | None = None) -> Tensor:
    r"""Surrogate for the log-prob of a clean sample, :math:`-\mathrm{mean}(v_\theta - v)^2`.

    Advantage weighted matching is the clipped surrogate of it: with the old policy's value at the
    SAME flow time and noise the ratio is the exponential of the old matching loss minus the new.
    On-policy the gradient of that surrogate is exactly the advantage times the gradient of the
    flow-matching loss. Where the policy IS the old one, the detached value is the old one and saves
    a forward pass. No solver and no density of steps is involved. To weigh flow times, multiply
    both log-probs by a weight of each row.

    Args:
        velocity: of a policy at the re-noised latent, [M, ...].
        target: ``velocity_target(clean, noise)``. Treated as a constant.
        valid: boolean, [M]; false rows give 0 with gradient 0, even if they hold NaN.

    Returns:
        [M], <= 0, float32 at least. Gradient flows to ``velocity`` alone.

    Raises:
        ValueError: shapes differ or there is no latent axis.
        TypeError: a tensor is not floating point, or the mask is not boolean.

    Source: Advantage Weighted Matching (arXiv 2509.25050).

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
    """
    return -row_squared_error(valid, velocity=velocity, target=target)
