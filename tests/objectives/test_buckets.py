"""Buckets: parts of several shapes, grids and lengths train as one batch, as separate calls do."""

from dataclasses import replace

import pytest
import torch
from objective_worlds import Recorded, gradients, recorded_trajectory, validity

from mteditflow import Trajectory, group_advantage
from mteditflow.objectives import (
    AWM,
    CRD,
    DGPO,
    DPO,
    DPPO,
    GRPO,
    MTOPSD,
    NFT,
    OBJECTIVES,
    Buckets,
    BucketVelocity,
    CleanSamples,
    Distillation,
    FlowAWR,
    ForwardObjective,
    Guard,
    Renoise,
    RoundKey,
    Samples,
    Units,
)
from mteditflow.training import most_parts
from tests.loops import some

REPLAYS = {"stochastic_steps": 3, "noise_level": 0.7, "share": 0.5, "kl_coef": 0.1}
ALL = [
    NFT(renoise=Renoise(levels=4), kl_coef=0.1, norm_coef=0.1),
    NFT(renoise=Renoise(distribution="grid", levels=2, stratified=True, shared=True), loss="plain"),
    AWM(old_kl_coef=0.1, weighting="huber"),
    FlowAWR(temperature=0.5),
    DPO(dpo_beta=2.0),
    CRD(kl_coef=0.1, kl_floor=0.01),
    DGPO(dgpo_beta=2.0, ratio_clip=0.5, kl_coef=0.1, norm_coef=0.1),
    GRPO(**REPLAYS, importance_cap=2.0),
    Guard(**REPLAYS),
    DPPO(**REPLAYS),
    Distillation(share=0.5),
    MTOPSD(queries=3),
]
by_name = pytest.mark.parametrize("objective", ALL, ids=lambda o: type(o).__name__)


class Elementwise:
    """Four policies, each entry of whose velocity depends on that entry, float64, of any shape."""

    def __init__(self):
        scales = {"current": 0.3, "old": 0.31, "reference": 0.2, "teacher": -0.4}
        self.scale = {
            policy: torch.tensor([x, 0.1], dtype=torch.float64, requires_grad=policy == "current")
            for policy, x in scales.items()
        }
        self.calls = []

    def __call__(self, policy, x_t, sigma, at):
        self.calls.append((policy, tuple(x_t.shape), at))
        place = sigma.double() + 0.1 * at[:, 0] - 0.2 * at[:, 1]
        slope, shift = self.scale[policy]
        return slope * x_t.double() + (shift * place).view(-1, *[1] * (x_t.ndim - 1))

    def gradient(self, loss):
        return gradients(loss.sum(), [self.scale["current"]])


def counted_from(velocity, start):
    """The velocity of a part: trajectories counted from its first."""
    return lambda policy, x_t, sigma, at: velocity(
        policy, x_t, sigma, at + torch.tensor([start, 0])
    )


def made(trajectories, turns, steps, shape, *, group, seed, dtype=torch.float32):
    """A part of one shape; its last turn is missing in its last trajectory, and NaN there."""
    random = torch.Generator().manual_seed(seed)
    latents = torch.randn(trajectories, turns, steps + 1, *shape, generator=random)
    mask = torch.ones(trajectories, turns, dtype=torch.bool)
    stochastic = torch.ones(turns, steps, dtype=torch.bool)
    stochastic[:, -1] = False
    log_prob = 0.1 * torch.randn(trajectories, turns, steps, generator=random, dtype=dtype) - 1
    if turns > 1:
        mask[-1, -1] = False
        latents[-1, -1], log_prob[-1, -1] = torch.nan, torch.nan
    return Trajectory(
        latents=latents,
        sigmas=torch.linspace(1, 0, steps + 1).expand(turns, -1),
        log_prob=log_prob,
        stochastic=stochastic,
        group=torch.as_tensor(group),
        turn_mask=mask,
        reduction="mean",
    )


def mixed():
    """Three parts that differ in latent shape and rank, grid, steps, turns and log-prob dtype."""
    return Buckets(
        [
            made(4, 3, 4, (2, 3), group=[5, 5, 5, 5], seed=0),
            made(2, 1, 2, (4, 1, 2), group=[7, 7], seed=1, dtype=torch.float64),
            made(2, 2, 5, (3, 3), group=[-1, -1], seed=2),
        ]
    )


