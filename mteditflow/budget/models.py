"""Known models with the sizes of their parts, and the rows of each pipeline class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mteditflow.budget.inputs import Shape

Config = Mapping[str, Any]
_FLUX_VAE: Config = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


@dataclass(frozen=True)
class Part:
    """Component of a pipeline: its class, and the arguments that differ from its defaults.

    Attributes:
        kind: class in diffusers or transformers.
        config: arguments of the class, or of its configuration for a text encoder.
    """

    kind: str
    config: Config = field(default_factory=dict)


#: Autoencoders by name.
VAES = {
    "flux": Part("AutoencoderKL", _FLUX_VAE),
    "flux2": Part("AutoencoderKLFlux2"),
    "qwen": Part("AutoencoderKLQwenImage"),
    "wan": Part("AutoencoderKLWan"),
}
_T5: Config = {
    "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_QWEN3: Config = {
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936,
}  # fmt: skip
#: Text encoders by name, with the arguments of their configurations.
ENCODERS = {
    "t5-xxl": Part("T5EncoderModel", {**_T5, "vocab_size": 32128}),
    "umt5-xxl": Part("UMT5EncoderModel", {**_T5, "vocab_size": 256384}),
    "clip-l": Part(
        "CLIPTextModel",
        {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
    ),
    "clip-g": Part(
        "CLIPTextModelWithProjection",
        {
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
            "num_attention_heads": 20, "projection_dim": 1280,
        },
    ),
    "qwen3-4b": Part(
        "Qwen3ForCausalLM",
        {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    ),
    "qwen3-8b": Part(
        "Qwen3ForCausalLM",
        {**_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
    ),
    "mistral-small": Part(
        "Mistral3ForConditionalGeneration",
        {
            "tie_word_embeddings": False,
            "text_config": {
                "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768,
                "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
                "head_dim": 128, "vocab_size": 131072,
            },
            "vision_config": {
                "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096,
                "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
            },
        },
    ),
    "qwen2.5-vl": Part(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "tie_word_embeddings": False,
            "text_config": {
                "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
            },
            "vision_config": {
                "hidden_size": 1280, "out_hidden_size": 3584, "depth": 32,
                "intermediate_size": 3420, "num_heads": 16,
            },
        },
    ),
}  # fmt: skip

_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


@dataclass(frozen=True)
class Pipeline:
    """Properties of a pipeline class that determine its costs.

    Attributes:
        transformer: class of its transformer.
        targets: endings of the names of adapted layers: attention and feed-forward of all blocks.
        text: default number of text tokens of a call.
        padded: whether an option for the length sets the number of tokens; if not, the option only
            truncates longer texts.
        more_text: additional text tokens that no option changes.
        reference: size of references: "none", there are none; "output", the output's size;
            "megapixel", about 1024 x 1024.
        guidance: "embedded", one pass; "branches", a second pass above the scale ``unguided``.
        unguided: highest guidance scale without a second pass.
        reads_images: whether the text encoder reads the references of a turn.
        one_by_one: whether several images of a call are several references of one edit, so that
            trajectories are sampled one at a time.
    """

    transformer: str
    targets: tuple[str, ...]
    text: int
    padded: bool = True
    more_text: int = 0
    reference: Literal["none", "output", "megapixel"] = "none"
    guidance: Literal["embedded", "branches"] = "branches"
    unguided: float = 1.0
    reads_images: bool = False
    one_by_one: bool = False

    def shape(
        self, resolution: int, *, text: int | None = None, references: int = 1, token: int = 16
    ) -> Shape:
        """Return the sizes of a row.

        Args:
            resolution: side of the square output, in pixels.
            text: number of text tokens, as the call's option sets it; None: the default.
            references: number of reference images, if the pipeline takes any.
            token: side of the square that one image token covers, in pixels.

        Raises:
            ValueError: the resolution is no multiple of ``token``.
        """
        if resolution % token:
            raise ValueError(f"resolution: expected a multiple of {token} pixels, got {resolution}")
        side = {"none": 0, "output": resolution, "megapixel": 1024}[self.reference]
        tokens = self.text if text is None else text if self.padded else min(text, self.text)
        return Shape(
            resolution,
            tokens + self.more_text,
            references if side else 0,
            side,
            token,
        )


_FLUX2_TARGETS = (
    *_ATTENTION,
    *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
    *("attn.to_qkv_mlp_proj", "attn.to_out"),
)
#: Pipelines by their class in ``model_index.json``.
PIPELINES = {
    "FluxKontextPipeline": Pipeline(
        "FluxTransformer2DModel",
        (*_ATTENTION, *_FEED_FORWARD, "proj_mlp", "proj_out"),
        text=512,
        reference="output",
        guidance="embedded",
    ),
    "Flux2KleinPipeline": Pipeline(
        "Flux2Transformer2DModel", _FLUX2_TARGETS, text=512, reference="output", one_by_one=True
    ),
    "Flux2Pipeline": Pipeline(
        "Flux2Transformer2DModel",
        _FLUX2_TARGETS,
        text=512,
        reference="output",
        guidance="embedded",
        one_by_one=True,
    ),
    "QwenImageEditPlusPipeline": Pipeline(
        "QwenImageTransformer2DModel",
        (*_ATTENTION, *(f"{x}_mlp.net.{y}" for x in ("img", "txt") for y in ("0.proj", "2"))),
        text=256,
        padded=False,
        reference="megapixel",
        reads_images=True,
        one_by_one=True,
    ),
    "ZImagePipeline": Pipeline(
        "ZImageTransformer2DModel",
        (
            *(f"attention.to_{x}" for x in ("q", "k", "v", "out.0")),
            *(f"feed_forward.w{x}" for x in (1, 2, 3)),
        ),
        text=256,
        padded=False,
        unguided=0.0,
    ),
    "StableDiffusion3Pipeline": Pipeline(
        "SD3Transformer2DModel",
        (*_ATTENTION, *(f"attn2.to_{x}" for x in ("q", "k", "v", "out.0")), *_FEED_FORWARD),
        text=256,
        more_text=77,
    ),
    "WanPipeline": Pipeline(
        "WanTransformer3DModel",
        (
            *(f"attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")),
            *("ffn.net.0.proj", "ffn.net.2"),
        ),
        text=512,
    ),
}


@dataclass(frozen=True)
class Model:
    """Pipeline with the sizes of its parts.

    Attributes:
        name: name in tables.
        pipeline: class of the pipeline, a key of ``PIPELINES``.
        config: arguments of its transformer where they differ from the class's defaults.
        vae: its autoencoder.
        encoders: its text encoders.
        hubs: its ids on the Hugging Face hub.
        distilled: whether it has no second pass at any guidance scale.
        token: side of the square that one image token covers, in pixels.
    """

    name: str
    pipeline: str
    config: Config
    vae: Part
    encoders: tuple[Part, ...]
    hubs: tuple[str, ...] = ()
    distilled: bool = False
    token: int = 16

    @property
    def behavior(self) -> Pipeline:
        """Return the entry of its pipeline in ``PIPELINES``."""
        return PIPELINES[self.pipeline]

    def branches(self, guidance: float, options: Config | None = None) -> int:
        """Return the number of forward passes for one velocity: 1, or 2 under guidance.

        Args:
            guidance: the call's guidance_scale.
            options: further options of the call. ``true_cfg_scale`` takes precedence over the
                scale; where guidance is embedded it also needs a ``negative_prompt``.
        """
        given = options or {}
        if self.behavior.guidance == "embedded":
            guided = given.get("negative_prompt") is not None
            return 2 if guided and given.get("true_cfg_scale", 1.0) > 1 else 1
        scale = given.get("true_cfg_scale", guidance)
        return 2 if scale > self.behavior.unguided and not self.distilled else 1


def _known(
    name: str,
    pipeline: str,
    vae: str,
    encoders: str,
    hubs: str,
    distilled: bool = False,
    **config: Any,
) -> Model:
    return Model(
        name,
        pipeline,
        config,
        VAES[vae],
        tuple(ENCODERS[x] for x in encoders.split()),
        tuple(hubs.split()),
        distilled,
    )


_KLEIN_4B: Config = {
    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
    "joint_attention_dim": 7680, "guidance_embeds": False,
}  # fmt: skip
_KLEIN_9B: Config = {
    "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32,
    "joint_attention_dim": 12288, "guidance_embeds": False,
}  # fmt: skip
_SD3: Config = {"joint_attention_dim": 4096, "qk_norm": "rms_norm", "attention_head_dim": 64}

#: Models by name; their transformers are built from these arguments, and nothing is downloaded.
MODELS = {
    model.name: model
    for model in (
        _known(
            "kontext", "FluxKontextPipeline", "flux", "t5-xxl clip-l",
            "black-forest-labs/FLUX.1-Kontext-dev", guidance_embeds=True,
        ),
        _known(
            "klein-4b", "Flux2KleinPipeline", "flux2", "qwen3-4b",
            "black-forest-labs/FLUX.2-klein-base-4B", **_KLEIN_4B,
        ),
        _known(
            "klein-9b", "Flux2KleinPipeline", "flux2", "qwen3-8b",
            "black-forest-labs/FLUX.2-klein-base-9B", **_KLEIN_9B,
        ),
        _known(
            "klein-4b-distilled", "Flux2KleinPipeline", "flux2", "qwen3-4b",
            "black-forest-labs/FLUX.2-klein-4B", distilled=True, **_KLEIN_4B,
        ),
        _known(
            "klein-9b-distilled", "Flux2KleinPipeline", "flux2", "qwen3-8b",
            "black-forest-labs/FLUX.2-klein-9B", distilled=True, **_KLEIN_9B,
        ),
        _known(
            "flux2-dev", "Flux2Pipeline", "flux2", "mistral-small",
            "black-forest-labs/FLUX.2-dev", joint_attention_dim=15360,
        ),
        _known(
            "qwen-edit-2509", "QwenImageEditPlusPipeline", "qwen", "qwen2.5-vl",
            "Qwen/Qwen-Image-Edit-2509",
        ),
        _known(
            "qwen-edit-2511", "QwenImageEditPlusPipeline", "qwen", "qwen2.5-vl",
            "Qwen/Qwen-Image-Edit-2511", zero_cond_t=True,
        ),
        _known("z-image", "ZImagePipeline", "flux", "qwen3-4b", "Tongyi-MAI/Z-Image"),
        _known(
            "sd3.5-medium", "StableDiffusion3Pipeline", "flux", "t5-xxl clip-l clip-g",
            "stabilityai/stable-diffusion-3.5-medium", num_layers=24, num_attention_heads=24,
            caption_projection_dim=1536, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)), **_SD3,
        ),
        _known(
            "sd3.5-large", "StableDiffusion3Pipeline", "flux", "t5-xxl clip-l clip-g",
            "stabilityai/stable-diffusion-3.5-large", num_layers=38, num_attention_heads=38,
            caption_projection_dim=2432, pos_embed_max_size=192, **_SD3,
        ),
        _known(
            "wan2.1-1.3b", "WanPipeline", "wan", "umt5-xxl", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            num_layers=30, num_attention_heads=12, ffn_dim=8960,
        ),
        _known("wan2.1-14b", "WanPipeline", "wan", "umt5-xxl", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    )
}  # fmt: skip
