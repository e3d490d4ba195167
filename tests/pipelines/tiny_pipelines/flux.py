"""FLUX.1 and its relatives: editing, filling, control, ControlNets and VisualCloze."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from mteditflow_examples.shapes.editor import build_kontext

from .base import (
    CFG,
    NEGATIVE,
    PROMPTS,
    Family,
    Options,
    dynamic,
    embeddings,
    half_mask,
    image_vae,
    make,
    picture,
    plus,
    prompts,
)

SIZE = {"height": 8, "width": 8}
TEXT = {"max_sequence_length": 10}
ROPE = (4, 6, 6)
TEXTS = embeddings(prompt_embeds=24, pooled_prompt_embeds=8)
NEGATIVES = embeddings(
    prompt_embeds=24,
    pooled_prompt_embeds=8,
    negative_prompt_embeds=24,
    negative_pooled_prompt_embeds=8,
)
TWICE = f"embedded and {CFG}"
GUIDED = {"embedded": {}, TWICE: {"true_cfg_scale": 2.5}}
HALF = {"strength": 0.5}


def transformer(
    channels: int = 16, *, text: int = 24, pooled: int = 8, embedded: bool = True
) -> torch.nn.Module:
    """FLUX's transformer; more input channels than 16 hold conditions behind the sample."""
    return diffusers.FluxTransformer2DModel(
        in_channels=channels,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text,
        pooled_projection_dim=pooled,
        guidance_embeds=embedded,
        axes_dims_rope=ROPE,
    )


def controlnet() -> torch.nn.Module:
    """A ControlNet of that transformer."""
    return diffusers.FluxControlNetModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=ROPE,
    )


def flux(kind: str, channels: int = 16, **more: Any) -> DiffusionPipeline:
    """A pipeline of the family that is given embeddings."""
    return make(
        kind,
        **{"scheduler": dynamic(), "vae": image_vae()} | more,
        transformer=transformer(channels),
    )


def with_text(kind: str, channels: int = 16, **more: Any) -> DiffusionPipeline:
    """A pipeline of the family with CLIP and T5."""
    whole = build_kontext(image_size=8)
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    text = {name: getattr(whole, name) for name in names}
    wide = transformer(channels, text=64, pooled=32)
    return make(kind, scheduler=dynamic(), vae=image_vae(), transformer=wide, **text, **more)


def picture_options(*names: str, size: int = 8) -> Options:
    """Pictures by their arguments' names; a mask where one is asked for."""
    given = {name: picture(size, seed=seed) for seed, name in enumerate(names)}
    return {n: half_mask(size) if "mask" in n else image for n, image in given.items()}


def examples(turn: int, batch: int) -> Options:
    """One example of two images and a query whose second is to be painted, for each trajectory."""
    images = [[picture(16, seed=1), picture(16, seed=2)], [picture(16, seed=3), None]]
    task, content = PROMPTS[turn][:batch], PROMPTS[1 - turn][:batch]
    return {"task_prompt": task, "content_prompt": content, "image": [images] * batch}


def visual_cloze(kind: str, **options: Any) -> Family:
    """VisualCloze, which fills the last cell of a grid of images."""
    return Family(
        lambda: with_text(kind, 36, resolution=16),
        examples,
        TEXT | options,
        {"embedded": {}},
        text="CLIP, T5",
    )


def plain(kind: str, *pictures: str, channels: int = 16, **options: Any) -> Family:
    """A pipeline with embedded guidance alone."""
    given = plus(TEXTS, **picture_options(*pictures))
    steps = 4 if options.get("strength", 1) < 1 else 2
    return Family(
        lambda: flux(kind, channels), given, SIZE | options, {"embedded": {}}, steps=steps
    )


def controlled(kind: str, *pictures: str, **options: Any) -> Family:
    """A pipeline with a ControlNet."""
    given = plus(TEXTS, **picture_options("control_image", *pictures))
    return Family(
        lambda: flux(kind, controlnet=controlnet()),
        given,
        SIZE | options,
        {"embedded": {}},
        steps=4 if options else 2,
    )


FAMILIES = {
    "FluxPipeline": Family(
        lambda: with_text("FluxPipeline"),
        prompts,
        SIZE | TEXT,
        {"embedded": {}, TWICE: {"negative_prompt": NEGATIVE, "true_cfg_scale": 2.5}},
        text="CLIP, T5",
    ),
    "FluxImg2ImgPipeline": Family(
        lambda: flux("FluxImg2ImgPipeline"),
        plus(NEGATIVES, **picture_options("image")),
        SIZE | HALF,
        GUIDED,
        steps=4,
    ),
    "FluxInpaintPipeline": Family(
        lambda: flux("FluxInpaintPipeline"),
        plus(NEGATIVES, **picture_options("image", "mask_image")),
        SIZE | HALF,
        GUIDED,
        steps=4,
    ),
    "FluxFillPipeline": plain("FluxFillPipeline", "image", "mask_image", channels=36),
    "FluxControlPipeline": plain("FluxControlPipeline", "control_image", channels=32),
    "FluxControlImg2ImgPipeline": plain(
        "FluxControlImg2ImgPipeline", "image", "control_image", channels=32, **HALF
    ),
    "FluxControlInpaintPipeline": plain(
        "FluxControlInpaintPipeline", "image", "mask_image", "control_image", channels=32, **HALF
    ),
    "FluxControlNetPipeline": controlled("FluxControlNetPipeline"),
    "FluxControlNetImg2ImgPipeline": controlled("FluxControlNetImg2ImgPipeline", "image", **HALF),
    "FluxControlNetInpaintPipeline": controlled(
        "FluxControlNetInpaintPipeline", "image", "mask_image", **HALF
    ),
    "FluxKontextPipeline": Family(
        lambda: with_text("FluxKontextPipeline"),
        plus(prompts, **picture_options("image")),
        SIZE | TEXT | {"max_area": 64, "_auto_resize": False},
        {"embedded": {}, TWICE: {"negative_prompt": NEGATIVE, "true_cfg_scale": 2.5}},
        text="CLIP, T5",
    ),
    "FluxKontextInpaintPipeline": Family(
        lambda: flux("FluxKontextInpaintPipeline"),
        plus(NEGATIVES, **picture_options("image", "image_reference", "mask_image")),
        SIZE | HALF | {"max_area": 64, "_auto_resize": False},
        GUIDED,
        steps=4,
    ),
    "VisualClozeGenerationPipeline": visual_cloze("VisualClozeGenerationPipeline"),
    "VisualClozePipeline": visual_cloze(
        "VisualClozePipeline", upsampling_height=16, upsampling_width=16
    ),
}