STARTS = (0, 4, 6)


def advantages_of(samples):
    """One per turn; NaN where the turn does not exist."""
    random = torch.Generator().manual_seed(9)
    values = torch.randn(samples.turn_mask.shape, generator=random, dtype=torch.float64)
    return torch.where(samples.turn_mask, values, torch.nan)


def draw(objective, samples, values, valid=None, *, first=0, minibatches=1):
    given = values if objective.card.rewarded else None
    key = RoundKey(3, 1, first=first)
    return objective.units(samples, given, valid, key=key, minibatches=minibatches)


def parts_alone(objective, samples, minibatches=1):
    """Each part with its first trajectory and units, drawn as if the others were not there."""
    values = advantages_of(samples)
    for start, part in zip(samples.starts, samples.parts, strict=True):
        own = values[start : start + len(part), : part.turn_mask.shape[1]]
        drawn = draw(objective, part, own, first=start, minibatches=minibatches)
        yield start, part, drawn


def test_every_objective_is_held_to_the_laws_of_this_file():
    assert {type(objective) for objective in ALL} == set(OBJECTIVES.values())


def test_masks_are_padded_and_groups_join():
    samples = mixed()
    assert isinstance(samples, Samples)
    assert len(samples) == 8
    assert samples.starts == STARTS
    assert samples.group.tolist() == [5, 5, 5, 5, 7, 7, -1, -1]
    assert samples.turn_mask.int().tolist() == [
        *[[1, 1, 1]] * 3,
        [1, 1, 0],
        *[[1, 0, 0]] * 2,
        [1, 1, 0],
        [1, 0, 0],
    ]
    assert samples.step_mask.shape == (8, 3, 5)
    assert samples.step_mask[0].int().tolist() == [[1, 1, 1, 0, 0]] * 3
    assert samples.step_mask[5].int().tolist() == [[1, 0, 0, 0, 0], [0] * 5, [0] * 5]
    assert samples.step_mask[6].int().tolist() == [[1, 1, 1, 1, 0]] * 2 + [[0] * 5]
    assert samples.reduction == "mean"


def test_rows_are_read_from_the_part_that_holds_them():
    samples = mixed()
    first, second, third = samples.parts
    at = torch.tensor([[7, 0], [6, 1]])
    assert torch.equal(samples.clean_at(at), third.clean[[1, 0], [0, 1]])
    steps = samples.steps_at(torch.tensor([[5, 0, 1]]))
    assert torch.equal(steps.x_t, second.latents[[1], 0, 1])
    assert steps.log_prob.dtype == torch.float64
    with pytest.raises(ValueError, match=r"rows: expected those of one latent shape in a call"):
        samples.clean_at(torch.tensor([[7, 0], [0, 0]]))
    for outside in some([-1, 8]):
        with pytest.raises(ValueError, match=r"trajectory: expected indices in 0\.\.7"):
            samples.clean_at(torch.tensor([[outside, 0]]))
    # Parts of one latent shape are read in any order.
    both = Buckets([first, replace(first, latents=first.latents + 1)])
    clean = both.clean_at(torch.tensor([[5, 0], [1, 0], [4, 2]]))
    assert torch.equal(
        clean,
        torch.stack(
            [
                x.clean[b, n]
                for x, b, n in [(both.parts[1], 1, 0), (first, 1, 0), (both.parts[1], 0, 2)]
            ]
        ),
    )


