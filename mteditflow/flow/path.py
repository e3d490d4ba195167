r"""The straight probability path of flow matching, and grids of flow time on it.

One convention everywhere: ``sigma`` is 1 at pure noise and 0 at data, ``velocity`` is
:math:`dx/d\sigma`. Shapes: ``M`` rows (samples), followed by any latent axes; ``S`` denoising
steps. ``sigma`` is a number, or a tensor whose shape is a leading part of the latent's, such as
``[M]``, with or without trailing axes of size one. Half-precision inputs are computed in float32
and returned in their own dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_real,
    check_count,
    check_floating,
    check_number,
    check_rank,
    check_same_shape,
    check_step_values,
    check_values,
)
from mteditflow._reduce import per_row, promote, row_mean_square, valid_rows

_MAX_SHIFT = 1e30  # beyond any use, and its inverse is still a normal float32


def interpolate(clean: Tensor, noise: Tensor, sigma: float | Numbers) -> Tensor:
    r"""Point on the path, :math:`x_t = (1 - \sigma)\,clean + \sigma\,noise`.

    It is exactly ``clean`` at sigma 0 and exactly ``noise`` at sigma 1.

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
    # lerp, unlike (1 - s) x + s z, is exact at both ends.
    return torch.lerp(start, end, per_row("sigma", sigma, start)).to(clean.dtype)


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    r"""Velocity of the path, :math:`noise - clean`: the regression target of flow matching.

    Args:
        clean: data latent, [M, ...].
        noise: standard Gaussian, shape of ``clean``.

    Returns:
        [M, ...] in the common dtype. Gradient flows to both.

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


def clean_from_velocity(x_t: Tensor, velocity: Tensor, sigma: float | Numbers) -> Tensor:
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


def noise_from_velocity(x_t: Tensor, velocity: Tensor, sigma: float | Numbers) -> Tensor:
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


def score_from_velocity(x_t: Tensor, velocity: Tensor, sigma: float | Numbers) -> Tensor:
    r"""Score of the marginal at x_t, :math:`-(x_t + (1-\sigma)\,velocity)/\sigma`.

    Args:
        x_t: noisy latent, [M, ...].
        velocity: model output, shape of ``x_t``.
        sigma: flow time in (0, 1], number or leading-shape tensor; at 0 the score diverges.

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


def flow_matching_loss(
    velocity: Tensor, clean: Tensor, noise: Tensor, *, valid: Numbers | None = None
) -> Tensor:
    r"""Per-sample loss, :math:`\mathrm{mean}\,\lVert velocity - (noise - clean)\rVert^2`.

    Args:
        velocity: model output at a point of the path between ``clean`` and ``noise``, [M, ...].
        clean: data latent, shape of ``velocity``.
        noise: standard Gaussian, shape of ``velocity``.
        valid: boolean, [M]; false rows give loss 0 and gradient 0, even if they hold NaN.

    Returns:
        [M], float32 at least: the mean over elements, unreduced over samples. Gradient flows to
        all three.

    Raises:
        ValueError: shapes differ or there is no latent axis.
        TypeError: an argument is not floating point, or the mask is not boolean.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 1.

    Example:
        >>> flow_matching_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
        tensor([5.])
    """
    check_floating(velocity=velocity, clean=clean, noise=noise)
    check_same_shape(velocity=velocity, clean=clean, noise=noise)
    check_rank("velocity", velocity, 2, "[M, ...]")
    v, x, z = promote(velocity, clean, noise)
    return row_mean_square(valid_rows(valid, v - (z - x))).to(v.dtype)


def uniform_sigmas(steps: int) -> Tensor:
    """Grid from 1 to 0 in equal steps.

    Args:
        steps: number of denoising steps S, at least 1.

    Returns:
        [S + 1], float32 on the CPU, from exactly 1 to exactly 0.

    Raises:
        ValueError: ``steps`` is below 1.
        TypeError: ``steps`` is not an integer.

    Example:
        >>> uniform_sigmas(4)
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000])
    """
    check_count("steps", steps)
    return torch.linspace(1, 0, steps + 1, dtype=torch.float32, device="cpu")


