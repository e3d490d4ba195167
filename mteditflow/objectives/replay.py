"""Base of objectives that replay stochastic steps: GRPO, GRPO-Guard and Flow-DPPO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from mteditflow._checks import check_choice, check_count, check_number
from mteditflow.diagnostics import RatioCheck, check_ratio
from mteditflow.flow.solvers import (
    CPS,
    DanceSDE,
    FlowSDE,
    Solver,
    Transition,
    gaussian_kl,
    gaussian_log_prob,
    sliding_window,
)
from mteditflow.flow.trajectory import Steps
from mteditflow.losses.importance import truncated_importance_weight
from mteditflow.objectives.base import Metrics, Objective, Output, Sampling, Velocity, masked_output
from mteditflow.objectives.keys import Key, round_key
from mteditflow.objectives.kl_share import check_kl_share, share_kl, weighted_kl
from mteditflow.objectives.samples import (
    Samples,
    named_parts,
    starts_of,
    stored_steps,
    turn_values,
)
from mteditflow.objectives.units import (
    ALL,
    Rows,
    Units,
    at_rows,
    check_units,
    draw_units,
    member_mask,
    member_rows,
)
from mteditflow.objectives.velocities import Velocities

RATIO_SCALE = 1e-4  # the usual clip range of mean-reduced log-probs
SOLVERS: dict[str, Callable[[float], Solver]] = {"flow": FlowSDE, "dance": DanceSDE, "cps": CPS}


class Replay:
    """Stored steps of M rows under the current and the old policy, on the velocities' device.

    Attributes:
        steps: states, flow times and recorded log-probs.
        velocities: velocities of the policies at the states.
        reduction: reduction of the recorded log-probs over elements, "mean" or "sum".
        transition: Gaussian of the next states under the current policy, with gradient.
    """

    def __init__(
        self,
        solver: Solver,
        velocity: Velocity,
        samples: Samples,
        units: Units,
        *,
        old_is_current: bool,
    ) -> None:
        check_units(units, members=1, drawn=False)
        rows, self._solver = member_rows(units), solver
        stored = Steps(*(x.detach() for x in samples.steps_at(rows)))
        # States go to the model where they are stored; the rest follows the model's device.
        self.velocities = Velocities(
            velocity, stored.x_t, stored.sigma, units, old_is_current=old_is_current
        )
        self.reduction = samples.reduction
        self.steps = Steps(*(x.to(self.velocities.current.device) for x in stored))
        self.transition = self.under(self.velocities.current)

    def under(self, velocity: Tensor, rows: Rows = ALL) -> Transition:
        """Return the Gaussian of the next states of all or some rows under their velocity."""
        steps = Steps(*(at_rows(x, rows) for x in self.steps))
        return self._solver(steps.x_t, velocity, steps.sigma, steps.next_sigma)

    def kl(self, rows: Rows, valid: Tensor | None) -> Tensor:
        """KL of the current transition to the reference's at all or some rows, with gradient."""
        mean, std = self.under(at_rows(self.velocities.current, rows), rows)
        reference = self.under(self.velocities.reference_at(rows), rows).mean
        return gaussian_kl(mean, reference, std, reduction=self.reduction, valid=valid)

    @cached_property
    def old_mean(self) -> Tensor:
        """Mean of the old policy's transition, detached."""
        return self.under(self.velocities.old).mean

    @cached_property
    def log_prob(self) -> Tensor:
        """Log-prob of the recorded next states, [M], with gradient."""
        return gaussian_log_prob(self.steps.next_x, *self.transition, reduction=self.reduction)

    @cached_property
    def old_log_prob(self) -> Tensor:
        """Log-prob under the old policy as training computes it, [M], detached."""
        # The std depends on solver and grid alone, so all policies share it.
        std = self.transition.std
        return gaussian_log_prob(self.steps.next_x, self.old_mean, std, reduction=self.reduction)

    @torch.no_grad()
    def old_kl(self) -> Tensor:
        """KL of the current transition to the old one, [M], detached."""
        mean, std = self.transition
        return gaussian_kl(mean, self.old_mean, std, reduction=self.reduction)


