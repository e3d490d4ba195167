"""The KL of gated trajectories alone: a plain loop, forward passes, ranks, the share, errors."""

import pytest
import torch
from objective_worlds import (
    NOISE_LEVEL,
    Recorded,
    advantages,
    clean_samples,
    gradients,
    recorded_trajectory,
    validity,
)

from mteditflow.objectives import AWM, DPO, GRPO, NFT, CleanSamples, Renoise, RoundKey, gate_kl
from tests.loops import some

GATE = torch.tensor([True, False, False, True, False, False, True, False])
KEY = RoundKey(3, 1)
KINDS = {
    "nft": lambda **x: NFT(renoise=Renoise(levels=2), kl_coef=0.3, **x),
    "awm": lambda **x: AWM(kl_coef=0.3, **x),
    "grpo": lambda **x: GRPO(stochastic_steps=3, noise_level=NOISE_LEVEL, kl_coef=0.3, **x),
}


def world(name, **options):
    """Objective, velocity, samples and all units of a round."""
    velocity, objective = Recorded(), KINDS[name](**options)
    re_noised = objective.samples_with == "old"
    samples = clean_samples() if re_noised else recorded_trajectory(velocity.policies["old"])
    (units,) = objective.units(samples, advantages(), validity(), key=KEY)
    return objective, velocity, samples, units


@pytest.mark.parametrize("name", KINDS)
def test_the_kl_counts_where_the_gate_says_and_nowhere_else(name):
    """Loss and gradient are those of policy loss + gate_i kl_coef KL_i, unit by unit."""
    objective, velocity, samples, units = world(name)
    every = objective(velocity, samples, units)
    gated = objective(velocity, samples, gate_kl(units, GATE))
    factor = torch.tensor([float(GATE[b]) for b in units.rows[:, 0, 0].tolist()])
    assert 0 < factor.sum() < len(units)
    kl = factor * every.metrics["kl"]
    torch.testing.assert_close(gated.metrics["kl"], kl.to(gated.metrics["kl"]))
    rest = every.loss - 0.3 * every.metrics["kl"]
    torch.testing.assert_close(gated.loss, rest + 0.3 * kl.to(rest))
    own = velocity.parameters()
    open_, (none, all_) = (
        gradients((every.loss * factor).sum(), own),
        [
            gradients(objective(velocity, samples, gate_kl(units, gate)).loss.sum(), own)
            for gate in (torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool))
        ],
    )
    torch.testing.assert_close(all_, gradients(every.loss.sum(), own))
    closed = objective(velocity, samples, gate_kl(units, ~GATE & GATE))
    closed_ = gradients((closed.loss * (1 - factor)).sum(), own)
    torch.testing.assert_close(gradients(gated.loss.sum(), own), open_ + closed_)
    assert not torch.allclose(none, all_)


@pytest.mark.parametrize("name", KINDS)
def test_the_reference_is_evaluated_on_gated_units_alone(name):
    objective, velocity, samples, units = world(name)
    for part in some(gate_kl(units, GATE).split(5)):
        velocity.calls.clear()
        objective(velocity, samples, part, old_is_current=True)
        rows = {call[0]: len(call[1]) for call in velocity.calls}
        wanted = max(int(GATE[part.rows[:, 0, 0]].sum()), 1)
        assert rows == {"current": len(part), "reference": wanted}


@pytest.mark.parametrize("name", ["nft", "grpo"])
def test_ranks_gate_the_units_that_one_process_does(name):
    """The second rank has its part of the gate, and counts its trajectories from 0."""
    objective, _, samples, units = world(name)
    whole = gate_kl(units, GATE).kl_weight[units.rows[:, 0, 0] >= 4]
    half = (
        CleanSamples(samples.clean[4:], samples.group[4:], samples.turn_mask[4:])
        if isinstance(samples, CleanSamples)
        else samples.select(slice(4, 8))
    )
    key = RoundKey(KEY.seed, KEY.round, first=4)
    (own,) = objective.units(half, advantages()[4:], validity()[4:], key=key)
    assert torch.equal(gate_kl(own, GATE[4:]).kl_weight, whole)
    assert 0 < whole.sum() < len(whole)


def test_a_share_of_the_gated_kl_keeps_its_weight():
    _, _, _, units = world("nft", kl_share=0.5)
    found = gate_kl(units, GATE.tolist())
    assert torch.equal(found.kl_weight, units.kl_weight * GATE[units.rows[:, 0, 0]].float())
    assert set(found.kl_weight.tolist()) == {0.0, 2.0}
    assert found.count == units.count
    assert torch.equal(found.rows, units.rows)


def test_idle_units_stay_without_weight():
    _, _, _, units = world("nft")
    assert gate_kl(units, GATE).idle().kl_weight.tolist() == [0.0]


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        (GATE.float(), TypeError, r"gate: expected booleans, got torch\.float32"),
        (GATE[:, None], ValueError, r"gate: expected shape \[B\], got \[8, 1\]"),
        (GATE[:7], ValueError, "gate: expected one entry for each trajectory, at least 8, got 7"),
    ],
)
def test_what_is_no_gate_of_the_trajectories_is_refused(gate, error, message):
    _, _, _, units = world("nft")
    with pytest.raises(error, match=message):
        gate_kl(units, gate)


def test_units_of_several_members_are_refused():
    (pairs,) = DPO(kl_coef=1.0).units(clean_samples(), advantages(), validity(), key=KEY)
    with pytest.raises(ValueError, match="units: expected one member each"):
        gate_kl(pairs, GATE)
