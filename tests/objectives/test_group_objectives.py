"""DGPO and CRD: groups as units, against loops over groups, beside DPO, and the policies called."""

import re
from dataclasses import replace

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

from mteditflow.objectives import CRD, DGPO, DPO, CleanSamples, Renoise, RoundKey
from tests.loops import some

MIDDLE = Renoise(distribution="logit_normal", std=0.5, levels=2)  # no flow time near 0
COEFFICIENTS = [{}, {"kl_coef": 0.3, "norm_coef": 0.7}]


def run(objective, *, velocity=None, old_is_current=False, values=None):
    velocity, samples = velocity or Recorded(), clean_samples()
    values = advantages() if values is None else values
    (units,) = objective.units(samples, values, validity(), key=key())
    return velocity, units, objective(velocity, samples, units, old_is_current=old_is_current)


def members(velocity, units, unit):
    """Advantage, velocities by policy, and target of each member of a group that exists."""
    found = []
    for k in units.mask[unit].nonzero()[:, 0].tolist():
        x_t, sigma, at = velocity.at(units, unit, k)
        clean = clean_samples().clean[at[0, 0], at[0, 1]].double()
        made = {name: policy(x_t, sigma, at)[0] for name, policy in velocity.policies.items()}
        made = {name: v if name == "current" else v.detach() for name, v in made.items()}
        found.append((float(units.advantage[unit, k]), made, (x_t[0] - clean) / sigma.double()))
    return found


def mean(terms):
    return torch.stack(list(terms)).mean()


def regularized(objective, group, loss, share=lambda _: 1.0):
    """Loss and metrics with KL and norm hinge, averaged over the members."""
    terms = {}
    if objective.kl_coef > 0:
        terms["kl"] = mean(
            share(a) * (v["current"] - v["reference"]).square().mean() for a, v, _ in group
        )
        loss = loss + objective.kl_coef * terms["kl"]
    if objective.norm_coef > 0:
        sizes = [
            [v[p].square().mean().sqrt() for p in ("current", "reference")] for _, v, _ in group
        ]
        terms["norm_hinge"] = mean((new - old).clamp(min=0) for new, old in sizes)
        loss = loss + objective.norm_coef * terms["norm_hinge"]
    return loss, terms


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("more", [{}, {"anchor": "old", "ratio_clip": 0.02}])
def test_dgpo_is_a_loop_over_groups(coefficients, more):
    objective = DGPO(dgpo_beta=3.0, renoise=MIDDLE, **coefficients, **more)
    velocity, units, output = run(objective)

    def loop(unit):
        group = members(velocity, units, unit)
        anchor, behind, losses = more.get("anchor", "reference"), 0.0, []
        for a, v, target in group:
            gain = (v[anchor] - target).square().mean() - (v["current"] - target).square().mean()
            behind = behind - 3.0 * a * gain.detach() / len(group)
        for a, v, target in group:
            error, old = ((v[p] - target).square().mean() for p in ("current", "old"))
            ratio = float((old - error).detach().exp())
            if more and (ratio > 1.02 if a > 0 else ratio < 0.98):
                error = error.detach()
            losses.append(torch.sigmoid(behind) * a * error)
        policy_loss = mean(losses)
        loss, terms = regularized(objective, group, policy_loss)
        return loss, {"policy_loss": policy_loss, "preferred": float(behind < 0), **terms}

    assert_equals_loop(output, units, velocity, loop)
    assert 0 < float(output.metrics["preferred"].mean()) < 1
    assert not units.mask.all()  # groups of several sizes


@pytest.mark.parametrize("coefficients", [*COEFFICIENTS, {"kl_coef": 0.3, "kl_floor": 0.05}])
@pytest.mark.parametrize("adaptive", [False, True])
def test_crd_is_a_loop_over_groups(coefficients, adaptive):
    objective = CRD(
        crd_beta=2.0, advantage_max=1.5, adaptive=adaptive, renoise=MIDDLE, **coefficients
    )
    velocity, units, output = run(objective)

    def share(a):
        good = 0.5 + min(max(a / 1.5, -1.0), 1.0) / 2
        return (0.05 + good * 0.25) / 0.3 if objective.kl_floor else 1.0

    def loop(unit):
        group = members(velocity, units, unit)
        implicit, wanted = [], []
        for a, v, target in group:
            new, old = (v[p] - target for p in ("current", "old"))
            sizes = [x.detach().abs().mean() if adaptive else 1.0 for x in (new, old)]
            implicit.append(old.square().mean() / sizes[1] - new.square().mean() / sizes[0])
            wanted.append(min(max(a / 1.5, -1.0), 1.0) / 2)
        q_mean, a_mean = mean(implicit).detach(), sum(wanted) / len(wanted)
        pairs = zip(implicit, wanted, strict=True)
        policy_loss = mean((2 * (q - q_mean) - (a - a_mean)) ** 2 * 1.5 / 2 for q, a in pairs)
        old_kl = mean((v["current"] - v["old"]).square().mean() for _, v, _ in group)
        loss, terms = regularized(objective, group, policy_loss, share)
        return loss, {"policy_loss": policy_loss, "old_kl": old_kl, **terms}

    assert_equals_loop(output, units, velocity, loop)


