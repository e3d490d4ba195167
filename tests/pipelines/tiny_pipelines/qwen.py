"""Qwen-Image: text, image to image, inpainting, editing, ControlNets, layers, and 2.1."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from mteditflow_examples.shapes.editor import build_klein
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from .base import (
    CFG,
    Family,
    Inputs,
    Options,
    dynamic,
    embeddings,
    half_mask,
    make,
    picture,
    plus,
    prompts,
    with_negative,
)

SIZE = {"height": 16, "width": 16}
LARGE = {"height": 256, "width": 256}
HALF = {"strength": 0.5}
RESCALED = {"none": {"true_cfg_scale": 1.0}, f"{CFG}, norm rescaled": {"true_cfg_scale": 4.0}}
RGBA = picture().convert("RGBA")
REFERENCES = [picture(64, seed=1), picture(64, 128, seed=2)]


def shipped() -> Any:
    """The scheduler that Qwen-Image ships: it ends at 0.02 before 0."""
    return dynamic(shift=1.0, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)


def transformer(width: int = 8, channels: int = 4, **more: Any) -> torch.nn.Module:
    """Qwen-Image's transformer for packed latents."""
    return diffusers.QwenImageTransformer2DModel(
        in_channels=4 * channels,
        out_channels=channels,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=width,
        axes_dims_rope=(4, 6, 6),
        **more,
    )


def vae(downsamplings: int, channels: int = 4, **more: Any) -> torch.nn.Module:
    """Qwen-Image's VAE; a deep one makes few latents of references of a million pixels."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=2,
        z_dim=channels,
        dim_mult=[1] * (downsamplings + 1),
        num_res_blocks=0,
        temperal_downsample=[False] * downsamplings,
        latents_mean=[0.1] * channels,
        latents_std=[1.5] * channels,
        **more,
    )


def qwen(kind: str, downsamplings: int = 1, **more: Any) -> DiffusionPipeline:
    """A pipeline of the family that is given embeddings."""
    parts = {"scheduler": shipped(), "transformer": transformer(), "vae": vae(downsamplings)}
    return make(kind, **parts | more)


def text_parts() -> Options:
    """A Qwen2.5-VL and klein's tokenizer."""
    tokenizer = build_klein(image_size=8).tokenizer
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        },
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"out_hidden_size": 16})
    return {"text_encoder": Qwen2_5_VLForConditionalGeneration(config), "tokenizer": tokenizer}


def controlnet(extra: int = 0) -> torch.nn.Module:
    """A ControlNet of one block."""
    return diffusers.QwenImageControlNetModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        axes_dims_rope=(4, 6, 6),
        extra_condition_channels=extra,
    )


def layered() -> DiffusionPipeline:
    """Qwen-Image-Layered, whose transformer also embeds whether a picture is opaque."""
    return qwen(
        "QwenImageLayeredPipeline",
        transformer=transformer(channels=8, use_additional_t_cond=True, use_layer3d_rope=True),
        vae=vae(6, channels=8, input_channels=4),  # pictures of as many channels are latents
        **text_parts(),
    )


def texts(turn: int, batch: int) -> Options:
    """Prompts as embeddings, of which the last is shorter."""
    mask = torch.ones(batch, 5, dtype=torch.int64)
    mask[-1, 3:] = 0
    given = embeddings(prompt_embeds=8, negative_prompt_embeds=8)(turn, batch)
    return given | {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask.flip(0)}


def one(inputs: Inputs) -> Inputs:
    """The inputs of the first trajectory, as many times as there are trajectories."""

    def given(turn: int, batch: int) -> Options:
        first = {name: x[:1] for name, x in inputs(turn, batch).items()}
        return first | {"num_images_per_prompt": batch}

    return given


def edited(
    kind: str, inputs: Inputs, options: Options, downsamplings: int = 1, output: str = "pt"
) -> Family:
    """A pipeline that is given embeddings; a strength leaves half of four steps."""
    steps = 4 if "strength" in options else 2
    return Family(
        lambda: qwen(kind, downsamplings), inputs, options, RESCALED, steps=steps, output=output
    )


FAMILIES = {
    "QwenImagePipeline": Family(
        lambda: qwen("QwenImagePipeline", transformer=transformer(16), **text_parts()),
        with_negative,
        SIZE,
        RESCALED,
        text="Qwen2.5-VL",
    ),
    "QwenImageImg2ImgPipeline": edited(
        "QwenImageImg2ImgPipeline", plus(texts, image=picture(16)), SIZE | HALF
    ),
    "QwenImageInpaintPipeline": edited(
        "QwenImageInpaintPipeline",
        plus(texts, image=picture(16), mask_image=half_mask(16)),
        SIZE | HALF,
    ),
    "QwenImageEditPipeline": edited(
        "QwenImageEditPipeline", plus(texts, image=picture()), LARGE, downsamplings=6
    ),
    "QwenImageEditInpaintPipeline": edited(
        "QwenImageEditInpaintPipeline",
        plus(texts, image=picture(), mask_image=half_mask()),
        HALF,
        downsamplings=6,
        output="latent",  # its pixels are a million
    ),
    "QwenImageEditPlusPipeline": edited(
        "QwenImageEditPlusPipeline",
        plus(one(texts), image=REFERENCES),
        LARGE,
        downsamplings=6,
    ),
    "QwenImageControlNetPipeline": Family(
        lambda: qwen("QwenImageControlNetPipeline", controlnet=controlnet()),
        plus(texts, control_image=picture(16)),
        SIZE,
        RESCALED,
    ),
    "QwenImageControlNetInpaintPipeline": Family(
        lambda: qwen("QwenImageControlNetInpaintPipeline", controlnet=controlnet(4)),
        plus(texts, control_image=picture(16), control_mask=half_mask(16)),
        SIZE,
        RESCALED,
    ),
    "QwenImageLayeredPipeline": Family(
        layered,
        lambda turn, batch: texts(turn, batch) | prompts(turn, batch) | {"image": RGBA},
        {"layers": 2},
        {
            "none": {"true_cfg_scale": 1.0},
            CFG: {"true_cfg_scale": 4.0},
            f"{CFG}, norm rescaled": {"true_cfg_scale": 4.0, "cfg_normalize": True},
        },
        latent="pt",  # it fails with "latent"
    ),
}
