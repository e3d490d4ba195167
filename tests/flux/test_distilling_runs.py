"""Runs of self_distillation.py: what the teacher is shown, what is learnt, going on."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from mteditflow_examples import self_distillation as distilling
from mteditflow_examples.flux.config import ConfigError, DistillationConfig
from mteditflow_examples.flux.sampling import next_chains
from PIL import ImageChops
from safetensors.torch import load_file

from mteditflow.chains import ChainDataset, read_chains
from mteditflow.pipelines import RolloutVelocity
from mteditflow.training import Updater
from tests.flux.rounds import started
from tests.flux.worlds import SCRIPT, options, run, weights
from tests.loops import some

pytestmark = pytest.mark.usefixtures("undrawn")


def sampled(run_):
    """The first round's rollout, and what the teacher is shown."""
    run_.first_round = 0
    drawn = next_chains(run_)
    instructions = [chain.instructions for chain in drawn.chains]
    rollout = distilling.record_student(run_, drawn.references, instructions, drawn.group)
    if run_.config.teacher.path is not None:
        return rollout, rollout
    return rollout, distilling.clean_rollout(run_, drawn, rollout)


@contextmanager
def taught(world, output, *more, family="kontext"):
    """A run before its first update: units of all minibatches, and the loss of any of them."""
    more = ("--data.groups", 2, *more)
    with started(world, output, *more, family=family, kind=DistillationConfig) as run_:
        source = "reference"
        if run_.config.teacher.path is not None:
            distilling.load_teacher(run_)
            source = "old"
        rollout, shown = sampled(run_)
        velocity = RolloutVelocity(run_.policies, rollout, teacher=(source, shown))
        (units,) = run_.objective.units(rollout, None, key=run_.key)
        yield SimpleNamespace(
            run=run_, units=units, losses=lambda part: run_.objective(velocity, rollout, part)
        )


