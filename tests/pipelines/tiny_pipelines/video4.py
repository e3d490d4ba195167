"""Cosmos, Kandinsky 5, SANA-Video, Motif-Video."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance

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
from .video import video
from .video3 import hunyuan_vae, padded, siglip

WIDTH = 16  # of text embeddings
FRAMES = {"height": 16, "width": 16, "num_frames": 5}
GUIDED = {"none": {"guidance_scale": 1.0}, CFG: {"guidance_scale": 5.0}}
EDM = {"sigma_max": 80.0, "sigma_min": 0.002, "sigma_data": 0.5, "final_sigmas_type": "sigma_min"}

text = embeddings(prompt_embeds=WIDTH, negative_prompt_embeds=WIDTH)
masked_text = padded(text)


class Permissive(torch.nn.Module):
    """In the place of Cosmos's guardrail, a package of its own: all prompts and videos pass."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        """Every prompt passes."""
        return True

    def check_video_safety(self, frames: Any) -> Any:
        """Every video passes as it is."""
        return frames


def wan_vae(channels: int = 16) -> Any:
    """The autoencoder of Wan 2.1, of which Cosmos 2 and SANA-Video make use."""
    return diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=channels,
        dim_mult=[1] * 4,
        num_res_blocks=1,
        latents_mean=[0.1] * channels,
        latents_std=[1.5] * channels,
    )


def cosmos(kind: str, channels: int = 16, **more: Any) -> DiffusionPipeline:
    """Cosmos; ``more`` is of the pipeline or, by name, of its transformer."""
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=channels,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=False,
        extra_pos_embed_type=more.pop("positions", None),
    )
    parts = {"transformer": transformer, "vae": wan_vae(), "safety_checker": Permissive()}
    return make(kind, **parts | more)


def cosmos_1(kind: str, channels: int) -> DiffusionPipeline:
    """Cosmos 1, with its scheduler for noise up to sigma = 80."""
    vae = diffusers.AutoencoderKLCosmos(
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=2,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    return cosmos(
        kind,
        channels,
        vae=vae,
        scheduler=EDMEulerScheduler(
            sigma_min=0.002,
            sigma_max=80,
            sigma_data=0.5,
            sigma_schedule="karras",
            num_train_timesteps=1000,
            prediction_type="epsilon",
            rho=7.0,
            final_sigmas_type="sigma_min",
        ),
        positions="learnable",
    )


def cosmos_2(kind: str, channels: int) -> DiffusionPipeline:
    """Cosmos 2: a flow Euler scheduler over noise up to sigma = 80."""
    steps = scheduler(1.0, use_karras_sigmas=True)
    steps.register_to_config(**EDM)
    return cosmos(kind, channels, scheduler=steps)


def kandinsky(kind: str, channels: int = 4, cond: bool = False) -> DiffusionPipeline:
    """Kandinsky 5, whose samples have their channels last."""
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=channels,
        out_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=8,
        time_dim=8,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 4, 8),
        visual_cond=cond,
    )
    return make(kind, transformer=transformer, vae=hunyuan_vae(), scheduler=scheduler(5.0))


def kandinsky_text(turn: int, batch: int) -> Options:
    """Embeddings of Qwen and CLIP; the lengths are told as cumulated sums."""
    made: Options = {}
    for k, kind in enumerate(("", "negative_")):
        seed = turn + 10 * k
        made[f"{kind}prompt_embeds_qwen"] = normal(batch, 5, WIDTH, seed=seed)
        made[f"{kind}prompt_embeds_clip"] = normal(batch, 8, seed=seed + 1000)
        sums = torch.arange(batch + 1, dtype=torch.int32) * 5
        made[f"{kind}prompt_cu_seqlens"] = sums
    return made


def sana(kind: str, **more: Any) -> DiffusionPipeline:
    """SANA-Video."""
    transformer = diffusers.SanaVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=WIDTH,
        sample_size=2,
    )
    parts = {"transformer": transformer, "vae": wan_vae(), "scheduler": scheduler(8.0)}
    return make(kind, **parts | more)


