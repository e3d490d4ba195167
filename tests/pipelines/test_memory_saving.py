"""Recording and replay of models that save memory: casting, offload, compiling, checkpointing."""

from copy import deepcopy

import pytest
import torch
from bases import SOLVER, gradients_of, policies_on, replayed
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook
from mteditflow_examples.shapes.editor import build_klein, build_kontext
from tiny import roll_out

from tests.loops import some

FLOAT8 = torch.float8_e4m3fn


def cast_layers(pipeline, dtype=torch.float32):
    pipeline.transformer.enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=dtype)


def offload(pipeline, **where):
    cpu = torch.device("cpu")
    pipeline.transformer.enable_group_offload(cpu, cpu, **where)


def checkpoint(pipeline):
    pipeline.transformer.enable_gradient_checkpointing()
    pipeline.transformer.train()


def round_to_float8(pipeline):
    """The weights that layerwise casting stores, in the dtype that it computes in."""
    stored = deepcopy(pipeline.transformer)
    stored.enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=torch.float32)
    weights = {name: weight.float() for name, weight in stored.state_dict().items()}
    pipeline.transformer.load_state_dict(weights)


@pytest.mark.parametrize("build", [build_kontext, build_klein])
@pytest.mark.parametrize(
    ("save_memory", "plain"),
    [
        (cast_layers, round_to_float8),
        (lambda pipeline: offload(pipeline, offload_type="leaf_level"), None),
        (checkpoint, None),
        pytest.param(
            lambda pipeline: pipeline.transformer.compile_repeated_blocks(backend="eager"),
            None,
            marks=[
                pytest.mark.bases,  # minutes, in all of which dynamo traces
                pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
            ],
        ),
    ],
    ids=["layerwise casting", "offload of leaves", "checkpointing", "compiled blocks"],
)
def test_ratio_and_gradients_are_those_of_the_plain_model(build, save_memory, plain):
    pipeline, other = build(), build()
    save_memory(pipeline)
    if plain is not None:
        plain(other)
    policies = policies_on(pipeline)
    rollout, deviation, gradients = replayed(pipeline, policies)
    assert deviation == 0
    assert {weight.dtype for weight in policies.parameters()} == {torch.float32}
    others = policies_on(other)
    others.load_state_dict(policies.state_dict())  # peft draws in the dtype of the base's weights
    expected = gradients_of(rollout, others)
    for ours, theirs in some(zip(gradients, expected, strict=True)):
        assert torch.equal(ours, theirs)


def test_layerwise_casting_computes_in_half_precision(pipeline):
    """Adapters are neither stored in float8 nor computed in bfloat16."""
    pipeline.to(torch.bfloat16)
    cast_layers(pipeline, torch.bfloat16)
    policies = policies_on(pipeline)
    _, deviation, gradients = replayed(pipeline, policies)
    assert deviation == 0
    assert {weight.dtype for weight in policies.parameters()} == {torch.float32}
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in some(gradients))
    hooked = [m for m in policies.model.modules() if hasattr(m, "_diffusers_hook")]
    hooks = [m._diffusers_hook.get_hook("layerwise_casting") for m in hooked]
    assert any(isinstance(hook, LayerwiseCastingHook) for hook in hooks)
    assert any(weight.dtype == FLOAT8 for weight in policies.model.parameters())


def test_a_rollout_under_offload_to_disk_is_the_plain_one(kontext, tmp_path):
    expected = roll_out(kontext, turns=1).trajectory.latents
    offload(
        kontext,
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path),
    )
    assert torch.equal(roll_out(kontext, turns=1).trajectory.latents, expected)


def test_gradients_under_group_offload_to_disk_are_refused(kontext, tmp_path):
    """diffusers empties weights after the forward pass; the backward pass would read garbage."""
    policies = policies_on(kontext)
    rollout = roll_out(kontext, SOLVER, turns=1)
    offload(
        kontext,
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path),
    )
    with pytest.raises(ValueError, match=r"model: expected weights that stay .* group offload"):
        gradients_of(rollout, policies)
