"""Few-step samplers: a LoRA that only sampling has, and another transformer of the same kind."""

import pytest
import torch
from mteditflow_examples.shapes.editor import TEXT_TOKENS, build_klein, build_kontext
from PIL import Image
from test_adapters import build, change, config, velocity, velocity_of_file

from mteditflow.pipelines import (
    Editor,
    LoraPolicies,
    Rollout,
    RolloutVelocity,
    Start,
    load_sibling,
    read_lora,
)
from tests.loops import some

__all__ = ["build", "velocity"]  # fixtures
CALL = {"height": 12, "width": 12, "num_inference_steps": 3, "max_sequence_length": TEXT_TOKENS}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a base, a sibling of other weights, and what is no sibling."""
    folder = tmp_path_factory.mktemp("siblings")
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
    base = build_kontext(seed=0, **sizes)
    base.save_pretrained(folder / "base")
    base.transformer.load_state_dict(build_kontext(seed=1, **sizes).transformer.state_dict())
    base.save_pretrained(folder / "sibling")
    build_kontext(**(sizes | {"num_single_layers": 2})).save_pretrained(folder / "deeper")
    build_klein(**sizes).save_pretrained(folder / "klein")
    return folder


def rolled_out(editor, **more):
    parts = editor.roll_out(
        [Image.new("RGB", (12, 12), color) for color in ("red", "blue")],
        [["Remove the square", "Remove the circle"]] * 2,
        generators=[torch.Generator().manual_seed(b) for b in range(2)],
        group=torch.arange(2),
        batch=2,
        **more,
    )
    return Rollout.concatenate([part.rollout for part in parts])


def replayed(velocity, rollout, policy="current"):
    """Velocities at the first step of all turns, and what the pipeline had stepped by there."""
    at = rollout.turn_mask.nonzero()
    x_t = rollout.trajectory.latents[at[:, 0], at[:, 1], 0]
    return velocity(policy, x_t, torch.ones(len(at)), at)


def test_a_lora_for_few_steps_is_on_in_its_context_alone(build, velocity, tmp_path):
    pipeline = build()
    few = LoraPolicies(pipeline.transformer, config(target_modules=["to_q", "to_v"]))
    change(few, seed=3)
    few.save(pipeline, tmp_path / "few")
    read = read_lora(type(pipeline), tmp_path / "few")
    pipeline = build()
    model = pipeline.transformer
    base = velocity(model).detach()
    policies = LoraPolicies(model, config(r=2), few_steps=read)
    assert torch.equal(velocity(model), base)  # not active, and policies are no-ops
    with policies.use("reference", few_steps=True):
        fused = velocity_of_file(build, velocity, tmp_path / "few")
        torch.testing.assert_close(velocity(model).detach(), fused, rtol=0, atol=1e-5)
        with policies.use("reference"):
            assert torch.equal(velocity(model), base)
        torch.testing.assert_close(velocity(model).detach(), fused, rtol=0, atol=1e-5)
        with pytest.raises(RuntimeError, match=r"inside use\('reference', few_steps=True\)"):
            policies.check_current()

    # With a policy that has moved, it is the sum of both; and nothing of it is trained or saved.
    change(policies)
    policies.save(pipeline, tmp_path / "own")
    own = read_lora(type(pipeline), tmp_path / "own")
    assert {x.shape for x in some(own.values())}.isdisjoint({x.shape for x in read.values()})
    trained = [x for x in model.parameters() if x.requires_grad]
    assert sorted(map(id, policies.parameters())) == sorted(map(id, trained))
    with policies.use("current", few_steps=True):
        both = velocity(model).detach()
        with pytest.raises(RuntimeError, match=r"inside use\('current', few_steps=True\)"):
            policies.check_current()
    policies.check_current()
    fresh = build()
    on_it = LoraPolicies(fresh.transformer, config(r=2), start=Start(read, frozen=True))
    on_it.load_state_dict(policies.state_dict())
    torch.testing.assert_close(velocity(fresh.transformer).detach(), both, rtol=0, atol=1e-5)
    on_it.save(fresh, tmp_path / "both")
    torch.testing.assert_close(
        velocity_of_file(build, velocity, tmp_path / "both"), both, rtol=0, atol=1e-5
    )


def test_a_lora_that_is_not_there_or_does_not_fit_is_refused(build):
    policies = LoraPolicies(build().transformer, config())
    with (
        pytest.raises(ValueError, match="few_steps: there is no such LoRA"),
        policies.use("old", few_steps=True),
    ):
        pass
    foreign = {"nowhere.lora_A.weight": torch.ones(1, 2), "nowhere.lora_B.weight": torch.ones(2, 1)}
    with pytest.raises(ValueError, match="few_steps: "):
        LoraPolicies(build().transformer, config(), few_steps=foreign)


def test_a_record_of_the_sibling_trains_the_base(models):
    editor = Editor.load(models / "base", call=CALL)
    sibling = load_sibling(editor, models / "sibling", call={"num_inference_steps": 2})
    alone = Editor.load(models / "sibling", call=CALL | {"num_inference_steps": 2})
    assert sibling.pipeline.vae is editor.pipeline.vae
    assert not any(x.requires_grad for x in some(list(sibling.transformer.parameters())))
    options = editor.lora(rank=2, alpha=4)
    policies = LoraPolicies(editor.transformer, options, seed=0)
    copies = LoraPolicies(sibling.transformer, options, seed=1)
    of_alone = LoraPolicies(alone.transformer, options, seed=2)
    change(policies)
    for target in (copies, of_alone):
        target.load_state_dict(policies.state_dict())
    pairs = zip(copies.parameters(), policies.parameters(), strict=True)
    assert all(torch.equal(x, y) for x, y in some(list(pairs)))

    # The latents are those of the sibling loaded alone: its weights, its steps.
    rollout = rolled_out(sibling)
    assert rollout.trajectory.latents.shape[2] == 2 + 1
    assert torch.equal(rollout.trajectory.latents, rolled_out(alone).trajectory.latents)
    stepped = replayed(RolloutVelocity(copies, rollout), rollout).detach()
    first = rollout.trajectory.latents[:, :, :2].flatten(0, 1)
    torch.testing.assert_close(
        first[:, 1], first[:, 0] - 0.5 * stepped, rtol=0, atol=1e-5
    )  # Euler from sigma 1 to 1/2

    # Velocities and gradients are the base's, under the conditioning of the same edits.
    own = rolled_out(editor, call={"num_inference_steps": 2})
    velocities = RolloutVelocity(policies, rollout), RolloutVelocity(policies, own)
    x_t, sigma = torch.randn(4, *rollout.trajectory.latents.shape[3:]), torch.full((4,), 0.5)
    at = rollout.turn_mask.nonzero()
    firsts = at[at[:, 1] == 0]  # turn 1 edits the same images
    by_sibling, by_own = (v("current", x_t[:2], sigma[:2], firsts) for v in velocities)
    assert torch.equal(by_sibling, by_own)
    by_sibling.square().sum().backward()
    assert all(x.grad is not None for x in some(policies.parameters()))
    assert all(x.grad is None for x in some(list(sibling.transformer.parameters())))
    assert (replayed(velocities[0], rollout).detach() - stepped).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("klein", {}, "source: expected a FluxKontextPipeline, got a Flux2KleinPipeline in "),
        ("deeper", {}, r"configured as the editor's \(num_single_layers 1\), got num_single_la"),
        ("sibling", {"call": {"max_sequence_length": 4}}, "call: expected no options of text enc"),
        ("sibling", {"call": {"steps": 4}}, "call: expected options among "),
    ],
)
def test_what_is_no_sibling_is_refused(source, more, message, models):
    editor = Editor.load(models / "base", call=CALL)
    with pytest.raises(ValueError, match=message):
        load_sibling(editor, models / source, **more)
