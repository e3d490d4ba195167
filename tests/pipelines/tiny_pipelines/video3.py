"""HunyuanVideo, HunyuanVideo 1.5, Mochi, EasyAnimate."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.guiders import ClassifierFreeGuidance
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from .base import (
    CFG,
    Family,
    Inputs,
    Options,
    embeddings,
    make,
    normal,
    picture,
    plus,
    scheduler,
)

WIDTH = 16  # of text embeddings
FRAMES = {"height": 16, "width": 16, "num_frames": 5}
NAMES = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
GUIDED = {"none": {"guidance_scale": 1.0}, CFG: {"guidance_scale": 5.0}}


def padded(inputs: Inputs, mask: str = "{}prompt_attention_mask", **more: Any) -> Inputs:
    """Embeddings with masks; the last token of every other prompt is padding."""

    def given(turn: int, batch: int) -> Options:
        made = inputs(turn, batch) | more
        for kind in ("", "negative_"):
            if f"{kind}prompt_embeds" in made:
                tokens = torch.ones(made[f"{kind}prompt_embeds"].shape[:2], dtype=torch.int64)
                tokens[1::2, -1] = 0
                made[mask.format(kind)] = tokens
        return made

    return given


def positive(inputs: Inputs) -> Inputs:
    """The same inputs without the negative prompts, which would ask for guidance."""

    def given(turn: int, batch: int) -> Options:
        made = inputs(turn, batch)
        return {name: value for name, value in made.items() if not name.startswith("negative")}

    return given


hunyuan_text = padded(
    embeddings(
        prompt_embeds=WIDTH,
        pooled_prompt_embeds=8,
        negative_prompt_embeds=WIDTH,
        negative_pooled_prompt_embeds=8,
    )
)
TRUE_CFG = {
    "embedded": {"true_cfg_scale": 1.0},
    f"embedded and {CFG}": {"true_cfg_scale": 4.0},
}
PLAIN_CFG = {"none": {"true_cfg_scale": 1.0}, CFG: {"true_cfg_scale": 4.0}}


def hunyuan_vae() -> Any:
    """The autoencoder of HunyuanVideo: factor 4 in time, 8 in space."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def hunyuan(kind: str, **more: Any) -> DiffusionPipeline:
    """HunyuanVideo and what was made of it; ``more`` is of the transformer."""
    of = "Framepack" if "Framepack" in kind else ""
    transformer = getattr(diffusers, f"HunyuanVideo{of}Transformer3DModel")(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "text_embed_dim": WIDTH,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        }
        | more
    )
    parts = siglip() if of else {}
    return make(kind, transformer=transformer, vae=hunyuan_vae(), scheduler=scheduler(7.0), **parts)


def siglip() -> Options:
    """SigLIP's vision tower and its processor."""
    config = SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    return {"image_encoder": SiglipVisionModel(config), "feature_extractor": processor}


def hunyuan_1_5(kind: str, guided: bool = True) -> DiffusionPipeline:
    """HunyuanVideo 1.5, whose guidance is a part of the pipeline."""
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(2, 4, 4),
        target_size=32,
        task_type="i2v" if "Image" in kind else "t2v",
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8,) * 5,
        layers_per_block=1,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    guider = ClassifierFreeGuidance(guidance_scale=6.0, enabled=guided)
    parts = siglip() if "Image" in kind else {}
    return make(
        kind, transformer=transformer, vae=vae, guider=guider, scheduler=scheduler(5.0), **parts
    )


def hunyuan_1_5_text(turn: int, batch: int) -> Options:
    """Embeddings of both encoders and their masks."""
    made: Options = {}
    for k, kind in enumerate(("", "negative_")):
        for name, width, tokens in (("", WIDTH, 5), ("_2", 8, 3)):
            seed = turn + 10 * k + 100 * tokens
            made[f"{kind}prompt_embeds{name}"] = normal(batch, tokens, width, seed=seed)
            mask = torch.ones(batch, tokens)
            mask[1::2, -1] = 0
            made[f"{kind}prompt_embeds_mask{name}"] = mask
    return made


def mochi() -> DiffusionPipeline:
    """Mochi, whose time runs from noise to data."""
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=WIDTH,
        time_embed_dim=4,
        max_sequence_length=5,
    )
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    return make(
        "MochiPipeline",
        transformer=transformer,
        vae=vae,
        scheduler=scheduler(1.0, invert_sigmas=True),
    )