def shift_sigmas(sigmas: Numbers, shift: float) -> Tensor:
    r"""Shift a grid toward noise: :math:`\sigma' = a\sigma / (1 + (a - 1)\sigma)` with shift a.

    It is computed as :math:`\sigma / (\sigma + (1 - \sigma) / a)`, which maps 0 and 1 exactly to
    themselves and never leaves [0, 1].

    Args:
        sigmas: values in [0, 1], any shape; integers count as float32.
        shift: a in [1e-30, 1e30]; 1 is the identity, above 1 moves values toward noise.

    Returns:
        Shape and dtype of ``sigmas``. Gradient flows to ``sigmas``.

    Raises:
        ValueError: ``shift`` lies outside its range, or a sigma outside [0, 1].
        TypeError: ``sigmas`` holds no real numbers.

    Source: Stable Diffusion 3 (arXiv 2403.03206), Eq. 23.

    Example:
        >>> shift_sigmas(torch.tensor([1.0, 0.5, 0.0]), 3.0)
        tensor([1.0000, 0.7500, 0.0000])
    """
    sigmas = as_real("sigmas", sigmas)
    check_floating(sigmas=sigmas)
    check_number("shift", shift, low=1 / _MAX_SHIFT, high=_MAX_SHIFT)
    check_values("sigmas", sigmas, (sigmas >= 0) & (sigmas <= 1), "values in [0, 1]")
    (s,) = promote(sigmas)
    return (s / (s + (1 - s) / shift)).to(sigmas.dtype)


def exponential_shift_sigmas(sigmas: Numbers, mu: float) -> Tensor:
    r"""FLUX's dynamic shift, :math:`\sigma' = e^\mu / (e^\mu + 1/\sigma - 1)`.

    It is computed as ``shift_sigmas(sigmas, exp(mu))``, which equals it and is finite at 0.

    Args:
        sigmas: values in [0, 1], any shape; integers count as float32.
        mu: log of the shift in [-69, 69], from ``flux_mu`` or ``flux2_mu``.

    Returns:
        Shape and dtype of ``sigmas``. Gradient flows to ``sigmas``.

    Raises:
        ValueError: ``mu`` lies outside its range, or a sigma outside [0, 1].
        TypeError: ``sigmas`` holds no real numbers.

    Source: FLUX.1's time shift, as in the schedulers of diffusers.

    Example:
        >>> exponential_shift_sigmas(torch.tensor([1.0, 0.5, 0.0]), 0.0)
        tensor([1.0000, 0.5000, 0.0000])
    """
    check_number("mu", mu, low=-69.0, high=69.0)  # exp(69) is just below _MAX_SHIFT
    return shift_sigmas(sigmas, math.exp(mu))


def flux_mu(
    image_tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    r"""Resolution-dependent shift of FLUX.1: a line through two (token count, mu) points.

    .. math:: \mu = base_{shift} + (max_{shift} - base_{shift})
        \frac{tokens - base_{tokens}}{max_{tokens} - base_{tokens}}

    Args:
        image_tokens: tokens of the generated image, without those of the reference.
        base_tokens: token count at which mu is ``base_shift``.
        max_tokens: token count at which mu is ``max_shift``, above ``base_tokens``.
        base_shift: mu at ``base_tokens``.
        max_shift: mu at ``max_tokens``.

    Returns:
        mu, for ``exponential_shift_sigmas``.

    Raises:
        ValueError: a count is below 1, ``max_tokens`` is not above ``base_tokens``, or a shift is
            not finite.
        TypeError: a count is not an integer.

    Source: the FLUX.1 pipelines of diffusers; a test checks equality with them.

    Example:
        >>> flux_mu(256), round(flux_mu(1024), 4)
        (0.5, 0.63)
    """
    check_count("image_tokens", image_tokens)
    check_count("base_tokens", base_tokens)
    check_count("max_tokens", max_tokens, low=base_tokens + 1)
    check_number("base_shift", base_shift)
    check_number("max_shift", max_shift)
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return base_shift + slope * (image_tokens - base_tokens)


def flux2_mu(image_tokens: int, steps: int) -> float:
    """Shift of FLUX.2, an empirical fit by its authors to token count and number of steps.

    It is linear in the token count for 10 and for 200 steps, and interpolated linearly in the
    number of steps between them. Above 4300 tokens the 200-step line applies to any step count.

    Args:
        image_tokens: tokens of the generated image, without those of the reference.
        steps: number of denoising steps S.

    Returns:
        mu, for ``exponential_shift_sigmas``.

    Raises:
        ValueError: an argument is below 1.
        TypeError: an argument is not an integer.

    Source: the FLUX.2 pipelines of diffusers, including the constants; a test checks equality with
        them.

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


def _state(x_t: Tensor, velocity: Tensor, sigma: float | Numbers) -> tuple[Tensor, Tensor, Tensor]:
    check_floating(x_t=x_t, velocity=velocity)
    check_same_shape(x_t=x_t, velocity=velocity)
    x, v = promote(x_t, velocity)
    return x, v, per_row("sigma", sigma, x)