# units


def test_a_unit_is_every_valid_member_of_a_group_at_one_flow_time_and_noise():
    velocity, units, _ = run(DGPO(renoise=MIDDLE, kl_coef=0.1))
    samples, valid = clean_samples(), validity() & clean_samples().turn_mask
    expected = set()
    for name in (5, -2):
        for turn in range(3):
            own = [b for b in range(8) if GROUP[b] == name and valid[b, turn]]
            if len(own) > 1:
                expected |= {(turn, level, *own) for level in range(2)}
    found = set()
    for unit, (rows, mask) in some(enumerate(zip(units.rows, units.mask, strict=True))):
        found.add((*rows[0, 1:].tolist(), *rows[mask][:, 0].tolist()))
        assert (rows[:, 1:] == rows[0, 1:]).all()
        assert (rows[~mask] == rows[0]).all()
        assert len(units.seed[unit].unique()) == 1
        states = [velocity.at(units, unit, k) for k in range(len(rows))]
        noises = [(x[0] - (1 - s) * samples.clean[at[0, 0], at[0, 1]]) / s for x, s, at in states]
        for noise, (_, sigma, _) in some(zip(noises, states, strict=True)):
            torch.testing.assert_close(noise, noises[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(sigma, states[0][1])
    assert found == expected
    assert len(units) == units.count == len(expected) == len(units.seed[:, 0].unique())


@pytest.mark.parametrize(("coefficient", "left_out"), [(0.0, 2), (0.1, 0)])
def test_groups_without_an_advantage_are_left_out_where_they_cannot_matter(coefficient, left_out):
    values = advantages()
    values[:4, 1] = 0.0  # of one turn, two levels
    _, units, output = run(DGPO(renoise=MIDDLE, kl_coef=coefficient), values=values)
    assert units.count - len(units) == left_out
    assert len(output.loss) == len(units)


@pytest.mark.parametrize(
    "objective",
    [
        DGPO(dgpo_beta=3.0, renoise=MIDDLE, kl_coef=0.3, norm_coef=0.7),
        CRD(renoise=MIDDLE, kl_coef=0.3, kl_floor=0.1, norm_coef=0.7),
    ],
    ids=lambda o: type(o).__name__,
)
def test_padding_changes_nothing(objective):
    """A group alone, beside a larger one, and in any micro-batch."""
    velocity, units, output = run(objective)
    small = units[units.mask.sum(dim=1) == 2]
    narrow = replace(
        small,
        rows=small.rows[:, :2],
        mask=small.mask[:, :2],
        advantage=small.advantage[:, :2],
        seed=small.seed[:, :2],
    )
    wide, alone = (objective(velocity, clean_samples(), x).loss for x in (small, narrow))
    torch.testing.assert_close(wide, alone)
    torch.testing.assert_close(output.loss[units.mask.sum(dim=1) == 2], alone)
    split = torch.cat([objective(velocity, clean_samples(), x).loss for x in units.split(1)])
    torch.testing.assert_close(split, output.loss)
    idle = objective(velocity, clean_samples(), units.idle())
    assert idle.loss.tolist() == [0.0]
    assert not gradients(idle.loss.sum(), velocity.parameters()).any()


def test_minibatches_partition_the_groups():
    objective, samples = DGPO(renoise=MIDDLE), clean_samples()

    def drawn(minibatches):
        return objective.units(
            samples, advantages(), validity(), key=RoundKey(0, 0), minibatches=minibatches
        )

    def groups(units):
        pairs = zip(units.rows, units.mask, units.seed, strict=True)
        return [(rows[mask].tolist(), int(seed[0])) for rows, mask, seed in pairs]

    (whole,), parts = drawn(1), drawn(4)
    assert sorted(x for part in parts for x in groups(part)) == sorted(groups(whole))
    assert sum(part.count for part in parts) == whole.count


def test_one_trajectory_makes_no_group():
    samples = CleanSamples(torch.zeros(1, 1, 2), torch.tensor([3]))
    (units,) = DGPO(kl_coef=0.1).units(samples, torch.tensor([1.0]), key=key())
    assert len(units) == units.count == 0
    idle = DGPO()(Recorded(), clean_samples(), units.idle())
    assert idle.loss.tolist() == [0.0]


# beside DPO


def test_groups_of_two_train_as_pairs_do():
    """DPO's gradient over beta, of the same pairs at the same flow times and noise."""
    group = torch.tensor([0, 0, 1, 1])
    samples = CleanSamples(clean_samples().clean[:4], group)
    advantage = torch.tensor([1.0, -1.0, -1.0, 1.0])
    renoise = replace(MIDDLE, shared=True)  # the noise is the group's, whoever leads
    found = []
    for objective in (DGPO(dgpo_beta=3.0, renoise=renoise), DPO(dpo_beta=3.0, renoise=renoise)):
        velocity = Recorded()
        (units,) = objective.units(samples, advantage, key=RoundKey(0, 0))
        loss = objective(velocity, samples, units).loss.sum()
        found.append(gradients(loss, velocity.parameters()))
        assert units.count == 2 * 3 * 2
    torch.testing.assert_close(3.0 * found[0], found[1], rtol=1e-4, atol=1e-6)


# which policies


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, ["current", "reference"]),
        ({"kl_coef": 1.0}, ["current", "reference"]),
        ({"ratio_clip": 0.1}, ["current", "reference", "old"]),
        ({"anchor": "old"}, ["current", "old"]),
        ({"anchor": "old", "norm_coef": 1.0}, ["current", "old", "reference"]),
    ],
)
def test_policies_are_called_once_where_they_matter(options, asked):
    velocity, *_ = run(DGPO(**options))
    assert sorted(velocity.asked()) == sorted(asked)
    assert [call[0] for call in velocity.calls if call[4]] == ["current"]
    velocity, *_ = run(DGPO(**options), old_is_current=True)
    assert sorted(velocity.asked()) == sorted({*asked} - {"old"})


