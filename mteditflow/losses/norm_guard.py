r"""NormGuard: a hinge on the velocity norm above the reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from mteditflow._checks import Numbers, check_floating, check_number, check_rank, check_same_shape
from mteditflow._reduce import promote, row_root_mean_square, valid_rows


def velocity_norm_hinge(
    velocity: Tensor,
    reference_velocity: Tensor,
    *,
    margin: float = 0.0,
    valid: Numbers | None = None,
) -> Tensor:
    r"""Hinge on the norm, :math:`\max(0, \lVert v\rVert - (1 + margin)\,\lVert v_{ref}\rVert)`.

    Norms are root mean squares over a row's elements, so that the size of a latent does not matter.
    RL inflates velocity norms, by 5 to 15 % in the paper, and image quality drops. This penalty can
    be added to any velocity objective and acts on the norm only. Within the margin, and for any
    change of direction at equal norm, it is exactly 0 with gradient 0. Above the margin the
    gradient points along the velocity with a size that does not depend on the excess, so that a
    weight larger than the objective's own radial gradient enforces the bound.

    Args:
        velocity: velocity of the policy being trained, [M, ...].
        reference_velocity: velocity of the reference at the same point. Treated as a constant.
        margin: relative growth of the norm that is not penalized, >= 0.
        valid: boolean, [M]; false rows give loss 0 and gradient 0, even if they hold NaN.

    Returns:
        [M], >= 0, float32 at least; multiply by a coefficient and add to a loss. Gradient flows to
        ``velocity`` alone.

    Raises:
        ValueError: shapes differ, there is no latent axis, or the margin is negative.
        TypeError: a tensor is not floating point, or the mask is not boolean.

    Source: NormGuard (arXiv 2606.27771) for a hinge where the norm exceeds the reference's. Its
        exact form is not known here; the root mean square and the margin are this library's.

    Example:
        >>> velocity = torch.tensor([[3.0, 3.0], [1.0, -1.0]])
        >>> velocity_norm_hinge(velocity, torch.ones(2, 2), margin=0.5)
        tensor([1.5000, 0.0000])
    """
    check_floating(velocity=velocity, reference_velocity=reference_velocity)
    check_same_shape(velocity=velocity, reference_velocity=reference_velocity)
    check_rank("velocity", velocity, 2, "[M, ...]")
    check_number("margin", margin, low=0.0)
    v, v_ref = (valid_rows(valid, x) for x in promote(velocity, reference_velocity.detach()))
    excess = row_root_mean_square(v) - (1 + margin) * row_root_mean_square(v_ref)
    return torch.relu(excess).to(v.dtype)
