"""An update of the trainer outside of a run, and what figures of it are made with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import diffusers
import peft
import torch
from mteditflow_examples.flux.config import Training

from benchmarks import report
from mteditflow.objectives import Objective, Output, RoundKey, Units
from mteditflow.pipelines import LoraPolicies, Rollout, RolloutVelocity
from mteditflow.training import Update, Updater


@dataclass(frozen=True, eq=False)
class Batch:
    """A round before its update: trajectories with advantages, and what trains on them.

    Attributes:
        policies: policies on the model of the rollout.
        objective: loss and its hyperparameters.
        rollout: recorded trajectories.
        advantage: advantage of each turn, [B, N].
        valid: turns that take part, [B, N].
        training: number of minibatches and size of micro-batches.
        key: of the round's random numbers.
    """

    policies: LoraPolicies
    objective: Objective
    rollout: Rollout
    advantage: torch.Tensor
    valid: torch.Tensor
    training: Training
    key: RoundKey

    def units(self) -> Units:
        """Draw the units of the first minibatch."""
        return self.objective.units(
            self.rollout,
            self.advantage,
            self.valid,
            key=self.key,
            minibatches=self.training.minibatches,
        )[0]

    def losses(self, part: Units) -> Output:
        """Compute the output of a micro-batch as the trainer does."""
        velocity = RolloutVelocity(self.policies, self.rollout)
        equal = self.policies.old_equals_current
        return self.objective(velocity, self.rollout, part, old_is_current=equal)

    def update(self, updater: Updater) -> Update:
        """Take the optimizer step of the first minibatch, in micro-batches."""
        units = self.units()
        return updater.step(units.split(self.training.batch), self.losses, count=units.count)


class ForwardCounter:
    """Counts calls of a transformer, and the rows that went through it with and without graph."""

    def __init__(self, model: Any) -> None:
        self.calls = self.trained = self.others = 0
        model.register_forward_hook(self._count)

    def _count(self, _: Any, args: Any, output: Any) -> None:
        rows, self.calls = len(output[0]), self.calls + 1
        if output[0].requires_grad:
            self.trained += rows
        else:
            self.others += rows

    def lap(self) -> tuple[int, int, int]:
        """Calls, rows with a graph, and rows without one, since the last lap."""
        counted = self.calls, self.trained, self.others
        self.calls = self.trained = self.others = 0
        return counted


def environment(device: str) -> dict[str, Any]:
    """Environment of the figures, and how busy the machine was."""
    versions = {"diffusers": diffusers.__version__, "peft": peft.__version__}
    return {**report.environment(device), **versions, "load": os.getloadavg()[0]}
