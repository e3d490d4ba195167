"""Weights of the stochastic steps of a turn, as factors of their advantages."""

from __future__ import annotations

from dataclasses import replace

import torch

from mteditflow.flow.solvers import Solver
from mteditflow.losses.tempflow import noise_step_weight
from mteditflow.objectives.samples import Samples, stored_steps
from mteditflow.objectives.units import Units


def weigh_by_noise(units: list[Units], samples: Samples, solver: Solver) -> list[Units]:
    """Multiply the advantage of each step by its ``noise_step_weight``, of mean 1 over a turn.

    A loss that is proportional to the advantage, as the clipped surrogate is, is then multiplied by
    the weight. The mean is over all stored steps of a turn, whether a unit was drawn of them or
    not, so that weights depend on no draw.

    Args:
        units: units of one member with one advantage each.
        samples: the samples that they were drawn from.
        solver: solver of the stochastic steps.
    """
    exists = stored_steps(samples)
    weight = torch.zeros(exists.shape, dtype=torch.float64, device="cpu")
    for b, n in exists.any(dim=2).nonzero().tolist():
        place = exists[b, n].nonzero()[:, 0]
        rows = torch.stack([torch.full_like(place, b), torch.full_like(place, n), place], dim=1)
        stored = samples.steps_at(rows)
        found = noise_step_weight(solver, stored.sigma, stored.next_sigma)
        weight[b, n, place] = found.to(weight)
    return [_weighed(part, weight) for part in units]


def _weighed(units: Units, weight: torch.Tensor) -> Units:
    assert units.advantage is not None
    factor = weight[units.rows.unbind(dim=2)].to(units.advantage)
    return replace(units, advantage=units.advantage * factor)
