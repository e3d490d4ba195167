r"""Stochastic sampling of a flow: one step as a Gaussian transition with an exact log-probability.

All solvers share one formula. A step from ``sigma`` to ``next_sigma`` (d = sigma - next_sigma)
takes the Euler step, removes a share ``pull`` of the noise estimate, and adds fresh noise:

.. math:: mean = x_t - d\,v - pull\,(x_t + (1 - \sigma) v), \qquad x' = mean + std\,z

========== ============================================ ==========================
solver     pull                                         std
========== ============================================ ==========================
ODE        0                                            0
Flow-SDE   g^2 d / (2 sigma), g = a sqrt(s / (1 - s))   g sqrt(d)
Dance-SDE  g^2 d / (2 sigma), g = a                     g sqrt(d)
CPS        next_sigma (1 - cos(a pi / 2))               next_sigma sin(a pi / 2)
========== ============================================ ==========================

``a`` is the noise level. At 0 each solver IS the Euler step, bit for bit the same as ``ODE``.
Shapes: ``M`` rows, followed by any latent axes. Everything is computed in float32 at least.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from mteditflow._checks import (
    REDUCTIONS,
    Numbers,
    as_real,
    check_callable,
    check_choice,
    check_count,
    check_floating,
    check_full_precision,
    check_number,
    check_rank,
    check_same_shape,
    check_step_values,
    first_tensor,
)
from mteditflow._reduce import (
    elements,
    per_row,
    promote,
    reduce_elements,
    row_mean_square,
    row_std,
    stochastic_rows,
    valid_rows,
)


class Transition(NamedTuple):
    """Gaussian distribution of the next state given the current one.

    Attributes:
        mean: [M, ...], float32 at least; carries the gradient of the velocity.
        std: broadcasts over ``mean``, one value per row; 0 where the step is deterministic.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Next state, ``mean + std * noise``.

        Args:
            noise: standard Gaussian, shape of ``mean``.

        Returns:
            [M, ...] in the dtype of ``mean``. Gradient flows to all three.

        Raises:
            ValueError: shapes differ.
            TypeError: ``noise`` is not floating point.

        Example:
            >>> Transition(torch.tensor([[1.0]]), torch.tensor([[0.5]])).sample(torch.ones(1, 1))
            tensor([[1.5000]])
        """
        check_floating(noise=noise)
        check_same_shape(mean=self.mean, noise=noise)
        return torch.addcmul(self.mean, self.std, noise.to(self.mean))


@runtime_checkable
class Solver(Protocol):
    """One solver step: maps a state and its velocity to the Gaussian of the next state."""

    def __call__(
        self, x_t: Tensor, velocity: Tensor, sigma: float | Numbers, next_sigma: float | Numbers
    ) -> Transition:
        """Return the Gaussian of the state at ``next_sigma`` given ``x_t`` at ``sigma``."""
        ...


class _PulledEuler(ABC):
    """Common formula of all solvers; subclasses define ``pull`` and ``std``."""

    @abstractmethod
    def coefficients(self, sigma: Tensor, next_sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``pull`` and ``std`` of a step, in the shape of ``sigma``."""

    def __call__(
        self, x_t: Tensor, velocity: Tensor, sigma: float | Numbers, next_sigma: float | Numbers
    ) -> Transition:
        """Return the Gaussian of the state at ``next_sigma`` given ``x_t`` at ``sigma``.

        To replay a step, make the same call with the stored ``x_t`` and the current policy's
        velocity, and take ``gaussian_log_prob`` of the stored next state.

        Args:
            x_t: state, [M, ...].
            velocity: model output, shape of ``x_t``.
            sigma: flow time of ``x_t`` in (0, 1]: a number, [M] or [M, 1, ...], so that rows at
                different steps can share a batch.
            next_sigma: flow time after the step, in [0, sigma), in one of the same forms.

        Returns:
            Transition with mean [M, ...] and std of one value per row. Gradient flows to ``x_t``
            and ``velocity``.

        Raises:
            ValueError: shapes differ, a flow time lies outside [0, 1], or the step does not go
                from noise toward data.
            TypeError: an argument is not floating point.
        """
        check_floating(x_t=x_t, velocity=velocity)
        check_same_shape(x_t=x_t, velocity=velocity)
        check_rank("x_t", x_t, 2, "[M, ...]")
        x, v = promote(x_t, velocity)
        s, s_next = per_row("sigma", sigma, x), per_row("next_sigma", next_sigma, x)
        check_step_values("next_sigma - sigma", s_next - s, s_next < s, "a step toward data, < 0")
        pull, std = self.coefficients(s, s_next)
        # The module's formula with x_t and v collected; with pull 0 it is Euler bit for bit.
        mean = torch.addcmul(x * (1 - pull), v, s_next - s - pull * (1 - s))
        return Transition(mean, std)


