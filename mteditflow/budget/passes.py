"""Forward passes of an objective, counted by running it on a tiny rollout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mteditflow.flow.path import uniform_sigmas
from mteditflow.flow.sampling import rollout, trajectory_generators
from mteditflow.flow.solvers import ODE
from mteditflow.objectives import Objective, RoundKey
from mteditflow.objectives.base import Policy


@dataclass(frozen=True)
class Passes:
    """Rows that an update runs per trajectory, and rows of one loss entry.

    Attributes:
        trained: rows of the current policy, forward and backward.
        old: rows of the old policy, forward only.
        reference: rows of the reference policy, forward only.
        members: rows of a loss entry: 1, 2 for pairs, or the size of a group.
    """

    trained: float
    old: float
    reference: float
    members: int

    @property
    def forward(self) -> float:
        """Return the number of rows that run forward only."""
        return self.old + self.reference


def count_passes(
    objective: Objective,
    *,
    turns: int,
    steps: int,
    group_size: int,
    minibatches: int = 1,
    epochs: int = 1,
    round: int = 0,  # noqa: A002
) -> Passes:
    """Count the rows of an update by running the objective itself.

    Every turn is valid and no advantage is 0, so this is an upper bound. Rows that are drawn at
    random count with their expectation.

    Args:
        objective: the objective.
        turns: turns N of a trajectory.
        steps: denoising steps S of a turn.
        group_size: trajectories of a group.
        minibatches: optimizer steps per pass over the samples.
        epochs: passes over the samples of a round.
        round: round that is counted; in the first rounds the old policy may equal the current one,
            which saves its passes.

    Returns:
        Rows per trajectory.

    Raises:
        ValueError: the objective refuses these numbers.

    Example:
        >>> from mteditflow.objectives import NFT
        >>> count_passes(NFT(kl_coef=1e-4), turns=3, steps=6, group_size=4, round=9)
        Passes(trained=3.0, old=3.0, reference=3.0, members=1)
    """
    share = getattr(objective, "kl_share", 1.0)
    if share < 1:  # rows are drawn at random: count all of them, and scale by the share below
        objective = replace(objective, kl_share=1.0)  # type: ignore[type-var]
    trajectories = group_size * minibatches
    how = objective.sampling(round, steps=steps)
    samples = rollout(
        lambda x_t, *_, **__: torch.zeros_like(x_t),
        torch.ones(trajectories, turns, 2, dtype=torch.float32, device="cpu"),
        uniform_sigmas(steps),
        solver=ODE() if how.solver is None else how.solver,
        generators=trajectory_generators(0, trajectories),
        reduction="mean",
        group=torch.arange(trajectories, device="cpu") // group_size,
        stochastic_steps=how.stochastic_steps,
    )
    rows: dict[Policy, int] = {"current": 0, "old": 0, "reference": 0}

    def velocity(policy: Policy, x_t: Tensor, sigma: Tensor, at: Tensor) -> Tensor:  # noqa: ARG001
        rows[policy] += len(x_t)
        return torch.zeros_like(x_t)

    # Both signs, no zeros and no ties, so that no objective drops a row or a pair.
    advantage = torch.linspace(1.0, 2.0, trajectories, dtype=torch.float32, device="cpu")
    advantage[::2] *= -1
    old_is_current = objective.old_decay(round) == 0
    members = 1
    for epoch in range(epochs):
        key = RoundKey(0, round, epoch=epoch)
        for units in objective.units(samples, advantage, key=key, minibatches=minibatches):
            if len(units):
                objective(velocity, samples, units, old_is_current=old_is_current)
                members = max(members, units.rows.shape[1])
            old_is_current = False  # after the first update the policies differ
    trained, old, reference = (count / trajectories for count in rows.values())
    return Passes(trained, old, share * reference, members)
