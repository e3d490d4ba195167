"""Rollouts of two aspect ratios: one batch of an objective, one velocity for each."""

import torch
from peft import LoraConfig
from tiny import CHAIN, call, picture

from mteditflow import trajectory_generators
from mteditflow.objectives import GRPO, Buckets, BucketVelocity, Distillation, RoundKey
from mteditflow.pipelines import LoraPolicies, Recorder, RolloutVelocity
from tests.loops import some


def roll_out(pipeline, solver, seed, **size):
    """One turn of two steps of a group of two trajectories."""
    generators = trajectory_generators(seed, 2)
    images = [picture(pipeline).resize((size["width"], size["height"]))] * 2
    prompts = [CHAIN[0][0]] * 2
    with Recorder(pipeline, solver, generators=generators) as recorder:
        call(pipeline, images, prompts, generators, steps=2, **size)
    return recorder.rollout(group=[seed, seed])


def test_two_aspect_ratios_train_in_one_batch_as_each_alone(kontext):
    size = kontext.vae.config.sample_size
    objective = GRPO(stochastic_steps=1, noise_level=0.7)
    area = {"max_area": 2 * size * size}
    rollouts = [
        roll_out(kontext, objective.step_solver, 1, height=size, width=size, max_area=size * size),
        roll_out(kontext, objective.step_solver, 2, height=size, width=2 * size, **area),
    ]
    square, wide = (rollout.trajectory.latents.shape[3:] for rollout in rollouts)
    assert square != wide
    policies = LoraPolicies(
        kontext.transformer, LoraConfig(r=2, target_modules=["to_q", "to_v"], lora_alpha=2)
    )
    samples = Buckets(rollouts)
    teachers = [("reference", rollout) for rollout in rollouts]
    velocities = [
        RolloutVelocity(policies, rollout, teacher=teacher)
        for rollout, teacher in zip(rollouts, teachers, strict=True)
    ]
    velocity = BucketVelocity(samples, velocities)
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5])
    for each, given in some([(objective, advantage), (Distillation(), None)]):
        (units,) = each.units(samples, given, key=RoundKey(0, 0))
        output = each(velocity, samples, units)
        alone = []
        for number, (rollout, own) in enumerate(zip(rollouts, velocities, strict=True)):
            part = None if given is None else given[2 * number : 2 * number + 2]
            (drawn,) = each.units(rollout, part, key=RoundKey(0, 0, first=2 * number))
            alone.append(each(own, rollout, drawn).loss)
        assert torch.equal(output.loss, torch.cat(alone))
    check = objective.check_ratios(velocity, samples, trajectories=4, size=2)
    assert check.ok
