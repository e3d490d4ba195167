"""Tiny editors of the real diffusers classes, built offline from their configs.

Nothing is downloaded: tokenizers contain the words of the shapes world, text encoders are random
and frozen (reproducible from a seed), and the VAE is an identity with hand-set weights. Only the
transformer is trained; the repository has weights for both families, see :func:`load_editor`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from .world import IMAGE_SIZE, WORDS

STEPS = 4
TEXT_TOKENS = 10
TEXT_LAYERS = (1, 2)  # layers of klein's text encoder whose hidden states condition it
KLEIN_SCALE = 8  # klein refuses references below 64 pixels: every world pixel becomes 8 x 8
LATENT_CHANNELS = 4  # three colors and one zero: with 3, Kontext would mistake RGB for latents
WEIGHTS = Path(__file__).parent / "weights"


class Family(str, Enum):
    """Tiny editors by the family of their pipeline."""

    kontext = "kontext"
    klein = "klein"


def build_kontext(
    *,
    seed: int = 0,
    image_size: int = IMAGE_SIZE,
    num_layers: int = 1,
    num_single_layers: int = 3,
    num_attention_heads: int = 4,
    attention_head_dim: int = 16,
) -> FluxKontextPipeline:
    """Build a tiny, untrained FLUX.1-Kontext pipeline; call it with :func:`call_options`.

    Args:
        seed: Seed of all random weights; the global generator is not changed.
        image_size: Height and width in pixels, a multiple of 2; the VAE's factor is 1.
        num_layers: Double-stream blocks.
        num_single_layers: Single-stream blocks.
        num_attention_heads: Attention heads.
        attention_head_dim: Width of a head, a multiple of 8.

    Returns:
        The pipeline, float32, on the CPU, in eval mode, with its progress bar off.
    """
    eighth = attention_head_dim // 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = clip_config(len(clip_tokenizer(WORDS)))
        t5_words = t5_tokenizer(WORDS)
        t5 = T5Config(
            vocab_size=len(t5_tokenizer(WORDS)),
            d_model=64,
            d_kv=16,
            d_ff=64,
            num_layers=1,
            num_heads=2,
        )
        pipeline = FluxKontextPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
            vae=_identity_vae(AutoencoderKL, blocks=1, sample_size=image_size),
            text_encoder=CLIPTextModel(clip),
            tokenizer=clip_tokenizer(WORDS),
            text_encoder_2=T5EncoderModel(t5),
            tokenizer_2=t5_words,
            transformer=FluxTransformer2DModel(
                in_channels=4 * LATENT_CHANNELS,
                num_layers=num_layers,
                num_single_layers=num_single_layers,
                attention_head_dim=attention_head_dim,
                num_attention_heads=num_attention_heads,
                joint_attention_dim=t5.d_model,
                pooled_projection_dim=clip.hidden_size,
                axes_dims_rope=(2 * eighth, 3 * eighth, 3 * eighth),
            ),
        )
    return frozen(pipeline)


def build_klein(
    *,
    seed: int = 0,
    image_size: int = IMAGE_SIZE,
    num_layers: int = 1,
    num_single_layers: int = 2,
    num_attention_heads: int = 4,
    attention_head_dim: int = 16,
) -> Flux2KleinPipeline:
    """Build a tiny, untrained FLUX.2-klein pipeline; call it with :func:`call_options`.

    The VAE has a factor of 8 and is exact on images whose 8 x 8 blocks are of one color, which
    is what :func:`enlarge` makes of an image of the world: klein takes nothing below 64 pixels.

    Args:
        seed: Seed of all random weights; the global generator is not changed.
        image_size: Height and width in pixels of the world; the pipeline's is 8 times that.
        num_layers: Double-stream blocks.
        num_single_layers: Single-stream blocks.
        num_attention_heads: Attention heads.
        attention_head_dim: Width of a head, a multiple of 8.

    Returns:
        The pipeline, float32, on the CPU, in eval mode, with its progress bar off.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _qwen_tokenizer()
        qwen = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
        pipeline = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
            vae=_identity_vae(AutoencoderKLFlux2, blocks=4, sample_size=KLEIN_SCALE * image_size),
            text_encoder=Qwen3ForCausalLM(qwen),
            tokenizer=tokenizer,
            transformer=Flux2Transformer2DModel(
                in_channels=4 * LATENT_CHANNELS,
                num_layers=num_layers,
                num_single_layers=num_single_layers,
                attention_head_dim=attention_head_dim,
                num_attention_heads=num_attention_heads,
                joint_attention_dim=2 * qwen.hidden_size,
                timestep_guidance_channels=64,
                axes_dims_rope=(attention_head_dim // 4,) * 4,
                guidance_embeds=False,
            ),
        )
    return frozen(pipeline)


def call_options(
    pipeline: FluxKontextPipeline | Flux2KleinPipeline, *, steps: int = STEPS
) -> dict[str, Any]:
    """Return the keyword arguments of a tiny pipeline's call, except image and prompt.

    Args:
        pipeline: A pipeline of :func:`build_kontext` or :func:`build_klein`.
        steps: Denoising steps.

    Returns:
        Size, steps, text length and, for Kontext, options against resizing to a megapixel.
    """
    size = pipeline.vae.config.sample_size
    options: dict[str, Any] = {
        "height": size,
        "width": size,
        "num_inference_steps": steps,
        "max_sequence_length": TEXT_TOKENS,
        "output_type": "pt",
    }
    if isinstance(pipeline, FluxKontextPipeline):
        return options | {"max_area": size * size, "_auto_resize": False}
    return options | {"text_encoder_out_layers": TEXT_LAYERS, "guidance_scale": 1.0}


