r"""The straight probability path of flow matching, and grids of flow time on it.

One convention everywhere: ``sigma`` is 1 at pure noise and 0 at data, ``velocity`` is
:math:`dx/d\sigma`. Shapes: ``M`` rows (samples) and any latent axes behind them; ``S`` denoising
steps. ``sigma`` is a number or a tensor whose shape is a leading part of the latent's, such as
``[M]``. Half-precision inputs are computed in float32 and returned in their own dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mteditflow._checks import (
    check_count,
    check_floating,
    check_number,
    check_rank,
    check_same_shape,
    check_step_values,
    check_values,
)
from mteditflow._reduce import per_row, promote, row_mean_square


def interpolate(clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    r"""Point on the path, :math:`x_t = (1 - \sigma)\,clean + \sigma\,noise`.

    Exactly ``clean`` at 0 and exactly ``noise`` at 1.

    Args:
        clean: data latent, [M, ...].
        noise: standard Gaussian, shape of ``clean``.
        sigma: flow time in [0, 1], number or leading-shape tensor.

    Returns:
        [M, ...] in the dtype of ``clean``. Gradient flows to all three.

    Raises:
        ValueError: shapes differ, or sigma lies outside [0, 1].
        TypeError: an argument is not floating point.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 1.

    Example:
        >>> interpolate(torch.zeros(1, 2), torch.ones(1, 2), 0.25)
        tensor([[0.2500, 0.2500]])
    """
    check_floating(clean=clean, noise=noise)
    check_same_shape(clean=clean, noise=noise)
    start, end = promote(clean, noise)
    return torch.lerp(start, end, per_row("sigma", sigma, start)).to(clean.dtype)


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    r"""Velocity of the path, :math:`noise - clean`: what a flow-matching model regresses to.

    Args:
        clean: data latent, [M, ...].
        noise: standard Gaussian, shape of ``clean``.

    Returns:
        [M, ...]. Gradient flows to both.

    Raises:
        ValueError: shapes differ.
        TypeError: an argument is not floating point.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 1.

    Example:
        >>> velocity_target(torch.tensor([[1.0]]), torch.tensor([[3.0]]))
        tensor([[2.]])
    """
    check_floating(clean=clean, noise=noise)
    check_same_shape(clean=clean, noise=noise)
    return noise - clean


def clean_from_velocity(x_t: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    r"""Data estimate, :math:`x_t - \sigma\,velocity`.

    Args:
        x_t: noisy latent, [M, ...].
        velocity: model output, shape of ``x_t``.
        sigma: flow time in [0, 1], number or leading-shape tensor.

    Returns:
        [M, ...] in the dtype of ``x_t``. Gradient flows to all three.

    Raises:
        ValueError: shapes differ, or sigma lies outside [0, 1].
        TypeError: an argument is not floating point.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 1.

    Example:
        >>> clean_from_velocity(torch.tensor([[2.0]]), torch.tensor([[1.0]]), 0.5)
        tensor([[1.5000]])
    """
    x, v, s = _state(x_t, velocity, sigma)
    return torch.addcmul(x, s, v, value=-1).to(x_t.dtype)


def noise_from_velocity(x_t: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    r"""Noise estimate, :math:`x_t + (1 - \sigma)\,velocity`.

    Args:
        x_t: noisy latent, [M, ...].
        velocity: model output, shape of ``x_t``.
        sigma: flow time in [0, 1], number or leading-shape tensor.

    Returns:
        [M, ...] in the dtype of ``x_t``. Gradient flows to all three.

    Raises:
        ValueError: shapes differ, or sigma lies outside [0, 1].
        TypeError: an argument is not floating point.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 1.

    Example:
        >>> noise_from_velocity(torch.tensor([[2.0]]), torch.tensor([[1.0]]), 0.25)
        tensor([[2.7500]])
    """
    x, v, s = _state(x_t, velocity, sigma)
    return torch.addcmul(x, 1 - s, v).to(x_t.dtype)


def score_from_velocity(x_t: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    r"""Score of the marginal at x_t, :math:`-(x_t + (1-\sigma)\,velocity)/\sigma`.

    Args:
        x_t: noisy latent, [M, ...].
        velocity: model output, shape of ``x_t``.
        sigma: flow time in (0, 1], number or leading-shape tensor; at 0 there is no density.

    Returns:
        [M, ...] in the dtype of ``x_t``. Gradient flows to all three.

    Raises:
        ValueError: shapes differ, or sigma lies outside (0, 1].
        TypeError: an argument is not floating point.

    Source: Flow-GRPO (arXiv 2505.05470), the score used by its SDE.

    Example:
        >>> score_from_velocity(torch.tensor([[2.0]]), torch.tensor([[0.0]]), 0.5)
        tensor([[-4.]])
    """
    x, v, s = _state(x_t, velocity, sigma)
    check_step_values("sigma", s, s > 0, "values in (0, 1]")
    return torch.addcmul(x, 1 - s, v).div(-s).to(x_t.dtype)


def flow_matching_loss(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    r"""Per-sample loss, :math:`\mathrm{mean}\,\lVert velocity - (noise - clean)\rVert^2`.

    Args:
        velocity: model output at a point of the path between ``clean`` and ``noise``, [M, ...].
        clean: data latent, shape of ``velocity``.
        noise: standard Gaussian, shape of ``velocity``.

    Returns:
        [M], float32 at least: the mean over elements, unreduced over samples. Gradient flows to
        all three.

    Raises:
        ValueError: shapes differ or there is no latent axis.
        TypeError: an argument is not floating point.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 1.

    Example:
        >>> flow_matching_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
        tensor([5.])
    """
    check_floating(velocity=velocity, clean=clean, noise=noise)
    check_same_shape(velocity=velocity, clean=clean, noise=noise)
    check_rank("velocity", velocity, 2, "[M, ...]")
    v, x, z = promote(velocity, clean, noise)
    return row_mean_square(v - (z - x))


def uniform_sigmas(steps: int) -> Tensor:
    """Grid from 1 to 0 in equal steps.

    Args:
        steps: number of denoising steps S, at least 1.

    Returns:
        [S + 1], float32, from exactly 1 to exactly 0.

    Raises:
        ValueError: ``steps`` is below 1.

    Example:
        >>> uniform_sigmas(4)
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000])
    """
    check_count("steps", steps)
    return torch.linspace(1, 0, steps + 1)


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    r"""Shift a grid toward noise: :math:`\sigma' = a\sigma / (1 + (a - 1)\sigma)` with shift a.

    Args:
        sigmas: values in [0, 1], any shape; 0 and 1 stay where they are.
        shift: a > 0; 1 is the identity, above 1 moves values toward noise.

    Returns:
        Shape and dtype of ``sigmas``.

    Raises:
        ValueError: ``shift`` is not positive, or a sigma lies outside [0, 1].

    Source: Stable Diffusion 3 (arXiv 2403.03206), Eq. 23.

    Example:
        >>> shift_sigmas(torch.tensor([1.0, 0.5, 0.0]), 3.0)
        tensor([1.0000, 0.7500, 0.0000])
    """
    check_floating(sigmas=sigmas)
    check_number("shift", shift, low=0.0, open_low=True)
    check_values("sigmas", sigmas, (sigmas >= 0) & (sigmas <= 1), "values in [0, 1]")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def exponential_shift_sigmas(sigmas: Tensor, mu: float) -> Tensor:
    r"""FLUX's dynamic shift, :math:`\sigma' = e^\mu / (e^\mu + 1/\sigma - 1)`.

    The same as ``shift_sigmas(sigmas, exp(mu))``, which is how it is computed: finite at 0.

    Args:
        sigmas: values in [0, 1], any shape.
        mu: log of the shift, from ``flux_mu`` or ``flux2_mu``.

    Returns:
        Shape and dtype of ``sigmas``.

    Raises:
        ValueError: ``mu`` is not finite, or a sigma lies outside [0, 1].

    Example:
        >>> exponential_shift_sigmas(torch.tensor([1.0, 0.5, 0.0]), 0.0)
        tensor([1.0000, 0.5000, 0.0000])
    """
    check_number("mu", mu)
    return shift_sigmas(sigmas, math.exp(mu))


def flux_mu(
    image_tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """Resolution-dependent shift of FLUX.1: a line through two (token count, mu) points.

    Args:
        image_tokens: tokens of the image generated (the reference's do not count).
        base_tokens: token count at which mu is ``base_shift``.
        max_tokens: token count at which mu is ``max_shift``.
        base_shift: mu at ``base_tokens``.
        max_shift: mu at ``max_tokens``.

    Returns:
        mu, for ``exponential_shift_sigmas``.

    Raises:
        ValueError: a count is below 1, or the two counts are equal.

    Example:
        >>> flux_mu(256), round(flux_mu(1024), 4)
        (0.5, 0.63)
    """
    for name, count in (("image_tokens", image_tokens), ("base_tokens", base_tokens)):
        check_count(name, count)
    check_count("max_tokens", max_tokens, low=base_tokens + 1)
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return base_shift + slope * (image_tokens - base_tokens)


def flux2_mu(image_tokens: int, steps: int) -> float:
    """Shift of FLUX.2, fitted by its authors to token count and number of steps.

    Two lines in the token count, for 10 and for 200 steps, interpolated linearly in the number of
    steps; above 4300 tokens the 200-step line alone.

    Args:
        image_tokens: tokens of the image generated (the reference's do not count).
        steps: number of denoising steps S.

    Returns:
        mu, for ``exponential_shift_sigmas``.

    Raises:
        ValueError: an argument is below 1.

    Example:
        >>> round(flux2_mu(1024, 10), 4), round(flux2_mu(1024, 50), 4)
        (1.9878, 1.702)
    """
    check_count("image_tokens", image_tokens)
    check_count("steps", steps)
    at_200_steps = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return at_200_steps
    at_10_steps = 8.73809524e-05 * image_tokens + 1.89833333
    return at_200_steps + (at_10_steps - at_200_steps) * (200 - steps) / 190


def _state(x_t: Tensor, velocity: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_floating(x_t=x_t, velocity=velocity)
    check_same_shape(x_t=x_t, velocity=velocity)
    x, v = promote(x_t, velocity)
    return x, v, per_row("sigma", sigma, x)
