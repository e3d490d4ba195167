"""Roll out a velocity function into a trajectory: one turn, or a chain of successive edits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from mteditflow._checks import (
    REDUCTIONS,
    Numbers,
    as_device,
    as_ids,
    as_mask,
    as_real,
    check_callable,
    check_choice,
    check_count,
    check_floating,
    check_generator,
    check_group,
    check_kind,
    check_rank,
    check_shape,
    check_values,
)
from mteditflow.flow.solvers import ODE, Solver, gaussian_log_prob
from mteditflow.flow.trajectory import Trajectory

_LARGEST_SEED = 2**64 - 1  # of a torch.Generator


class VelocityFunction(Protocol):
    """Policy as a function: velocity of a latent, given its reference and turn."""

    def __call__(
        self, x_t: Tensor, sigma: Tensor, *, reference: Tensor | None, turn: int
    ) -> Tensor:
        """Velocity [B, ...] at ``x_t`` [B, ...] and ``sigma`` [B].

        ``reference`` [B, ...] is the clean latent of the previous turn (at turn 0 the one given to
        ``rollout``, or ``None``). ``turn`` counts from 0 and selects the instruction.
        """
        ...


def trajectory_generators(
    seed: int, count: int, *, device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """One generator per trajectory, so that a trajectory does not depend on its batch.

    Args:
        seed: seed of the first generator, >= 0; the next ones get ``seed + 1``, ``seed + 2``, ...
        count: number of trajectories, >= 1.
        device: device on which the noise is drawn.

    Returns:
        ``count`` generators.

    Raises:
        ValueError: ``count`` is below 1 or ``seed`` below 0.
        TypeError: ``count`` or ``seed`` is not an integer.

    Example:
        >>> [generator.initial_seed() for generator in trajectory_generators(7, 2)]
        [7, 8]
    """
    check_count("count", count)
    check_count("seed", seed, low=0, high=_LARGEST_SEED - count)
    place = as_device("device", device)
    return [torch.Generator(place).manual_seed(seed + k) for k in range(count)]


def batched_noise(
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard Gaussian noise with row b drawn from generator b alone.

    Args:
        shape: shape of one row.
        generators: one per row, all on one device; each advances by one draw.
        dtype: dtype of the result.
        device: device of the result; ``None`` means that of the generators.

    Returns:
        ``[B, *shape]``.

    Raises:
        ValueError: there is no generator, or a size is negative.
        TypeError: an argument has the wrong type.

    Example:
        >>> batched_noise((2, 3), trajectory_generators(0, 4)).shape
        torch.Size([4, 2, 3])
    """
    _check_generators(generators)
    if not generators:
        raise ValueError("generators: expected at least one, got none")
    check_kind("shape", shape, (list, tuple), "the sizes of a row's axes")
    shape = tuple(shape)
    for axis, size in enumerate(shape):
        check_count(f"shape[{axis}]", size, low=0)
    check_kind("dtype", dtype, torch.dtype, "a torch.dtype")
    place = None if device is None else as_device("device", device)
    # Drawn row by row on the generators' device: a row's noise then depends on its seed alone.
    rows = [torch.randn(shape, generator=g, dtype=dtype, device=g.device) for g in generators]
    return torch.stack(rows).to(device=place)


def _check_generators(generators: Sequence[torch.Generator]) -> None:
    check_kind("generators", generators, (list, tuple), "a list of one torch.Generator per row")
    for row, generator in enumerate(generators):
        check_generator(f"generators[{row}]", generator)