@dataclass(frozen=True)
class ODE(_PulledEuler):
    """Deterministic Euler step; ``std`` is 0, and the step has no density.

    Source: Flow-GRPO (arXiv 2505.05470), the ODE whose marginals its SDE shares.

    Example:
        >>> ODE()(torch.tensor([[1.0]]), torch.tensor([[2.0]]), 1.0, 0.75)
        Transition(mean=tensor([[0.5000]]), std=tensor([[0.]]))
    """

    def coefficients(self, sigma: Tensor, next_sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return zeros: no pull and no noise."""
        return torch.zeros_like(sigma), torch.zeros_like(sigma)


class _SDE(_PulledEuler):
    """Euler-Maruyama step of the SDE with the ODE's marginals and diffusion coefficient g."""

    @abstractmethod
    def diffusion(self, sigma: Tensor, next_sigma: Tensor) -> Tensor:
        """Return the diffusion coefficient g of the step."""

    def coefficients(self, sigma: Tensor, next_sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``g^2 d / (2 sigma)`` and ``g sqrt(d)``."""
        # Score correction: + g^2/2 * score * d with score = -noise / sigma.
        g, d = self.diffusion(sigma, next_sigma), sigma - next_sigma
        return g.square() * d / (2 * sigma), g * d.sqrt()


@dataclass(frozen=True)
class FlowSDE(_SDE):
    r"""Flow-SDE step, :math:`g = a\sqrt{\sigma / (1 - \sigma)}`.

    At sigma = 1, where g diverges, the denominator uses the next grid value in place of 1. The
    variance after a first step of size h is then :math:`a^4/4 + a^2 h` too large, by :math:`a^4/4`
    however small the step, and later steps contract the error. The ODE's marginals are therefore
    reached at first order in the step size from any sigma below 1, and at order
    :math:`\min(1, a^2)` from exactly 1.

    Args:
        noise_level: a >= 0; Flow-GRPO uses 0.7, and 0.9 for FLUX.1-Kontext. 0 is the Euler step.

    Source: Flow-GRPO (arXiv 2505.05470), its Euler-Maruyama sampler.

    Example:
        >>> FlowSDE(0.7).diffusion(torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.25]))
        tensor([0.9899, 0.7000])
    """

    noise_level: float

    def __post_init__(self) -> None:
        check_number("noise_level", self.noise_level, low=0.0)

    def diffusion(self, sigma: Tensor, next_sigma: Tensor) -> Tensor:
        """Return the diffusion coefficient g, with ``next_sigma`` in place of a sigma of 1."""
        # As flow_grpo does: sigma_1 replaces 1 in the denominator of the first step only.
        below_one = torch.where(sigma == 1, next_sigma, sigma)
        return self.noise_level * (sigma / (1 - below_one)).sqrt()


@dataclass(frozen=True)
class DanceSDE(_SDE):
    """Dance-SDE step: a constant diffusion coefficient, g = a.

    Args:
        noise_level: a >= 0; DanceGRPO uses 0.3. 0 is the Euler step.

    Source: DanceGRPO (arXiv 2505.07818).

    Example:
        >>> DanceSDE(0.5)(torch.zeros(1, 1), torch.zeros(1, 1), 1.0, 0.75).std
        tensor([[0.2500]])
    """

    noise_level: float

    def __post_init__(self) -> None:
        check_number("noise_level", self.noise_level, low=0.0)

    def diffusion(self, sigma: Tensor, next_sigma: Tensor) -> Tensor:
        """Return the diffusion coefficient g, the noise level at every sigma."""
        return torch.full_like(sigma, self.noise_level)


@dataclass(frozen=True)
class CPS(_PulledEuler):
    r"""Coefficient-preserving step: the noise of the next state is part old, part fresh.

    .. math:: x' = (1 - \sigma')\,\hat c + \sigma'(\cos(a\pi/2)\,\hat n + \sin(a\pi/2)\,z)

    with the clean estimate c and the noise estimate n. The total noise coefficient stays sigma',
    so no step adds more noise than the path has at sigma'. The marginals of the ODE are not
    preserved.

    Args:
        noise_level: a in [0, 1]; 0 is the Euler step, 1 replaces all noise.

    Source: Flow-CPS (arXiv 2509.05952).

    Example:
        >>> CPS(1.0)(torch.tensor([[1.0]]), torch.tensor([[2.0]]), 0.5, 0.25)
        Transition(mean=tensor([[0.]]), std=tensor([[0.2500]]))
    """

    noise_level: float

    def __post_init__(self) -> None:
        check_number("noise_level", self.noise_level, low=0.0, high=1.0)

    def coefficients(self, sigma: Tensor, next_sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``next_sigma (1 - cos)`` and ``next_sigma sin`` of the angle ``a pi / 2``."""
        angle = self.noise_level * math.pi / 2
        # 1 - cos = 2 sin^2 of half the angle, without cancellation at small noise levels.
        return next_sigma * (2 * math.sin(angle / 2) ** 2), next_sigma * math.sin(angle)