def test_crd_calls_the_old_policy_where_it_is_another_and_the_reference_for_its_kl():
    velocity, units, _ = run(CRD())
    assert velocity.asked() == ["current", "old"]
    assert units.count == len(units)
    velocity, *_ = run(CRD(kl_coef=1.0, kl_floor=0.0), old_is_current=True)
    assert velocity.asked() == ["current", "reference"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DGPO(dgpo_beta=-1.0), "dgpo_beta: expected a finite number in [0, inf], got -1.0"),
        (lambda: DGPO(ratio_clip=0.0), "ratio_clip: expected a finite number in (0, 1), got 0.0"),
        (lambda: DGPO(anchor="base"), "anchor: expected one of ['reference', 'old'], got 'base'"),
        (lambda: CRD(crd_beta=0.0), "crd_beta: expected a finite number in (0, inf], got 0.0"),
        (
            lambda: CRD(advantage_max=0.0),
            "advantage_max: expected a finite number in (0, inf], got 0.0",
        ),
        (
            lambda: CRD(kl_floor=0.1),
            "kl_floor: has an effect only where kl_coef > 0, got 0.1",
        ),
        (
            lambda: CRD(kl_coef=0.1, kl_floor=0.2),
            "kl_floor: expected a finite number in [0, 0.1], got 0.2",
        ),
        (
            lambda: DGPO(kl_coef=1.0, kl_share=0.5),
            "kl_share: expected 1 for DGPO, whose units are groups, got 0.5",
        ),
    ],
)
def test_hyperparameters_out_of_range(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_adaptive_is_a_boolean():
    with pytest.raises(TypeError, match=r"^adaptive: expected True or False, got int$"):
        CRD(adaptive=1)


def test_units_of_other_objectives_and_no_advantage_are_refused():
    samples = clean_samples()
    with pytest.raises(TypeError, match=r"^advantage: expected a tensor for DGPO, got None$"):
        DGPO().units(samples, None, key=key())
    (units,) = DGPO().units(samples, advantages(), key=key())
    with pytest.raises(ValueError, match=r"^units: expected .*, K = 2 or more with seeds, got K"):
        DGPO()(Recorded(), samples, replace(units, seed=None))


@pytest.mark.parametrize("objective", [DGPO(), DPO()], ids=lambda o: type(o).__name__)
def test_flat_groups_alone_make_no_units(objective):
    (units,) = objective.units(clean_samples(), torch.zeros(8), key=key())
    assert len(units) == 0


@pytest.mark.parametrize("kind", [DGPO, CRD, DPO])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("groups", "minibatches"), [(4, 2), (4, 4), (6, 2), (5, 2)])
def test_minibatches_have_equal_numbers_of_groups(kind, interleaved, groups, minibatches):
    """Before, groups went where their leads went: one of two minibatches of 4 was often empty."""
    members, turns = 4, 3
    number = torch.arange(groups)
    group = number.repeat(members) if interleaved else number.repeat_interleave(members)
    samples = CleanSamples(torch.zeros(groups * members, turns, 2), group=group)
    advantage = torch.randn(len(group), turns, generator=torch.Generator().manual_seed(1))
    orders = set()
    for seed in range(20):
        parts = kind().units(
            samples, advantage, key=RoundKey(seed=seed, round=0), minibatches=minibatches
        )
        counts = [len(part) for part in parts]
        assert sum(counts) == groups * turns
        assert max(counts) - min(counts) <= (0 if groups % minibatches == 0 else turns)
        orders.add(tuple(int(group[part.rows[0, 0, 0]]) for part in parts))
    assert len(orders) > 1
