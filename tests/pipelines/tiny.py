"""Tiny pipelines called as their users call them, chains rolled out by them, and replays."""

from __future__ import annotations

import torch
from diffusers import FluxKontextPipeline
from mteditflow_examples.shapes.editor import call_options
from PIL import Image

from mteditflow import trajectory_generators
from mteditflow.pipelines import Recorder, Rollout

CHAIN = [
    ["Remove the square", "Remove the circle", "Change the background to white"],
    ["Change the color of circle to red", "Remove the square", "Remove the circle"],
    ["Remove the triangle", "Change the color of square to blue", "Remove the square"],
]
STEPS = 3


def picture(pipeline, seed=0):
    """A random image that the pipeline accepts: of 8 x 8 blocks for klein, PIL for both."""
    size = pipeline.vae.config.sample_size
    generator = torch.Generator().manual_seed(1000 + seed)
    pixels = torch.randint(0, 256, (12, 12, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy()).resize((size, size), Image.Resampling.NEAREST)


def options(pipeline, guidance=1.0, batch=1, steps=STEPS):
    """Call options; both families spell classifier-free guidance differently."""
    given = call_options(pipeline, steps=steps) | {"output_type": "pil"}
    if isinstance(pipeline, FluxKontextPipeline):
        if guidance > 1:
            given |= {"true_cfg_scale": guidance, "negative_prompt": ["Add a red star"] * batch}
        return given
    return given | {"guidance_scale": guidance}


def call(pipeline, images, prompts, generators, guidance=1.0, steps=STEPS, **more):
    """Call the pipeline as its users do: images in, images out."""
    given = options(pipeline, guidance, len(prompts), steps) | more
    if isinstance(pipeline, FluxKontextPipeline):
        return pipeline(images, prompts, generator=generators, **given).images
    return pipeline(images, prompts[0], generator=generators, **given).images


def roll_out(pipeline, solver=None, *, batch=2, turns=2, guidance=1.0, steps=STEPS, **recording):
    """A rollout of ``batch`` chains, in one batch for Kontext and one by one for klein."""
    together = isinstance(pipeline, FluxKontextPipeline)
    parts = []
    for members in [range(batch)] if together else [[b] for b in range(batch)]:
        generators = [trajectory_generators(10 + b, 1)[0] for b in members]
        images = [picture(pipeline, b) for b in members]
        with Recorder(pipeline, solver, generators=generators, **recording) as recorder:
            for turn in range(turns):
                prompts = [CHAIN[b % len(CHAIN)][turn] for b in members]
                images = call(pipeline, images, prompts, generators, guidance, steps)
        parts.append(recorder.rollout(group=list(members)))
    return parts[0] if together else Rollout.concatenate(parts)


def batches_of_rollout(rollout, together):
    """Rows of every denoising step in the batches in which they were sampled."""
    b, n, s = rollout.trajectory.log_prob.shape
    everyone = [torch.arange(b)] if together else torch.arange(b)[:, None]
    for members in everyone:
        for turn in range(n):
            for step in range(s):
                yield members, torch.full_like(members, turn), torch.full_like(members, step)
