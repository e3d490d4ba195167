"""Samples of a user's own: buckets of latent shapes, a replay buffer, other containers."""

from dataclasses import replace

import pytest
import torch
from objective_worlds import (
    GROUP,
    TURN_MASK,
    Recorded,
    advantages,
    gradients,
    recorded_trajectory,
    validity,
)

from mteditflow import Steps, Trajectory
from mteditflow.objectives import (
    AWM,
    DPO,
    DPPO,
    GRPO,
    NFT,
    CleanSamples,
    Distillation,
    Guard,
    Renoise,
    RoundKey,
    Samples,
)
from tests.loops import some

REPLAYS = {"stochastic_steps": 3, "noise_level": 0.7}
FORWARD = [NFT(renoise=Renoise(levels=2)), AWM(), DPO(dpo_beta=2.0)]
ALL = [*FORWARD, GRPO(**REPLAYS), Guard(**REPLAYS), DPPO(**REPLAYS), Distillation()]
by_name = pytest.mark.parametrize("objective", ALL, ids=lambda o: type(o).__name__)


def draw(objective, samples, values=None, valid=None):
    values = advantages() if values is None else values
    valid = validity() if valid is None else valid
    given = values if objective.card.rewarded else None
    (units,) = objective.units(samples, given, valid, key=RoundKey(0, 0))
    return units


class Buckets:
    """Trajectories of two latent shapes, each in a Trajectory of its own; duck-typed."""

    def __init__(self, parts):
        self.parts = parts
        sizes = [len(part) for part in parts]
        self.bucket = torch.cat([torch.full((n,), k) for k, n in enumerate(sizes)])
        self.place = torch.cat([torch.arange(n) for n in sizes])
        self.reduction = parts[0].reduction
        for name in ("group", "turn_mask", "step_mask"):
            setattr(self, name, torch.cat([getattr(part, name) for part in parts]))

    def _own(self, rows):
        (bucket,) = self.bucket[rows[:, 0]].unique().tolist()
        return self.parts[bucket], torch.cat([self.place[rows[:, :1]], rows[:, 1:]], dim=1)

    def clean_at(self, at):
        part, own = self._own(at)
        return part.clean_at(own)

    def steps_at(self, rows):
        part, own = self._own(rows)
        return part.steps_at(own)


def taller(trajectory):
    """The same rollout with latents of twice the height."""
    return replace(trajectory, latents=torch.cat([trajectory.latents] * 2, dim=3))


class AnyShape(Recorded):
    """Applies the policies of [2, 3] latents to any number of such halves."""

    def __call__(self, policy, x_t, sigma, at):
        halves = [super(AnyShape, self).__call__(policy, x, sigma, at) for x in x_t.split(2, 1)]
        return torch.cat(halves, dim=1)


@pytest.fixture(scope="module")
def trajectory():
    return recorded_trajectory(Recorded().policies["old"])


def test_containers_have_the_members_of_samples(trajectory):
    clean = CleanSamples(trajectory.clean, GROUP, TURN_MASK)
    for samples in (trajectory, clean, Buckets([trajectory])):
        assert isinstance(samples, Samples)