def motif(kind: str, guider: Any = None) -> DiffusionPipeline:
    """Motif-Video, whose guidance is a part of the pipeline."""
    image = {"image_embed_dim": 8} if "Image" in kind else {}
    transformer = diffusers.MotifVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_decoder_layers=1,
        patch_size=2,
        text_embed_dim=WIDTH,
        rope_axes_dim=(4, 4, 4),
        **image,
    )
    guider = guider or AdaptiveProjectedGuidance(guidance_scale=8.0)
    parts = {"feature_extractor": siglip()["feature_extractor"]} if image else {}
    return make(
        kind,
        transformer=transformer,
        vae=wan_vae(),
        guider=guider,
        scheduler=scheduler(15.0),
        **parts,
    )


BIG = {"height": 32, "width": 32, "num_frames": 5}
SANA = {"height": 32, "width": 32, "frames": 5, "use_resolution_binning": False}

FAMILIES = {
    "Cosmos2_5_PredictBasePipeline": Family(
        lambda: cosmos("Cosmos2_5_PredictBasePipeline", 17), text, FRAMES, GUIDED
    ),
    "Kandinsky5T2VPipeline": Family(
        lambda: kandinsky("Kandinsky5T2VPipeline"),
        kandinsky_text,
        BIG,
        GUIDED,
        lora=KANDINSKY,
    ),
    "SanaVideoPipeline": Family(
        lambda: sana("SanaVideoPipeline"), masked_text, SANA | {"negative_prompt": None}, GUIDED
    ),
    "MotifVideoPipeline, adaptive projected guidance": Family(
        lambda: motif("MotifVideoPipeline"), masked_text, FRAMES, {CFG: {}}
    ),
    "MotifVideoPipeline": Family(
        lambda: motif("MotifVideoPipeline", ClassifierFreeGuidance(5.0)),
        masked_text,
        FRAMES,
        {CFG: {}},
    ),
    "MotifVideoImage2VideoPipeline": Family(
        lambda: motif("MotifVideoImage2VideoPipeline", ClassifierFreeGuidance(5.0)),
        plus(masked_text, image=picture(16), prompt=None),
        FRAMES,
        {CFG: {}},
        batches=(1,),
    ),
}

REFUSED = {
    "CosmosTextToWorldPipeline": refused(
        Family(lambda: cosmos_1("CosmosTextToWorldPipeline", 16), text, FRAMES, GUIDED),
        "with EDMEulerScheduler",
    ),
    "CosmosVideoToWorldPipeline": refused(
        Family(
            lambda: cosmos_1("CosmosVideoToWorldPipeline", 17),
            plus(text, image=picture(16)),
            FRAMES,
            GUIDED,
            batches=(1,),
        ),
        "with EDMEulerScheduler",
    ),
    "Cosmos2TextToImagePipeline": refused(
        Family(
            lambda: cosmos_2("Cosmos2TextToImagePipeline", 16),
            text,
            {"height": 16, "width": 16},
            GUIDED,
        ),
        "expected a grid that falls from at most 1 to 0",
    ),
    "Cosmos2VideoToWorldPipeline": refused(
        Family(
            lambda: cosmos_2("Cosmos2VideoToWorldPipeline", 17),
            plus(text, image=picture(16)),
            FRAMES,
            GUIDED,
            batches=(1,),
        ),
        "expected a grid that falls from at most 1 to 0",
    ),
    "Cosmos2_5_PredictBasePipeline, from a video": refused(
        Family(
            lambda: cosmos("Cosmos2_5_PredictBasePipeline", 17),
            plus(text, video=video()),
            FRAMES | {"num_latent_conditional_frames": 1},
            GUIDED,
            batches=(1,),
        ),
        "none does",
    ),
    "Kandinsky5I2VPipeline": refused(
        Family(
            lambda: kandinsky("Kandinsky5I2VPipeline", 4, cond=True),
            plus(kandinsky_text, image=picture(16)),
            FRAMES | {"num_frames": 25},
            GUIDED,
            batches=(1,),
        ),
        "none does",
    ),
    "SanaImageToVideoPipeline": refused(
        Family(
            lambda: sana("SanaImageToVideoPipeline"),
            plus(masked_text, image=picture(16)),
            SANA | {"negative_prompt": None},
            GUIDED,
        ),
        "one argument of the transformer should hold the scheduler's timestep",
    ),
}

NOT_BUILT = {
    "Cosmos2_5_TransferPipeline": "its control network needs torchvision, which is not installed",
}
