"""FlowAWR as an objective: loops over units, its softmax over groups, policies, refusals."""

import re

import pytest
import torch
from objective_worlds import (
    GROUP,
    Recorded,
    advantages,
    assert_equals_loop,
    clean_samples,
    gradients,
    key,
    validity,
)

from mteditflow import group_advantage, softmax_advantage
from mteditflow.objectives import OBJECTIVES, FlowAWR, Renoise
from tests.loops import some

MIDDLE = Renoise(distribution="logit_normal", std=0.5, levels=2)  # no flow time near 0


def run(objective, *, velocity=None, old_is_current=False, valid=None):
    velocity, samples = velocity or Recorded(), clean_samples()
    valid = validity() if valid is None else valid
    (units,) = objective.units(samples, advantages(), valid, key=key())
    return (
        velocity,
        samples,
        units,
        objective(velocity, samples, units, old_is_current=old_is_current),
    )


def tilted(temperature):
    """Advantages of the units, member by member, from the raw ones."""
    samples, found = clean_samples(), {}
    values, valid = advantages(), validity() & samples.turn_mask
    for turn in range(3):
        for b in range(8):
            own = [c for c in range(8) if GROUP[c] == GROUP[b] and valid[c, turn]]
            if valid[b, turn]:
                weight = (values[:, turn] / temperature).exp()
                found[b, turn] = float(weight[b] / weight[own].mean() - 1)
    return found


@pytest.mark.parametrize("coefficients", [{}, {"kl_coef": 0.3}])
@pytest.mark.parametrize("form", ["displaced", "exact"])
def test_it_is_a_loop_over_units(form, coefficients):
    objective = FlowAWR(temperature=0.7, form=form, renoise=MIDDLE, **coefficients)
    velocity, samples, units, output = run(objective)
    advantage = tilted(0.7)
    assert len(units) == units.count == 2 * len(advantage)

    def loop(unit):
        x_t, sigma, at = velocity.at(units, unit)
        clean = samples.clean[at[0, 0], at[0, 1]].double()
        target = (x_t[0].double() - clean) / sigma.double()
        v = velocity.policies["current"](x_t, sigma, at)[0]
        old, reference = (
            velocity.policies[name](x_t, sigma, at)[0].detach() for name in ("old", "reference")
        )
        a = advantage[int(at[0, 0]), int(at[0, 1])]
        if form == "displaced":
            total = (v - (old + a * (target - old))).square().mean()
        else:
            total = (1 + a) * (v - target).square().mean()
        metrics = {"policy_loss": total, "old_kl": (v - old).square().mean()}
        if coefficients:
            metrics["kl"] = (v - reference).square().mean()
            total = total + 0.3 * metrics["kl"]
        return total, metrics

    assert_equals_loop(output, units, velocity, loop)


def test_its_units_have_the_softmax_of_rewards_and_of_linear_advantages_alike():
    samples, reward = clean_samples(), advantages()
    everyone = torch.ones(8, 3, dtype=torch.bool)
    linear = group_advantage(reward, GROUP, std="batch", valid=samples.turn_mask, eps=0.0)
    expected = softmax_advantage(reward, GROUP, valid=samples.turn_mask)
    (units,) = FlowAWR().units(samples, linear, everyone, key=key())
    rows = units.rows[:, 0]
    torch.testing.assert_close(units.advantage[:, 0], expected[rows[:, 0], rows[:, 1]])
    (other,) = FlowAWR(temperature=0.5).units(samples, reward, everyone, key=key())
    (moved,) = FlowAWR(temperature=0.5).units(samples, reward + 7.0, everyone, key=key())
    torch.testing.assert_close(other.advantage, moved.advantage)
    (plain,) = FlowAWR(temperature=None).units(samples, reward, everyone, key=key())
    assert torch.equal(plain.advantage[:, 0], reward[rows[:, 0], rows[:, 1]])


def test_a_trajectorys_advantage_is_that_of_each_turn_among_the_chains_that_have_it():
    samples, reward = clean_samples(), advantages()[:, 0]
    (units,) = FlowAWR().units(samples, reward, key=key())
    whole = softmax_advantage(
        reward[:, None].expand(-1, 3), GROUP, valid=samples.turn_mask, temperature=1.0
    )
    rows = units.rows[:, 0]
    assert torch.equal(units.advantage[:, 0], whole[rows[:, 0], rows[:, 1]])


@pytest.mark.parametrize("form", ["displaced", "exact"])
def test_minibatches_and_rows_of_advantage_zero_stay(form):
    objective, samples = FlowAWR(form=form), clean_samples()
    drawn = objective.units(samples, torch.zeros(8), key=key(), minibatches=2)
    assert sum(map(len, drawn)) == int(samples.turn_mask.sum())
    assert all(not units.advantage.any() for units in some(drawn))
    assert objective.zero_matters


def test_equal_rewards_give_no_gradient_on_policy():
    velocity, samples = Recorded(), clean_samples()
    (units,) = FlowAWR().units(samples, torch.full((8, 3), 0.4), key=key())
    output = FlowAWR()(velocity, samples, units, old_is_current=True)
    assert not gradients(output.loss.sum(), velocity.parameters()).any()


@pytest.mark.parametrize("form", ["displaced", "exact"])
def test_policies_are_called_once_where_they_matter(form):
    objective = FlowAWR(form=form, renoise=MIDDLE)
    velocity, _, _, output = run(objective)
    assert sorted(velocity.asked()) == ["current", "old"]
    output.loss.sum().backward()
    assert all(p.grad is None for p in some(velocity.policies["old"].parameters()))
    saved, *_ = run(objective, old_is_current=True)
    assert saved.asked() == ["current"]


class Half(Recorded):
    """Velocities in bfloat16, as those of a model in it."""

    def __call__(self, policy, x_t, sigma, at):
        return super().__call__(policy, x_t, sigma, at).bfloat16()


@pytest.mark.parametrize("form", ["displaced", "exact"])
def test_half_precision_velocities_keep_advantages_in_full(form):
    _, samples, units, output = run(FlowAWR(form=form, renoise=MIDDLE), velocity=Half())
    assert output.loss.dtype == torch.float32

    class Rounded(Recorded):
        def __call__(self, policy, x_t, sigma, at):
            return super().__call__(policy, x_t, sigma, at).bfloat16().float()

    expected = FlowAWR(form=form, renoise=MIDDLE)(Rounded(), samples, units).loss
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a finite number in (0, inf], got 0.0"),
        ({"form": "plain"}, "form: expected one of ['displaced', 'exact'], got 'plain'"),
        (
            {"temperature": None, "form": "exact"},
            "temperature: expected a number for form 'exact', whose weight 1 + advantage must not "
            "be negative, got None",
        ),
    ],
)
def test_hyperparameters_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        FlowAWR(**options)


def test_it_needs_whole_groups_and_advantages():
    assert OBJECTIVES["flow_awr"].card.whole_groups
    with pytest.raises(TypeError, match=r"^advantage: expected a tensor for FlowAWR, got None"):
        FlowAWR().units(clean_samples(), None, key=key())
