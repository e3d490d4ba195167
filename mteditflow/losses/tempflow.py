r"""TempFlow-GRPO: weights of denoising steps by the noise that they add."""

from __future__ import annotations

import torch
from torch import Tensor

from mteditflow._checks import Numbers
from mteditflow._reduce import in_float64
from mteditflow.flow.solvers import Solver, unit_step


def noise_step_weight(
    solver: Solver, sigma: float | Numbers, next_sigma: float | Numbers
) -> Tensor:
    r"""Weight of a step's loss by its std, :math:`w_k = s_k / \mathrm{mean}_j s_j`, s = g sqrt(h).

    For the surrogate of plain log-probs. The gradient of a log-prob by the velocity has the size
    :math:`(\sqrt{h} / g)(1 + a^2/2)` for Flow-SDE below sigma 1; times the weight it is
    proportional to the step size h: noisy steps, which decide more of a picture, count by how far
    they move. That is another weight than ``guard_step_weight``, which belongs to the log-ratio of
    ``guard_log_ratio`` and makes gradients equal at all steps: without it that log-ratio has, on
    policy, the gradient of this weight but for the mean of the stds.

    Args:
        solver: the solver of the rollout.
        sigma: flow time before each of the trained steps, in (0, 1]: a number, [M] or [M, 1, ...].
        next_sigma: flow time after it, in [0, sigma), in one of these forms too.

    Returns:
        [M], float32 at least, >= 0, mean 1 over the steps given, detached; multiply an unreduced
        loss by it. All 0 where no step is random.

    Raises:
        ValueError: shapes differ, or a step does not go from noise toward data.
        TypeError: a flow time is not floating point.

    Source: TempFlow-GRPO (arXiv 2508.04324), its noise-aware weighting; its Eq. 8 was known at
        second hand alone. The law of the gradient and any solver but Flow-SDE are derived here.

    Example:
        >>> from mteditflow import FlowSDE
        >>> noise_step_weight(FlowSDE(0.7), torch.tensor([0.8, 0.5]), torch.tensor([0.5, 0.2]))
        tensor([1.3333, 0.6667])
    """
    std = unit_step(solver, sigma, next_sigma).std.flatten()
    (exact,) = in_float64(std)
    mean = exact.mean()
    return (exact / torch.where(mean == 0, 1, mean)).to(std)
