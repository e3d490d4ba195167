"""Fibo, JoyImage, DreamLite, Ideogram 4, Qwen-Image 2.1 and VisualCloze.

Where a pipeline takes no embeddings and its text encoder is a VLM that needs torchvision, seeded
embeddings stand in the place of its ``encode_prompt``.
"""

from __future__ import annotations

import json
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from mteditflow_examples.shapes.editor import build_klein

from .base import (
    CFG,
    NEGATIVE,
    PROMPTS,
    Family,
    Options,
    Processor,
    dynamic,
    embeddings,
    encoded,
    image_vae,
    listed,
    make,
    normal,
    picture,
    prompts,
    scheduler,
    with_negative,
)
from .qwen import vae as qwen_vae

GUIDED = {"none": {"guidance_scale": 1.0}, CFG: {"guidance_scale": 4.0}}
JOY = ("img_attn_qkv", "txt_attn_qkv")
LARGE = {"height": 32, "width": 32}
SQUARE = {"height": 64, "width": 64}
INSTEAD = "embeddings in the place of encode_prompt"


# Fibo.


def fibo(kind: str) -> DiffusionPipeline:
    """Bria's Fibo with klein's Qwen3, each of whose blocks reads a layer of it."""
    text = build_klein(image_size=8)
    transformer = diffusers.BriaFiboTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(4, 6, 6),
        text_encoder_dim=32,
    )
    return make(
        kind,
        scheduler=dynamic(),
        vae=qwen_vae(4),
        transformer=transformer,
        text_encoder=text.text_encoder,
        tokenizer=text.tokenizer,
    )


def instructions(turn: int, batch: int) -> Options:
    """Prompts in Fibo's structure, about an image."""
    given = [json.dumps({"edit_instruction": prompt}) for prompt in PROMPTS[turn][:batch]]
    return {"prompt": given, "negative_prompt": NEGATIVE[:batch], "image": picture()}


def klein_vae() -> torch.nn.Module:
    """The VAE of FLUX.2 klein's world, of a factor of 8."""
    return build_klein(image_size=8).vae


def fibo2() -> DiffusionPipeline:
    """Fibo 2."""
    transformer = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=24,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=2,
        max_num_gist_tokens=2,
        gist_step=1,
        gist_min_text_len=2,
        gist_max_text_len=4,
        axes_dims=(8, 4, 4),
        axes_lens=(64, 16, 16),
    )
    return make("BriaFibo2Pipeline", scheduler=dynamic(), vae=klein_vae(), transformer=transformer)


def bundles(turn: int, batch: int) -> Options:
    """Embeddings of the gist and of one layer, with masks, of which the last is shorter."""
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[-1, 3:] = 0
    names = ["prompt_embeds", "negative_prompt_embeds"]
    given = {name: normal(batch, 2, 5, 24, seed=turn + 10 * k) for k, name in enumerate(names)}
    return given | {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask.flip(0)}


# JoyImage.


def joy(kind: str) -> DiffusionPipeline:
    """JoyImage-Edit, whose sample is preceded by its references as frames."""
    many = "Plus" in kind
    name = f"JoyImageEdit{'Plus' if many else ''}Transformer3DModel"
    transformer = getattr(diffusers, name)(
        in_channels=4,
        hidden_size=32,
        num_attention_heads=2,
        text_dim=24,
        num_layers=1,
        rope_dim_list=[4, 6, 6],
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=0,
        temperal_downsample=[False],
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
        scale_factor_spatial=2,
        scale_factor_temporal=1,
    )
    pipeline = make(kind, scheduler=scheduler(1.5), vae=vae, transformer=transformer)
    name = "image_processor" if many else "vae_image_processor"
    getattr(pipeline, name).get_default_height_width = lambda *_: (16, 16)  # for a million pixels

    def encode_prompt(prompt: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        embeds = encoded(prompt, 5, 24)
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.int64)

    pipeline.encode_prompt_multiple_images = encode_prompt
    return pipeline


# DreamLite.


def dreamlite(kind: str) -> DiffusionPipeline:
    """DreamLite: a UNet that is shown the reference at the right of the sample."""
    unet = diffusers.DreamLiteUNetModel(
        sample_size=8,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        transformer_layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=2,
        addition_embed_type="time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8,
    )
    pipeline = make(
        kind,
        scheduler=dynamic(max_shift=1.16),
        vae=image_vae(factor=8),
        unet=unet,
        text_encoder=build_klein(image_size=8).text_encoder,
    )

    def encode_prompt(prompts: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        embeds = encoded(prompts, 5, 24)
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.int64)

    pipeline.encode_prompt = lambda mode, prompts, **rest: encode_prompt(prompts, **rest)
    return pipeline