@by_name
def test_buckets_of_one_shape_are_the_unsplit_batch_bit_for_bit(objective):
    whole = recorded_trajectory(Recorded().policies["old"])
    cuts = [slice(0, 4), slice(4, 8)] if objective.card.whole_groups else [slice(0, 3), slice(3, 8)]
    samples = Buckets([whole.select(cut) for cut in cuts])
    values, velocity = advantages_of(whole), Elementwise()
    pairs = zip(
        draw(objective, whole, values, validity(), minibatches=2),
        draw(objective, samples, values, validity(), minibatches=2),
        strict=True,
    )
    for expected, units in some(pairs):
        assert (units.count, units.spare) == (expected.count, expected.spare)
        for name in ("rows", "mask", "advantage", "seed"):
            one, other = getattr(units, name), getattr(expected, name)
            assert (one is None and other is None) or torch.equal(one, other)
        together = objective(velocity, whole, expected)
        apart = objective(velocity, samples, units)
        assert together.loss.any()
        assert torch.equal(apart.loss, together.loss)
        assert apart.metrics.keys() == together.metrics.keys()
        for name in some(together.metrics):
            assert torch.equal(apart.metrics[name], together.metrics[name]), name
        for loss in (
            apart.loss,
            torch.cat([objective(velocity, samples, part).loss for part in units.split(3)]),
        ):
            assert torch.equal(loss, together.loss)
            torch.testing.assert_close(
                velocity.gradient(loss), velocity.gradient(together.loss), rtol=1e-12, atol=1e-14
            )


@by_name
@pytest.mark.parametrize("minibatches", [1, 2])
def test_parts_of_several_shapes_are_separate_calls(objective, minibatches):
    """Draws, losses, metrics and gradients; padded advantages and absent turns hold NaN."""
    samples, velocity = mixed(), Elementwise()
    drawn = draw(objective, samples, advantages_of(samples), minibatches=minibatches)
    alone = list(parts_alone(objective, samples, minibatches))
    for number, units in some(list(enumerate(drawn))):
        shift = [torch.tensor([start, 0, 0]) for start, _, _ in alone]
        members = [own[number].rows[own[number].mask] for _, _, own in alone]  # a group is padded
        rows = [own + by for own, by in zip(members, shift, strict=True)]
        assert torch.equal(units.rows[units.mask], torch.cat(rows))
        several = len(set(units.bucket.tolist())) > 1  # three groups may part by bucket
        assert several or (objective.card.whole_groups and minibatches == 2)
        assert units.count == sum(own[number].count for _, _, own in alone)
        outputs = [
            objective(counted_from(velocity, start), part, own[number])
            for start, part, own in alone
            if len(own[number])  # a flat pair of one minibatch leaves none
        ]
        output = objective(velocity, samples, units)
        expected = torch.cat([x.loss for x in outputs])
        assert torch.equal(output.loss, expected)
        assert output.loss.isfinite().all()
        for name, metric in some(output.metrics.items()):
            assert torch.equal(metric, torch.cat([x.metrics[name] for x in outputs]))
            assert not metric.requires_grad
        gradient = sum(velocity.gradient(x.loss) for x in outputs)
        torch.testing.assert_close(velocity.gradient(output.loss), gradient, rtol=1e-12, atol=0)
        assert gradient.abs().max() > 0


@by_name
def test_units_in_any_order_and_micro_batches_of_any_size_give_the_same(objective):
    samples, velocity = mixed(), Elementwise()
    (units,) = draw(objective, samples, advantages_of(samples))
    whole = objective(velocity, samples, units)
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(1))
    mixed_up = objective(velocity, samples, units[order])
    torch.testing.assert_close(mixed_up.loss, whole.loss[order], rtol=1e-12, atol=1e-14)
    for name, metric in some(whole.metrics.items()):
        torch.testing.assert_close(mixed_up.metrics[name], metric[order], rtol=1e-6, atol=1e-7)
    for size in some([1, 3, 100]):
        velocity.calls.clear()
        parts = units.split(size)
        cut = torch.cat([objective(velocity, samples, part).loss for part in parts])
        torch.testing.assert_close(cut, whole.loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            velocity.gradient(cut), velocity.gradient(whole.loss), rtol=1e-11, atol=1e-14
        )
        # One forward pass of a policy in each part: equally many collective calls on every rank.
        assert [call[0] for call in velocity.calls].count("current") == len(parts)
        assert most_parts(units, size) == len(parts)
        assert all(len(part.bucket.unique()) == 1 and len(part) <= size for part in some(parts))


