"""MT-OPSD from parts: a teacher shown the clean image, at the states of the student's edit."""

import copy

import pytest
import torch
from tiny import call, picture

from mteditflow import FlowSDE, distillation_loss, trajectory_generators
from mteditflow.pipelines import Recorder
from tests.loops import some

KEEP, EDIT = "Change nothing", "Remove the square"


def record(pipeline, image, prompt, steps=2):
    """An edit of one image: the rollout, and the image that comes out."""
    generators = trajectory_generators(3, 1)
    with Recorder(pipeline, FlowSDE(0.7), generators=generators) as recorder:
        images = call(pipeline, [image], [prompt], generators, steps=steps)
    return recorder.rollout(group=[0]), images[0]


def losses(worn, clean, student, teacher):
    """At every stored state of the student's edit, as the room's docstring has it."""
    trajectory, turn, step = worn.trajectory.step_mask.nonzero(as_tuple=True)
    steps = worn.trajectory.steps(trajectory, turn, step)
    velocity = worn.velocity(student, steps.x_t, steps.sigma, trajectory, turn)
    with torch.no_grad():
        teacher_velocity = clean.velocity(teacher, steps.x_t, steps.sigma, trajectory, turn)
    return distillation_loss(velocity, teacher_velocity)


@pytest.fixture
def edits(kontext):
    """The same edit of a clean image, of the student's own copy of it, and the copy."""
    clean_image = picture(kontext)
    _, worn_image = record(kontext, clean_image, KEEP)
    worn, _ = record(kontext, worn_image, EDIT)
    clean, _ = record(kontext, clean_image, EDIT, steps=1)
    return worn, clean, clean_image


def test_a_student_that_is_shown_the_clean_image_has_nothing_to_learn(kontext, edits):
    """One step records the teacher's conditioning; the states are those of the student."""
    _, clean, clean_image = edits
    own, _ = record(kontext, clean_image, EDIT)
    loss = losses(own, clean, kontext.transformer, kontext.transformer)
    assert loss.shape == (2,)
    torch.testing.assert_close(loss, torch.zeros(2))


def test_a_step_brings_the_worn_edit_nearer_to_the_clean_one(kontext, edits):
    worn, clean, _ = edits
    student, teacher = kontext.transformer, copy.deepcopy(kontext.transformer)
    before = losses(worn, clean, student, teacher)
    assert (before > 0).all()
    before.mean().backward()
    assert all(p.grad is None for p in some(teacher.parameters()))
    with torch.no_grad():
        for p in student.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad
    after = losses(worn, clean, student, teacher)
    assert after.mean() < before.mean()
