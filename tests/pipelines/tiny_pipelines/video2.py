"""LTX-Video and LTX-2."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, LTXEulerAncestralRFScheduler
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from mteditflow_examples.shapes.editor import build_kontext

from .base import (
    CFG,
    Family,
    Inputs,
    Options,
    dynamic,
    embeddings,
    make,
    picture,
    plus,
    prompts,
)
from .refusals import refused

WIDTH = 16  # of text embeddings
FRAMES = {"height": 32, "width": 64, "num_frames": 9}
LTX_GUIDED = {
    "none": {"guidance_scale": 1.0},
    CFG: {"guidance_scale": 3.0},
    f"{CFG}, std rescaled": {"guidance_scale": 3.0, "guidance_rescale": 0.7},
}
SHIFT = {  # as LTX-Video and LTX-2 ship it
    "shift": 1.0,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "shift_terminal": 0.1,
}


def masked(inputs: Inputs, *names: str) -> Inputs:
    """Inputs whose embeddings get a mask; the last token of every other prompt is padding."""

    def given(turn: int, batch: int) -> Options:
        made = inputs(turn, batch)
        for name in names:
            mask = torch.ones(made[name].shape[:2], dtype=torch.int64)
            mask[1::2, -1] = 0
            made[name.replace("embeds", "attention_mask")] = mask
        return made

    return given


text = masked(
    embeddings(prompt_embeds=WIDTH, negative_prompt_embeds=WIDTH),
    "prompt_embeds",
    "negative_prompt_embeds",
)


def per_row(inputs: Inputs, **fixed: Any) -> Inputs:
    """Inputs with more that is given once per trajectory, in a list."""

    def given(turn: int, batch: int) -> Options:
        return inputs(turn, batch) | {name: [value] * batch for name, value in fixed.items()}

    return given


def ltx(kind: str, **more: Any) -> DiffusionPipeline:
    """LTX-Video."""
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=more.pop("width", WIDTH),
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )
    return make(
        kind, **{"transformer": transformer, "vae": vae, "scheduler": dynamic(**SHIFT)} | more
    )


def ltx_condition() -> DiffusionPipeline:
    """LTX-Video 0.9.5 and later, whose scheduler is given the grid."""
    return ltx("LTXConditionPipeline", scheduler=diffusers.FlowMatchEulerDiscreteScheduler())


def ltx_long() -> DiffusionPipeline:
    """Long LTX-Video, window after window; it encodes the prompt itself."""
    whole = build_kontext(image_size=8)
    return ltx(
        "LTXI2VLongMultiPromptPipeline",
        text_encoder=whole.text_encoder_2,
        tokenizer=whole.tokenizer_2,
        width=whole.text_encoder_2.config.d_model,
        scheduler=LTXEulerAncestralRFScheduler(),
    )


def ltx2(kind: str = "LTX2Pipeline", **more: Any) -> DiffusionPipeline:
    """LTX-2: one transformer for a video and its sound."""
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=WIDTH,
        rope_double_precision=False,
        rope_type="split",
        vae_scale_factors=(2, 16, 16),
        perturbed_attn=True,
    )
    side = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    side |= {"num_learnable_registers": None}
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=1,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
        **{f"{name}_connector_{k}": v for name in ("video", "audio") for k, v in side.items()},
    )
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=8,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=16,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return make(
        kind,
        **{
            "transformer": transformer,
            "connectors": connectors,
            "vae": vae,
            "audio_vae": audio_vae,
            "vocoder": vocoder,
            "scheduler": dynamic(**SHIFT),
        }
        | more,
    )


def sides(**values: Any) -> Options:
    """Options of LTX-2's guidance, for the video and for its sound."""
    return values | {f"audio_{name}": value for name, value in values.items()}


OFF = sides(guidance_scale=1.0, stg_scale=0.0, modality_scale=1.0, guidance_rescale=0.0)
LTX2 = {"height": 32, "width": 32, "num_frames": 5, "frame_rate": 25.0}
LTX2 |= {"spatio_temporal_guidance_blocks": [1]}
LTX2_GUIDED = {
    "none": OFF,
    CFG: OFF | sides(guidance_scale=3.0),
    f"{CFG}, std rescaled": OFF | sides(guidance_scale=3.0, guidance_rescale=0.7),
    f"{CFG}, skipped layers and modality isolated": OFF
    | sides(guidance_scale=3.0, stg_scale=1.0, modality_scale=3.0, guidance_rescale=0.7),
}
FIRST = {"image": picture(32, 64)}

FAMILIES = {
    "LTXPipeline": Family(lambda: ltx("LTXPipeline"), text, FRAMES, LTX_GUIDED),
    "LTXConditionPipeline": Family(ltx_condition, text, FRAMES, LTX_GUIDED),
}

REFUSED = {
    "LTXImageToVideoPipeline": refused(
        Family(lambda: ltx("LTXImageToVideoPipeline"), per_row(text, **FIRST), FRAMES, LTX_GUIDED),
        "none does",
    ),
    "LTXConditionPipeline, from an image": refused(
        Family(ltx_condition, plus(text, **FIRST), FRAMES, LTX_GUIDED),
        "per_token_timesteps",
    ),
    "LTXConditionPipeline, from an image without noise": refused(
        Family(
            ltx_condition, plus(text, **FIRST), FRAMES | {"image_cond_noise_scale": 0.0}, LTX_GUIDED
        ),
        "per_token_timesteps",
    ),
    "LTXI2VLongMultiPromptPipeline": refused(
        Family(
            ltx_long,
            prompts,
            FRAMES | {"max_sequence_length": 10, "seed": None, "skip_steps_sigma_threshold": None},
            LTX_GUIDED,
            text="T5",
            batches=(1,),
            steps=3,
        ),
        "got LTXI2VLongMultiPromptPipeline with LTXEulerAncestralRFScheduler",
    ),
    "LTX2Pipeline": refused(
        Family(ltx2, text, LTX2, LTX2_GUIDED),
        "a second sample",
    ),
    "LTX2ImageToVideoPipeline": refused(
        Family(
            lambda: ltx2("LTX2ImageToVideoPipeline"),
            plus(text, image=picture(32)),
            LTX2 | {"image_crf": 0},  # recompression needs a video codec
            LTX2_GUIDED,
        ),
        "none does",
    ),
    "LTX2ConditionPipeline": refused(
        Family(lambda: ltx2("LTX2ConditionPipeline"), text, LTX2, LTX2_GUIDED),
        "a second sample",
    ),
    "LTX2InContextPipeline": refused(
        Family(lambda: ltx2("LTX2InContextPipeline"), text, LTX2, LTX2_GUIDED),
        "a second sample",
    ),
    "LTX2HDRPipeline": refused(
        Family(lambda: ltx2("LTX2HDRPipeline"), text, LTX2),
        "a second sample",
    ),
}

NOT_BUILT = {
    "LTX2DFRPipeline": "it is given sigmas, no number of steps; as LTX2Pipeline it has two samples",
    "LTX2DFRTemporalRefinePipeline": "as LTX2DFRPipeline, with LTXEulerAncestralRFScheduler",
}