@by_name
def test_an_idle_unit_of_buckets_is_one_forward_pass_without_effect(objective):
    samples, velocity = mixed(), Elementwise()
    (units,) = draw(objective, samples, advantages_of(samples))
    idle = units.split(100, parts=5)[-1]
    output = objective(velocity, samples, idle)
    assert output.loss.tolist() == [0.0]
    assert not velocity.gradient(output.loss).any()
    assert [call[0] for call in velocity.calls].count("current") == 1


def test_no_units_are_refused_as_without_buckets():
    samples = mixed()
    (units,) = draw(ALL[0], samples, advantages_of(samples))
    with pytest.raises(ValueError, match="units: expected at least one, got none"):
        ALL[0](Elementwise(), samples, units[:0])


def test_the_advantage_compares_members_of_a_group_across_buckets():
    wide = made(1, 1, 2, (1, 4), group=[5], seed=4)
    samples = Buckets([made(1, 1, 2, (2, 2), group=[5], seed=3), wide])
    reward = torch.tensor([1.0, 0.0])
    advantage = group_advantage(reward, samples.group)
    assert advantage.sign().tolist() == [1.0, -1.0]
    velocity = Elementwise()
    (units,) = draw(NFT(), samples, advantage)
    assert objective_shapes(NFT(), velocity, samples, units) == {(1, 2, 2), (1, 1, 4)}


def objective_shapes(objective, velocity, samples, units):
    objective(velocity, samples, units)
    return {shape for _, shape, _ in velocity.calls}


def test_a_pair_across_buckets_is_refused_with_its_trajectories():
    whole = recorded_trajectory(Recorded().policies["old"])
    samples = Buckets([whole.select(slice(0, 3)), whole.select(slice(3, 8))])
    values = torch.tensor([0.0, 1.0, 0.5, -1.0, 0.1, 0.2, 0.3, 0.4])
    message = r"units: .* in one bucket, got trajectories \[1, 3\] in several; give each bucket"
    with pytest.raises(ValueError, match=message):
        DPO().units(samples, values, key=RoundKey(0, 0))
    # Units that do not know of buckets are refused by the call.
    (units,) = DPO().units(whole, values, key=RoundKey(0, 0))
    with pytest.raises(ValueError, match=message):
        DPO()(Elementwise(), samples, units)


class GroupMean(ForwardObjective):
    """A group objective of a user's: the mean error over the members that exist."""

    members = 3

    def __call__(self, velocity, samples, units, *, old_is_current=False):
        states, at = self.states(velocity, samples, units, old_is_current=old_is_current)
        error = (at.current - states.target).flatten(1).square().mean(dim=1).view(3, -1)
        exists = units.mask.T
        loss = torch.where(exists, error, 0).sum(dim=0) / exists.sum(dim=0)
        return self.output(units, loss, at, {})


def test_a_masked_member_may_name_a_row_of_another_bucket():
    """Padded groups of a user's objective: what a masked member points to is never read."""
    samples, objective, velocity = mixed(), GroupMean(), Elementwise()
    rows = torch.tensor([[[6, 0, 0], [7, 0, 0], [0, 2, 0]], [[3, 2, 0], [4, 0, 0], [5, 0, 0]]])
    mask = torch.tensor([[True, True, False], [False, True, True]])
    units = Units(rows, mask, None, torch.arange(6).view(2, 3), 2)
    output = objective(velocity, samples, units)
    inside = rows.clone()
    inside[0, 2], inside[1, 0] = rows[0, 0], rows[1, 1]
    for number, unit in some([(0, 2), (1, 1)]):
        start = STARTS[unit]
        own = replace(units, rows=inside - torch.tensor([start, 0, 0]))[number : number + 1]
        alone = objective(counted_from(velocity, start), samples.parts[unit], own)
        assert torch.equal(output.loss[number], alone.loss[0])
    assert output.loss.isfinite().all()
    assert velocity.gradient(output.loss).isfinite().all()


