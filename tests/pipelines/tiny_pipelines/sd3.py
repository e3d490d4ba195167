"""Stable Diffusion 3.5: text, image to image, inpainting, ControlNets, perturbed attention."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from mteditflow_examples.shapes.editor import build_kontext
from transformers import CLIPTextModelWithProjection

from .base import (
    CFG,
    NEGATIVE,
    Family,
    embeddings,
    half_mask,
    image_vae,
    listed,
    make,
    picture,
    plus,
    prompts,
    scheduler,
)

SIZE = {"height": 8, "width": 8}
HALF = {"strength": 0.5}
TEXT = {"max_sequence_length": 10}
EMBEDDINGS = embeddings(
    prompt_embeds=24,
    pooled_prompt_embeds=8,
    negative_prompt_embeds=24,
    negative_pooled_prompt_embeds=8,
)
GUIDED = {"none": {"guidance_scale": 1.0}, CFG: {"guidance_scale": 4.5}}
PERTURBED = {
    "perturbed attention": {"guidance_scale": 1.0, "pag_scale": 3.0},
    f"{CFG} and perturbed attention": {"guidance_scale": 4.5, "pag_scale": 3.0},
}
SHARED = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
}


def transformer(text: int = 24, pooled: int = 8, **more: Any) -> torch.nn.Module:
    """The transformer of SD 3.5, whose first block has a second attention."""
    given = SHARED | {"joint_attention_dim": text, "pooled_projection_dim": pooled} | more
    return diffusers.SD3Transformer2DModel(**{"dual_attention_layers": (0,)} | given)


def controlnet(extra: int = 0) -> torch.nn.Module:
    """A ControlNet of one block for each of the transformer's two."""
    return diffusers.SD3ControlNetModel(
        **SHARED,
        joint_attention_dim=24,
        pooled_projection_dim=8,
        extra_conditioning_channels=extra,
    )


def sd3(kind: str, **more: Any) -> DiffusionPipeline:
    """A pipeline of the family that is given embeddings."""
    parts = {"scheduler": scheduler(3.0), "transformer": transformer(), "vae": image_vae()}
    return make(kind, **parts | more)


def perturbed(kind: str) -> DiffusionPipeline:
    """A pipeline that perturbs the attention of SD 3.0's first block."""
    return sd3(
        kind,
        transformer=transformer(dual_attention_layers=(), qk_norm=None),
        pag_applied_layers=["blocks.0"],
    )


def with_text() -> DiffusionPipeline:
    """Stable Diffusion 3.5 with Kontext's T5 and two CLIPs of Kontext's size."""
    text = build_kontext(image_size=8)
    clip, t5 = text.text_encoder.config, text.text_encoder_2.config
    return sd3(
        "StableDiffusion3Pipeline",
        transformer=transformer(t5.d_model, 2 * clip.projection_dim),
        text_encoder=CLIPTextModelWithProjection(clip),
        tokenizer=text.tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip),
        tokenizer_2=text.tokenizer,
        text_encoder_3=text.text_encoder_2,
        tokenizer_3=text.tokenizer_2,
    )


FAMILIES = {
    "StableDiffusion3Pipeline": Family(
        with_text,
        prompts,
        SIZE | TEXT,
        {
            "none": {"guidance_scale": 1.0},
            CFG: {"guidance_scale": 4.5, "negative_prompt": NEGATIVE},
            f"{CFG}, skipped layers": {
                "guidance_scale": 4.5,
                "negative_prompt": NEGATIVE,
                "skip_guidance_layers": [0],
                "skip_layer_guidance_start": 0.3,
                "skip_layer_guidance_stop": 0.9,
            },
        },
        text="two CLIP, T5",
        steps=3,
    ),
    "StableDiffusion3Img2ImgPipeline": Family(
        lambda: sd3("StableDiffusion3Img2ImgPipeline"),
        listed(EMBEDDINGS, image=picture(8)),
        SIZE | HALF,
        GUIDED,
        steps=4,
    ),
    "StableDiffusion3InpaintPipeline": Family(
        lambda: sd3(
            "StableDiffusion3InpaintPipeline",
            transformer=transformer(in_channels=16, out_channels=16),
            vae=image_vae(16),
        ),
        listed(EMBEDDINGS, image=picture(8), mask_image=half_mask(8)),
        SIZE | HALF,
        GUIDED,
        steps=4,
    ),
    "StableDiffusion3ControlNetPipeline": Family(
        lambda: sd3("StableDiffusion3ControlNetPipeline", controlnet=controlnet()),
        plus(EMBEDDINGS, control_image=picture(8)),
        SIZE,
        GUIDED,
    ),
    "StableDiffusion3ControlNetInpaintingPipeline": Family(
        lambda: sd3("StableDiffusion3ControlNetInpaintingPipeline", controlnet=controlnet(1)),
        plus(EMBEDDINGS, control_image=picture(8), control_mask=half_mask(8)),
        SIZE,
        GUIDED,
    ),
    "StableDiffusion3PAGPipeline": Family(
        lambda: perturbed("StableDiffusion3PAGPipeline"), EMBEDDINGS, SIZE, PERTURBED
    ),
    "StableDiffusion3PAGImg2ImgPipeline": Family(
        lambda: perturbed("StableDiffusion3PAGImg2ImgPipeline"),
        listed(EMBEDDINGS, image=picture(8)),
        SIZE | HALF,
        PERTURBED,
        steps=4,
    ),
}
