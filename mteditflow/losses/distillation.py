r"""On-policy distillation: match a teacher's velocity at states of the student's own rollouts.

No reward is needed. The methods share one loss and differ in the teacher and the states:

================= ================================== ======================================
method            teacher                            weight of a row
================= ================================== ======================================
on-policy         another model, same conditioning   ``step_kl_weight`` of a stochastic step
velocity matching another model, same conditioning   1
MT-OPSD           a frozen earlier copy of the       1
                  student, given the CLEAN image
================= ================================== ======================================

MT-OPSD trains an editor to work on its own imperfect images without annotated chains. From a clean
image the student is run for k turns with an instruction to change nothing. Its output, the worn
image, differs from the clean image by the artifacts that the model adds. There are two losses:

- edit: ``distillation_loss`` at states of a real edit of the worn image, between the student
  conditioned on the worn image and the teacher conditioned on the clean one, under the same
  instruction and at the same state;
- identity: ``flow_matching_loss`` under the instruction to change nothing, with the worn image
  itself as the target, which keeps artifacts from growing.

``mt_opsd_loss`` computes both, and ``objectives.MTOPSD`` draws the states. The edit loss differs
from plain distillation in its conditioning only::

    worn = recorder.rollout(...)      # the student's edit of its own k-th image
    clean = recorder.rollout(...)     # the same edit of the clean image: its conditioning is used
    velocity = worn.velocity(student, x_t, sigma, trajectory, turn)
    with torch.no_grad():
        teacher_velocity = clean.velocity(teacher, x_t, sigma, trajectory, turn)
    loss = distillation_loss(velocity, teacher_velocity)

with ``x_t`` and ``sigma`` of a few stored steps of ``worn``. Source: MT-OPSD (arXiv 2609.35611).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_mask,
    check_floating,
    check_number,
    check_rank,
    check_same_shape,
)
from mteditflow._reduce import row_squared_error
from mteditflow.flow.solvers import Solver, gaussian_kl, unit_step


def distillation_loss(
    velocity: Tensor, teacher_velocity: Tensor, *, valid: Numbers | None = None
) -> Tensor:
    r"""Distance to the teacher's velocity, :math:`\mathrm{mean}\,\lVert v_\theta - v_T\rVert^2`.

    Multiplied by ``step_kl_weight`` it is the KL divergence between the steps of student and
    teacher. ``gaussian_kl`` of their transition means gives the same number, but the means round
    away part of a small difference between the velocities.

    Args:
        velocity: student's velocity at a state of its own rollout, [M, ...].
        teacher_velocity: teacher's velocity at the same state and flow time, under its own
            conditioning. Treated as a constant.
        valid: boolean, [M]; false rows give loss 0 and gradient 0, even if they hold NaN.

    Returns:
        [M], float32 at least: mean over elements, unreduced over rows. Gradient flows to
        ``velocity`` alone.

    Raises:
        ValueError: shapes differ or there is no latent axis.
        TypeError: a tensor is not floating point, or the mask is not boolean.

    Source: DanceOPD (arXiv 2606.27377); MT-OPSD (arXiv 2609.35611), Eq. 5.

    Example:
        >>> distillation_loss(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))
        tensor([5.])
    """
    return row_squared_error(valid, velocity=velocity, teacher_velocity=teacher_velocity)


def mt_opsd_loss(
    velocity: Tensor,
    teacher_velocity: Tensor,
    identity_target: Tensor,
    identity: Numbers,
    *,
    identity_weight: float = 10.0,
    valid: Numbers | None = None,
) -> Tensor:
    r"""MT-OPSD loss: distill edits from a teacher on the clean image, and train identity turns.

    With the worn image :math:`\tilde I`, its latent :math:`\tilde c` and the clean image
    :math:`I_0`, the mean over elements of

    - for an edit: :math:`\lVert v_S(x, \tilde I, e) - v_T(x, I_0, e) \rVert^2` at a state x of the
      student's own rollout
    - for an identity turn: :math:`w \lVert v_S(\tilde x, \tilde I, e_{id}) - (n - \tilde c)
      \rVert^2` at a point :math:`\tilde x` of the path between :math:`\tilde c` and noise n

    Args:
        velocity: velocity of the student, conditioned on the worn image, [M, ...].
        teacher_velocity: velocity of the teacher, conditioned on the clean image, shape of
            ``velocity``. Treated as a constant; not read in identity rows.
        identity_target: ``velocity_target(clean, noise)`` of the worn image's own latent, shape of
            ``velocity``. Treated as a constant; not read in edit rows.
        identity: rows whose instruction asks for no change, boolean [M].
        identity_weight: w, weight of an identity row relative to an edit, >= 0.
        valid: boolean, [M]; false rows give loss 0 and gradient 0, even if they hold NaN.

    Returns:
        [M], float32 at least: mean over elements, unreduced over rows. Gradient flows to
        ``velocity`` alone.

    Raises:
        ValueError: shapes differ, there is no latent axis, or the weight is negative.
        TypeError: a tensor is not floating point, or a mask is not boolean.

    Source: MT-OPSD (arXiv 2609.35611), Eq. 5 and 6.

    Example:
        >>> student, teacher = torch.tensor([[1.0], [1.0]]), torch.tensor([[3.0], [3.0]])
        >>> mt_opsd_loss(student, teacher, torch.zeros(2, 1), torch.tensor([False, True]))
        tensor([ 4., 10.])
    """
    check_number("identity_weight", identity_weight, low=0.0)
    if identity is None:
        raise TypeError("identity: expected a boolean mask, got None")
    given = {"velocity": velocity, "teacher_velocity": teacher_velocity}
    given["identity_target"] = identity_target
    check_floating(**given)
    check_same_shape(**given)
    check_rank("velocity", velocity, 2, "[M, ...]")
    still = as_mask("identity", identity, velocity.flatten(1)[:, 0], "[M]")
    rows = still.reshape(-1, *(1,) * (velocity.ndim - 1))
    target = torch.where(rows, identity_target.detach(), teacher_velocity.detach())
    loss = distillation_loss(velocity, target, valid=valid)
    return torch.where(still, identity_weight * loss, loss)


def step_kl_weight(solver: Solver, sigma: float | Numbers, next_sigma: float | Numbers) -> Tensor:
    r"""Factor from a squared velocity distance to the KL of a step, :math:`c^2 / (2 std^2)`.

    A solver's mean is linear in the velocity with slope c, and its std does not depend on the
    velocity. With the step size :math:`\Delta` the weight is
    :math:`\Delta\,(1 + a^2/2)^2 (1 - \sigma) / (2 a^2 \sigma)` for Flow-SDE below sigma 1.

    Args:
        solver: the solver of the rollout.
        sigma: flow time before each step, in (0, 1]: a number, [M] or [M, 1, ...].
        next_sigma: flow time after the step, in [0, sigma), in one of the same forms.

    Returns:
        [M], float32 at least, detached: the KL per element for a mean squared velocity difference
        of 1; 0 for a deterministic step, which has no density.

    Raises:
        ValueError: shapes differ, or a step does not go from noise toward data.
        TypeError: a flow time is not floating point.

    Source: DiffusionOPD (arXiv 2605.15055), the closed form of its objective; derived here for
        every solver.

    Example:
        >>> from mteditflow import DanceSDE
        >>> step_kl_weight(DanceSDE(0.5), torch.tensor([1.0]), torch.tensor([0.5]))
        tensor([1.])
    """
    # Means are linear in the velocity: the KL of slopes c and 0 is c^2 / (2 std^2).
    mean, std = unit_step(solver, sigma, next_sigma)
    return gaussian_kl(mean, torch.zeros_like(mean), std, reduction="mean")
