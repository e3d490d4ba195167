"""Z-Image: text, image to image, inpainting and ControlNets."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from mteditflow_examples.shapes.editor import build_klein
from transformers import Siglip2ImageProcessorPil, Siglip2VisionConfig, Siglip2VisionModel

from .base import (
    CFG,
    NEGATIVE,
    Family,
    Inputs,
    Options,
    half_mask,
    image_vae,
    listed,
    make,
    normal,
    picture,
    plus,
    prompts,
    scheduler,
)

SIZE = {"height": 8, "width": 8}
REFERENCES = [picture(64, seed=1), picture(64, 128, seed=2)]
HALF = {"strength": 0.5}
GUIDED = {
    "none": {"guidance_scale": 0.0},
    CFG: {"guidance_scale": 5.0},
    f"{CFG}, norm limited": {"guidance_scale": 5.0, "cfg_normalization": True},
    f"{CFG}, truncated": {"guidance_scale": 5.0, "cfg_truncation": 0.2},
}
WORDS = {
    kind: options | ({"negative_prompt": NEGATIVE} if options["guidance_scale"] else {})
    for kind, options in GUIDED.items()
}
MODEL = {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}


def transformer(**more: Any) -> torch.nn.Module:
    """Z-Image's transformer."""
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        n_layers=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 128, 128],
        **MODEL,
        **more,
    )


def controlnet(channels: int) -> torch.nn.Module:
    """A ControlNet of its first block and its refiner."""
    model = diffusers.ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=channels,
        **MODEL,
    )
    model.gradient_checkpointing = False  # it is read under gradients, and never set
    return model


def z_image(kind: str = "ZImagePipeline", *, text: bool = False, **more: Any) -> DiffusionPipeline:
    """A pipeline of the family, with klein's Qwen3 or given embeddings."""
    if text:
        whole = build_klein(image_size=8)
        more |= {"text_encoder": whole.text_encoder, "tokenizer": whole.tokenizer}
    parts = {"scheduler": scheduler(6.0), "transformer": transformer(), "vae": image_vae()}
    return make(kind, **parts | more)


def texts(turn: int, batch: int) -> Options:
    """Prompts of other lengths as lists of embeddings."""
    lengths = (3, 6, 4)[:batch]
    return {
        name: [normal(n, 32, seed=10 * turn + n + k) for n in lengths]
        for k, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))
    }


def half(kind: str, inputs: Inputs) -> Family:
    """A pipeline that begins from an image."""
    return Family(lambda: z_image(kind), inputs, SIZE | HALF, GUIDED, steps=4)


def controlled(kind: str, channels: int, **images: Any) -> Family:
    """A pipeline with a ControlNet, whose latents of conditions have ``channels``."""
    inputs = listed(plus(texts, control_image=picture(8)), **images)
    return Family(
        lambda: z_image(kind, controlnet=controlnet(channels)), inputs, SIZE, GUIDED, steps=3
    )


def omni() -> DiffusionPipeline:
    """Z-Image-Omni, which also reads its references with a SigLIP."""
    config = Siglip2VisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        patch_size=8,
        num_patches=16,
    )
    return z_image(
        "ZImageOmniPipeline",
        text=True,
        transformer=transformer(siglip_feat_dim=16),
        vae=image_vae().to(torch.bfloat16),  # references are given to it in that
        siglip=Siglip2VisionModel(config),
        siglip_processor=Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16),
    )


FAMILIES = {
    "ZImagePipeline": Family(
        lambda: z_image(text=True), prompts, SIZE, WORDS, text="Qwen3", steps=3
    ),
    "ZImageImg2ImgPipeline": half("ZImageImg2ImgPipeline", plus(texts, image=picture(8))),
    "ZImageInpaintPipeline": half(
        "ZImageInpaintPipeline", plus(texts, image=picture(8), mask_image=half_mask(8))
    ),
    "ZImageControlNetPipeline": controlled("ZImageControlNetPipeline", 4),
    "ZImageControlNetInpaintPipeline": controlled(
        "ZImageControlNetInpaintPipeline", 9, image=picture(8, seed=1), mask_image=half_mask(8)
    ),
    "ZImageOmniPipeline": Family(
        omni,
        prompts,
        SIZE,
        {
            "none": {"guidance_scale": 0.0},
            "none, with two references": {"guidance_scale": 0.0, "image": REFERENCES},
            f"{CFG}, with two references": {"guidance_scale": 5.0, "image": REFERENCES},
        },
        text="Qwen3",
        batches=(1, 2),
    ),
}
