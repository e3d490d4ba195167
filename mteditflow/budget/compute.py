"""Floating-point operations of a run, and a lower bound on their time."""

from __future__ import annotations

from dataclasses import dataclass

from mteditflow._checks import check_number
from mteditflow.budget.plan import Plan

#: Peak TFLOP/s of dense bf16 products with float32 accumulation, from vendors' data sheets.
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

    Text encoders, the autoencoder (under 1%), rewards and evaluation are not included.

    Attributes:
        forward: F, a forward pass of one row in one branch of the trained model.
        sampling_forward: the same for the model that samples.
        sampling: all steps of all turns.
        update: all rows that an update runs.
    """

    forward: float
    sampling_forward: float
    sampling: float
    update: float

    @property
    def total(self) -> float:
        """Return the FLOPs of a trajectory."""
        return self.sampling + self.update

    @property
    def in_forwards(self) -> float:
        """Return the FLOPs of a trajectory in units of F."""
        return self.total / self.forward


def work(plan: Plan) -> Work:
    """Return the FLOPs of one trajectory of a run."""
    row, passes = plan.costs.row, plan.passes
    # Interpolated between checkpointing all blocks and none, as blocks cost about the same.
    train = row.train + plan.kept_share * (row.train_plain - row.train)
    return Work(
        float(row.forward),
        float(plan.sampling_forward),
        float(plan.turns * plan.steps * plan.branches * plan.sampling_forward),
        plan.branches * (passes.trained * train + passes.forward * row.forward),
    )


def least_hours(plan: Plan, rate: float, *, efficiency: float = 0.4, rounds: int = 100) -> float:
    """Return a lower bound on the hours of a run at an assumed efficiency.

    It is no forecast: the judge, other services and sampling one trajectory at a time make a run
    longer.

    Args:
        plan: the run.
        rate: peak rate of a GPU in TFLOP/s, such as an entry of ``GPUS``.
        efficiency: assumed share of the peak rate, in (0, 1].
        rounds: number of rounds.

    Raises:
        ValueError: a number is out of range.
    """
    check_number("rate", rate, low=0.0, open_low=True)
    check_number("efficiency", efficiency, low=0.0, high=1.0, open_low=True)
    flops = work(plan).total * plan.trajectories * rounds
    return flops / (rate * 1e12 * efficiency * plan.gpus) / 3600
