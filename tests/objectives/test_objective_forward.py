"""NFT, AWM and DPO against loops over units, by hand, and by the meaning of their gradients."""

import math
import re

import pytest
import torch
from objective_worlds import (
    Recorded,
    advantages,
    assert_equals_loop,
    clean_samples,
    gradients,
    key,
    validity,
)

from mteditflow.objectives import AWM, DPO, NFT, CleanSamples, Renoise
from tests.loops import some

MIDDLE = Renoise(distribution="logit_normal", std=0.5, levels=2)  # no flow time near 0


def run(objective, *, velocity=None, old_is_current=False, valid=True):
    """Units and output of an objective on the hand-made samples."""
    velocity, samples = velocity or Recorded(), clean_samples()
    (units,) = objective.units(samples, advantages(), validity() if valid else None, key=key())
    output = objective(velocity, samples, units, old_is_current=old_is_current)
    return velocity, samples, units, output


def member(velocity, samples, units, unit, k=0):
    """Velocities of the policies at a member's state, and the target that its x_t implies."""
    x_t, sigma, at = velocity.at(units, unit, k)
    clean = samples.clean[at[0, 0], at[0, 1]].double()
    target = (x_t[0].double() - clean) / sigma.double()
    found = {name: policy(x_t, sigma, at)[0] for name, policy in velocity.policies.items()}
    return (
        {name: v if name == "current" else v.detach() for name, v in found.items()},
        target,
        sigma,
    )


def regularizers(objective, velocities):
    """KL and norm hinge, in the words of their formulas."""
    v, ref = velocities["current"], velocities["reference"]
    terms = {}
    if objective.kl_coef > 0:
        terms["kl"] = (v - ref).square().mean()
    if objective.norm_coef > 0:
        excess = v.square().mean().sqrt() - ref.square().mean().sqrt()
        terms["norm_hinge"] = excess.clamp(min=0)
    return terms


def add(objective, loss, terms):
    loss = loss + objective.kl_coef * terms.get("kl", 0)
    return loss + objective.norm_coef * terms.get("norm_hinge", 0)


COEFFICIENTS = [{}, {"kl_coef": 0.3}, {"norm_coef": 0.7}, {"kl_coef": 0.3, "norm_coef": 0.7}]


# loops


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("loss", ["plain", "adaptive"])
def test_nft_is_a_loop_over_units(loss, coefficients):
    objective = NFT(nft_beta=0.4, loss=loss, advantage_max=2.0, renoise=MIDDLE, **coefficients)
    velocity, samples, units, output = run(objective)

    def loop(unit):
        at, target, sigma = member(velocity, samples, units, unit)
        v, old, b = at["current"], at["old"], objective.nft_beta
        r = min(max(0.5 + float(units.advantage[unit, 0]) / 4, 0.0), 1.0)
        total = 0.0
        for weight, branch in ((r, (1 - b) * old + b * v), (1 - r, (1 + b) * old - b * v)):
            if loss == "plain":
                total = total + weight * (branch - target).square().mean()
            else:
                error = sigma.double() * (target - branch)  # of the clean estimate
                scale = error.detach().abs().mean().clamp(min=1e-5)
                total = total + weight * error.square().mean() / scale * 2.0 / b
        terms = regularizers(objective, at)
        metrics = {"policy_loss": total, "old_kl": (v - old).square().mean(), **terms}
        return add(objective, total, terms), metrics

    assert_equals_loop(output, units, velocity, loop)


@pytest.mark.parametrize("coefficients", [*COEFFICIENTS, {"old_kl_coef": 0.5, "kl_coef": 0.2}])
def test_awm_is_a_loop_over_units(coefficients):
    objective = AWM(clip_low=0.02, clip_high=0.05, renoise=MIDDLE, **coefficients)
    velocity, samples, units, output = run(objective, velocity=Recorded(by=0.05))
    sides = set()

    def loop(unit):
        at, target, _ = member(velocity, samples, units, unit)
        v, old, advantage = at["current"], at["old"], float(units.advantage[unit, 0])
        log_ratio = (old - target).square().mean() - (v - target).square().mean()
        ratio = log_ratio.exp()
        sides.add(int(ratio > 1.05) - int(ratio < 0.98))
        clipped = ratio.clamp(1 - 0.02, 1 + 0.05)
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
        old_kl = (v - old).square().mean()
        loss = loss + objective.old_kl_coef * old_kl
        terms = regularizers(objective, at)
        beyond = float(ratio > 1.05 or ratio < 0.98)
        metrics = {"policy_loss": loss, "ratio": ratio, "clip_fraction": beyond, "old_kl": old_kl}
        return add(objective, loss, terms), {**metrics, **terms}

    assert_equals_loop(output, units, velocity, loop)
    assert sides == {-1, 0, 1}


