"""Tiny pipelines of the real diffusers classes, one per family, and what a call of each needs.

Text encoders and tokenizers are real where the shapes world has tiny ones of the right class;
elsewhere the calls are given embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from mteditflow_examples.shapes.editor import build_klein, build_kontext
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

Options = dict[str, Any]

PROMPTS = [
    ["Remove the square", "Remove the circle"],
    ["Change the color of circle to red", "Add a red star"],
]
NEGATIVE = ["Add a red star", "Remove the triangle"]


@dataclass(frozen=True)
class Family:
    """One pipeline of the table.

    Attributes:
        build: makes the tiny pipeline.
        inputs: what the call of a turn is given for two trajectories.
        options: of every call.
        guided: kinds of guidance, and the options that ask for them; "none" has the rest.
        text: whether prompts go through real encoders, or calls are given embeddings.
    """

    build: Callable[[], DiffusionPipeline]
    inputs: Callable[[int], Options]
    options: Options
    guided: dict[str, Options] = field(default_factory=dict)
    text: str = "embeddings"


def normal(*shape: int, seed: int) -> torch.Tensor:
    """A seeded normal tensor."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(size: int = 64) -> Image.Image:
    """An image of random blocks."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)


def prompts(turn: int) -> Options:
    """Two prompts."""
    return {"prompt": list(PROMPTS[turn])}


def edit(turn: int, size: int = 64) -> Options:
    """Two prompts and the image that they are about."""
    return prompts(turn) | {"image": picture(size)}


def embeddings(**widths: int) -> Callable[[int], Options]:
    """Two prompts as embeddings by name: rows if pooled, else five tokens each."""

    def given(turn: int) -> Options:
        tokens = {name: () if "pooled" in name else (5,) for name in widths}
        return {
            name: normal(2, *tokens[name], width, seed=turn + 10 * k)
            for k, (name, width) in enumerate(widths.items())
        }

    return given


def make(kind: str, **parts: Any) -> DiffusionPipeline:
    """The pipeline of these parts and none else, quiet and in eval mode."""
    pipeline_class = getattr(diffusers, kind)
    names = pipeline_class._get_signature_keys(pipeline_class)[0]
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)} | parts
    pipeline = pipeline_class(**dict.fromkeys(names) | parts)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipeline


def distilled(transformer: torch.nn.Module) -> torch.nn.Module:
    """A transformer of the same size that takes the guidance scale as an input."""
    return type(transformer).from_config(transformer.config, guidance_embeds=True)


def image_vae() -> torch.nn.Module:
    """AutoencoderKL of factor 1."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, norm_num_groups=1, shift_factor=0.1
    )


def flux() -> DiffusionPipeline:
    """FLUX.1 of Kontext's parts."""
    whole = build_kontext(image_size=8)
    parts = {
        name: part
        for name, part in whole.components.items()
        if name not in ("transformer", "image_encoder", "feature_extractor")
    }
    return make("FluxPipeline", **parts, transformer=distilled(whole.transformer))


def flux2() -> DiffusionPipeline:
    """FLUX.2 of klein's parts: its Mistral is replaced by embeddings."""
    whole = build_klein(image_size=8)
    return make("Flux2Pipeline", vae=whole.vae, transformer=distilled(whole.transformer))


def stable_diffusion_3() -> DiffusionPipeline:
    """Stable Diffusion 3.5 with Kontext's T5 and two CLIPs of Kontext's size."""
    text = build_kontext(image_size=8)
    clip, t5 = text.text_encoder.config, text.text_encoder_2.config
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=t5.d_model,
        caption_projection_dim=16,
        pooled_projection_dim=2 * clip.projection_dim,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return make(
        "StableDiffusion3Pipeline",
        transformer=transformer,
        vae=image_vae(),
        text_encoder=CLIPTextModelWithProjection(clip),
        tokenizer=text.tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip),
        tokenizer_2=text.tokenizer,
        text_encoder_3=text.text_encoder_2,
        tokenizer_3=text.tokenizer_2,
    )