def disturb(run_, seed=0):
    """Other weights of the current policy."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in run_.policies.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))


@pytest.fixture
def teacher(world, tmp_path):
    """A LoRA other than the base model."""
    with started(world, tmp_path / "teaching") as run_:
        disturb(run_)
        run_.policies.save(run_.editor.pipeline, tmp_path / "lora")
    return tmp_path / "lora"


def test_clean_images_are_the_true_ones_from_the_reference_on(world, klein_world):
    for where, side in ((world, 12), (klein_world, 96)):
        example = ChainDataset(read_chains(where / "train.jsonl").chains)[0]
        images = distilling.clean_images(example.chain, example.image)
        assert [image.size for image in images] == [(side, side)] * 3
        assert ImageChops.difference(images[0], example.image).getbbox() is None
        assert all(ImageChops.difference(images[0], x).getbbox() for x in some(images[1:]))


@pytest.mark.parametrize("family", ["kontext", "klein"])
def test_a_first_turn_has_nothing_to_teach_an_untrained_student(
    world, klein_world, tmp_path, family
):
    chosen = {"kontext": world, "klein": klein_world}[family]
    with taught(chosen, tmp_path, family=family) as now:
        assert len(now.units) == now.units.count == 8 * 2 * 3
        loss = now.losses(now.units).loss
    first = now.units.rows[:, 0, 1] == 0
    assert (loss[first] == 0).all()
    assert (loss[~first] > 0).any()
    assert now.units.mask.all()


def test_each_turn_is_shown_the_clean_image_of_its_own_chain(world, tmp_path):
    with started(world, tmp_path, "--data.groups", 3, kind=DistillationConfig) as run_:
        rollout, shown = sampled(run_)
    group, calls = rollout.trajectory.group, shown.index.flatten(0, 1)
    assert len(group.unique()) == 3
    assert len(calls.unique(dim=0)) == 3 * 2  # whatever the size of a group
    for g in some(group.unique()):
        assert len(shown.index[group == g].unique(dim=0)) == 1
    for b in some(range(len(rollout))):  # the clean image of the first turn is the student's own
        own, clean = rollout.index[b, 0].tolist(), shown.index[b, 0].tolist()
        tensors = [
            record.conditioning[call].stages[0].calls[0].rest.tensor[row]
            for record, (call, row) in ((rollout, own), (shown, clean))
        ]
        assert torch.equal(*tensors)


def test_only_the_current_policy_learns_and_comes_nearer(world, tmp_path):
    with taught(world, tmp_path) as now:
        policies, units = now.run.policies, now.units[now.units.rows[:, 0, 1] == 1]
        with torch.no_grad():
            before = float(now.losses(units).loss.mean())
        old = policies.state_dict("old")
        updater = Updater(now.run.optimizer, policies.parameters, max_grad_norm=1.0)
        for _ in range(5):
            step = updater.step(units.split(12), now.losses, count=units.count)
            assert step.outcome == "taken"
        now.losses(units).loss.sum().backward()
        learnt = {id(p) for p in policies.parameters()}
        graded = {id(p) for p in policies.model.parameters() if p.grad is not None}
        assert graded == learnt
        with torch.no_grad():
            assert float(now.losses(units).loss.mean()) < 0.9 * before
        assert all(torch.equal(x, old[k]) for k, x in some(policies.state_dict("old").items()))


def test_a_student_with_the_weights_of_its_teacher_has_nothing_to_learn(world, tmp_path, teacher):
    more = ("--teacher.path", teacher, "--objective.share", 0.5)
    with taught(world, tmp_path, *more) as now:
        assert len(now.units) == 8 * 2 * 2
        assert (now.losses(now.units).loss > 0).all()
        now.run.policies.load(now.run.editor.pipeline, teacher)
        assert (now.losses(now.units).loss == 0).all()


def test_teachers_that_do_not_fit_are_refused(world, tmp_path, teacher):
    for folder, *more in ((tmp_path / "none",), (teacher, "--model.lora-rank", 4)):
        given = ("--teacher.path", folder, *more)
        with (
            pytest.raises(ConfigError, match=r"teacher.path: cannot load"),
            taught(world, tmp_path / "run", *given),
        ):
            pass


@pytest.mark.parametrize("taught_by", ["itself", "another"])
def test_a_run_goes_on_to_the_same_weights(world, tmp_path, teacher, taught_by, monkeypatch):
    more = ["--training.rounds", 2, "--output.checkpoint-every", 1, "--objective.share", 0.5]
    more += ["--data.groups", 2]
    more += ["--teacher.path", teacher] if taught_by == "another" else []
    held_out = world / "held_out.jsonl" if taught_by == "itself" else None
    given = options(world, tmp_path / "whole", *more, "--data.held-out", held_out)
    monkeypatch.setattr(sys, "argv", ["self_distillation.py", *given])
    distilling.main()  # as a user starts it
    assert (tmp_path / "whole" / "curves.png").exists()
    assert (tmp_path / "whole" / "report.json").exists() == (held_out is not None)
    again = ("--output.resume", tmp_path / "whole" / "checkpoints" / "round-000001")
    with started(world, tmp_path / "again", *more, *again, kind=DistillationConfig) as run_:
        distilling.train(run_)
        assert run_.first_round == 1
    for name in ("current", "old", "optimizer"):
        whole, resumed = (weights(tmp_path / x, name, done=2) for x in ("whole", "again"))
        assert all(torch.equal(whole[k], resumed[k]) for k in some(whole))
    came = weights(tmp_path / "whole", "old", done=1)
    assert all(
        torch.equal(came[k], x) for k, x in some(weights(tmp_path / "whole", "old", 2).items())
    )
    if taught_by == "another":
        saved = load_file(teacher / "pytorch_lora_weights.safetensors")
        came = {k: x for k, x in came.items() if not k.endswith(".lora_scale")}
        assert all(torch.equal(saved[f"transformer.{k}"], x) for k, x in some(came.items()))


@pytest.mark.slow
@pytest.mark.long
def test_one_process_and_two_ranks_learn_alike(world, tmp_path):
    for ranks in (1, 2):
        given = options(world, tmp_path / str(ranks), "--training.rounds", 3)
        run(*given, ranks=ranks, script=SCRIPT.with_name("self_distillation.py"))
    ours, theirs = (weights(tmp_path / str(ranks), done=3) for ranks in (1, 2))
    for name, x in some(ours.items()):
        torch.testing.assert_close(x, theirs[name], rtol=1e-5, atol=1e-6)
