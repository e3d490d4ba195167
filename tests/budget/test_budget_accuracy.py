"""Predicted against measured memory: fake tensors against the allocator's events on the CPU."""

import json
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mteditflow.budget import PIPELINES, Case, Shape, simulate
from mteditflow.budget.inputs import make_inputs
from mteditflow.budget.simulation import build_model, resident, run_sample, run_update

# The real classes, three sizes: FLUX.1 with both kinds of blocks, FLUX.2 under guidance by two
# branches, SD3.5 with blocks that differ.
SMALL = {
    "flux": Case(
        "FluxTransformer2DModel",
        {
            "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2,
            "joint_attention_dim": 512, "guidance_embeds": True,
        },
        Shape(192, 64, 1, 192),
        PIPELINES["FluxKontextPipeline"].targets,
        rank=8,
        dtype=torch.float32,
    ),
    "flux2": Case(
        "Flux2Transformer2DModel",
        {
            "num_layers": 1, "num_single_layers": 2, "num_attention_heads": 3,
            "joint_attention_dim": 768, "guidance_embeds": False,
        },
        Shape(256, 64, 1, 256),
        PIPELINES["Flux2KleinPipeline"].targets,
        rank=16,
        branches=2,
        dtype=torch.float32,
    ),
    "sd3": Case(
        "SD3Transformer2DModel",
        {
            "num_layers": 3, "num_attention_heads": 8, "attention_head_dim": 64,
            "joint_attention_dim": 512, "caption_projection_dim": 512, "qk_norm": "rms_norm",
            "pos_embed_max_size": 96, "dual_attention_layers": (0,),
        },
        Shape(320, 128),
        PIPELINES["StableDiffusion3Pipeline"].targets,
        dtype=torch.float32,
    ),
}  # fmt: skip
SMALL["flux, bfloat16"] = replace(SMALL["flux"], dtype=torch.bfloat16)  # with casts that are shared


def measured_peak(run, folder):
    """Highest sum of the allocator's events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted((x for x in events if x.get("name") == "[memory]"), key=lambda x: x["ts"])
    return max(accumulate(x["args"]["Bytes"] for x in memory))


@pytest.mark.parametrize("name", SMALL)
def test_predicted_training_memory_is_within_a_tenth_of_the_measured(name, tmp_path):
    case = SMALL[name]
    costs = simulate(case)
    model = build_model(case, {}, device="cpu")
    resident(model)  # gradients exist, as after the first micro-batch
    inputs = make_inputs(case.kind, model.config, 1, case.shape, case.dtype)
    plain = measured_peak(lambda: run_update(model, inputs, case.branches), tmp_path)
    sample = measured_peak(lambda: run_sample(model, inputs), tmp_path)
    model.enable_gradient_checkpointing()
    checkpointed = measured_peak(lambda: run_update(model, inputs, case.branches), tmp_path)
    assert costs.update == pytest.approx(checkpointed, rel=0.1)
    assert costs.update_plain == pytest.approx(plain, rel=0.1)
    assert costs.sample == pytest.approx(sample, rel=0.25)  # kernels' own copies weigh more here
    assert costs.update < costs.update_plain
