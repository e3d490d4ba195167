"""Floating-point operations of a run, and the least time that they take."""

from __future__ import annotations

from dataclasses import dataclass

from mteditflow._checks import check_number
from mteditflow.budget.plan import Plan

#: Dense bf16 products with float32 accumulation, TFLOP/s, as the makers state them.
GPUS = {
    "H100/H200": 989.0,
    "A100": 312.0,
    "RTX 4090": 165.0,
    "RTX 5090": 209.5,
    "B200": 2250.0,
}


@dataclass(frozen=True)
class Work:
    """FLOPs of the transformer for one trajectory.

    Encoders, the autoencoder (under 1%), rewards and evaluation are left out.

    Attributes:
        forward: F, a forward pass of one row in one branch of the trained model.
        sampling_forward: the same of what samples.
        sampling: of all steps of all turns.
        update: of all rows that an update runs.
    """

    forward: float
    sampling_forward: float
    sampling: float
    update: float

    @property
    def total(self) -> float:
        """FLOPs of a trajectory."""
        return self.sampling + self.update

    @property
    def in_forwards(self) -> float:
        """FLOPs of a trajectory in units of F."""
        return self.total / self.forward


def work(plan: Plan) -> Work:
    """Return what a trajectory computes."""
    row, passes = plan.costs.row, plan.passes
    train = row.train + plan.kept_share * (row.train_plain - row.train)
    return Work(
        float(row.forward),
        float(plan.sampling_forward),
        float(plan.turns * plan.steps * plan.branches * plan.sampling_forward),
        plan.branches * (passes.trained * train + passes.forward * row.forward),
    )


def least_hours(plan: Plan, rate: float, *, efficiency: float = 0.4, rounds: int = 100) -> float:
    """Return the hours below which no run of so many rounds ends, at an efficiency.

    It is a bound and no forecast: judge, services and the sampling of one trajectory at a time
    make a run longer.

    Args:
        plan: the run.
        rate: TFLOP/s of a GPU, such as an entry of ``GPUS``.
        efficiency: share of it that is reached, in (0, 1]; an assumption.
        rounds: rounds.

    Raises:
        ValueError: a number is out of range.
    """
    check_number("rate", rate, low=0.0, open_low=True)
    check_number("efficiency", efficiency, low=0.0, high=1.0, open_low=True)
    flops = work(plan).total * plan.trajectories * rounds
    return flops / (rate * 1e12 * efficiency * plan.gpus) / 3600
