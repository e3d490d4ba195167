"""Pipelines whose transformers descend from FLUX.1's: Chroma, Bria, LongCat-Image, Ovis-Image."""

from __future__ import annotations

import diffusers
import torch
from diffusers import DiffusionPipeline

from .base import (
    CFG,
    NEGATIVE,
    PROMPTS,
    Family,
    Inputs,
    Options,
    Processor,
    dynamic,
    embeddings,
    encoded,
    half_mask,
    image_vae,
    make,
    picture,
    plus,
    scheduler,
    with_negative,
)

SIZE = {"height": 8, "width": 8}
HALF = {"strength": 0.5}
GUIDED = {"none": {"guidance_scale": 1.0}, CFG: {"guidance_scale": 5.0}}
TEXTS = embeddings(prompt_embeds=24, negative_prompt_embeds=24)
MODEL = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}


def masked(turn: int, batch: int) -> Options:
    """Embeddings with masks, of which the last is shorter."""
    mask = torch.ones(batch, 5)
    mask[-1, 3:] = 0
    given = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask.flip(0)}
    return TEXTS(turn, batch) | given


def one_edit(turn: int, batch: int) -> Options:
    """One prompt about one image, which is all that LongCat-Image-Edit takes, several times."""
    one = {"prompt": PROMPTS[turn][0], "negative_prompt": NEGATIVE[0], "image": picture()}
    return one | {"num_images_per_prompt": batch}


def chroma(kind: str) -> DiffusionPipeline:
    """Chroma, whose modulations come from one approximator."""
    transformer = diffusers.ChromaTransformer2DModel(
        **MODEL, approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1
    )
    transformer.register_to_config(guidance_embeds=False)  # inpainting reads it, and fails without
    return make(kind, scheduler=scheduler(1.0), vae=image_vae(), transformer=transformer)


def started(kind: str, inputs: Inputs) -> Family:
    """A Chroma that begins from an image."""
    return Family(lambda: chroma(kind), inputs, SIZE | HALF, GUIDED, steps=4)


def bria() -> DiffusionPipeline:
    """Bria 3.2."""
    transformer = diffusers.BriaTransformer2DModel(**MODEL)
    return make("BriaPipeline", scheduler=dynamic(), vae=image_vae(), transformer=transformer)


def longcat(kind: str, factor: int = 1) -> DiffusionPipeline:
    """LongCat-Image, whose prompts are embeddings in the place of its Qwen2.5-VL's.

    Editing scales references to a million pixels, which a deep VAE makes few.
    """
    transformer = diffusers.LongCatImageTransformer2DModel(
        **MODEL | {"in_channels": 64}, pooled_projection_dim=8
    )
    pipeline = make(
        kind,
        scheduler=dynamic(),
        vae=image_vae(16, factor),
        transformer=transformer,
        text_processor=Processor(image_processor=None),
    )
    pipeline._encode_prompt = lambda prompt, *images: encoded(prompt, 5, 24)
    return pipeline


def ovis() -> DiffusionPipeline:
    """Ovis-Image."""
    transformer = diffusers.OvisImageTransformer2DModel(**MODEL, out_channels=16)
    return make("OvisImagePipeline", scheduler=dynamic(), vae=image_vae(), transformer=transformer)


FAMILIES = {
    "ChromaPipeline": Family(lambda: chroma("ChromaPipeline"), masked, SIZE, GUIDED),
    "ChromaImg2ImgPipeline": started("ChromaImg2ImgPipeline", plus(masked, image=picture(8))),
    "ChromaInpaintPipeline": started(
        "ChromaInpaintPipeline", plus(masked, image=picture(8), mask_image=half_mask(8))
    ),
    "BriaPipeline": Family(bria, TEXTS, SIZE, GUIDED),
    "LongCatImagePipeline": Family(
        lambda: longcat("LongCatImagePipeline"),
        with_negative,
        SIZE | {"enable_prompt_rewrite": False},
        {
            "none": {"guidance_scale": 1.0},
            CFG: {"guidance_scale": 4.5, "enable_cfg_renorm": False},
            f"{CFG}, norm rescaled": {"guidance_scale": 4.5},
        },
    ),
    "LongCatImageEditPipeline": Family(
        lambda: longcat("LongCatImageEditPipeline", 64), one_edit, {}, GUIDED
    ),
    "OvisImagePipeline": Family(ovis, plus(TEXTS, negative_prompt=None), SIZE, GUIDED),
}
