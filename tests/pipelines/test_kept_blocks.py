"""Checkpointing of all blocks but the last ones: the same gradients, fewer forward passes."""

from collections import Counter

import pytest
import torch
from mteditflow_examples.shapes.editor import build_kontext, call_options
from tiny import CHAIN, picture

from mteditflow import trajectory_generators
from mteditflow.pipelines import Editor, LoraPolicies, RolloutVelocity
from mteditflow.pipelines.checkpointing import enable_checkpointing
from tests.loops import some


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "kontext"
    build_kontext().save_pretrained(folder)
    return folder


def load(saved, **options):
    call = call_options(build_kontext(), steps=1)
    del call["output_type"]
    return Editor.load(saved, call=call, **options)


def blocks_of(model):
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def gradients(saved, **options):
    """Gradients of the adapters at one velocity, and forward passes of each block."""
    editor = load(saved, **options)
    policies = LoraPolicies(editor.transformer, editor.lora(rank=2, alpha=4))
    image = picture(build_kontext(), 0)
    (part,) = editor.roll_out(
        [image],
        [CHAIN[0][:1]],
        generators=trajectory_generators(0, 1),
        group=torch.tensor([0]),
        batch=1,
    )
    passes = Counter()
    for number, block in enumerate(blocks_of(editor.transformer)):
        block.register_forward_pre_hook(lambda *_, n=number: passes.update([n]))
    at = torch.tensor([[0, 0]])
    x_t = part.rollout.clean_at(at).float()
    velocity = RolloutVelocity(policies, part.rollout)("current", x_t, torch.tensor([0.5]), at)
    velocity.square().sum().backward()
    return [x.grad for x in policies.parameters()], [passes[n] for n in sorted(passes)]


def test_gradients_are_the_same_and_kept_blocks_run_once(saved):
    expected, once = gradients(saved)
    total = len(once)
    assert set(once) == {1}
    for kept in some(range(total + 1)):
        found, passes = gradients(saved, gradient_checkpointing=True, kept_blocks=kept)
        assert passes == [2] * (total - kept) + [1] * kept
        for one, other in some(list(zip(found, expected, strict=True))):
            assert torch.equal(one, other)


def test_more_blocks_than_there_are_and_blocks_without_checkpointing_are_refused(saved):
    model = build_kontext().transformer
    total = len(blocks_of(model))
    with pytest.raises(ValueError, match=f"expected at most the {total} blocks of a FluxTransf"):
        enable_checkpointing(model, total + 1)
    with pytest.raises(ValueError, match="kept_blocks: expected 0 without gradient_checkpointing"):
        load(saved, kept_blocks=1)
