"""TempFlow's weights in GRPO: the closed form, share and window, what they leave alone."""

import math

import pytest
import torch
from objective_worlds import (
    NOISE_LEVEL,
    Recorded,
    advantages,
    gradients,
    recorded_trajectory,
    validity,
)

from mteditflow.objectives import GRPO, Buckets, RoundKey
from tests.loops import some

SIGMAS = [1.0, 0.8, 0.55, 0.3, 0.0]
FIELDS = {"stochastic_steps": 2, "noise_level": NOISE_LEVEL}
KEY = RoundKey(2, 1)


def world(**options):
    """GRPO with and without weights, and a rollout whose steps 1 and 2 are stochastic."""
    velocity = Recorded()
    samples = recorded_trajectory(velocity.policies["old"], stochastic=(1, 2))
    both = [GRPO(step_weight=x, **FIELDS, **options) for x in ("uniform", "tempflow")]
    return velocity, samples, *both


def closed_form():
    """std a sqrt(sigma / (1 - sigma)) sqrt(h) of steps 1 and 2, over their mean."""
    std = [math.sqrt(SIGMAS[k] / (1 - SIGMAS[k]) * (SIGMAS[k] - SIGMAS[k + 1])) for k in (1, 2)]
    return {k: x * 2 / sum(std) for k, x in zip((1, 2), std, strict=True)}


@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.3}, {"share": 0.5}], ids=str)
def test_the_policy_loss_of_a_step_is_multiplied_by_its_weight(options):
    """Beside a KL, whose weight stays: loss_k = w_k policy_loss_k + kl_coef KL_k."""
    velocity, samples, plain, weighed = world(**options)
    units, own = (
        objective.units(samples, advantages(), validity(), key=KEY)[0]
        for objective in (plain, weighed)
    )
    assert torch.equal(units.rows, own.rows)
    assert units.count == own.count
    weight = torch.tensor([closed_form()[k] for k in units.rows[:, 0, 2].tolist()]).double()
    assert len(weight.unique()) == 2
    one, other = plain(velocity, samples, units), weighed(velocity, samples, own)
    policy_loss = weight * one.metrics["policy_loss"]
    torch.testing.assert_close(other.metrics["policy_loss"], policy_loss)
    for name in some(set(one.metrics) - {"policy_loss"}):
        assert torch.equal(other.metrics[name], one.metrics[name]), name
    kl = 0.3 * one.metrics["kl"] if "kl" in one.metrics else 0.0
    torch.testing.assert_close(other.loss, policy_loss + kl)
    if not options:
        found, expected = (
            gradients(loss.sum(), velocity.parameters()) for loss in (other.loss, weight * one.loss)
        )
        torch.testing.assert_close(found, expected)


def test_a_unit_of_several_minibatches_and_buckets_has_the_same_weight():
    _, samples, _, weighed = world()
    (whole,) = weighed.units(samples, advantages(), validity(), key=KEY)
    expected = {
        tuple(row): x
        for row, x in zip(
            whole.rows[:, 0].tolist(), whole.advantage.flatten().tolist(), strict=True
        )
    }
    halves = weighed.units(samples, advantages(), validity(), key=KEY, minibatches=2)
    buckets = Buckets([samples.select(slice(0, 4)), samples.select(slice(4, 8))])
    (parts,) = weighed.units(buckets, advantages(), validity(), key=KEY)
    for units in some([*halves, parts]):
        found = zip(units.rows[:, 0].tolist(), units.advantage.flatten().tolist(), strict=True)
        assert all(expected[tuple(row)] == x for row, x in some(list(found)))


def test_an_unknown_weight_is_refused():
    with pytest.raises(ValueError, match="step_weight: expected one of"):
        GRPO(step_weight="noise")