def qwen_image(kind: str, downsamplings: int, *, width: int = 8, **more: Any) -> DiffusionPipeline:
    """Qwen-Image; editing scales references to a million pixels, which a deep VAE makes few."""
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=width,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=2,
        z_dim=4,
        dim_mult=[1] * (downsamplings + 1),
        num_res_blocks=0,
        temperal_downsample=[False] * downsamplings,
        latents_mean=[0.1] * 4,
        latents_std=[1.5] * 4,
    )
    return make(kind, transformer=transformer, vae=vae, **more)


def qwen_image_with_text() -> DiffusionPipeline:
    """Qwen-Image with a Qwen2.5-VL of its own and klein's tokenizer."""
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
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    return qwen_image("QwenImagePipeline", 1, width=16, text_encoder=encoder, tokenizer=tokenizer)


def z_image() -> DiffusionPipeline:
    """Z-Image with klein's Qwen3."""
    text = build_klein(image_size=8)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 16, 16],
    )
    return make(
        "ZImagePipeline",
        transformer=transformer,
        vae=image_vae(),
        text_encoder=text.text_encoder,
        tokenizer=text.tokenizer,
    )


def wan(kind: str, *, image: bool = False, **more: Any) -> DiffusionPipeline:
    """Wan, with the scheduler that its users set in place of UniPC."""
    tokenizer = build_kontext(image_size=8).tokenizer_2
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16 + 20 * image,
        text_dim=text.d_model,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
        image_dim=8 if image else None,
        added_kv_proj_dim=24 if image else None,
    )
    vae = diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1] * 4, num_res_blocks=1)
    if image:
        config = CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
        sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        more |= {
            "image_encoder": CLIPVisionModel(config),
            "image_processor": CLIPImageProcessorPil(**sizes),
        }
    return make(
        kind,
        transformer=transformer,
        vae=vae,
        text_encoder=UMT5EncoderModel(text),
        tokenizer=tokenizer,
        **more,
    )


def ltx(kind: str = "LTXPipeline") -> DiffusionPipeline:
    """LTX-Video with Kontext's T5."""
    text = build_kontext(image_size=8)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=text.text_encoder_2.config.d_model,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )
    return make(
        kind,
        transformer=transformer,
        vae=vae,
        text_encoder=text.text_encoder_2,
        tokenizer=text.tokenizer_2,
    )


SIZE = {"height": 8, "width": 8}
TEXT = {"max_sequence_length": 10}
CFG = "classifier-free"

VIDEO = {"height": 16, "width": 16, "num_frames": 5} | TEXT
WAN = {
    "none": {"guidance_scale": 1.0},
    CFG: {"guidance_scale": 5.0, "negative_prompt": NEGATIVE},
}
RESCALED = {"none": {"true_cfg_scale": 1.0}, f"{CFG}, norm rescaled": {"true_cfg_scale": 4.0}}


def qwen_embeddings(turn: int) -> Options:
    """Two prompts as embeddings, of which the second is shorter."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    given = embeddings(prompt_embeds=8, negative_prompt_embeds=8)(turn)
    return given | {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask.flip(0)}


def wan_embeddings(turn: int) -> Options:
    """Two prompts as embeddings, because Wan's image-to-video needs ftfy for text; an image."""
    given = embeddings(prompt_embeds=16, negative_prompt_embeds=16)(turn)
    return given | {"image": picture()}


def one(given: Options) -> Options:
    """The inputs of the first trajectory."""
    return {name: x[:1] for name, x in given.items()}


