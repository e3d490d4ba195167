"""A user's default device and dtype change no unit, no random number and no loss."""

import pytest
import torch

import mteditflow as mt
from mteditflow.objectives import OBJECTIVES, Renoise, RoundKey
from tests.glossary import undocumented
from tests.loops import some

B, N, S = 4, 2, 3
weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
trajectory = mt.Trajectory(
    latents=torch.randn(B, N, S + 1, 6, generator=torch.Generator().manual_seed(1)),
    sigmas=torch.tensor([1.0, 0.7, 0.3, 0.0]).repeat(N, 1),
    log_prob=torch.zeros(B, N, S),
    stochastic=torch.tensor([[True, True, False]] * N),
    group=torch.tensor([0, 0, 1, 1]),
    turn_mask=torch.ones(B, N, dtype=torch.bool),
    reduction="mean",
)
advantage = torch.tensor([1.0, -1.0, 0.5, -0.5])
renoises = [
    Renoise(),
    Renoise(distribution="grid"),
    Renoise(distribution="logit_normal", levels=2, stratified=True, shared=True),
]


def velocity(policy, x_t, sigma, at):
    return x_t @ weight + {"current": 0.0, "old": 0.1, "reference": 0.2, "teacher": 0.3}[policy]


def losses(objective, key):
    own = advantage if objective.card.rewarded else None
    drawn = objective.units(trajectory, own, key=key, minibatches=2)
    return [objective(velocity, trajectory, units).loss for units in drawn if len(units)]


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_defaults_change_nothing(name, keyed):
    kind = OBJECTIVES[name]
    options = [{"share": 1.0}, {"share": 0.5}]
    if "renoise" in kind.__dataclass_fields__:
        options = [{"renoise": x} for x in renoises]
    if "queries" in kind.__dataclass_fields__:
        options = [{"queries": 1}, {"queries": 3}]

    def all_losses():
        key = RoundKey(0, 3) if keyed else torch.Generator("cpu").manual_seed(0)
        return [x for given in options for x in losses(kind(**given), key)]

    expected = all_losses()
    try:
        torch.set_default_device("meta")  # on which nothing can be computed with CPU tensors
        torch.set_default_dtype(torch.float64)
        found = all_losses()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert len(found) == len(expected) > 0
    for ours, theirs in some(zip(found, expected, strict=True)):
        assert ours.dtype == theirs.dtype == torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_metric_is_in_the_glossary(name):
    objective = OBJECTIVES[name]()
    own = advantage if objective.card.rewarded else None
    drawn = objective.units(trajectory, own, key=RoundKey(0, 3), minibatches=1)
    found = {metric for units in drawn for metric in objective(velocity, trajectory, units).metrics}
    assert undocumented(f"training/{metric}" for metric in some(found)) == []
