r"""TempFlow-GRPO: denoising steps weighted by the noise that they add."""

from __future__ import annotations

import torch
from torch import Tensor

from mteditflow._checks import Numbers
from mteditflow._reduce import in_float64
from mteditflow.flow.solvers import Solver, unit_step


def noise_step_weight(
    solver: Solver, sigma: float | Numbers, next_sigma: float | Numbers
) -> Tensor:
    r"""Loss weight of a step by its std, :math:`w_k = s_k / \mathrm{mean}_j s_j`, s = g sqrt(h).

    It is meant for surrogates on plain log-probs. For Flow-SDE below sigma 1 the gradient of a
    log-prob with respect to the velocity has the size :math:`(\sqrt{h} / g)(1 + a^2/2)`. Times the
    weight it is proportional to the step size h, so that each step counts by how far it moves.

    ``guard_step_weight`` is a different weight. It belongs to ``guard_log_ratio`` and equalizes the
    gradients of all steps. On-policy, ``guard_log_ratio`` without a step weight has the gradient of
    the log-prob with this weight, times the mean of the stds.

    Args:
        solver: the solver of the rollout.
        sigma: flow time before each of the trained steps, in (0, 1]: a number, [M] or [M, 1, ...].
        next_sigma: flow time after the step, in [0, sigma), in one of the same forms.

    Returns:
        [M], float32 at least, >= 0, mean 1 over the given steps, detached; multiply an unreduced
        loss by it. All 0 if no step is stochastic.

    Raises:
        ValueError: shapes differ, or a step does not go from noise toward data.
        TypeError: a flow time is not floating point.

    Source: the noise-aware weighting of TempFlow-GRPO (arXiv 2508.04324), whose Eq. 8 is known here
        only at second hand. The gradient's size and solvers other than Flow-SDE are derived here.

    Example:
        >>> from mteditflow import FlowSDE
        >>> noise_step_weight(FlowSDE(0.7), torch.tensor([0.8, 0.5]), torch.tensor([0.5, 0.2]))
        tensor([1.3333, 0.6667])
    """
    std = unit_step(solver, sigma, next_sigma).std.flatten()
    (exact,) = in_float64(std)
    mean = exact.mean()
    return (exact / torch.where(mean == 0, 1, mean)).to(std)