FAMILIES = {
    "FluxPipeline": Family(
        flux,
        prompts,
        SIZE | TEXT,
        {
            "embedded": {},
            f"embedded and {CFG}": {"negative_prompt": NEGATIVE, "true_cfg_scale": 2.5},
        },
        text="CLIP, T5",
    ),
    "FluxKontextPipeline": Family(
        lambda: build_kontext(image_size=8),
        lambda turn: edit(turn, 8),
        SIZE | TEXT | {"max_area": 64, "_auto_resize": False},
        {"none": {}, CFG: {"negative_prompt": NEGATIVE, "true_cfg_scale": 2.5}},
        text="CLIP, T5",
    ),
    "Flux2Pipeline": Family(
        flux2,
        embeddings(prompt_embeds=64),
        {"height": 64, "width": 64},
        {"embedded": {}, "embedded, with two references": {"image": [picture(), picture()]}},
    ),
    "Flux2KleinPipeline": Family(
        lambda: build_klein(image_size=8),
        edit,
        {"height": 64, "width": 64, "text_encoder_out_layers": (1, 2)} | TEXT,
        {"none": {"guidance_scale": 1.0}, CFG: {"guidance_scale": 4.0}},
        text="Qwen3",
    ),
    "StableDiffusion3Pipeline": Family(
        stable_diffusion_3,
        prompts,
        SIZE | TEXT,
        {
            "none": {"guidance_scale": 1.0},
            CFG: {"guidance_scale": 4.5, "negative_prompt": NEGATIVE},
        },
        text="two CLIP, T5",
    ),
    "QwenImagePipeline": Family(
        qwen_image_with_text,
        lambda turn: prompts(turn) | {"negative_prompt": NEGATIVE},
        {"height": 16, "width": 16},
        RESCALED,
        text="Qwen2.5-VL",
    ),
    "QwenImageEditPipeline": Family(
        lambda: qwen_image("QwenImageEditPipeline", 6),
        lambda turn: qwen_embeddings(turn) | {"image": picture()},
        {"height": 256, "width": 256},
        RESCALED,
    ),
    "QwenImageEditPlusPipeline": Family(
        lambda: qwen_image("QwenImageEditPlusPipeline", 6),
        lambda turn: one(qwen_embeddings(turn)) | {"image": [picture(), picture()]},
        {"height": 256, "width": 256, "num_images_per_prompt": 2},
        RESCALED,
    ),
    "ZImagePipeline": Family(
        z_image,
        prompts,
        SIZE | TEXT,
        {
            "none": {"guidance_scale": 0.0},
            CFG: {"guidance_scale": 5.0, "negative_prompt": NEGATIVE},
            f"{CFG}, norm limited": {
                "guidance_scale": 5.0,
                "negative_prompt": NEGATIVE,
                "cfg_normalization": True,
            },
        },
        text="Qwen3",
    ),
    "WanPipeline": Family(lambda: wan("WanPipeline"), prompts, VIDEO, WAN, text="UMT5"),
    "WanPipeline, expand_timesteps": Family(
        lambda: wan("WanPipeline", expand_timesteps=True), prompts, VIDEO, WAN, text="UMT5"
    ),
    "WanImageToVideoPipeline": Family(
        lambda: wan("WanImageToVideoPipeline", image=True),
        wan_embeddings,
        VIDEO,
        {"none": {"guidance_scale": 1.0}, CFG: {"guidance_scale": 5.0}},
    ),
    "LTXPipeline": Family(
        ltx,
        prompts,
        {"height": 32, "width": 32, "num_frames": 9} | TEXT,
        {
            "none": {"guidance_scale": 1.0},
            CFG: {"negative_prompt": NEGATIVE},
            f"{CFG}, std rescaled": {"negative_prompt": NEGATIVE, "guidance_rescale": 0.7},
        },
        text="T5",
    ),
}


@dataclass(frozen=True)
class Refused:
    """A pipeline or an option that the recorder refuses, and what its error must say."""

    build: Callable[[], DiffusionPipeline]
    options: Options
    reason: str


def with_unipc() -> DiffusionPipeline:
    """Wan with the scheduler that it ships with."""
    pipeline = wan("WanPipeline")
    pipeline.scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    return pipeline


REFUSED = {
    "Wan 2.2 A14B, whose steps are shared by two transformers": Refused(
        lambda: wan("WanPipeline", boundary_ratio=0.875),
        {},
        "boundary_ratio=0.875 hands those below sigma 0.875 to transformer_2",
    ),
    "Wan 2.2 TI2V-5B from an image (from text it is supported)": Refused(
        lambda: wan("WanImageToVideoPipeline", expand_timesteps=True),
        wan_embeddings(0) | VIDEO,
        "the pipeline changes the sample before the call",
    ),
    "LTX-Video from an image": Refused(
        lambda: ltx("LTXImageToVideoPipeline"),
        edit(0) | FAMILIES["LTXPipeline"].options,
        "may hold it in another layout",
    ),
    "Stable Diffusion 3.5 with `skip_guidance_layers`": Refused(
        stable_diffusion_3,
        prompts(0) | SIZE | TEXT | {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.9},
        "the transformer's calls hold the sample in different ways",
    ),
}