def enlarge(image: torch.Tensor, scale: int = KLEIN_SCALE) -> torch.Tensor:
    """Repeat every pixel ``scale`` times along both sides: ``[..., H, W]`` to ``[..., sH, sW]``."""
    return image.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)


def shrink(image: torch.Tensor, scale: int = KLEIN_SCALE) -> torch.Tensor:
    """Undo :func:`enlarge`: keep the first pixel of every block."""
    return image[..., ::scale, ::scale]


def save_weights(transformer: nn.Module, path: str | Path, card: dict[str, Any]) -> None:
    """Write a transformer's weights as safetensors, and its card as JSON.

    Args:
        transformer: The model whose ``state_dict`` is written.
        path: File to write, ending in ``.safetensors``; the JSON is written next to it.
        card: Origin of the weights (command, seed, versions, measurements) and, under
            ``"build"``, the keyword arguments of the family's build function.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in transformer.state_dict().items()}, path)
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def load_editor(name: str | Path = "kontext") -> FluxKontextPipeline | Flux2KleinPipeline:
    """Build a pipeline and load its trained transformer.

    Args:
        name: ``"kontext"`` or ``"klein"`` for the weights in the repository, or the path of a
            file that :func:`save_weights` wrote.

    Returns:
        The pipeline with trained weights.
    """
    path = Path(name) if str(name).endswith(".safetensors") else WEIGHTS / f"{name}.safetensors"
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    build = build_klein if card.get("family") == "klein" else build_kontext
    pipeline = build(**card["build"])
    pipeline.transformer.load_state_dict(load_file(path))
    return pipeline


def frozen(pipeline: Any) -> Any:
    """Freeze all of a pipeline except its transformer, set eval mode, and hide progress bars."""
    pipeline.transformer.eval()
    for part in (pipeline.vae, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)):
        if part is not None:
            part.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _identity_vae(kind: Any, *, blocks: int, sample_size: int) -> Any:
    """Build an autoencoder with decode(encode(x)) = x, up to its stride of 2^(blocks-1).

    The channels between the first and last convolution are [x, -x, c, -c]: the residual
    branches are zero, the constant c = 1000 fixes the divisor of GroupNorm, and the last
    convolution undoes the activation by silu(y) - silu(-y) = y. Down- and upsampling keep the
    first pixel of a block and repeat it.
    """
    pairs, constant = LATENT_CHANNELS, 1000.0
    width = 2 * pairs + 2
    options = {"scaling_factor": 1.0, "shift_factor": 0.0} if kind is AutoencoderKL else {}
    vae = kind(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(width,) * blocks,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=sample_size,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **options,
    )
    with torch.no_grad():
        for name, weight in vae.named_parameters():
            if "resnets" in name and "conv" in name:
                weight.zero_()
        for name, module in vae.named_modules():
            if isinstance(module, nn.Conv2d) and "samplers" in name:
                # Downsampling pads right and below, so tap 0 is the first pixel of a block; the
                # convolution after upsampling is centered.
                tap = 0 if "downsamplers" in name else 1
                module.weight.zero_()
                module.bias.zero_()
                module.weight[range(width), range(width), tap, tap] = 1.0
        for half in (vae.encoder, vae.decoder):
            half.conv_in.weight.zero_()
            half.conv_in.bias.zero_()
            half.conv_in.bias[-2:] = torch.tensor([constant, -constant])
            half.conv_out.weight.zero_()
            half.conv_out.bias.zero_()
            # Mean 0 and variance about 2 c^2 / width: this scale undoes GroupNorm's division.
            half.conv_norm_out.weight.fill_(constant * (2 / width) ** 0.5)
            half.conv_norm_out.bias.zero_()
            for i in range(3):
                half.conv_in.weight[i, i, 1, 1] = 1.0
                half.conv_in.weight[pairs + i, i, 1, 1] = -1.0
                half.conv_out.weight[i, i, 1, 1] = 1.0
                half.conv_out.weight[i, pairs + i, 1, 1] = -1.0
        vae.encoder.conv_out.bias[LATENT_CHANNELS:] = -30.0  # log-variance: no noise
    return vae


def clip_config(words: int) -> CLIPTextConfig:
    """Return the config of a tiny CLIP text encoder for a vocabulary."""
    return CLIPTextConfig(
        vocab_size=words,
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def clip_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """Build a CLIP tokenizer with a token for each word, in lower case."""
    letters = sorted(set("".join(words).lower()))
    special = ["<|startoftext|>", "<|endoftext|>"]
    pieces = special + letters + [f"{letter}</w>" for letter in letters]
    tokenizer = CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=16
    )
    tokenizer.add_tokens(_word_tokens(sorted({word.lower() for word in words})))
    return tokenizer


def t5_tokenizer(words: Sequence[str]) -> T5TokenizerFast:
    """Build a T5 tokenizer with a token for each word."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in words)]
    return T5TokenizerFast(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0)


def _qwen_tokenizer() -> Qwen2TokenizerFast:
    letters = ["Ġ", *sorted(set("".join(WORDS)))]
    pieces = ["<|endoftext|>", *letters]
    tokenizer = Qwen2TokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    tokenizer.add_tokens(_word_tokens(WORDS))
    tokenizer.chat_template = "<|endoftext|>{{ messages[0]['content'] }}"
    return tokenizer


def _word_tokens(words: Any) -> list[AddedToken]:
    return [AddedToken(word, single_word=True, lstrip=True, normalized=False) for word in words]