@pytest.mark.parametrize("objective", [x for x in ALL if hasattr(x, "check_ratios")])
def test_ratios_are_checked_in_every_bucket(objective):
    whole = recorded_trajectory(Recorded().policies["old"])
    taller = replace(
        whole.select(slice(4, 8)), latents=torch.cat([whole.latents[4:]] * 2, dim=3)
    )  # mean log-probs are those of one half
    samples, velocity = Buckets([whole.select(slice(4)), taller]), Recorded()
    policies = {"current": velocity.policies["old"]}

    def halves(policy, x_t, sigma, at):
        return torch.cat([policies[policy](x, sigma, at) for x in x_t.split(2, 1)], dim=1)

    check = objective.check_ratios(halves, samples, trajectories=8, size=5)
    assert check.ok
    shifted = Buckets([samples.parts[0], replace(taller, log_prob=taller.log_prob + 0.01)])
    assert not objective.check_ratios(halves, shifted, trajectories=8, size=5).ok


def test_bucket_velocity_counts_trajectories_within_each_part():
    samples, calls = mixed(), []

    def part_velocity(number):
        def velocity(policy, x_t, sigma, at):
            calls.append((number, policy, at.tolist()))
            return number + 0 * x_t

        return velocity

    velocity = BucketVelocity(samples, [part_velocity(number) for number in range(3)])
    (units,) = draw(Distillation(), samples, advantages_of(samples))
    Distillation()(velocity, samples, units)
    assert {(number, policy) for number, policy, _ in calls} == {
        (number, policy) for number in range(3) for policy in ("current", "teacher")
    }
    for number, _, at in some(calls):
        assert max(trajectory for trajectory, _ in at) < len(samples.parts[number])
    # Rows of several parts in one call come back in their order.
    at = torch.tensor([[6, 0], [0, 0], [7, 0], [5, 0]])
    found = velocity("old", torch.zeros(4, 2), torch.zeros(4), at)
    assert found.tolist() == [[2.0, 2.0], [0.0, 0.0], [2.0, 2.0], [1.0, 1.0]]


def test_a_part_that_cannot_be_trained_is_named():
    samples = mixed()
    clean = CleanSamples(torch.randn(2, 1, 4), torch.tensor([8, 8]))
    ode = samples.parts[1]
    ode = replace(ode, stochastic=torch.zeros_like(ode.stochastic))
    values = torch.ones(10)
    both = Buckets([samples.parts[0], clean, *samples.parts[1:]])
    for objective in some([GRPO(), Distillation()]):
        with pytest.raises(ValueError, match=r"samples\.parts\[1\]: expected stored steps"):
            draw(objective, both, values)
    with pytest.raises(ValueError, match=r"samples\.parts\[1\]: expected stochastic steps"):
        draw(GRPO(), Buckets([samples.parts[0], ode]), values[:6])
    assert draw(NFT(), both, values)[0].count == both.turn_mask.sum()


def test_buckets_of_buckets_are_their_parts():
    samples = mixed()
    outer = Buckets([samples.parts[0], Buckets(samples.parts[1:])])
    assert outer.parts == samples.parts


def test_wrong_parts_are_refused():
    part = made(2, 1, 2, (2,), group=[0, 0], seed=0)
    with pytest.raises(ValueError, match="parts: expected at least one Samples, got none"):
        Buckets([])
    with pytest.raises(TypeError, match="parts: expected a sequence of Samples, got Trajectory"):
        Buckets(part)
    with pytest.raises(TypeError, match=r"parts\[1\]: expected Samples, got int"):
        Buckets([part, 3])
    with pytest.raises(ValueError, match=r"parts\[1\]\.reduction: expected one of \['mean'\]"):
        Buckets([part, replace(part, reduction="sum")])
    with pytest.raises(ValueError, match=r"parts\[1\]\.group: expected device cpu, got meta"):
        Buckets([part, part.to("meta")])
    samples = Buckets([part, part])
    with pytest.raises(ValueError, match=r"velocities: expected one for each of the 2 parts, got"):
        BucketVelocity(samples, [Elementwise()])
    with pytest.raises(TypeError, match=r"velocities\[1\]: expected a callable, got str"):
        BucketVelocity(samples, [Elementwise(), "old"])
    with pytest.raises(TypeError, match="velocities: expected a sequence of callables"):
        BucketVelocity(samples, Elementwise())
    with pytest.raises(TypeError, match="samples: expected Buckets, got Trajectory"):
        BucketVelocity(part, [Elementwise()])
