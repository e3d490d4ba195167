r"""GRPO-Guard: an unbiased log-ratio of equal scale at all steps, and a weight per denoising step.

With the std ``s`` of a step, its noise ``z = (x' - mean_old) / s`` and the displacement
``d = mean - mean_old`` of the policy's mean, the log-ratio of the step is, for every element,

.. math:: \log\rho = z d / s - d^2 / (2 s^2)

Its mean under the old policy is minus the KL. A clip range around 1 therefore stops good samples
too late and bad ones too early. Its spread, d / s, differs between steps, so that no single range
fits all of them.
"""

from __future__ import annotations

from torch import Tensor

from mteditflow._checks import (
    REDUCTIONS,
    Numbers,
    check_choice,
    check_floating,
    check_full_precision,
    check_rank,
    check_same_shape,
)
from mteditflow._reduce import promote, reduce_elements, row_mean, row_std, stochastic_rows
from mteditflow.flow.solvers import Solver, unit_step


def guard_log_ratio(
    next_x: Tensor,
    mean: Tensor,
    old_mean: Tensor,
    std: float | Numbers,
    *,
    reduction: str,
    valid: Numbers | None = None,
) -> Tensor:
    r"""Normalized log-ratio, :math:`s \log\rho + d^2 / (2 s) = z\,d`.

    It has mean 0 under the old policy, and a spread that does not depend on ``std``. At the old
    policy its gradient is ``std`` times that of the log-prob. Pass it to the clipped surrogate as
    ``log_prob``, with zeros as ``old_log_prob``. Clip ranges are ``std`` times those for plain
    log-probs.

    Args:
        next_x: next state as it was used in the rollout, [M, ...]. Treated as a constant.
        mean: transition mean of the policy being trained, shape of ``next_x``.
        old_mean: transition mean of the sampling policy from the same state. Treated as a constant.
        std: std of the step, >= 0: a number, [M] or [M, 1, ...]. Treated as a constant.
        reduction: "mean" or "sum" over elements, as in ``gaussian_log_prob``.
        valid: boolean, [M]; false rows give 0 with gradient 0, even if they hold NaN.

    Returns:
        [M], float32 at least; 0 with gradient 0 where ``std`` is 0. Gradient flows to ``mean``
        alone.

    Raises:
        ValueError: shapes differ, std has more than one value per row or is negative, or the
            reduction is unknown.
        TypeError: ``next_x`` is not floating point, another tensor not float32 or float64, or the
            mask not boolean.

    Source: GRPO-Guard (arXiv 2510.22319), its ratio normalization.

    Example:
        >>> import torch
        >>> from mteditflow import clipped_surrogate_loss
        >>> mean = torch.tensor([[0.2, 0.0]], requires_grad=True)
        >>> next_x, old_mean = torch.tensor([[0.5, 1.0]]), torch.zeros(1, 2)
        >>> log_ratio = guard_log_ratio(
        ...     next_x, mean, old_mean, torch.tensor([[0.5]]), reduction="mean"
        ... )
        >>> log_ratio.detach()  # (1 * 0.2 + 2 * 0) / 2
        tensor([0.1000])
        >>> loss = clipped_surrogate_loss(
        ...     log_ratio, torch.zeros(1), torch.ones(1), clip_low=0.2, clip_high=0.2
        ... )
        >>> loss.detach()
        tensor([-1.1052])
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_floating(next_x=next_x)
    check_full_precision(mean=mean, old_mean=old_mean)
    check_same_shape(next_x=next_x, mean=mean, old_mean=old_mean)
    check_rank("next_x", next_x, 2, "[M, ...]")
    x, new, old = promote(next_x.detach(), mean, old_mean.detach())
    safe_std, stochastic = row_std(std, x, valid)
    # (x' - mean_old) = s z and (mean - mean_old) = d, so mean(z d) is their product over s.
    noise, moved = (stochastic_rows(y - old, stochastic) for y in (x, new))
    per_element = row_mean(noise * moved) / safe_std.detach()
    return reduce_elements(per_element, stochastic, x, reduction)


def guard_step_weight(
    solver: Solver, sigma: float | Numbers, next_sigma: float | Numbers
) -> Tensor:
    r"""Loss weight of a step that equalizes the scale of the velocity's gradient over steps.

    The gradient of ``guard_log_ratio`` with respect to the velocity is the noise of the step times
    the slope of its mean in the velocity; the weight is the inverse of that slope's size. With the
    step size :math:`\Delta` it is :math:`1/\Delta` for an ODE, :math:`1/(\Delta\,(1 + a^2/2))` for
    Flow-SDE below sigma 1 and :math:`1/(\Delta\,(1 + a^2 (1 - \sigma)/(2\sigma)))` for Dance-SDE.
    This is of the order of the number of steps; divide it by its mean to keep the learning rate.

    Args:
        solver: the solver of the rollout.
        sigma: flow time before each step, in (0, 1]: a number, [M] or [M, 1, ...].
        next_sigma: flow time after the step, in [0, sigma), in one of the same forms.

    Returns:
        [M], float32 at least, > 0, detached; multiply an unreduced loss by it.

    Raises:
        ValueError: shapes differ, or a step does not go from noise toward data.
        TypeError: a flow time is not floating point.

    Source: GRPO-Guard (arXiv 2510.22319), its gradient re-weighting, which is 1 over the step size
        for Flow-SDE; derived here for every solver.

    Example:
        >>> import torch
        >>> from mteditflow import ODE
        >>> guard_step_weight(ODE(), torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.25]))
        tensor([2., 4.])
    """
    # The slope is negative: a step toward data subtracts the velocity.
    return -1 / unit_step(solver, sigma, next_sigma).mean.flatten()
