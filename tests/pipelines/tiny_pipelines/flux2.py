"""FLUX.2: dev with an embedded scale, klein with its Qwen3, klein's cache and inpainting."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from mteditflow_examples.shapes.editor import build_klein

from .base import (
    CFG,
    Family,
    dynamic,
    embeddings,
    half_mask,
    make,
    picture,
    plus,
    prompts,
)

SIZE = {"height": 64, "width": 64}
TEXT = {"max_sequence_length": 10, "text_encoder_out_layers": (1, 2)}
REFERENCES = [picture(64, seed=1), picture(64, 128, seed=2)]
EMBEDDINGS = embeddings(prompt_embeds=64, negative_prompt_embeds=64)
KLEIN = {"none": {"guidance_scale": 1.0}, CFG: {"guidance_scale": 4.0}}


def transformer(*, embedded: bool) -> torch.nn.Module:
    """FLUX.2's transformer for packed latents of 16 channels."""
    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        timestep_guidance_channels=64,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=embedded,
    )


def flux2(
    kind: str, *, embedded: bool = False, text: bool = False, **more: Any
) -> DiffusionPipeline:
    """A pipeline of the family, with klein's VAE, and with its Qwen3 or given embeddings."""
    whole = build_klein(image_size=8)
    if text:
        more |= {"text_encoder": whole.text_encoder, "tokenizer": whole.tokenizer}
    return make(
        kind,
        scheduler=dynamic(),
        vae=whole.vae,
        transformer=transformer(embedded=embedded),
        **more,
    )


FAMILIES = {
    "Flux2Pipeline": Family(
        lambda: flux2("Flux2Pipeline", embedded=True),
        embeddings(prompt_embeds=64),
        SIZE,
        {"embedded": {}, "embedded, with two references": {"image": REFERENCES}},
    ),
    "Flux2KleinPipeline": Family(
        lambda: flux2("Flux2KleinPipeline", text=True),
        plus(prompts, image=picture()),
        SIZE | TEXT,
        KLEIN | {f"{CFG}, with two references": {"guidance_scale": 4.0, "image": REFERENCES}},
        text="Qwen3",
    ),
    "Flux2KleinKVPipeline": Family(
        lambda: flux2("Flux2KleinKVPipeline", is_distilled=True),
        plus(embeddings(prompt_embeds=64), image=picture()),
        SIZE,
    ),
    "Flux2KleinInpaintPipeline": Family(
        lambda: flux2("Flux2KleinInpaintPipeline"),
        plus(EMBEDDINGS, image=picture(), image_reference=picture(seed=1), mask_image=half_mask()),
        SIZE | {"strength": 0.5},
        KLEIN,
        steps=4,
    ),
}
