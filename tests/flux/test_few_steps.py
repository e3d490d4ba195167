"""Runs that sample in few steps: with a LoRA, or by a sibling, while the base is trained."""

import pytest
import torch
from diffusers import FluxKontextPipeline
from mteditflow_examples import export, self_distillation, train_flux
from mteditflow_examples.flux.sampling import next_chains, sample, sampling_as, velocity_of
from mteditflow_examples.flux.updating import update

from mteditflow.pipelines import Editor, LoraPolicies, RolloutVelocity
from mteditflow.training import Updater
from tests.flux.rounds import ForwardRows, started, turn_values
from tests.flux.worlds import options, weights
from tests.loops import some
from tests.refusals import call

pytestmark = pytest.mark.usefixtures("undrawn")
SHORT = ("--data.held-out", "None", "--training.schedule", "constant", "--sampling.steps", 2)


@pytest.fixture(scope="module")
def siblings(world, tmp_path_factory):
    """A LoRA for few steps, and a sibling of other weights; both move velocities."""
    folder = tmp_path_factory.mktemp("siblings")
    editor = Editor.load(world / "model")
    lora = editor.lora(rank=2, alpha=2, targets=["attn.to_q", "proj_mlp"])
    policies = LoraPolicies(editor.transformer, lora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in policies.parameters():
            x.add_(0.2 * torch.randn(x.shape, generator=generator))
    policies.save(editor.pipeline, folder / "lora")
    pipeline = FluxKontextPipeline.from_pretrained(world / "model")
    with torch.no_grad():
        for x in pipeline.transformer.parameters():
            x.add_(0.05 * x.std(correction=0) * torch.randn(x.shape, generator=generator))
    pipeline.save_pretrained(folder / "model")
    return folder


def words_of(which, folder):
    given = {"lora": ("--sampling.lora", folder / "lora")}
    given["model"] = ("--sampling.model", folder / "model")
    given["both"] = (*given["lora"], *given["model"])
    return (*SHORT, *given[which])


def is_of(model, policies, policy, rollout, *, few_steps):
    """How far a record's first steps are from those of a policy, in velocity."""
    at = rollout.turn_mask.nonzero()
    latents = rollout.trajectory.latents[at[:, 0], at[:, 1]]
    with torch.no_grad(), policies.use(policy, few_steps=few_steps):
        velocity = rollout.velocity(model, latents[:, 0], torch.ones(len(at)), *at.unbind(1))
    return float((latents[:, 1] - (latents[:, 0] - 0.5 * velocity)).abs().max())


@pytest.mark.parametrize("which", ["lora", "model", "both"])
def test_the_sampler_samples_and_the_base_is_trained(which, world, siblings, tmp_path):
    with started(world, tmp_path, *words_of(which, siblings)) as run:
        run.first_round = 0
        own = run.policies
        with torch.no_grad():  # as if trained: old and current differ from each other and the base
            generator = torch.Generator().manual_seed(1)
            for x in [*own.old_parameters(), *own.parameters()]:
                x.add_(0.02 * torch.randn(x.shape, generator=generator))
        drawn = next_chains(run)
        rollout, _, scores = sample(run, drawn)
        assert rollout.trajectory.latents.shape[2] == 2 + 1

        # The record is the sampler's: its base, the policy that samples, and the LoRA.
        few_steps, wanted = which != "model", run.objective.samples_with
        if run.sibling is None:
            sampler, policies, policy = run.editor, own, wanted
        else:
            sampler, policies, policy = run.sibling.editor, run.sibling.policies, "current"
            copied, source = policies.state_dict(policy), own.state_dict(wanted)
            assert all(torch.equal(copied[name], x) for name, x in some(source.items()))
            assert sampler.transformer is not run.editor.transformer
        assert is_of(sampler.transformer, policies, policy, rollout, few_steps=few_steps) < 1e-5
        assert is_of(run.editor.transformer, own, wanted, rollout, few_steps=False) > 1e-3

        # Updates move the current policy of the base alone; velocities are those of the base.
        velocity = velocity_of(own, rollout)
        assert isinstance(velocity, RolloutVelocity)
        before = {name: x.clone() for name, x in run.editor.transformer.state_dict().items()}
        others = {} if run.sibling is None else sampler.transformer.state_dict()
        others = {name: x.clone() for name, x in others.items()}
        advantage, valid = turn_values(run, scores, drawn.group)
        updater = Updater(run.optimizer, own.parameters, max_grad_norm=1.0)
        run.begin_round()
        update(run, updater, velocity, rollout, advantage, valid)
        after = run.editor.transformer.state_dict()
        moved = {name for name, x in before.items() if not torch.equal(after[name], x)}
        assert moved
        assert all(".current." in name for name in some(moved))
        now = sampler.transformer.state_dict()
        assert [name for name, x in others.items() if not torch.equal(now[name], x)] == []

        # The next round samples with what the policy is then.
        own.update_old(decay=0.0)
        with sampling_as(run, wanted):
            current = policies.state_dict(policy)
        assert all(torch.equal(current[k], x) for k, x in some(own.state_dict(wanted).items()))


def test_without_guidance_one_branch_is_sampled_and_trained(klein_world, tmp_path):
    editor = Editor.load(klein_world / "model")
    policies = LoraPolicies(editor.transformer, editor.lora(rank=2, alpha=2))
    policies.save(editor.pipeline, tmp_path / "lora")
    few = (*SHORT, "--data.groups", 2, "--data.group-size", 2, "--data.turns", 1)
    few += ("--sampling.lora", tmp_path / "lora", "--model.guidance", 4)
    rows = {}
    for guidance in (1, 4):
        more = (*few, "--sampling.guidance", guidance)
        with started(klein_world, tmp_path / str(guidance), *more, family="klein") as run:
            count = ForwardRows(run.editor.transformer)
            rollout, _, _ = sample(run, next_chains(run))
            sampled = count.others
            at = rollout.turn_mask.nonzero()
            velocity = velocity_of(run.policies, rollout)
            velocity("current", rollout.clean_at(at), torch.ones(len(at)), at)
            rows[guidance] = sampled, count.trained
    assert rows == {1: (4 * 2, 4), 4: (2 * 4 * 2, 2 * 4)}


def test_it_goes_on_to_the_same_weights_and_saves_the_trained_alone(world, siblings, tmp_path):
    for rounds, folder in ((2, "whole"), (1, "parts"), (2, "parts")):
        more = (*words_of("both", siblings), "--training.rounds", rounds, "--data.turns", 1)
        words = options(world, tmp_path / folder, *more, "--evaluation.policy", "current")
        assert call(train_flux.main, words).code == 0
    whole, parts = (weights(tmp_path / folder, done=2) for folder in ("whole", "parts"))
    assert all(torch.equal(parts[name], x) for name, x in some(whole.items()))
    assert any(x.any() for name, x in some(whole.items()) if ".lora_B." in name)
    with started(world, tmp_path / "plain", *SHORT) as run:
        assert whole.keys() == run.policies.state_dict().keys()
    assert call(export.app, [tmp_path / "whole", "--output", tmp_path / "a.safetensors"]).code == 0
    card = (tmp_path / "README.md").read_text()
    last = siblings.name
    assert f"| sampled by | model {last}/model and lora {last}/lora, in 2 steps |" in card
    assert str(siblings) not in card


@pytest.mark.parametrize(
    ("more", "objective", "message"),
    [
        (("--sampling.lora", "lora"), "grpo", "sampling.lora: expected None for grpo, which tra"),
        (("--sampling.model", "model"), "grpo", "sampling.model: expected None for grpo, which "),
        (("--sampling.guidance", 2), "nft", "sampling.guidance: has an effect only where sampl"),
        (("--sampling.lora", "none"), "nft", "sampling.lora: expected a folder with pytorch_lora"),
        (("--sampling.model", "lora"), "nft", "sampling.model: expected "),
    ],
)
def test_what_cannot_sample_is_refused_before_a_model_is_loaded(
    more, objective, message, world, siblings, tmp_path, monkeypatch
):
    monkeypatch.setattr(Editor, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    given = [siblings / x if x in ("lora", "model", "none") else x for x in more]
    words = options(world, tmp_path / "run", *SHORT, *given, objective=objective)
    ended = call(train_flux.main, words)
    assert (ended.code, ended.err[: len(message) + 7]) == (2, f"error: {message}")


def test_a_pipeline_of_another_class_is_refused(world, klein_world, tmp_path):
    words = options(world, tmp_path, *SHORT, "--sampling.model", klein_world / "model")
    ended = call(train_flux.main, words)
    message = "error: sampling.model: expected a FluxKontextPipeline, as model.path, got a Flux2K"
    assert (ended.code, ended.err[: len(message)]) == (2, message)


def test_a_lora_of_other_layers_is_refused(world, klein_world, siblings, tmp_path):
    words = options(
        *(klein_world, tmp_path, *SHORT, "--sampling.lora", siblings / "lora"), family="klein"
    )
    ended = call(train_flux.main, words)
    assert ended.code == 2
    assert "error: sampling.lora: " in ended.err


def test_distillation_is_refused(world, siblings, tmp_path):
    words = options(world, tmp_path, *words_of("lora", siblings))
    ended = call(lambda: self_distillation.main(), words)
    message = "error: sampling.lora: expected None for distillation, which trains on the steps of"
    assert (ended.code, ended.err[: len(message)]) == (2, message)
