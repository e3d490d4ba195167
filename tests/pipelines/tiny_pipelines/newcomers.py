"""HunyuanImage, Kandinsky 5, Krea 2, ERNIE-Image, NucleusMoE, GLM-Image, Ideogram 4."""

from __future__ import annotations

import diffusers
import torch
from diffusers import DiffusionPipeline
from mteditflow_examples.shapes.editor import build_klein

from .base import (
    CFG,
    KANDINSKY,
    Family,
    Options,
    dynamic,
    embeddings,
    image_vae,
    listed,
    make,
    normal,
    picture,
    scheduler,
)

SIZE = {"height": 16, "width": 16}
LARGE = {"height": 32, "width": 32}
GUIDED = {"none": {"guidance_scale": 1.0}, CFG: {"guidance_scale": 4.0}}


def masks(names: dict[str, int], batch: int, tokens: int = 5) -> Options:
    """Masks by name of as many tokens, of which those of the last trajectory are shorter."""
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[-1, tokens - 2 :] = 0
    return dict.fromkeys(names, mask)


# HunyuanImage.


def hunyuan_texts(turn: int, batch: int) -> Options:
    """Embeddings of Qwen2.5-VL and ByT5, with masks."""
    widths = {"prompt_embeds": 24, "prompt_embeds_2": 12}
    widths |= {f"negative_{name}": width for name, width in widths.items()}
    names = [name.replace("embeds", "embeds_mask") for name in widths]
    return embeddings(**widths)(turn, batch) | masks(names, batch)


def hunyuan(guided: bool, *, meanflow: bool = False) -> DiffusionPipeline:
    """HunyuanImage 2.1 with its guider, or distilled, which also reads the next flow time."""
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=24,
        text_embed_2_dim=12,
        rope_axes_dim=(4, 4),
        guidance_embeds=not guided,
        use_meanflow=meanflow,
    )
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.75,
    )
    guider = diffusers.AdaptiveProjectedMixGuidance(enabled=guided)
    return make(
        "HunyuanImagePipeline",
        scheduler=scheduler(5.0),
        vae=vae,
        transformer=transformer,
        guider=guider,
    )


def refiner() -> DiffusionPipeline:
    """HunyuanImage's refiner, whose sample is followed by the image that it refines."""
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=16,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1, 1),
        text_embed_dim=24,
        rope_axes_dim=(4, 4, 4),
        guidance_embeds=True,
    )
    vae = diffusers.AutoencoderKLHunyuanImageRefiner(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=2,
        temporal_compression_ratio=1,
    )
    return make(
        "HunyuanImageRefinerPipeline", scheduler=scheduler(4.0), vae=vae, transformer=transformer
    )


def refined(turn: int, batch: int) -> Options:
    """Embeddings with masks, and the image to refine."""
    given = embeddings(prompt_embeds=24, negative_prompt_embeds=24)(turn, batch)
    names = ["prompt_embeds_mask", "negative_prompt_embeds_mask"]
    return given | masks(names, batch) | {"image": [picture(16)] * batch}


# Kandinsky 5.


def kandinsky(kind: str, *, edits: bool = False) -> DiffusionPipeline:
    """Kandinsky 5, whose latents are frames with channels last."""
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=8,
        time_dim=8,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(2, 2, 4),
        visual_cond=edits,
    )
    pipeline = make(
        kind, scheduler=scheduler(3.0), vae=image_vae(factor=8), transformer=transformer
    )
    pipeline.resolutions = [(32, 32)]
    return pipeline


def kandinsky_texts(turn: int, batch: int) -> Options:
    """Embeddings of Qwen2.5-VL's tokens and of CLIP."""
    given = embeddings(
        prompt_embeds_qwen=24,
        prompt_embeds_clip_pooled=8,
        negative_prompt_embeds_qwen=24,
        negative_prompt_embeds_clip_pooled=8,
    )(turn, batch)
    lengths = torch.arange(batch + 1, dtype=torch.int32) * 5
    given |= {"prompt_cu_seqlens": lengths, "negative_prompt_cu_seqlens": lengths}
    return {name.removesuffix("_pooled"): x for name, x in given.items()}


# Single pipelines.


def krea2() -> DiffusionPipeline:
    """Krea 2, whose text is a stack of an encoder's layers."""
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=24,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=2,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=0,
        temperal_downsample=[False],
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    )
    return make("Krea2Pipeline", scheduler=dynamic(shift=1.0), vae=vae, transformer=transformer)