@pytest.mark.parametrize("weighting", ["sigma", "sigma_squared", "huber", "general_huber"])
def test_awm_weighs_matching_losses_at_the_rows_own_flow_times(weighting):
    objective = AWM(clip_low=0.9, clip_high=9.0, weighting=weighting, renoise=MIDDLE)
    velocity, samples, units, output = run(objective)
    for unit in some(range(len(units))):
        at, target, sigma = member(velocity, samples, units, unit)
        loss = {name: (at[name] - target).square().mean() for name in ("current", "old")}
        weight = {
            "sigma": lambda x, s: s * x,
            "sigma_squared": lambda x, s: s**2 * x,
            "huber": lambda x, s: s * ((x + 1e-10).sqrt() - 1e-5),
            "general_huber": lambda x, s: 4 * s * ((x + 1e-10) ** 0.25 - 1e-10**0.25),
        }[weighting]
        s = sigma[0].double()
        ratio = (weight(loss["old"], s) - weight(loss["current"], s)).exp()
        expected = -ratio * units.advantage[unit, 0]
        torch.testing.assert_close(output.loss[unit], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_dpo_is_a_loop_over_pairs(coefficients):
    objective = DPO(dpo_beta=3.0, renoise=MIDDLE, **coefficients)
    velocity, samples, units, output = run(objective)

    def loop(unit):
        rewards, terms = [], []
        for k in range(2):
            at, target, _ = member(velocity, samples, units, unit, k)
            reference, v = at["reference"], at["current"]
            gain = (reference - target).square().mean() - (v - target).square().mean()
            rewards.append(3.0 / 2 * gain)
            terms.append(regularizers(objective, at))
        loss = torch.log1p(torch.exp(rewards[1] - rewards[0]))
        mean = {name: (terms[0][name] + terms[1][name]) / 2 for name in terms[0]}
        preferred = float(rewards[0] > rewards[1])
        return add(objective, loss, mean), {"policy_loss": loss, "preferred": preferred, **mean}

    assert_equals_loop(output, units, velocity, loop)
    assert 0 < float(output.metrics["preferred"].mean()) < 1


def test_dpo_pairs_are_best_against_worst_at_one_flow_time_and_noise():
    velocity, samples, units, _ = run(DPO(renoise=MIDDLE))
    values, valid = advantages(), validity() & samples.turn_mask
    expected = set()
    for name in (5, -2):
        for turn in range(3):
            own = [b for b in range(8) if samples.group[b] == name and valid[b, turn]]
            if len(own) > 1:
                by_value = sorted(own, key=lambda b, n=turn: float(values[b, n]))
                expected |= {(by_value[-1], by_value[0], turn, level) for level in range(2)}
    found = {(*unit[:, 0].tolist(), *unit[0, 1:].tolist()) for unit in units.rows}
    assert found == expected
    assert len(units) == units.count == len(expected)
    assert torch.equal(units.seed[:, 0], units.seed[:, 1])
    assert len(units.seed[:, 0].unique()) == len(units)
    for unit, rows in some(enumerate(units.rows)):
        (best, s, _), (worst, t, _) = (velocity.at(units, unit, k) for k in range(2))
        assert s == t
        clean = samples.clean[rows[:, 0], rows[:, 1]]
        noises = (best[0] - (1 - s) * clean[0]) / s, (worst[0] - (1 - t) * clean[1]) / t
        torch.testing.assert_close(*noises, rtol=1e-4, atol=1e-4)
    for u, rows in some(enumerate(units.rows)):
        for k in range(2):
            assert units.advantage[u, k] == values[rows[k, 0], rows[k, 1]]


# by hand


class Constant:
    """Velocities that do not depend on the state: one number for each policy, one element."""

    def __init__(self, **velocities):
        self.values = {
            name: torch.tensor([float(x)], dtype=torch.float64, requires_grad=True)
            for name, x in velocities.items()
        }

    def __call__(self, policy, x_t, sigma, at):
        self.x_t, self.sigma = x_t, sigma
        return self.values[policy].expand(len(x_t), 1)


def one_sample():
    return CleanSamples(torch.zeros(2, 1, 1), torch.tensor([0, 0]))


def target_of(velocity):
    """The clean latent is 0, so noise and target are x_t over sigma."""
    return (velocity.x_t.double() / velocity.sigma.double()[:, None]).flatten()


@pytest.mark.parametrize(
    ("advantage", "plain"),
    [
        (5.0, lambda t: (2 - t) ** 2),  # r = 1: v+ is the policy
        (-5.0, lambda t: (0 - t) ** 2),  # r = 0: v- = 2 * 1 - 2 = 0
        (0.0, lambda t: ((2 - t) ** 2 + (0 - t) ** 2) / 2),
        (99.0, lambda t: (2 - t) ** 2),  # saturated
    ],
)
def test_nft_by_hand(advantage, plain):
    velocity, objective = Constant(current=2.0, old=1.0), NFT(loss="plain", renoise=MIDDLE)
    values = torch.full((2,), advantage, dtype=torch.float64)
    (units,) = objective.units(one_sample(), values, key=key())
    output = objective(velocity, one_sample(), units)
    expected = plain(target_of(velocity))
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert output.metrics["old_kl"].tolist() == [1.0] * len(units)


def test_awm_by_hand():
    velocity, objective = Constant(current=0.5, old=0.0), AWM(clip_low=0.5, clip_high=9.0)
    values = torch.tensor([1.0, -2.0], dtype=torch.float64)
    (units,) = objective.units(one_sample(), values, key=key())
    output = objective(velocity, one_sample(), units)
    t = target_of(velocity)
    ratio = (t**2 - (0.5 - t) ** 2).exp()
    lower = torch.stack([ratio[0].clamp(max=10), 2 * -ratio[1].clamp(min=0.5)])
    torch.testing.assert_close(output.loss, -lower, rtol=1e-4, atol=1e-4)


def test_dpo_by_hand():
    velocity, objective = Constant(current=1.0, reference=0.0), DPO(dpo_beta=2.0)
    (units,) = objective.units(one_sample(), torch.tensor([3.0, 7.0]), key=key())
    assert units.rows.tolist() == [[[1, 0, 0], [0, 0, 0]]]
    output = objective(velocity, one_sample(), units)
    # Same noise, same clean latent: both implicit rewards are equal, whatever the policy.
    assert output.loss.tolist() == pytest.approx([math.log(2)])


# meaning of gradients


def by_velocity(objective, advantage, **velocities):
    velocity, samples = Constant(**velocities), one_sample()
    (units,) = objective.units(samples, torch.tensor(advantage, dtype=torch.float64), key=key())
    output = objective(velocity, samples, units)
    found = [
        torch.autograd.grad(x, velocity.values["current"], retain_graph=True)[0]
        for x in output.loss
    ]
    return torch.cat(found), target_of(velocity)


def test_on_policy_gradient_of_nft_pulls_to_good_samples_and_from_bad_ones():
    objective = NFT(loss="plain", nft_beta=0.5, renoise=MIDDLE)
    gradient, target = by_velocity(objective, [2.5, -5.0], current=0.7, old=0.7)
    c = torch.tensor([0.5, 0.5, -1.0, -1.0], dtype=torch.float64)  # 2r - 1, two levels each
    torch.testing.assert_close(gradient, 2 * 0.5 * c * (0.7 - target), rtol=1e-5, atol=1e-5)


def test_on_policy_gradient_of_awm_is_advantage_times_that_of_flow_matching():
    objective = AWM(renoise=MIDDLE)
    gradient, target = by_velocity(objective, [2.0, -3.0], current=0.7, old=0.7)
    advantage = torch.tensor([2.0, 2.0, -3.0, -3.0], dtype=torch.float64)
    torch.testing.assert_close(gradient, advantage * 2 * (0.7 - target), rtol=1e-5, atol=1e-5)


def test_gradient_of_dpo_at_the_reference_is_that_of_the_matching_losses():
    velocity, samples, objective = Recorded(), clean_samples(), DPO(dpo_beta=3.0, renoise=MIDDLE)
    velocity.policies["reference"].load_state_dict(velocity.policies["current"].state_dict())
    (units,) = objective.units(samples, advantages(), validity(), key=key())
    output = objective(velocity, samples, units)
    torch.testing.assert_close(output.loss, torch.full_like(output.loss, math.log(2)))
    difference = 0.0
    for unit in range(len(units)):
        for k, sign in ((0, 1), (1, -1)):
            at, target, _ = member(velocity, samples, units, unit, k)
            difference = difference + sign * (at["current"] - target).square().mean()
    parameters = velocity.parameters()
    torch.testing.assert_close(
        gradients(output.loss.sum(), parameters),
        3.0 / 4 * gradients(difference, parameters),
        rtol=1e-4,
        atol=1e-4,
    )


# who is asked

FORWARD = {
    "nft": (NFT, {"old"}),
    "nft, plain": (lambda **x: NFT(loss="plain", **x), {"old"}),
    "awm": (AWM, {"old"}),
    "awm, old_kl": (lambda **x: AWM(old_kl_coef=1.0, **x), {"old"}),
}


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("name", FORWARD)
def test_policies_are_called_once_where_they_matter(name, coefficients):
    make, others = FORWARD[name]
    velocity, *_ = run(make(**coefficients))
    expected = {"current", *others} | ({"reference"} if coefficients else set())
    assert sorted(velocity.asked()) == sorted(expected)
    assert {call[0] for call in velocity.calls if call[4]} == {"current"}


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("name", FORWARD)
def test_the_old_policy_is_not_called_where_it_is_the_current_one(name, coefficients):
    make, _ = FORWARD[name]
    saved, asked = Recorded(), Recorded()
    for velocity in (saved, asked):
        current = velocity.policies["current"].state_dict()
        velocity.policies["old"].load_state_dict(current)
    _, _, _, short = run(make(**coefficients), velocity=saved, old_is_current=True)
    _, _, _, long = run(make(**coefficients), velocity=asked)
    assert "old" not in saved.asked()
    assert "old" in asked.asked()
    assert torch.equal(short.loss, long.loss)
    assert all(torch.equal(x, long.metrics[k]) for k, x in some(short.metrics.items()))
    assert torch.equal(
        gradients(short.loss.sum(), saved.parameters()),
        gradients(long.loss.sum(), asked.parameters()),
    )


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_dpo_calls_the_reference_and_never_the_old_policy(coefficients):
    velocity, *_ = run(DPO(**coefficients))
    assert velocity.asked() == ["current", "reference"]
    assert [call[4] for call in velocity.calls] == [True, False]


@pytest.mark.parametrize("make", [NFT, AWM, DPO])
def test_only_the_current_policy_gets_a_gradient(make):
    velocity, _, _, output = run(make(kl_coef=1.0, norm_coef=1.0))
    others = [p for name in ("old", "reference") for p in velocity.policies[name].parameters()]
    output.loss.sum().backward()
    assert all(p.grad is None for p in some(others))
    assert all(bool(p.grad.any()) for p in some(velocity.parameters()))


@pytest.mark.parametrize("make", [NFT, lambda: NFT(loss="plain"), AWM, DPO])
def test_velocities_of_half_precision_give_a_float32_loss(make):
    class Half(Recorded):
        def __call__(self, *given):
            return super().__call__(*given).bfloat16()

    _, _, _, output = run(make(), velocity=Half())
    assert output.loss.dtype == torch.float32
    assert output.loss.isfinite().all()


def test_old_policy_follows_its_schedule():
    objective = NFT(old_slope=0.01, old_maximum=0.2)
    assert [objective.old_decay(k) for k in (0, 5, 90)] == pytest.approx([0.0, 0.05, 0.2])
    assert NFT(old_slope=0.0).old_decay(90) == 0.0
    assert objective.samples_with == "old"
    assert objective.sampling(3, steps=4) == (None, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NFT(nft_beta=0.0), "nft_beta: expected a finite number in (0, inf], got 0.0"),
        (lambda: NFT(advantage_max=0.0), "advantage_max: expected a finite number in (0"),
        (lambda: NFT(loss="huber"), "loss: expected one of ['adaptive', 'plain'], got 'huber'"),
        (lambda: NFT(kl_coef=-1.0), "kl_coef: expected a finite number in [0, inf], got -1.0"),
        (lambda: DPO(norm_coef=-1.0), "norm_coef: expected a finite number in [0, inf]"),
        (lambda: AWM(old_kl_coef=-1.0), "old_kl_coef: expected a finite number in [0, inf]"),
        (lambda: AWM(weighting="l1"), "weighting: expected one of ['uniform', 'sigma', 'sigma_"),
        (lambda: AWM(clip_low=1.0), "clip_low: expected a finite number in [0, 1), got 1.0"),
        (lambda: AWM(clip_high=-0.1), "clip_high: expected a finite number in [0, inf]"),
        (lambda: DPO(dpo_beta=0.0), "dpo_beta: expected a finite number in (0, inf], got 0.0"),
        (lambda: NFT(old_slope=-1.0), "old_slope: expected a finite number in [0, inf]"),
        (lambda: NFT(old_maximum=1.5), "old_maximum: expected a finite number in [0, 1], got 1.5"),
    ],
)
def test_hyperparameters_out_of_range(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make()