def easy_animate(kind: str, channels: int = 4) -> DiffusionPipeline:
    """EasyAnimate 5.1."""
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=4,
        patch_size=2,
        num_layers=1,
        mmdit_layers=1,
        time_embed_dim=4,
        text_embed_dim=WIDTH,
        resize_inpaint_mask_directly="Inpaint" in kind,
        add_noise_in_inpaint_model="Inpaint" in kind,
    )
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=[8, 8, 8, 8],
        layers_per_block=1,
        norm_num_groups=4,
        spatial_group_norm=False,
    )
    return make(
        kind, transformer=transformer, vae=vae, scheduler=scheduler(5.0, use_dynamic_shifting=True)
    )


def clip(batch: int = 1) -> torch.Tensor:
    """A video as EasyAnimate takes it, [B, 3, frames, height, width] in 0..1."""
    return normal(batch, 3, 5, 16, 16, seed=5).sigmoid()


easy_text = padded(embeddings(prompt_embeds=WIDTH, negative_prompt_embeds=WIDTH))
BIG = {"height": 32, "width": 32, "num_frames": 5}
SKYREELS = {"guidance_embeds": False, "in_channels": 8}
FRAMEPACK = {
    "has_image_proj": True,
    "image_proj_dim": 8,
    "has_clean_x_embedder": True,
    "patch_size": 2,
}
PACKED = {"height": 32, "width": 32, "num_frames": 4, "latent_window_size": 1}
MASK_VIDEO = torch.ones(1, 1, 5, 16, 16)

FAMILIES = {
    "HunyuanVideoPipeline": Family(
        lambda: hunyuan("HunyuanVideoPipeline"), hunyuan_text, FRAMES, TRUE_CFG
    ),
    "HunyuanVideoImageToVideoPipeline, first frame as channels": Family(
        lambda: hunyuan(
            "HunyuanVideoImageToVideoPipeline",
            image_condition_type="latent_concat",
            in_channels=9,
            guidance_embeds=False,
        ),
        plus(hunyuan_text, image=picture(16)),
        FRAMES,
        PLAIN_CFG,
        batches=(1,),
    ),
    "HunyuanVideoImageToVideoPipeline, first frame as tokens": Family(
        lambda: hunyuan("HunyuanVideoImageToVideoPipeline", image_condition_type="token_replace"),
        plus(hunyuan_text, image=picture(16)),
        FRAMES,
        TRUE_CFG,
        batches=(1,),
    ),
    "HunyuanSkyreelsImageToVideoPipeline": Family(
        lambda: hunyuan("HunyuanSkyreelsImageToVideoPipeline", **SKYREELS),
        plus(hunyuan_text, image=picture(16)),
        FRAMES,
        PLAIN_CFG,
        batches=(1,),
    ),
    "HunyuanVideoFramepackPipeline": Family(
        lambda: hunyuan("HunyuanVideoFramepackPipeline", **FRAMEPACK),
        plus(hunyuan_text, image=picture(16)),
        PACKED,
        TRUE_CFG,
        batches=(1,),
    ),
    "HunyuanVideoFramepackPipeline, vanilla": Family(
        lambda: hunyuan("HunyuanVideoFramepackPipeline", **FRAMEPACK),
        plus(hunyuan_text, image=picture(16)),
        PACKED | {"sampling_type": "vanilla"},
        TRUE_CFG,
        batches=(1,),
    ),
    "HunyuanVideo15Pipeline": Family(
        lambda: hunyuan_1_5("HunyuanVideo15Pipeline"),
        hunyuan_1_5_text,
        BIG,
        {CFG: {}},
        output="latent",
    ),
    "HunyuanVideo15Pipeline, guidance off": Family(
        lambda: hunyuan_1_5("HunyuanVideo15Pipeline", guided=False),
        hunyuan_1_5_text,
        BIG,
        output="latent",
    ),
    "HunyuanVideo15ImageToVideoPipeline": Family(
        lambda: hunyuan_1_5("HunyuanVideo15ImageToVideoPipeline"),
        plus(hunyuan_1_5_text, image=picture(32)),
        {"num_frames": 5},
        {CFG: {}},
        output="latent",
    ),
    "MochiPipeline": Family(mochi, easy_text, {"height": 16, "width": 16, "num_frames": 7}, GUIDED),
    "EasyAnimatePipeline": Family(
        lambda: easy_animate("EasyAnimatePipeline"),
        easy_text,
        FRAMES,
        GUIDED | {f"{CFG}, std rescaled": {"guidance_scale": 5.0, "guidance_rescale": 0.7}},
    ),
    "EasyAnimateInpaintPipeline": Family(
        lambda: easy_animate("EasyAnimateInpaintPipeline", 9),
        plus(easy_text, video=clip(), mask_video=MASK_VIDEO * 255),
        FRAMES,
        GUIDED,
        batches=(1,),
    ),
}

NOT_BUILT = {
    "EasyAnimateControlPipeline": "in diffusers 0.42.1 every call raises a TypeError, because "
    "its encode_prompt does not take the text_encoder_index that it is given",
}
