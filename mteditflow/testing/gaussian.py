"""Gaussian policies and flows with closed-form densities, marginals and policy gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianPolicy:
    r"""One-step policy :math:`a \sim N(mean, std^2)` under the reward :math:`-(a - goal)^2 / 2`.

    Its expected reward is :math:`-((mean - goal)^2 + std^2) / 2`, so the policy gradient by the
    mean is ``goal - mean``.

    Attributes:
        mean: mean of the action.
        std: standard deviation, > 0.

    Source: the score-function identity; see "Policy gradients" in any text on the subject.

    Example:
        >>> GaussianPolicy(1.0, 0.5).gradient(3.0)
        2.0
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf:
            raise ValueError(f"std: expected a finite number > 0, got {self.std!r}")

    def gradient(self, goal: float) -> float:
        """Return the gradient of the expected reward by the mean."""
        return goal - self.mean

    def quadrature(self, nodes: int = 8) -> tuple[Tensor, Tensor]:
        """Return actions and weights whose weighted sums are exact expectations.

        Args:
            nodes: number of actions; exact for polynomials up to degree ``2 nodes - 1``.

        Returns:
            Actions and weights, float64 [nodes]; the weights add up to 1.
        """
        # Gauss-Hermite nodes of the probabilists' weight exp(-z^2 / 2); weights sum to sqrt(2 pi).
        z, weight = np.polynomial.hermite_e.hermegauss(nodes)
        action = self.mean + self.std * torch.from_numpy(z)
        return action, torch.from_numpy(weight / weight.sum())

    @staticmethod
    def log_density(action: Tensor, mean: Tensor, std: float) -> Tensor:
        """Return the log-density of actions; gradient flows to ``mean``."""
        return -((action - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class GaussianFlow:
    r"""Flow whose data are :math:`N(mean, std^2)` in each element, with its exact velocity.

    On the path :math:`x_t = (1 - \sigma)\,clean + \sigma\,noise` the marginal at flow time sigma is
    Gaussian with mean :math:`(1 - \sigma)\,mean` and variance
    :math:`(1 - \sigma)^2 std^2 + \sigma^2`; the velocity is the expectation of noise - clean there.

    Attributes:
        mean: mean of the data.
        std: standard deviation of the data, > 0.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 1, for Gaussian data.

    Example:
        >>> GaussianFlow(0.0, 1.0).velocity(torch.tensor([[2.0]]), 0.5)
        tensor([[0.]])
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not 0 < self.std < math.inf:
            raise ValueError(f"std: expected a finite number > 0, got {self.std!r}")

    def marginal(self, sigma: float) -> tuple[float, float]:
        """Return mean and variance of ``x_t`` at a flow time."""
        return (1 - sigma) * self.mean, (1 - sigma) ** 2 * self.std**2 + sigma**2

    def velocity(self, x_t: Tensor, sigma: float) -> Tensor:
        """Return the exact velocity at ``x_t`` [M, ...]; gradient flows to ``x_t``."""
        mean, variance = self.marginal(sigma)
        # Regression of noise - clean on x_t: their covariance is sigma - (1 - sigma) std^2, and
        # the mean of noise - clean is -self.mean.
        slope = (sigma - (1 - sigma) * self.std**2) / variance
        return slope * (x_t - mean) - self.mean
