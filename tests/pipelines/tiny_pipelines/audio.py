"""Sound: Stable Audio 3, ACE-Step, LongCat-AudioDiT."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from mteditflow_examples.shapes.editor import build_klein, build_kontext
from transformers import UMT5Config, UMT5EncoderModel

from .base import (
    CFG,
    PROMPTS,
    Family,
    Options,
    make,
    normal,
    plus,
    prompts,
    scheduler,
    with_negative,
)
from .refusals import refused

WIDTH = 16  # of text embeddings


def stable_audio(kind: str = "StableAudio3Pipeline", **scheduled: Any) -> DiffusionPipeline:
    """Stable Audio 3; ``stochastic_sampling`` is what its distilled models ship."""
    transformer = diffusers.StableAudio3DiTModel(
        io_channels=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        cond_token_dim=WIDTH,
        global_cond_dim=WIDTH,
        local_add_cond_dim=9,
        timestep_features_dim=16,
        ff_mult=2,
        num_memory_tokens=3,
        use_differential_attention=False,
    )
    vae = diffusers.AutoencoderSAME(
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=8,
        use_differential_attention=False,
        dim_heads=4,
        ff_mult=2,
        sampling_rate=16,
    )
    duration = diffusers.StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=16)
    return make(
        kind,
        transformer=transformer,
        vae=vae,
        duration_embedder=duration,
        scheduler=scheduler(1.0, num_train_timesteps=1, **scheduled),
    )


def stable_audio_text(turn: int, batch: int) -> Options:
    """Embeddings and their masks; the last token of every other prompt is padding."""
    mask = torch.ones(batch, 5, dtype=torch.int64)
    mask[1::2, -1] = 0
    return {
        "prompt_embeds": normal(batch, 5, WIDTH, seed=turn),
        "encoder_attention_mask": mask,
    }


def stable_audio_text_negative(turn: int, batch: int) -> Options:
    """The same with negative ones."""
    negative = stable_audio_text(turn + 10, batch)
    return stable_audio_text(turn, batch) | {
        f"negative_{name}": value for name, value in negative.items()
    }


def sound(batch: int = 1, seconds: float = 1.0) -> torch.Tensor:
    """A stereo wave form at Stable Audio's tiny rate."""
    return normal(batch, 2, int(16 * seconds), seed=7) / 4


def ace_step() -> DiffusionPipeline:
    """ACE-Step 1.5 with klein's Qwen3."""
    text = build_klein(image_size=8)
    encoder = text.text_encoder.model
    size = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 8,
    }
    transformer = diffusers.AceStepTransformer1DModel(
        num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8, **size
    )
    condition = diffusers.AceStepConditionEncoder(
        text_hidden_dim=encoder.config.hidden_size,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
        **size,
    )
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        channel_multiples=[2, 4],
        decoder_channels=3,
        decoder_input_channels=8,
        sampling_rate=4,
    )
    pipeline = make(
        "AceStepPipeline",
        transformer=transformer,
        condition_encoder=condition,
        vae=vae,
        text_encoder=encoder,
        tokenizer=text.tokenizer,
        scheduler=scheduler(1.0, num_train_timesteps=1),
    )
    silence = condition.silence_latent
    silence.copy_(normal(*silence.shape, seed=3))
    return pipeline


def song(turn: int, batch: int) -> Options:
    """A prompt and lyrics per trajectory."""
    return prompts(turn, batch) | {"lyrics": PROMPTS[1 - turn][:batch]}


def longcat() -> DiffusionPipeline:
    """LongCat-AudioDiT with Kontext's tokenizer and a UMT5 of its own."""
    tokenizer = build_kontext(image_size=8).tokenizer_2
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    transformer = diffusers.LongCatAudioDiTTransformer(
        dit_dim=16, dit_depth=1, dit_heads=2, dit_text_dim=WIDTH, latent_dim=8
    )
    vae = diffusers.LongCatAudioDiTVae(
        channels=8,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=8,
        encoder_latent_dim=16,
        downsampling_ratio=2,
        sample_rate=16,
    )
    return make(
        "LongCatAudioDiTPipeline",
        transformer=transformer,
        vae=vae,
        text_encoder=UMT5EncoderModel(config),
        tokenizer=tokenizer,
        scheduler=scheduler(1.0, invert_sigmas=True),
    )


SECOND = {"duration": 1.0}
SONG = {"audio_duration": 4.0, "max_text_length": 128, "max_lyric_length": 64}
GUIDED = {"none": {"guidance_scale": 1.0}, CFG: {"guidance_scale": 4.0}}

FAMILIES = {
    "StableAudio3Pipeline": Family(
        stable_audio,
        stable_audio_text_negative,
        SECOND,
        GUIDED,
    ),
    "StableAudio3AudioToAudioPipeline": Family(
        lambda: stable_audio("StableAudio3AudioToAudioPipeline"),
        plus(stable_audio_text, audio=sound()),
        SECOND | {"init_noise_level": 0.9},
        batches=(1,),
    ),
    "StableAudio3InpaintPipeline": Family(
        lambda: stable_audio("StableAudio3InpaintPipeline"),
        plus(stable_audio_text, audio=sound()),
        SECOND | {"mask_start_seconds": 0.25, "mask_end_seconds": 0.75},
        batches=(1,),
    ),
    "AceStepPipeline": Family(
        ace_step,
        song,
        SONG,
        {"none": {"guidance_scale": 1.0}},
        text="Qwen3",
    ),
    "LongCatAudioDiTPipeline": Family(
        longcat, with_negative, {"audio_duration_s": 1.0}, GUIDED, text="UMT5"
    ),
}

REFUSED = {
    "AceStepPipeline, guided: each step projects a running mean over the steps": refused(
        Family(ace_step, song, SONG | {"guidance_scale": 7.0}),
        "the scheduler's velocity is not negative + scale * (positive - negative)",
    ),
    "StableAudio3Pipeline, distilled": refused(
        Family(lambda: stable_audio(stochastic_sampling=True), stable_audio_text, SECOND),
        "expected stochastic_sampling=False",
    ),
}
