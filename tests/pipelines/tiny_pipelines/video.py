"""Wan and the pipelines that share its transformer and autoencoder."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from .base import (
    CFG,
    Family,
    Options,
    embeddings,
    half_mask,
    make,
    picture,
    plus,
    scheduler,
)
from .refusals import refused

WIDTH = 16  # of text embeddings
FRAMES = {"height": 16, "width": 16, "num_frames": 5}
GUIDED = {"none": {"guidance_scale": 1.0}, CFG: {"guidance_scale": 5.0}}

text = embeddings(prompt_embeds=WIDTH, negative_prompt_embeds=WIDTH)


def video(frames: int = 5, size: int = 16) -> list[Any]:
    """Frames of random blocks."""
    return [picture(size, seed=frame) for frame in range(frames)]


def vae(**more: Any) -> diffusers.AutoencoderKLWan:
    """The autoencoder of Wan 2.1: factor 4 in time, 8 in space."""
    return diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1] * 4, num_res_blocks=1, **more)


def transformer(kind: str = "WanTransformer3DModel", **more: Any) -> Any:
    """A transformer of one layer; ``image_dim`` adds the attention to image embeddings."""
    image = {"image_dim": 8, "added_kv_proj_dim": 24} if more.pop("image", False) else {}
    return getattr(diffusers, kind)(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 16,
            "text_dim": WIDTH,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 1,
            "rope_max_seq_len": 32,
        }
        | image
        | more
    )


def image_encoder() -> Options:
    """CLIP's vision tower and its processor."""
    config = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return {
        "image_encoder": CLIPVisionModel(config),
        "image_processor": CLIPImageProcessorPil(**sizes),
    }


def build(kind: str, model: Any, shift: float = 3.0, **more: Any) -> DiffusionPipeline:
    """A pipeline of Wan's parts."""
    return make(kind, transformer=model, **{"vae": vae(), "scheduler": scheduler(shift)} | more)