@dataclass(frozen=True, kw_only=True)
class ReplayObjective(Objective):
    """Common fields and units of GRPO, Guard and DPPO; the current policy samples."""

    solver: Literal["flow", "dance", "cps"] = "flow"
    """Stochastic step: Flow-SDE, Dance-SDE or coefficient-preserving."""
    noise_level: float = 0.9
    """Noise level a of the solver, > 0: a step without noise has no log-prob."""
    stochastic_steps: int = 5
    """Steps of a turn that draw noise and are trained; the others are ODE steps."""
    window_interval: int = 0
    """Rounds after which the stochastic steps shift by one (MixGRPO); 0: always the first ones."""
    share: float = 1.0
    """Share of the stochastic steps that is trained, drawn separately for every turn."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference; above 0 it costs a forward pass."""
    kl_share: float = 1.0
    """Share of the steps whose KL is computed, at weight 1 / share: unbiased, fewer passes."""
    importance_cap: float | None = None
    """Cap of the importance weight between sampler and training if their log-probs differ
    (quantized, cached or stale rollouts); costs a forward pass of the old policy once it differs
    from the current one. None: the log-probs must agree."""

    def __post_init__(self) -> None:
        check_choice("solver", self.solver, list(SOLVERS))
        check_number("noise_level", self.noise_level, low=0.0, open_low=True)
        self.step_solver  # noqa: B018, checks the rest of the noise level
        check_count("stochastic_steps", self.stochastic_steps)
        check_count("window_interval", self.window_interval, low=0)
        check_number("share", self.share, low=0.0, high=1.0, open_low=True)
        check_number("kl_coef", self.kl_coef, low=0.0)
        check_kl_share(self.kl_share, self.kl_coef)
        if self.importance_cap is not None:
            check_number("importance_cap", self.importance_cap, low=1.0)

    @property
    def step_solver(self) -> Solver:
        """Solver of the stochastic steps."""
        return SOLVERS[self.solver](self.noise_level)

    def sampling(self, round: int, *, steps: int) -> Sampling:  # noqa: A002
        """See ``Objective``.

        Raises:
            ValueError: there are fewer steps than stochastic ones.
        """
        if self.stochastic_steps > steps:
            raise ValueError(
                f"stochastic_steps: expected at most the {steps} steps of a turn, got "
                f"{self.stochastic_steps}"
            )
        if self.window_interval == 0:
            return Sampling(self.step_solver, range(self.stochastic_steps))
        window = sliding_window(
            round, size=self.stochastic_steps, steps=steps, interval=self.window_interval
        )
        return Sampling(self.step_solver, window)

    def units(
        self,
        samples: Samples,
        advantage: Tensor | None,
        valid: Tensor | None = None,
        *,
        key: Key,
        minibatches: int = 1,
    ) -> list[Units]:
        """See ``Objective``: one row for each stochastic step, or a share of them."""
        if advantage is None:
            raise TypeError(f"advantage: expected a tensor for {type(self).__name__}, got None")
        values, own = turn_values(samples, advantage, valid)
        exists = stored_steps(samples)
        for name, part in named_parts(samples).items():
            if not bool(part.step_mask.any()):
                raise ValueError(
                    f"{name}: expected stochastic steps, got none; roll out with the solver and "
                    "the steps of objective.sampling(...)"
                )
        key = round_key(key)
        drawn = draw_units(
            samples,
            exists,
            values,
            own,
            key=key,
            share=self.share,
            minibatches=minibatches,
            zero_matters=self.kl_coef > 0,
        )
        return [share_kl(units, self.kl_share, key) for units in drawn]

    def replay(
        self, velocity: Velocity, samples: Samples, units: Units, *, old_is_current: bool
    ) -> Replay:
        """Gather the units' stored steps and evaluate the current policy there."""
        return Replay(self.step_solver, velocity, samples, units, old_is_current=old_is_current)

    @torch.no_grad()
    def check_ratios(
        self,
        velocity: Velocity,
        samples: Samples,
        *,
        trajectories: int,
        size: int,
        share: float = 0.1,
    ) -> RatioCheck:
        """Replay a fresh rollout and check that every ratio is 1, before the first update.

        Args:
            velocity: velocities of the policies; the current one is the policy that sampled.
            samples: the rollout.
            trajectories: number of trajectories to replay, from the first on.
            size: rows per forward pass.
            share: allowed deviation of a ratio from 1, as a share of the clip range.

        Returns:
            RatioCheck with its verdict.

        Raises:
            ValueError: a number is out of range, or these trajectories have no stochastic step.
            TypeError: a count is not an integer.
        """
        check_count("trajectories", trajectories)
        check_count("size", size)
        exists = stored_steps(samples)[:trajectories]
        # In float64: float32 would round a deviation from a large summed log-prob away.
        replayed, recorded = torch.zeros(2, *exists.shape, dtype=torch.float64, device="cpu")
        rows = exists.nonzero()
        every = torch.ones_like(rows[:, :1], dtype=torch.bool)
        all_steps = Units(rows[:, None], every, None, None, len(rows), starts=starts_of(samples))
        for units in all_steps.split(size):
            part = units.rows[:, 0]
            replay = self.replay(velocity, samples, units, old_is_current=True)
            replayed[part.unbind(dim=1)] = replay.log_prob.cpu().double()
            recorded[part.unbind(dim=1)] = replay.steps.log_prob.cpu().double()
        return check_ratio(replayed, recorded, clip=self.ratio_scale, valid=exists, share=share)

    @property
    def ratio_scale(self) -> float:
        """Deviation of a ratio from 1 that matters to the loss: the smaller clip range above 0."""
        bounds = (getattr(self, name, 0.0) for name in ("clip_low", "clip_high"))
        return min((bound for bound in bounds if bound > 0), default=RATIO_SCALE)

    def start(self, replay: Replay) -> Tensor:
        """Return the old log-prob of ratios: recorded, or recomputed if weights are capped."""
        return replay.steps.log_prob if self.importance_cap is None else replay.old_log_prob

    def output(self, units: Units, loss: Tensor, replay: Replay, metrics: Metrics) -> Output:
        """Apply the importance weight and add the KL to the reference."""
        if self.importance_cap is not None:
            weight = truncated_importance_weight(
                replay.old_log_prob,
                replay.steps.log_prob,
                cap=self.importance_cap,
                valid=member_mask(units, loss),
            )
            loss, metrics = weight * loss, {**metrics, "importance_weight": weight}
        found: Metrics = {"policy_loss": loss, **metrics}
        if self.kl_coef > 0:
            exists = member_mask(units, loss)
            found["kl"] = weighted_kl(units, lambda rows: replay.kl(rows, at_rows(exists, rows)))
            loss = loss + self.kl_coef * found["kl"]
        return masked_output(units, loss, found)


def ratio_metrics(log_ratio: Tensor, clip_low: float, clip_high: float) -> Metrics:
    """Return the ratio of new to old policy of each row, and whether it is outside the clip."""
    ratio = log_ratio.detach().exp()
    beyond = (ratio > 1 + clip_high) | (ratio < 1 - clip_low)
    return {"ratio": ratio, "clip_fraction": beyond.float()}


def estimated_kl(log_ratio: Tensor, reduction: str) -> Tensor:
    """Estimate KL(old || current) of each row from its log-ratio at a sample of the old policy.

    Unbiased: of the joint KL for summed log-probs, where it is never negative, and of the KL per
    element for mean log-probs. For these ``rho - 1 - log rho`` would be about KL / d for d
    elements; the minus log-ratio has the right mean, and its noise falls with d.
    """
    log_ratio = log_ratio.detach()
    if reduction == "mean":
        return -log_ratio
    # exp(l) - 1 - l is about l^2 / 2, which float32 loses to cancellation for tiny l.
    exact = log_ratio.double()
    return (exact.expm1() - exact).to(log_ratio.dtype)
