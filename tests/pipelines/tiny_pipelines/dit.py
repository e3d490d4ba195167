"""Diffusion transformers over images of latents: CogView4, Lumina, AuraFlow, Sana, PRX, HiDream."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from .base import (
    CFG,
    Family,
    Inputs,
    Options,
    dynamic,
    embeddings,
    image_vae,
    make,
    normal,
    picture,
    plus,
    scheduler,
)

SIZE = {"height": 16, "width": 16}
LARGE = {"height": 32, "width": 32}
SANA = {"height": 32, "width": 32, "negative_prompt": None}
GUIDED = {"none": {"guidance_scale": 1.0}, CFG: {"guidance_scale": 4.0}}
UNBINNED = {"use_resolution_binning": False}
TEXTS = embeddings(prompt_embeds=24, negative_prompt_embeds=24)


def masked(turn: int, batch: int) -> Options:
    """Embeddings with masks, of which the last is shorter."""
    mask = torch.ones(batch, 5, dtype=torch.int64)
    mask[-1, 3:] = 0
    given = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask.flip(0)}
    return TEXTS(turn, batch) | given


def cogview4(kind: str, channels: int = 4) -> DiffusionPipeline:
    """CogView4, whose grid is shifted linearly by the number of tokens."""
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=channels,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=24,
        time_embed_dim=8,
        condition_dim=4,
    )
    shipped = dynamic(shift=1.0, base_shift=0.25, max_shift=0.75, time_shift_type="linear")
    return make(kind, scheduler=shipped, vae=image_vae(), transformer=transformer)


def lumina() -> DiffusionPipeline:
    """Lumina-Next, whose transformer also predicts a variance."""
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        hidden_size=24,
        num_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        ffn_dim_multiplier=1.0,
        cross_attention_dim=24,
    )
    return make(
        "LuminaPipeline", scheduler=scheduler(), vae=image_vae(factor=8), transformer=transformer
    )


def lumina2() -> DiffusionPipeline:
    """Lumina-Image 2.0."""
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 16, 16),
        cap_feat_dim=24,
    )
    return make(
        "Lumina2Pipeline",
        scheduler=scheduler(6.0),
        vae=image_vae(factor=8),
        transformer=transformer,
    )


def aura_flow() -> DiffusionPipeline:
    """AuraFlow."""
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return make(
        "AuraFlowPipeline", scheduler=scheduler(1.73), vae=image_vae(), transformer=transformer
    )


def sana(kind: str, **more: Any) -> DiffusionPipeline:
    """Sana with the flow scheduler, which its users set in place of DPM-Solver."""
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=24,
        sample_size=8,
    )
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
    )
    return make(kind, scheduler=scheduler(3.0), vae=vae, transformer=transformer, **more)


def prx(kind: str, **more: Any) -> DiffusionPipeline:
    """PRX, which passes one time for its whole batch."""
    channels = 4 if "vae" in more else 3
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=channels,
        context_in_dim=24,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[4, 4],
    )
    return make(kind, scheduler=scheduler(3.0), transformer=transformer, **more)


def hidream() -> DiffusionPipeline:
    """HiDream-I1 with its experts."""
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[24, 12],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
    )
    pipeline = make(
        "HiDreamImagePipeline", scheduler=scheduler(3.0), vae=image_vae(), transformer=transformer
    )
    pipeline.default_sample_size = 8  # it scales every image to that size's area
    return pipeline


def hidream_texts(turn: int, batch: int) -> Options:
    """Embeddings of T5, of Llama's layers, which come first, and of both CLIPs."""
    names = {
        "prompt_embeds_t5": (batch, 5, 24),
        "prompt_embeds_llama3": (2, batch, 5, 12),
        "pooled_prompt_embeds": (batch, 8),
    }
    return {
        sign + name: normal(*shape, seed=10 * turn + len(sign + name))
        for name, shape in names.items()
        for sign in ("", "negative_")
    }


def dense(
    build: Any, inputs: Inputs, guided: Options | None = None, *, steps: int = 2, **options: Any
) -> Family:
    """A pipeline that is given embeddings."""
    return Family(build, inputs, SIZE | options, guided or GUIDED, steps=steps)


def one_time(build: Any) -> Family:
    """A PRX, which passes one time per branch, and so guides one trajectory alone."""
    return Family(
        build,
        masked,
        SIZE | UNBINNED,
        GUIDED,
        batches=(1,),
        lora=("img_qkv_proj", "txt_kv_proj"),
    )


FAMILIES = {
    # Its timesteps are no multiple of its sigmas, which two steps are too few to tell.
    "CogView4Pipeline": dense(lambda: cogview4("CogView4Pipeline"), TEXTS, steps=4),
    "CogView4ControlPipeline": dense(
        lambda: cogview4("CogView4ControlPipeline", 8),
        plus(TEXTS, control_image=picture(8)),
        steps=4,
    ),
    "LuminaPipeline": Family(lumina, masked, LARGE, GUIDED),
    "Lumina2Pipeline": Family(
        lumina2,
        masked,
        LARGE,
        {
            "none": {"guidance_scale": 1.0},
            CFG: {"guidance_scale": 4.0, "cfg_normalization": False},
            f"{CFG}, norm rescaled": {"guidance_scale": 4.0},
            f"{CFG}, truncated": {"guidance_scale": 4.0, "cfg_trunc_ratio": 0.5},
        },
        steps=3,
    ),
    "AuraFlowPipeline": dense(aura_flow, masked),
    "SanaPipeline": dense(lambda: sana("SanaPipeline"), masked, **SANA | UNBINNED),
    "SanaPAGPipeline": dense(
        lambda: sana("SanaPAGPipeline", pag_applied_layers=["transformer_blocks.0"]),
        masked,
        {"perturbed attention": {"guidance_scale": 1.0}, f"{CFG} and perturbed attention": {}},
        **SANA | UNBINNED,
    ),
    "PRXPipeline": one_time(lambda: prx("PRXPipeline", vae=image_vae())),
    "PRXPixelPipeline": one_time(lambda: prx("PRXPixelPipeline")),
    "HiDreamImagePipeline": dense(hidream, hidream_texts),
}