def unipc(shift: float) -> UniPCMultistepScheduler:
    """The scheduler that Wan and SkyReels-V2 ship."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def i2v(kind: str = "WanImageToVideoPipeline", shift: float = 3.0, **more: Any) -> Any:
    """Image-to-video with CLIP: the image lies behind the sample, along the channels."""
    return build(kind, transformer(in_channels=36, image=True), shift, **image_encoder(), **more)


def wan_2_2_i2v() -> DiffusionPipeline:
    """Wan 2.2 image-to-video has no CLIP: one of its two transformers, for all steps."""
    return build("WanImageToVideoPipeline", transformer(in_channels=36), 5.0)


def ti2v(kind: str) -> DiffusionPipeline:
    """Wan 2.2 TI2V-5B: clean frames in the place of noisy ones, one time per token."""
    return build(kind, transformer(), 5.0, expand_timesteps=True)


def two_experts(kind: str, model: Any, second: Any, boundary: float) -> DiffusionPipeline:
    """Wan 2.2 A14B: the steps below a flow time belong to the second transformer."""
    return build(kind, model, 5.0, transformer_2=second, boundary_ratio=boundary)


def vace() -> Any:
    """VACE's transformer, with a control branch beside its layer."""
    return transformer("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=96)


def animate() -> DiffusionPipeline:
    """Wan-Animate: a pose, a face and a character."""
    model = transformer(
        "WanAnimateTransformer3DModel",
        in_channels=36,
        image=True,
        num_layers=2,
        motion_encoder_channel_sizes={"4": 4, "8": 4, "16": 4},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    return build("WanAnimatePipeline", model, 5.0, **image_encoder())


def chrono_edit() -> DiffusionPipeline:
    """ChronoEdit: an edit as the last frame of a video."""
    model = transformer("ChronoEditTransformer3DModel", in_channels=36, image=True)
    return build("ChronoEditPipeline", model, 5.0, **image_encoder())


def lucy() -> DiffusionPipeline:
    """Lucy Edit: the video to edit lies behind the sample, along the channels."""
    return build("LucyEditPipeline", transformer(in_channels=32), 5.0, expand_timesteps=True)


def skyreels(kind: str, shift: float = 8.0, **more: Any) -> DiffusionPipeline:
    """SkyReels-V2 of Wan's parts; diffusion forcing needs integer timesteps, which UniPC has."""
    parts = image_encoder() if more.get("image") else {}
    if "Forcing" in kind:
        parts["scheduler"] = unipc(shift)
    return build(
        kind, transformer("SkyReelsV2Transformer3DModel", **more), **{"shift": shift} | parts
    )


CONTROL = {"video": video(), "mask": [half_mask(16)] * 5}
POSES = {"pose_video": video(), "face_video": video()}
FORCING = FRAMES | {"base_num_frames": 5, "num_frames": 5}
LONG = {"overlap_history": 1, "base_num_frames": 5, "num_frames": 9}

FAMILIES = {
    "WanPipeline": Family(lambda: build("WanPipeline", transformer()), text, FRAMES, GUIDED),
    "WanPipeline, Wan 2.2 TI2V-5B": Family(lambda: ti2v("WanPipeline"), text, FRAMES, GUIDED),
    "WanImageToVideoPipeline": Family(i2v, plus(text, image=picture(16)), FRAMES, GUIDED),
    "WanImageToVideoPipeline, first and last frame": Family(
        lambda: build(
            "WanImageToVideoPipeline",
            transformer(in_channels=36, image=True, pos_embed_seq_len=10),
            **image_encoder(),
        ),
        plus(text, image=picture(16), last_image=picture(16, seed=1)),
        FRAMES,
        GUIDED,
        batches=(1,),
    ),
    "WanImageToVideoPipeline, Wan 2.2 without CLIP": Family(
        wan_2_2_i2v, plus(text, image=picture(16)), FRAMES, GUIDED
    ),
    "WanVideoToVideoPipeline": Family(
        lambda: build("WanVideoToVideoPipeline", transformer()),
        plus(text, video=video()),
        {"height": 16, "width": 16, "strength": 0.7},
        GUIDED,
        steps=4,
        batches=(1,),
    ),
    "WanVACEPipeline": Family(
        lambda: build("WanVACEPipeline", vace()), text, FRAMES, GUIDED, batches=(1,)
    ),
    "WanVACEPipeline, with a video and its mask": Family(
        lambda: build("WanVACEPipeline", vace()),
        plus(text, **CONTROL),
        FRAMES,
        GUIDED,
        batches=(1,),
    ),
    "WanVACEPipeline, with a reference": Family(
        lambda: build("WanVACEPipeline", vace()),
        plus(text, reference_images=[picture(16)]),
        FRAMES,
        GUIDED,
        batches=(1,),
    ),
    "WanAnimatePipeline": Family(
        animate,
        plus(text, image=picture(16), **POSES),
        {"height": 16, "width": 16, "segment_frame_length": 5},
        GUIDED,
    ),
    "ChronoEditPipeline": Family(
        chrono_edit, plus(text, image=picture(16)), FRAMES, GUIDED, batches=(1, 3)
    ),
    "LucyEditPipeline": Family(lucy, plus(text, video=video()), FRAMES, GUIDED, batches=(1,)),
    "SkyReelsV2Pipeline": Family(lambda: skyreels("SkyReelsV2Pipeline"), text, FRAMES, GUIDED),
    "SkyReelsV2ImageToVideoPipeline": Family(
        lambda: skyreels("SkyReelsV2ImageToVideoPipeline", 5.0, in_channels=36, image=True),
        plus(text, image=picture(16)),
        FRAMES,
        GUIDED,
    ),
}

REFUSED = {
    "WanImageToVideoPipeline, Wan 2.2 TI2V-5B": refused(
        Family(
            lambda: ti2v("WanImageToVideoPipeline"), plus(text, image=picture(16)), FRAMES, GUIDED
        ),
        "none does",
    ),
    "SkyReelsV2DiffusionForcingPipeline": refused(
        Family(
            lambda: skyreels("SkyReelsV2DiffusionForcingPipeline", inject_sample_info=True),
            plus(text, prompt=None),
            FORCING,
            GUIDED,
            batches=(1,),
        ),
        "none does",
    ),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": refused(
        Family(
            lambda: skyreels("SkyReelsV2DiffusionForcingImageToVideoPipeline", 5.0),
            plus(text, image=picture(16)),
            FORCING,
            GUIDED,
            batches=(1,),
        ),
        "none does",
    ),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": refused(
        Family(
            lambda: skyreels("SkyReelsV2DiffusionForcingVideoToVideoPipeline"),
            plus(text, video=video()),
            FORCING | LONG,
            GUIDED,
            batches=(1,),
        ),
        "none does",
    ),
}
