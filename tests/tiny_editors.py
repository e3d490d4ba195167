"""Tiny pipelines of the families beside Kontext and klein, whole: with encoders and tokenizers.

Two processors of transformers need torchvision, which the tests have not: FLUX.2-dev gets klein's
tokenizer in the place of Pixtral's, and Qwen-Image-Edit PaddleOCR's of the same tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from mteditflow_examples.shapes.editor import build_klein
from transformers import (
    CLIPTextModelWithProjection,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PaddleOCRVLImageProcessorPil,
    PaddleOCRVLProcessor,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from tests.pipelines.tiny_pipelines import flux2, qwen, sd3, z_image

PICTURES = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
MESSAGES = "<|endoftext|>{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
PROMPTS = ["Remove the square", "Remove the circle", "Change the background to white"]
#: What calls of each family need beside prompts, images and steps.
CALLS: dict[str, dict[str, Any]] = {
    "flux2": {
        "guidance_scale": 3.0,
        "height": 64,
        "width": 64,
        "max_sequence_length": 10,
        "text_encoder_out_layers": (1, 2),
    },
    "qwen-edit": {"height": 128, "width": 128, "true_cfg_scale": 4.0, "negative_prompt": "a red"},
    "z-image": {"height": 8, "width": 8, "guidance_scale": 5.0},
    "sd3.5": {"height": 8, "width": 8, "guidance_scale": 4.5, "max_sequence_length": 10},
}


def build_flux2() -> DiffusionPipeline:
    """FLUX.2-dev with a Mistral 3 of two layers."""
    tokenizer = build_klein(image_size=8).tokenizer
    tokenizer.chat_template = MESSAGES
    text = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    vision = PixtralVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=28,
    )
    config = Mistral3Config(text_config=text, vision_config=vision)
    encoder = Mistral3ForConditionalGeneration(config)
    parts = {"text_encoder": encoder, "tokenizer": tokenizer}
    return flux2.flux2("Flux2Pipeline", embedded=True, **parts)


def build_qwen_edit() -> DiffusionPipeline:
    """Qwen-Image-Edit-Plus with a Qwen2.5-VL that sees, and a VAE of a factor of 32."""
    tokenizer = build_klein(image_size=8).tokenizer
    tokenizer.add_tokens(PICTURES, special_tokens=True)
    tokenizer._set_model_specific_special_tokens({"image_token": PICTURES[1]})
    numbers = dict(zip(PICTURES, tokenizer.convert_tokens_to_ids(PICTURES), strict=True))
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision | {"out_hidden_size": 16},
        vision_start_token_id=numbers["<|vision_start|>"],
        image_token_id=numbers["<|image_pad|>"],
        vision_end_token_id=numbers["<|vision_end|>"],
    )
    pipeline = qwen.qwen(
        "QwenImageEditPlusPipeline",
        downsamplings=5,
        transformer=qwen.transformer(16),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        processor=PaddleOCRVLProcessor(
            PaddleOCRVLImageProcessorPil(patch_size=14, temporal_patch_size=2), tokenizer
        ),
    )
    for layer in ("add_k_proj", "add_v_proj"):  # else its texts have next to no effect
        getattr(pipeline.transformer.transformer_blocks[0].attn, layer).weight.data.mul_(5)
    return pipeline


def build_sd3() -> DiffusionPipeline:
    """Stable Diffusion 3.5, whose CLIPs have a layer to skip."""
    pipeline = sd3.with_text()
    config = copy.deepcopy(pipeline.text_encoder.config)
    config.num_hidden_layers = 2
    pipeline.text_encoder = CLIPTextModelWithProjection(config).eval()
    pipeline.text_encoder_2 = CLIPTextModelWithProjection(config).eval()
    return pipeline


BUILD: dict[str, Callable[[], DiffusionPipeline]] = {
    "flux2": build_flux2,
    "qwen-edit": build_qwen_edit,
    "z-image": lambda: z_image.z_image(text=True),
    "sd3.5": build_sd3,
}


def build(name: str) -> DiffusionPipeline:
    """A pipeline of a family, from a seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BUILD[name]()
