"""LoRA weights under ComfyUI's names, with projections fused as in the original models.

ComfyUI reads ``lora_unet_<layer>`` for every layer of a model by its original name, and diffusers'
names for Qwen-Image, Z-Image and Stable Diffusion 3. It reads no metadata, so the scale must be in
the weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mteditflow.pipelines.lora_files import layer_of

Layers = Mapping[str, tuple[str, ...]]  # original layer -> its parts in diffusers, in order
QKV = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
}
EMBEDDERS = {"img_in": ("x_embedder",), "txt_in": ("context_embedder",)}
LAST = "final_layer.adaLN_modulation.1"


@dataclass(frozen=True)
class Original:
    """Original layer names of a family with fused projections.

    Attributes:
        double: layers of a two-stream block.
        single: layers of a one-stream block.
        others: layers outside of blocks.
        widths: rows of the parts of a fused layer, in units of the first part's.
        refused: layers that have no exact form, with the reason.
    """

    double: Layers
    single: Layers
    others: Layers
    widths: Mapping[str, tuple[int, ...]]
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Same:
    """Names that ComfyUI shares with diffusers: a prefix, and a pattern of layer names."""

    prefix: str
    layers: str


FLUX_1 = Original(
    double=QKV
    | {
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
        "img_mod.lin": ("norm1.linear",),
        "txt_mod.lin": ("norm1_context.linear",),
    },
    single={
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
        "modulation.lin": ("norm.linear",),
    },
    others=EMBEDDERS
    | {
        "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
        "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
        "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
        "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
        "final_layer.linear": ("proj_out",),
        LAST: ("norm_out.linear",),
    },
    widths={"linear1": (1, 1, 1, 4)},
)
FLUX_2 = Original(
    double=QKV
    | {
        "img_mlp.0": ("ff.linear_in",),
        "img_mlp.2": ("ff.linear_out",),
        "txt_mlp.0": ("ff_context.linear_in",),
        "txt_mlp.2": ("ff_context.linear_out",),
    },
    single={"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
    others=EMBEDDERS
    | {
        "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
        "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
        "final_layer.linear": ("proj_out",),
    },
    widths={},
    refused={
        "norm_out.linear": "converters disagree on the order of its scale and shift",
    },
)
ATTENTION = r"attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
#: Layout of each transformer class of diffusers.
LAYOUTS: dict[str, Original | Same] = {
    "FluxTransformer2DModel": FLUX_1,
    "Flux2Transformer2DModel": FLUX_2,
    "QwenImageTransformer2DModel": Same(
        "diffusion_model.",
        rf"transformer_blocks\.\d+\.({ATTENTION}|(img|txt)_mlp\.net\.(0\.proj|2)|(img|txt)_mod\.1)"
        r"|img_in|txt_in|proj_out|norm_out\.linear"
        r"|time_text_embed\.timestep_embedder\.linear_[12]",
    ),
    "SD3Transformer2DModel": Same(
        "transformer.",
        rf"transformer_blocks\.\d+\.({ATTENTION}|ff(_context)?\.net\.(0\.proj|2))",
    ),
    "ZImageTransformer2DModel": Same(
        "diffusion_model.",
        r"(layers|noise_refiner|context_refiner)\.\d+\."
        r"(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)",
    ),
}


def comfyui_lora(weights: Mapping[str, Tensor], transformer: str) -> dict[str, Tensor]:
    r"""Return a LoRA under ComfyUI's names, with exactly the same products B A.

    A projection that is fused in the original model, such as q, k and v, gets the stacked factors
    of its parts: :math:`A = [A_q; A_k; A_v]` and a block-diagonal :math:`B`. Parts without a LoRA,
    or of a lower rank, are padded with zeros.

    Args:
        weights: weights at scale 1, as ``read_lora`` returns them.
        transformer: class of the transformer in diffusers, such as "FluxTransformer2DModel".

    Returns:
        Weights by ComfyUI's names, of the same dtype, at scale 1 (without alphas).

    Raises:
        TypeError: ``transformer`` is no string.
        ValueError: the class or a layer of it has no known exact form in ComfyUI.

    Source: the key maps of ComfyUI's ``comfy/lora.py`` and ``comfy/utils.py``; the converters of
    diffusers read the result back.

    Example:
        >>> layer = "transformer_blocks.0.attn.to_out.0"
        >>> pair = {f"{layer}.lora_A.weight": torch.ones(1, 2)}
        >>> pair[f"{layer}.lora_B.weight"] = torch.ones(2, 1)
        >>> list(comfyui_lora(pair, "FluxTransformer2DModel"))[0]
        'lora_unet_double_blocks_0_img_attn_proj.lora_down.weight'
    """
    if not isinstance(transformer, str):
        kind = type(transformer).__name__
        raise TypeError(
            f"transformer: expected the name of a class, such as {kind!r}, got a {kind}"
        )
    layout = LAYOUTS.get(transformer)
    if layout is None:
        raise ValueError(
            f"transformer: expected one of {sorted(LAYOUTS)}, whose names in ComfyUI are known, "
            f"got {transformer!r}"
        )
    if isinstance(layout, Same):
        _check_known(weights, layout)
        return {f"{layout.prefix}{name}": x for name, x in weights.items()}
    parts: dict[str, dict[int, tuple[Tensor, Tensor]]] = defaultdict(dict)
    for layer in dict.fromkeys(map(layer_of, weights)):
        original, part = _place(layer, layout)
        pair = (weights[f"{layer}.lora_A.weight"], weights[f"{layer}.lora_B.weight"])
        parts[original][part] = pair
    named: dict[str, Tensor] = {}
    for original, pairs in parts.items():
        down, up = _fused(original, pairs, _widths(original, layout))
        key = f"lora_unet_{original.replace('.', '_')}"
        named |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    return named


def _check_known(weights: Mapping[str, Tensor], layout: Same) -> None:
    for layer in map(layer_of, weights):
        if not re.fullmatch(layout.layers, layer):
            raise _unknown(layer, "ComfyUI's name of it is not known")


def _unknown(layer: str, reason: str) -> ValueError:
    return ValueError(
        f"weights: expected layers with an exact form in ComfyUI, got {layer}: {reason}; "
        "diffusers' format holds it"
    )


def _place(layer: str, layout: Original) -> tuple[str, int]:
    """Return the original layer that contains a layer, and the layer's index among its parts."""
    if reason := layout.refused.get(layer):
        raise _unknown(layer, reason)
    block = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", layer)
    layers = layout.others if not block else layout.single if block[1] else layout.double
    kind = f"{'single' if block[1] else 'double'}_blocks.{block[2]}." if block else ""
    own = block[3] if block else layer
    for original, parts in layers.items():
        if own in parts:
            return f"{kind}{original}", parts.index(own)
    raise _unknown(layer, "ComfyUI's name of it is not known")