@torch.no_grad()
def rollout(
    velocity: VelocityFunction,
    noise: Tensor,
    sigmas: Numbers,
    *,
    solver: Solver,
    generators: Sequence[torch.Generator],
    reduction: str,
    reference: Tensor | None = None,
    group: Numbers | None = None,
    turn_mask: Numbers | None = None,
    stochastic_steps: Collection[int] | None = None,
) -> Trajectory:
    r"""Sample N turns of S steps; each turn edits the clean latent of the previous turn.

    Args:
        velocity: the policy, see ``VelocityFunction``; called S times per turn.
        noise: initial noise of each turn, [B, N, ...]; N = 1 is plain sampling.
        sigmas: grid of a turn, [S + 1], strictly decreasing, such as ``uniform_sigmas(S)``.
        solver: solver of the stochastic steps: ``FlowSDE``, ``DanceSDE`` or ``CPS``; ``ODE`` if no
            step is stochastic.
        generators: generators of the step noise, one per trajectory, so that a trajectory's noise
            does not depend on its batch.
        reduction: reduction of log-probs over elements, "mean" or "sum".
        reference: clean latent that turn 0 edits, [B, ...]; ``None`` for sampling without one.
        group: integer group ids, [B]; ``None`` puts each trajectory in a group of its own.
        turn_mask: turns that exist, boolean [B, N]; ``None`` means all. Absent turns are sampled
            like the others, to keep the batch rectangular, and their content is undefined.
        stochastic_steps: indices of the steps that use ``solver``, such as ``sliding_window(...)``;
            the others are ODE steps. ``None`` means all.

    Returns:
        Trajectory without gradients; a step is stochastic where its std is positive.

    Raises:
        ValueError: shapes do not match, the grid does not decrease, a step index is out of range,
            or a velocity has the wrong shape or is not finite.
        TypeError: noise or grid is not floating point, or the turn mask not boolean.

    Source: MT-EditFlow (arXiv 2606.01985), Eq. 9-16.

    Example:
        >>> def shrink(x_t, sigma, *, reference, turn):
        ...     return x_t
        >>> noise = batched_noise((1, 2), trajectory_generators(0, 3))  # one turn, latent [2]
        >>> rollout(shrink, noise, torch.tensor([1.0, 0.5, 0.0]), solver=ODE(),
        ...         generators=trajectory_generators(9, 3), reduction="mean")
        Trajectory(B=3, N=1, S=2, latent=[2], dtype=torch.float32, device=cpu)
    """
    check_callable("velocity", velocity)
    check_callable("solver", solver)
    check_floating(noise=noise)
    sigmas = as_real("sigmas", sigmas, like=noise)
    check_floating(sigmas=sigmas)
    check_rank("noise", noise, 3, "[B, N, ...]")
    check_choice("reduction", reduction, REDUCTIONS)
    b, n = noise.shape[:2]
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas: expected shape [S + 1] with S >= 1, got {list(sigmas.shape)}")
    _check_generators(generators)
    if len(generators) != b:
        raise ValueError(f"generators: expected one per trajectory, {b}, got {len(generators)}")
    if group is None:
        group = torch.arange(b, dtype=torch.int64, device=noise.device)
    group = as_ids(group, noise.device)
    check_group(group, (b,))
    turn_mask = as_mask("turn_mask", turn_mask, noise.flatten(2)[..., 0], "[B, N]")
    if reference is not None:
        check_floating(reference=reference)
        check_rank("reference", reference, 1, "[B, ...]")
        if len(reference) != b:
            raise ValueError(
                f"reference: expected one row per trajectory, {b}, got {len(reference)}"
            )
    solvers = _solver_of_each_step(solver, stochastic_steps, len(sigmas) - 1)
    sigmas = sigmas.to(noise.device, torch.promote_types(sigmas.dtype, torch.float32))
    fall = sigmas[:-1] - sigmas[1:]
    check_values("sigmas", fall, fall > 0, "a strictly decreasing grid, a fall > 0")

    turns = []
    for turn in range(n):
        policy = partial(velocity, reference=reference, turn=turn)
        turns.append(_roll_turn(policy, noise[:, turn], sigmas, solvers, generators, reduction))
        reference = turns[-1][0][:, -1]  # Eq. 9-16: a turn edits the last state of the one before
    latents, log_probs, stochastic = zip(*turns, strict=True)
    return Trajectory(
        latents=torch.stack(latents, dim=1),
        sigmas=sigmas.expand(n, -1),
        log_prob=torch.stack(log_probs, dim=1),
        stochastic=torch.stack(stochastic),
        group=group,
        turn_mask=turn_mask,
        reduction=reduction,
    )


def _roll_turn(
    policy: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigmas: Tensor,
    solvers: Sequence[Solver],
    generators: Sequence[torch.Generator],
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return states [B, S + 1, ...], log-probs [B, S] and stochastic steps [S] of a turn from x."""
    states, log_probs, stochastic = [x], [], []
    for solver, step_sigmas in zip(solvers, sigmas.unfold(0, 2, 1), strict=True):
        sigma, next_sigma = step_sigmas[:, None].expand(-1, len(x))
        v = policy(x, sigma)
        check_shape("velocity", v, x.shape, "of x_t")
        transition = solver(x, v, sigma, next_sigma)
        sample = transition.mean
        random = (transition.std > 0).all()
        # ODE steps draw nothing, so that the noise of later steps depends on stochastic steps only.
        if random:
            z = batched_noise(x.shape[1:], generators, dtype=sample.dtype, device=x.device)
            sample = transition.sample(z)
        # The log-prob is that of the value that the next step really uses, after rounding to the
        # latent's dtype. A replay sees this value, and its ratio must be 1 before the first update.
        x = sample.to(x.dtype)
        states.append(x)
        log_probs.append(gaussian_log_prob(x, *transition, reduction=reduction))
        stochastic.append(random)
    return torch.stack(states, dim=1), torch.stack(log_probs, dim=1), torch.stack(stochastic)


def _solver_of_each_step(
    solver: Solver, stochastic_steps: Collection[int] | None, steps: int
) -> list[Solver]:
    if stochastic_steps is None:
        return [solver] * steps
    kinds = (list, tuple, range, set, frozenset)
    check_kind("stochastic_steps", stochastic_steps, kinds, "a list or range of step indices")
    for step in stochastic_steps:
        check_count("stochastic_steps", step, low=-steps)
        if not 0 <= step < steps:
            raise ValueError(f"stochastic_steps: expected indices in 0..{steps - 1}, got {step}")
    return [solver if step in stochastic_steps else ODE() for step in range(steps)]