def gaussian_log_prob(
    x: Tensor,
    mean: Tensor,
    std: float | Numbers,
    *,
    reduction: str,
    valid: Numbers | None = None,
) -> Tensor:
    r"""Log-density of a stored step: :math:`-(x-mean)^2/(2 std^2) - \log std - \log(2\pi)/2`.

    A row with ``std`` 0 took a deterministic step, which has no density. Its log-prob is exactly 0
    with zero gradient, so its ratio is 1 for any policy. Exclude such rows from training by a step
    mask rather than by this value.

    Args:
        x: next state as it was used in the rollout (after any rounding), [M, ...].
        mean: transition mean, shape of ``x``.
        std: transition std, >= 0, one value per row: a number, [M] or [M, 1, ...].
        reduction: reduction over the elements of a row. "mean" is the per-element average, to which
            the usual clip ranges of 1e-4 .. 1e-5 belong; "sum" is the joint log-density. Use the
            same one for sampling and training.
        valid: boolean, [M]; false rows give 0 with gradient 0, even if they hold NaN.

    Returns:
        [M], float32 at least. Gradient flows to ``mean``, ``x`` and ``std``.

    Raises:
        ValueError: shapes differ, std has more than one value per row or is negative, or the
            reduction is unknown.
        TypeError: the mask is not boolean, ``x`` is not floating point, or ``mean`` or ``std`` is
            not float32 or float64: half precision rounds a mean by more than a policy update moves
            it.

    Source: Flow-GRPO (arXiv 2505.05470).

    Example:
        >>> zero = torch.zeros(1, 2)
        >>> gaussian_log_prob(zero, zero, torch.ones(1, 1), reduction="sum")
        tensor([-1.8379])
    """
    check_choice("reduction", reduction, REDUCTIONS)
    difference = _difference("x", x, "mean", mean)
    safe_std, stochastic = row_std(std, difference, valid)
    per_element = (
        -0.5 * _standardised_square(stochastic_rows(difference, stochastic), safe_std)
        - safe_std.log()
        - 0.5 * math.log(2 * math.pi)
    )
    return reduce_elements(per_element, stochastic, difference, reduction)


