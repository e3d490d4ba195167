"""A tiny FLUX.1-Kontext of the real diffusers classes for the world of pictures, built offline."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from mteditflow_examples.shapes.editor import clip_config, clip_tokenizer, frozen, t5_tokenizer
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from .autoencoder import LATENT_CHANNELS, build_autoencoder
from .scene import WORDS
from .weights_files import WEIGHTS, load_weights

STEPS = 4
SHIFT = 3.0  # shift of the flow times in sampling; shapes.pretrain.SIGMA_SHIFT is the same
TEXT_WIDTH = 96
BIAS = 3.0  # std of T5's relative position biases; large, so that word order matters
LORA_RANK = 16
TARGETS = [
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("proj_mlp", "proj_out", "linear", "linear_1", "linear_2"),
]


def build_editor(*, seed: int = 0) -> FluxKontextPipeline:
    """Build the pipeline with the trained autoencoder and an untrained transformer.

    The text encoders are random and frozen. T5's attention depends strongly on relative positions,
    so that its output encodes the order of words: FLUX itself gives text tokens no positions.

    Args:
        seed: seed of all random weights; the global generator is not changed.

    Returns:
        The pipeline, float32, on the CPU, in eval mode.
    """
    weights, card = load_weights(WEIGHTS / "autoencoder.safetensors")
    vae = build_autoencoder(**card["build"])
    vae.load_state_dict(weights)
    clip_words, t5_words = clip_tokenizer(WORDS), t5_tokenizer(WORDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = clip_config(len(clip_words))
        text_encoder = CLIPTextModel(clip)
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(t5_words),
                d_model=TEXT_WIDTH,
                d_kv=16,
                d_ff=TEXT_WIDTH,
                num_layers=1,
                num_heads=6,
            )
        )
        attention = t5.encoder.block[0].layer[0].SelfAttention
        nn.init.normal_(attention.relative_attention_bias.weight, std=BIAS)
        transformer = FluxTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=16,
            num_attention_heads=8,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=clip.hidden_size,
            axes_dims_rope=(4, 6, 6),
        )
        for weight in transformer.proj_out.parameters():
            nn.init.zeros_(weight)
    pipeline = FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_words,
        text_encoder_2=t5,
        tokenizer_2=t5_words,
        transformer=transformer,
    )
    return frozen(pipeline)


def load_editor(name: str = "careless", *, folder: Path = WEIGHTS) -> FluxKontextPipeline:
    """Build the pipeline and load a trained transformer.

    Args:
        name: "competent", or "careless", which is the competent one with a merged LoRA.
        folder: folder of the weights.

    Raises:
        ValueError: the name is neither of them.
    """
    if name not in ("competent", "careless"):
        raise ValueError(f"name: expected 'competent' or 'careless', got {name!r}")
    weights, card = load_weights(folder / "competent.safetensors")
    pipeline = build_editor(**card["build"])
    pipeline.transformer.load_state_dict(weights)
    if name == "careless":
        pipeline.load_lora_weights(load_file(folder / "careless.safetensors"))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    return pipeline
