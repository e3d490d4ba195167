"""Videos with schedulers or samples of their own: Helios, AnyFlow, Kandinsky 6, SANA-WM."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMapEulerDiscreteScheduler, HeliosScheduler

from .base import (
    CFG,
    KANDINSKY,
    Family,
    Options,
    embeddings,
    make,
    normal,
    picture,
    plus,
    scheduler,
)
from .refusals import refused
from .video import GUIDED, text, vae
from .video3 import hunyuan_vae

WIDTH = 16  # of text embeddings


def helios() -> DiffusionPipeline:
    """Helios, chunk after chunk of a video."""
    transformer = diffusers.HeliosTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_dim=(4, 4, 4),
    )
    steps = HeliosScheduler(stages=1, stage_range=[0, 1], scheduler_type="euler")
    return make("HeliosPipeline", transformer=transformer, vae=vae(), scheduler=steps)


def anyflow(kind: str, steps: Any = None, **more: Any) -> DiffusionPipeline:
    """AnyFlow, a flow map: its transformer is given the end of the step, too."""
    name = "AnyFlowFARTransformer3DModel" if "FAR" in kind else "AnyFlowTransformer3DModel"
    transformer = getattr(diffusers, name)(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
        **more,
    )
    steps = steps or FlowMapEulerDiscreteScheduler(shift=5.0)
    return make(kind, transformer=transformer, vae=vae(), scheduler=steps)


def kandinsky_6() -> DiffusionPipeline:
    """Kandinsky 6: one transformer for a video and its sound."""
    transformer = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=8,
        time_dim=16,
        model_dim=16,
        ff_dim=24,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 2, 2),
        in_audio_dim=4,
        out_audio_dim=4,
        visual_token_type_num_embeddings=2,
    )
    audio_vae = diffusers.MMAudioVAE(
        mel_bins=8,
        latent_channels=4,
        hidden_channels=8,
        channel_multipliers=(1, 2),
        layers_per_block=1,
        sample_rate=64,
        n_fft=16,
        hop_length=4,
    )
    vocoder = diffusers.MMAudioVocoder(
        num_mels=8,
        upsample_initial_channel=8,
        upsample_rates=(2, 2),
        upsample_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
    )
    return make(
        "Kandinsky6TI2VAPipeline",
        transformer=transformer,
        vae=hunyuan_vae(),
        audio_vae=audio_vae,
        vocoder=vocoder,
        scheduler=scheduler(7.0),
    )


def sana_wm() -> DiffusionPipeline:
    """SANA-WM: a camera's path through a scene."""
    transformer = diffusers.SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        linear_head_dim=16,
        softmax_every_n=2,
        chunk_plucker_post_attn_blocks=2,
        caption_channels=WIDTH,
        mlp_ratio=2.0,
        mixed_precision="no",
    )
    video_vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    return make("SanaWMPipeline", transformer=transformer, vae=video_vae, scheduler=scheduler(9.95))


kandinsky_text = embeddings(
    prompt_embeds=WIDTH,
    pooled_prompt_embeds=8,
    negative_prompt_embeds=WIDTH,
    negative_pooled_prompt_embeds=8,
)


def camera_text(turn: int, batch: int) -> Options:
    """Embeddings with masks for SANA-WM, and a camera that moves forward."""
    poses = np.tile(np.eye(4, dtype=np.float32), (9, 1, 1))
    poses[:, 2, 3] = np.linspace(0, 1, 9)
    made: Options = {"prompt": "", "c2w": poses, "intrinsics": [32.0, 32.0, 32.0, 32.0]}
    for k, kind in enumerate(("", "negative_")):
        made[f"{kind}prompt_embeds"] = normal(1, 5, WIDTH, seed=turn + 10 * k)
        made[f"{kind}prompt_attention_mask"] = torch.ones(1, 5, dtype=torch.int64)
    return made


CHUNK = {"height": 32, "width": 32, "num_frames": 5, "num_latent_frames_per_chunk": 2}
CHUNK |= {"history_sizes": [4, 2, 1]}
SMALL = {"height": 16, "width": 16, "num_frames": 5}
# Negative embeddings without guidance would double AnyFlow's batch.
FLOW_MAP = {"none": {"guidance_scale": 1.0, "negative_prompt_embeds": None}} | {CFG: GUIDED[CFG]}

FAMILIES = {
    "HeliosPipeline": Family(helios, text, CHUNK, GUIDED),
    "AnyFlowPipeline, without the mean velocity": Family(
        lambda: anyflow("AnyFlowPipeline", scheduler(5.0)),
        text,
        SMALL | {"use_mean_velocity": False},
        FLOW_MAP,
    ),
    "Kandinsky6TI2VAPipeline, without sound": Family(
        kandinsky_6, kandinsky_text, SMALL | {"sample_audio": False}, GUIDED, lora=KANDINSKY
    ),
    "Kandinsky6TI2VAPipeline, from an image": Family(
        kandinsky_6,
        plus(kandinsky_text, image=picture(16)),
        SMALL | {"sample_audio": False},
        GUIDED,
        batches=(1,),
        lora=KANDINSKY,
    ),
}

REFUSED = {
    "AnyFlowPipeline": refused(
        Family(lambda: anyflow("AnyFlowPipeline"), text, SMALL, FLOW_MAP),
        "with FlowMapEulerDiscreteScheduler",
    ),
    "AnyFlowFARPipeline": refused(
        Family(
            lambda: anyflow("AnyFlowFARPipeline", chunk_partition=(1, 1), full_chunk_limit=2),
            text,
            SMALL,
            FLOW_MAP,
        ),
        "with FlowMapEulerDiscreteScheduler",
    ),
    "Kandinsky6TI2VAPipeline": refused(
        Family(kandinsky_6, kandinsky_text, SMALL, GUIDED),
        "a second sample",
    ),
    "SanaWMPipeline": refused(
        Family(
            sana_wm,
            plus(camera_text, image=picture(64)),
            {"height": 64, "width": 64, "num_frames": 9},
            {"none": {"guidance_scale": 1.0}, CFG: {"guidance_scale": 5.0}},
            batches=(1,),
        ),
        "per_token_timesteps",
    ),
}
