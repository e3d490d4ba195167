"""Updates of a round: minibatches of an objective, and the check of its first ratios."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mteditflow import RatioCheck, gather_ranks
from mteditflow.objectives import (
    Buckets,
    Output,
    ReplayObjective,
    Samples,
    Units,
    Velocity,
    gate_kl,
)
from mteditflow.pipelines import ReplayError, Rollout, shared_casts
from mteditflow.training import Update, Updater, most_parts

from .gating import counting_gated
from .run import Run


def update(
    run: Run,
    updater: Updater,
    velocity: Velocity,
    rollout: Samples,
    advantage: Tensor | None,
    valid: Tensor | None,
    gate: Tensor | None = None,
) -> None:
    """Take the optimizer steps of a round: every minibatch of every inner epoch.

    Args:
        run: the run.
        updater: accumulates gradients and steps the optimizer.
        velocity: the policies' velocity function on the rollout.
        rollout: this rank's trajectories.
        advantage: advantage of each turn, [B, N], or of each token, [B, N, ...]; None for
            objectives without a reward.
        valid: turns to train on, boolean [B, N].
        gate: trajectories that keep their KL to the reference, boolean [B]; None: all.
    """
    training, objective, batch = run.config.training, run.objective, run.config.training.batch

    def losses(part: Units) -> Output:
        equal = run.policies.old_equals_current
        output = objective(velocity, rollout, part, old_is_current=equal)
        return output if gate is None else counting_gated(output, part, gate)

    for epoch in range(training.inner_epochs):
        key = run.key.of_epoch(epoch)
        for units in objective.units(
            rollout, advantage, valid, key=key, minibatches=training.minibatches
        ):
            units = units if gate is None else gate_kl(units, gate)
            # All ranks run equally many parts: gradients and sharded weights are collective.
            parts = units.split(batch, parts=most_parts(units, batch, device=run.device))
            with _casts(run):
                step = updater.step(parts, losses, count=units.count)
            run.count(step)
            if _too_far(step, training.stop_kl):
                run.numbers["training/stopped_at_kl"] = step.means["old_kl"]
                return


def _casts(run: Run) -> AbstractContextManager[None]:
    """Share float32 casts between adapters; not with compiled blocks, whose casts torch manages."""
    return nullcontext() if run.config.model.compile else shared_casts(run.policies.model)


def _too_far(step: Update, stop_kl: float | None) -> bool:
    """Whether the KL to the sampling policy exceeds ``stop_kl`` after a step."""
    return stop_kl is not None and step.outcome == "taken" and step.means["old_kl"] > stop_kl


def check_first_ratios(run: Run, velocity: Velocity, rollout: Rollout | Buckets) -> None:
    """Check that the ratios of the first rollout are 1, before any update of this process.

    Raises:
        ReplayError: ratios deviate on some rank, ``safety.ratio`` is not "warn", and no importance
            weights correct for the deviation.
    """
    objective, config = run.objective, run.config
    assert isinstance(objective, ReplayObjective)
    check = objective.check_ratios(
        velocity,
        rollout,
        trajectories=config.sampling.batch,
        size=config.training.batch,
        share=config.safety.ratio_share,
    )
    _judge(run, check, corrected=objective.importance_cap is not None)


def _judge(run: Run, check: RatioCheck, *, corrected: bool) -> None:
    (fine,), _ = gather_ranks(torch.tensor([check.ok], device=run.device))
    if bool(fine.all()):
        run.log.message(f"ratio check passed: {check.verdict}")
    elif corrected or run.config.safety.ratio == "warn":
        run.log.warning(f"ratio check failed: {check.verdict}")
    else:
        raise ReplayError(
            f"ratio check failed: {check.verdict}; continue with safety.ratio = warn, or correct "
            "ratios with objective.importance_cap"
        )