@by_name
def test_buckets_of_two_latent_shapes_train_one_shape_at_a_time(objective, trajectory):
    first, second = trajectory.select(slice(4)), taller(trajectory.select(slice(4, 8)))
    samples, velocity = Buckets([first, second]), AnyShape()
    units = draw(objective, samples)
    bucket_of = samples.bucket[units.rows[:, 0, 0]]
    parts = [units[bucket_of == k] for k in range(2)]
    assert all(part.count == units.count for part in some(parts))
    losses = [objective(velocity, samples, part).loss for part in parts]
    assert sorted(map(len, losses)) == sorted((bucket_of == k).sum() for k in range(2))
    # One unit at a time needs no bucket; and the first bucket is what it is alone.
    single = torch.cat([objective(velocity, samples, part).loss for part in units.split(1)])
    torch.testing.assert_close(single[bucket_of == 0], losses[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(single[bucket_of == 1], losses[1], rtol=1e-9, atol=1e-12)
    alone = objective(velocity, first, draw(objective, first, advantages()[:4], validity()[:4]))
    torch.testing.assert_close(alone.loss, losses[0], rtol=1e-9, atol=1e-12)


@by_name
def test_a_replay_buffer_of_old_rounds_is_their_concatenation(objective):
    velocity = Recorded()
    rounds = [recorded_trajectory(velocity.policies["old"], seed=seed) for seed in (0, 1)]
    apart = [replace(t, group=t.group + 100 * k) for k, t in enumerate(rounds)]
    buffer = Trajectory.concatenate(apart)
    values, valid = torch.cat([advantages(0), advantages(1)]), torch.cat([validity()] * 2)

    def at(policy, x_t, sigma, at):
        return velocity(policy, x_t, sigma, torch.stack([at[:, 0] % 8, at[:, 1]], dim=1))

    whole = objective(at, buffer, draw(objective, buffer, values, valid)).loss
    losses = []
    for k, part in enumerate(apart):
        own = slice(8 * k, 8 * k + 8)
        given = values[own] if objective.card.rewarded else None
        (units,) = objective.units(part, given, valid[own], key=RoundKey(0, 0, first=8 * k))
        losses.append(objective(velocity, part, units).loss)
    if isinstance(objective, DPO):  # pairs come by groups, whose ids are sorted
        whole, losses = whole.sort().values, [torch.cat(losses).sort().values]
    torch.testing.assert_close(whole, torch.cat(losses), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", FORWARD, ids=lambda o: type(o).__name__)
def test_clean_samples_are_a_trajectory_without_its_steps(objective, trajectory):
    clean, velocity = CleanSamples(trajectory.clean, GROUP, TURN_MASK), Recorded()
    losses = [objective(velocity, s, draw(objective, s)).loss for s in (trajectory, clean)]
    assert torch.equal(*losses)


@by_name
def test_latents_of_invalid_trajectories_are_never_read(objective, trajectory):
    """Neither are those of turns that do not exist: NaN there changes nothing."""
    latents = trajectory.latents.clone()
    latents[~TURN_MASK] = torch.nan
    broken, velocity = replace(trajectory, latents=latents), Recorded()
    latents[2] = torch.nan  # after validation: a trajectory that is lost, and marked so
    found, expected = (objective(velocity, s, draw(objective, s)) for s in (broken, trajectory))
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(
        gradients(found.loss.sum(), velocity.parameters()),
        gradients(expected.loss.sum(), velocity.parameters()),
    )


def test_log_probs_in_half_precision_are_refused(trajectory):
    class Half:
        group, turn_mask, step_mask = GROUP, TURN_MASK, trajectory.step_mask
        reduction, clean_at = "mean", trajectory.clean_at

        def steps_at(self, rows):
            return Steps(**trajectory.steps_at(rows)._asdict() | {"log_prob": self.half(rows)})

        def half(self, rows):
            return trajectory.steps_at(rows).log_prob.half()

    objective = GRPO(**REPLAYS)
    with pytest.raises(TypeError, match="old_log_prob: expected float32 or float64"):
        objective(Recorded(), Half(), draw(objective, Half()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@by_name
def test_samples_on_a_gpu_train_as_on_the_cpu(objective, trajectory):
    here, there = Recorded(), Recorded()
    for policy in there.policies.values():
        policy.cuda()

    def at(policy, x_t, sigma, at):
        return there(policy, x_t, sigma, at.cuda(non_blocking=True))

    moved = trajectory.to("cuda")
    units = draw(objective, trajectory)
    on_gpu = draw(objective, moved, advantages().cuda(), validity().cuda())
    assert torch.equal(units.rows, on_gpu.rows)
    expected, found = objective(here, trajectory, units), objective(at, moved, on_gpu)
    assert found.loss.is_cuda
    torch.testing.assert_close(found.loss.cpu(), expected.loss, rtol=1e-5, atol=1e-6)