def krea2_texts(turn: int, batch: int) -> Options:
    """Two layers of embeddings for each token."""
    names = ["prompt_embeds", "negative_prompt_embeds"]
    given = {name: normal(batch, 5, 2, 24, seed=turn + 10 * k) for k, name in enumerate(names)}
    return given | masks([f"{name}_mask" for name in names], batch)


def ernie() -> DiffusionPipeline:
    """ERNIE-Image, whose latents are FLUX.2's patches as an image."""
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=16,
        in_channels=16,
        out_channels=16,
        text_in_dim=24,
        rope_axes_dim=(4, 2, 2),
    )
    vae = build_klein(image_size=8).vae
    return make("ErnieImagePipeline", scheduler=scheduler(4.0), vae=vae, transformer=transformer)


def ernie_texts(turn: int, batch: int) -> Options:
    """Lists of embeddings of other lengths."""
    return {
        name: [normal(n, 24, seed=10 * turn + n + k) for n in (3, 6, 4)[:batch]]
        for k, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))
    }


def nucleus() -> DiffusionPipeline:
    """NucleusMoE-Image, whose second layer has experts."""
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        dense_moe_strategy="none",
        num_experts=2,
        moe_intermediate_dim=8,
        capacity_factors=1.0,
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=2,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=0,
        temperal_downsample=[False],
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    )
    return make(
        "NucleusMoEImagePipeline", scheduler=dynamic(shift=1.0), vae=vae, transformer=transformer
    )


def nucleus_texts(turn: int, batch: int) -> Options:
    """Embeddings with masks."""
    given = embeddings(prompt_embeds=24, negative_prompt_embeds=24)(turn, batch)
    return given | masks(["prompt_embeds_mask", "negative_prompt_embeds_mask"], batch)


def glm() -> DiffusionPipeline:
    """GLM-Image, which is given the tokens of its autoregressive prior."""
    transformer = diffusers.GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=24,
        time_embed_dim=8,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=16,
    )
    vae = image_vae(latents_mean=[0.1] * 4, latents_std=[1.5] * 4)
    shipped = dynamic(shift=1.0, base_shift=0.25, max_shift=0.75, time_shift_type="linear")
    return make("GlmImagePipeline", scheduler=shipped, vae=vae, transformer=transformer)


def glm_texts(turn: int, batch: int) -> Options:
    """Embeddings, and tokens of the prior for an image of 16 pixels."""
    generator = torch.Generator().manual_seed(turn)
    tokens = torch.randint(0, 16, (batch, 64), generator=generator)
    given = embeddings(prompt_embeds=24, negative_prompt_embeds=24)(turn, batch)
    return given | {"prior_token_ids": tokens}


FAMILIES = {
    "HunyuanImagePipeline": Family(
        lambda: hunyuan(True), hunyuan_texts, SIZE, {"guider": {}}, steps=8
    ),
    "HunyuanImagePipeline, distilled": Family(
        lambda: hunyuan(False, meanflow=True), hunyuan_texts, SIZE, {"embedded": {}}
    ),
    "HunyuanImageRefinerPipeline": Family(refiner, refined, SIZE, {"embedded": {}}),
    "Kandinsky5T2IPipeline": Family(
        lambda: kandinsky("Kandinsky5T2IPipeline"),
        kandinsky_texts,
        LARGE,
        GUIDED,
        lora=KANDINSKY,
    ),
    "Kandinsky5I2IPipeline": Family(
        lambda: kandinsky("Kandinsky5I2IPipeline", edits=True),
        listed(kandinsky_texts, image=picture(32)),
        LARGE,
        GUIDED,
        lora=KANDINSKY,
    ),
    "Krea2Pipeline": Family(krea2, krea2_texts, SIZE, GUIDED),
    "ErnieImagePipeline": Family(ernie, ernie_texts, {"height": 64, "width": 64}, GUIDED),
    "NucleusMoEImagePipeline": Family(nucleus, nucleus_texts, SIZE, GUIDED),
    "GlmImagePipeline": Family(
        glm,
        glm_texts,
        SIZE,
        GUIDED,
        recorder={"shared": ("kv_caches",)},  # empty without an image
        steps=4,  # two are too few to tell what its timesteps are
    ),
}