def _widths(original: str, layout: Original) -> tuple[int, ...]:
    """Return the rows of the parts of an original layer, in units of the first part's."""
    own = re.sub(r"^(single|double)_blocks\.\d+\.", "", original)
    everything = {**layout.others, **layout.single, **layout.double}
    return layout.widths.get(own, (1,) * len(everything[own]))


def _fused(
    original: str, pairs: Mapping[int, tuple[Tensor, Tensor]], widths: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return both factors of a layer from those of its parts."""
    if len(widths) == 1:
        down, up = pairs[0]
        # diffusers' last modulation returns scale, shift; the original model's shift, scale.
        return down, torch.cat(up.chunk(2)[::-1]) if original == LAST else up
    units = {up.shape[0] / widths[part] for part, (_, up) in pairs.items()}
    inputs = {down.shape[1] for down, _ in pairs.values()}
    if len(units) > 1 or len(inputs) > 1 or not min(units).is_integer():
        shapes = [list(up.shape) for _, up in pairs.values()]
        raise _unknown(original, f"its parts have rows {shapes}, not as {widths}")
    unit, rank = int(units.pop()), max(down.shape[0] for down, _ in pairs.values())
    like = next(iter(pairs.values()))[0]
    down = like.new_zeros(len(widths) * rank, inputs.pop())
    up = like.new_zeros(sum(widths) * unit, len(widths) * rank)
    # Each part has ``rank`` rows of A and columns of B to itself, so that B A has no cross terms.
    for part, (a, b) in pairs.items():
        top, left = sum(widths[:part]) * unit, part * rank
        down[left : left + len(a)] = a
        up[top : top + len(b), left : left + len(a)] = b
    return down, up