def gaussian_kl(
    mean: Tensor,
    reference_mean: Tensor,
    std: float | Numbers,
    *,
    reduction: str,
    valid: Numbers | None = None,
) -> Tensor:
    r"""KL divergence of two transitions of equal std: :math:`(mean - mean_{ref})^2 / (2 std^2)`.

    ``std`` is that of the step and includes the step size. Policy and reference share it because it
    depends on the grid alone. Deterministic rows give exactly 0. A ``kl_coef`` from implementations
    that leave the step size out of the std does not carry over.

    Args:
        mean: transition mean of the policy, [M, ...].
        reference_mean: transition mean of the reference, shape of ``mean``.
        std: as in ``gaussian_log_prob``.
        reduction: "mean" or "sum" over elements; use that of the log-prob.
        valid: as in ``gaussian_log_prob``.

    Returns:
        [M], >= 0, float32 at least. Gradient flows to both means and ``std``.

    Raises:
        ValueError: shapes differ, std has more than one value per row or is negative, or the
            reduction is unknown.
        TypeError: an argument is not float32 or float64, or the mask not boolean.

    Source: Flow-GRPO (arXiv 2505.05470).

    Example:
        >>> mean, std = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.5]])
        >>> gaussian_kl(mean, torch.zeros(1, 2), std, reduction="sum")
        tensor([50.])
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_full_precision(mean=mean)
    difference = _difference("mean", mean, "reference_mean", reference_mean)
    safe_std, stochastic = row_std(std, difference, valid)
    per_element = 0.5 * _standardised_square(stochastic_rows(difference, stochastic), safe_std)
    return reduce_elements(per_element, stochastic, difference, reduction)


def cps_surrogate(
    x: Tensor, mean: Tensor, *, reduction: str, valid: Numbers | None = None
) -> Tensor:
    r"""Flow-CPS's training signal :math:`-(x - mean)^2`: a surrogate, NOT a log-density.

    The factor 1 / (2 std^2) of the density is left out, so that steps with little noise do not
    dominate. The exponential of a difference of two such values is not a probability ratio. For the
    density use ``gaussian_log_prob``.

    Args:
        x: next state as it was used in the rollout, [M, ...].
        mean: transition mean, shape of ``x``.
        reduction: "mean" or "sum" over elements.
        valid: as in ``gaussian_log_prob``.

    Returns:
        [M], <= 0, float32 at least. Gradient flows to both.

    Raises:
        ValueError: shapes differ or the reduction is unknown.
        TypeError: ``x`` is not floating point, ``mean`` not float32 or float64, or the mask not
            boolean.

    Source: Flow-CPS (arXiv 2509.05952).

    Example:
        >>> cps_surrogate(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), reduction="sum")
        tensor([-25.])
    """
    check_choice("reduction", reduction, REDUCTIONS)
    difference = _difference("x", x, "mean", mean)
    surrogate = -row_mean_square(valid_rows(valid, difference))
    reduced = surrogate if reduction == "mean" else surrogate * elements(difference)
    return reduced.to(difference.dtype)


def unit_step(solver: Solver, sigma: float | Numbers, next_sigma: float | Numbers) -> Transition:
    """Transition from state 0 at velocity 1, mean and std [M, 1].

    Means are linear in state and velocity, so this mean is the slope of a step's mean in the
    velocity; it is negative.
    """
    check_callable("solver", solver)
    times = {"sigma": sigma, "next_sigma": next_sigma}
    like = first_tensor(*times.values())
    if like is None:
        like = torch.zeros((), dtype=torch.float32, device="cpu")
    start, end = (as_real(name, x, like=like).detach() for name, x in times.items())
    check_floating(sigma=start, next_sigma=end)
    rows = start if start.numel() >= end.numel() else end
    check_rank("sigma", rows, 0, "[M]")
    zero, _ = promote(torch.zeros_like(rows).reshape(-1, 1), end)
    return solver(zero, torch.ones_like(zero), start, end)


def sliding_window(
    update: int, *, size: int, steps: int, stride: int = 1, interval: int = 1
) -> range:
    """Denoising steps that are stochastic and trained at an update: a window that slides.

    It starts at the noisiest step and moves by ``stride`` every ``interval`` updates until it ends
    at the last step. The last move may be shorter, so that no step is left out. It then restarts.

    Args:
        update: number of the update, from 0.
        size: steps in the window, 1..steps.
        steps: denoising steps S.
        stride: steps moved at a time.
        interval: updates between moves.

    Returns:
        The range of step indices; all others take ODE steps.

    Raises:
        ValueError: a count is too small, or the window is larger than the grid.
        TypeError: a count is not an integer.

    Source: MixGRPO (arXiv 2507.21802).

    Example:
        >>> [list(sliding_window(k, size=2, steps=4)) for k in range(4)]
        [[0, 1], [1, 2], [2, 3], [0, 1]]
    """
    check_count("update", update, low=0)
    for name, count in (("size", size), ("stride", stride), ("interval", interval)):
        check_count(name, count)
    check_count("steps", steps, low=size)
    last = steps - size  # first step of the last window, so that no window is cut short
    positions = math.ceil(last / stride) + 1
    start = min(update // interval % positions * stride, last)
    return range(start, start + size)


def _difference(x_name: str, x: Tensor, mean_name: str, mean: Tensor) -> Tensor:
    check_floating(**{x_name: x})
    check_full_precision(**{mean_name: mean})
    check_same_shape(**{x_name: x, mean_name: mean})
    check_rank(x_name, x, 2, "[M, ...]")
    left, right = promote(x, mean)
    # Contiguous: the order of summation, and so the last bit of a log-prob, is that of the replay.
    return (left - right).contiguous()


def _standardised_square(difference: Tensor, std: Tensor) -> Tensor:
    """Mean of ``(difference / std)^2``."""
    return row_mean_square(difference) / std / std  # twice: the square of a tiny std would be 0