def dream(kind: str, guided: Options) -> Family:
    """A DreamLite of one trajectory: it repeats neither sizes nor references for more."""
    return Family(
        lambda: dreamlite(kind),
        lambda turn, batch: {"prompt": PROMPTS[turn][0]},
        LARGE,
        guided,
        text=INSTEAD,
        batches=(1,),
        model="unet",
    )


# Ideogram.


def ideogram() -> DiffusionPipeline:
    """Ideogram 4, whose unconditional branch is a transformer of its own."""

    def transformer() -> torch.nn.Module:
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            intermediate_size=16,
            adaln_dim=8,
            llm_features_dim=24,
            mrope_section=(2, 1, 1),
        )

    pipeline = make(
        "Ideogram4Pipeline",
        scheduler=scheduler(1.0),
        vae=klein_vae(),
        transformer=transformer(),
        unconditional_transformer=transformer(),
    )

    def encode_prompt(prompt: Any, grid_h: int, grid_w: int, max_sequence_length: int, **_: Any):
        text = encoded(prompt, max_sequence_length, 24)
        batch, image = len(text), grid_h * grid_w
        features = torch.cat([text, torch.zeros(batch, image, 24)], dim=1)
        length = max_sequence_length + image
        positions = torch.arange(length)[None, :, None].expand(batch, -1, 3)
        segments = torch.ones(batch, length, dtype=torch.int64)
        indicator = torch.tensor([3] * max_sequence_length + [2] * image).expand(batch, -1)
        return features, positions, segments, indicator

    pipeline.encode_prompt = encode_prompt
    return pipeline


# Qwen-Image 2.1.


def qwen21() -> DiffusionPipeline:
    """Qwen-Image 2.1, whose first step fills a cache of the text."""
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        temperal_downsample=[False] * 4,
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    )
    words = Processor(encode=lambda text: [0])
    return make(
        "QwenImage21Pipeline",
        scheduler=dynamic(shift=1.0),
        vae=vae,
        transformer=transformer,
        processor=Processor(apply_chat_template=lambda *_, **__: [[0]], tokenizer=words),
    )


FAMILIES = {
    "BriaFiboPipeline": Family(
        lambda: fibo("BriaFiboPipeline"),
        with_negative,
        SQUARE,
        GUIDED,
        text="Qwen3",
    ),
    "BriaFiboEditPipeline": Family(
        lambda: fibo("BriaFiboEditPipeline"),
        instructions,
        SQUARE | {"_auto_resize": False},
        GUIDED,
        text="Qwen3",
    ),
    "BriaFibo2Pipeline": Family(fibo2, bundles, SQUARE, GUIDED),
    "JoyImageEditPipeline": Family(
        lambda: joy("JoyImageEditPipeline"),
        listed(with_negative, image=picture()),
        {},
        GUIDED,
        text=INSTEAD,
        lora=JOY,
    ),
    "JoyImageEditPlusPipeline": Family(
        lambda: joy("JoyImageEditPlusPipeline"),
        listed(with_negative, images=[picture(), picture(seed=1)]),
        {},
        GUIDED,
        text=INSTEAD,
        lora=JOY,
    ),
    "DreamLitePipeline": dream(
        "DreamLitePipeline", {CFG: {}, f"{CFG} of text and image": {"image": picture(32)}}
    ),
    "DreamLiteMobilePipeline": dream("DreamLiteMobilePipeline", {"none": {}}),
    "DreamLiteMobilePipeline, from an image": dream(
        "DreamLiteMobilePipeline", {"none": {"image": picture(32)}}
    ),
    "Ideogram4Pipeline": Family(
        ideogram,
        prompts,
        SQUARE | {"max_sequence_length": 5},
        {f"{CFG} of two transformers": {"guidance_scale": 4.0, "guidance_schedule": None}},
        text=INSTEAD,
    ),
    "QwenImage21Pipeline": Family(
        qwen21,
        embeddings(prompt_embeds=24, negative_prompt_embeds=24),
        SQUARE | {"use_kv_cache": False},
        {"none": {"true_cfg_scale": 1.0}, CFG: {"true_cfg_scale": 4.0}},
    ),
    "QwenImage21Pipeline, with its cache": Family(
        qwen21,
        embeddings(prompt_embeds=24, negative_prompt_embeds=24),
        SQUARE,
        {"none": {"true_cfg_scale": 1.0}, CFG: {"true_cfg_scale": 4.0}},
    ),
}
