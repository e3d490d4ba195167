"""Laws of stochastic solver steps.

Source: MT-EditFlow (arXiv 2606.01985), stochastic sampler; Flow-GRPO (arXiv 2505.05470).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor

from mteditflow.testing.expect import described, expect_tensor, gradients
from mteditflow.testing.gaussian import GaussianFlow
from mteditflow.testing.law import Laws, call, expect_close, fail
from mteditflow.testing.options import Subject
from mteditflow.testing.reports import Returned
from mteditflow.testing.strategies import sigma_grids, tensors

ROWS, LATENT = 2, (2,)


@dataclass(frozen=True)
class SolverStep(Subject):
    """A stochastic solver step under test.

    Attributes:
        function: called as ``function(x_t, velocity, sigma, next_sigma, noise_level)`` with latents
            [M, ...] and numbers; returns mean [M, ...] and std, a number or one per row.
        noise_level: noise level of the checked steps; 0 for a solver without noise.
        marginals: the solver keeps the marginals of the ODE as steps become small.
        tolerance: relative difference that counts as rounding.
    """

    noise_level: float = 0.5
    marginals: bool = True
    tolerance: float = 1e-5

    def __call__(
        self, x_t: Tensor, velocity: Tensor, sigma: float, next_sigma: float, noise_level: float
    ) -> tuple[Tensor, Tensor]:
        """Return mean [M, ...] and std, which broadcasts to it; a failure breaks the law.

        Args:
            x_t: latents, [M, ...].
            velocity: velocities at ``x_t``, [M, ...].
            sigma: flow time of ``x_t``.
            next_sigma: flow time after the step.
            noise_level: noise level of the step.
        """
        case = _step(x_t, velocity, sigma, next_sigma, noise_level)
        result = call(self.function, case, x_t, velocity, sigma, next_sigma, noise_level)
        if not isinstance(result, (tuple, list)) or len(result) < 2:
            fail(case, "a mean and a std", Returned(described(result)))
        mean, std = expect_tensor(result[0], x_t.shape, case), result[1]
        std = torch.as_tensor(std, dtype=mean.dtype, device="cpu")
        axes = len(x_t), *[1] * (x_t.ndim - 1)
        return mean, std.reshape(1).expand(len(x_t)).reshape(axes) if std.numel() == 1 else std


def _step(*values: object) -> dict[str, object]:
    return dict(zip(("x_t", "velocity", "sigma", "next_sigma", "noise_level"), values, strict=True))


#: Laws of solver steps, for ``SolverStep``.
SOLVER: Laws[SolverStep] = Laws(
    "solver",
    SolverStep,
    called="fn(x_t, velocity, sigma, next_sigma, noise_level), returns mean and std",
)


@SOLVER.law(
    why="A deterministic evaluation must sample the model's ODE, not another one.",
)
def noise_0_is_euler(f: SolverStep, data: DataObject) -> None:
    """With noise level 0 a step is an Euler step, and its std is 0."""
    grid = data.draw(sigma_grids())
    x_t, velocity = data.draw(tensors((ROWS, *LATENT))), data.draw(tensors((ROWS, *LATENT)))
    at = data.draw(st.integers(0, len(grid) - 2))
    sigma, following = float(grid[at]), float(grid[at + 1])
    mean, std = f(x_t, velocity, sigma, following, 0.0)
    case = _step(x_t, velocity, sigma, following, 0.0)
    expect_close(mean, x_t + (following - sigma) * velocity, case, tolerance=f.tolerance)
    if bool((std != 0).any()):
        fail(case, "std 0", std, wrong=std != 0)


@SOLVER.law(
    why="The noise scale g diverges at sigma = 1, and a step to sigma = 0 may have no noise; a NaN "
    "there ends a run.",
)
def finite(f: SolverStep, data: DataObject) -> None:
    """Mean and std are finite on every grid from 1 to 0; all but the last step add noise."""
    grid = data.draw(sigma_grids())
    x_t, velocity = data.draw(tensors((ROWS, *LATENT))), data.draw(tensors((ROWS, *LATENT)))
    for sigma, following in pairwise(grid.tolist()):
        mean, std = f(x_t, velocity, sigma, following, f.noise_level)
        sound = bool(mean.isfinite().all()) and bool(std.isfinite().all())
        case = _step(x_t, velocity, sigma, following, f.noise_level)
        if not sound or bool((std < 0).any()):
            fail(case, "a finite mean and a finite std >= 0", f"std {std.flatten().tolist()}")
        if following > 0 and f.noise_level > 0 and bool((std == 0).any()):
            fail(case, "a std > 0", std, wrong=std == 0)


@SOLVER.law(
    why="Replay batches steps of different trajectories; the ratio must stay 1.",
)
def rows_independent(f: SolverStep, data: DataObject) -> None:
    """A row has the same mean and std alone and in a batch."""
    grid = data.draw(sigma_grids(to_zero=False))
    at = data.draw(st.integers(0, len(grid) - 2))
    x_t, velocity = data.draw(tensors((ROWS, *LATENT))), data.draw(tensors((ROWS, *LATENT)))
    arguments = float(grid[at]), float(grid[at + 1]), f.noise_level
    row = data.draw(st.integers(0, ROWS - 1))
    whole = f(x_t, velocity, *arguments)
    alone = f(x_t[row : row + 1], velocity[row : row + 1], *arguments)
    case = _step(x_t, velocity, *arguments)
    for batched, own in zip(whole, alone, strict=True):
        expect_close(batched[row : row + 1], own, case, tolerance=f.tolerance)


@SOLVER.law(
    why="Without a gradient from the mean to the velocity the log-prob trains nothing.",
)
def gradient_to_velocity(f: SolverStep, data: DataObject) -> None:
    """The mean is linear in the velocity, and has a negative gradient to it."""
    grid = data.draw(sigma_grids())
    at = data.draw(st.integers(0, len(grid) - 2))
    x_t, velocity = data.draw(tensors((ROWS, *LATENT))), data.draw(tensors((ROWS, *LATENT)))
    arguments = float(grid[at]), float(grid[at + 1]), f.noise_level
    case, leaf = _step(x_t, velocity, *arguments), velocity.clone().requires_grad_()
    mean, _ = f(x_t, leaf, *arguments)
    gradient = gradients(mean.sum(), {"velocity": leaf}, case)["velocity"]
    base, _ = f(x_t, torch.zeros_like(velocity), *arguments)
    expect_close(base + gradient * velocity, mean, case, tolerance=f.tolerance)
    if not bool((gradient < 0).all()):
        words = "a negative gradient: the velocity points from data to noise"
        fail(case, words, gradient, wrong=~(gradient < 0))


@SOLVER.law(
    why="An SDE with other marginals trains a distribution that evaluations do not sample.",
    skip=lambda f: None if f.marginals else "--no-marginals: the solver has other marginals",
    options=("--no-marginals",),
)
def marginals(f: SolverStep, data: DataObject) -> None:
    """Halving the step size reduces the error of the marginals by a factor of at least 1.5."""
    flow = GaussianFlow(data.draw(st.sampled_from([-1.0, 0.0, 2.0])), data.draw(
        st.sampled_from([0.25, 0.5, 1.0, 2.0])
    ))  # fmt: skip
    start = data.draw(st.sampled_from([0.6, 0.75, 0.9]))
    errors = [_marginal_error(f, flow, start, 0.1, steps) for steps in (32, 64, 128)]
    if errors[-1] <= 1e-9:  # exact up to rounding, where errors no longer halve
        return
    # A first-order solver halves its error; 1.5 leaves room for terms of higher order.
    if not (errors[0] >= 1.5 * errors[1] and errors[1] >= 1.5 * errors[2]):
        case = {"flow": flow, "from sigma": start, "to sigma": 0.1, "steps": [32, 64, 128]}
        fail(case, "errors that halve with the step size", errors)


def check_solver(
    function: Callable[..., Any],
    *,
    noise_level: float = 0.5,
    marginals: bool = True,
    tolerance: float = 1e-5,
    **search: Any,
) -> None:
    """Check a solver step.

    Args:
        function: called as ``function(x_t, velocity, sigma, next_sigma, noise_level)``, returns
            mean and std.
        noise_level: noise level of the checked steps; 0 for a solver without noise.
        marginals: the solver keeps the marginals of the ODE as steps become small.
        tolerance: relative difference that counts as rounding.
        **search: ``examples``, ``seed``, ``only``, ``without``, as in ``Laws.results``.

    Raises:
        LawBroken: a law fails; the message has its smallest case.
        AssertionError: several laws fail.

    Source: Flow-GRPO (arXiv 2505.05470); DanceGRPO (arXiv 2505.07818).

    Example:
        >>> from mteditflow import FlowSDE
        >>> def step(x_t, velocity, sigma, next_sigma, noise_level):
        ...     return FlowSDE(noise_level)(x_t, velocity, sigma, next_sigma)
        >>> check_solver(step, examples=2)
    """
    SOLVER.check(SolverStep(function, noise_level, marginals, tolerance), **search)


def _marginal_error(
    f: SolverStep, flow: GaussianFlow, start: float, end: float, steps: int
) -> float:
    """Return the error of mean plus that of variance at ``end``, by propagating a Gaussian.

    The velocity of a Gaussian flow is affine in x, so a step is affine, too, and two points
    determine it.
    """
    mean, variance = flow.marginal(start)
    grid = torch.linspace(start, end, steps + 1, dtype=torch.float64, device="cpu").tolist()
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64, device="cpu")
    for sigma, following in pairwise(grid):
        to, std = f(points, flow.velocity(points, sigma), sigma, following, f.noise_level)
        offset, slope = float(to[0]), float(to[1] - to[0])
        mean, variance = offset + slope * mean, slope**2 * variance + float(std.flatten()[0]) ** 2
    exact_mean, exact_variance = flow.marginal(end)
    return abs(mean - exact_mean) + abs(variance - exact_variance)
