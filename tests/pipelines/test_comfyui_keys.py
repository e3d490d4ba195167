"""Every key of an exported LoRA is one that ComfyUI loads: none is left out with a warning.

Facts of ComfyUI, from ``model_lora_keys_unet`` of comfy/lora.py (Comfy-Org/ComfyUI, ec93dcac), the
maps of comfy/utils.py (b3be02d6) and comfy/weight_adapter/lora.py:

- every weight of a model is known as ``lora_unet_`` and its name with underscores, and as
  ``diffusion_model.`` and its name;
- Stable Diffusion 3 is also known as ``transformer.`` and diffusers' name, Z-Image (Lumina2) as
  ``diffusion_model.`` and diffusers' name; Qwen-Image has diffusers' names itself;
- factors are ``lora_down`` and ``lora_up``, or ``lora_A`` and ``lora_B``; no alpha is scale 1.
"""

import re

import pytest
import torch
from mteditflow_examples.shapes.editor import build_klein, build_kontext
from tiny_pipelines import flux2, qwen, sd3, z_image

from mteditflow.pipelines import comfyui_lora
from mteditflow.pipelines.families import find_family
from tests.loops import some

STREAMS = r"(img|txt)_(attn\.(qkv|proj)|mlp\.[02])"
EMBEDDERS = r"(img|txt)_in|(time|guidance)_in\.(in|out)_layer"
LAST = r"final_layer\.(linear|adaLN_modulation\.1)"
DIFFUSERS_ATTENTION = r"to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out"
#: By the transformer's class in diffusers: the prefix of a key, and the names that may follow.
KNOWN = {
    "FluxTransformer2DModel": (
        "lora_unet_",
        rf"double_blocks\.\d+\.({STREAMS}|(img|txt)_mod\.lin)"
        r"|single_blocks\.\d+\.(linear[12]|modulation\.lin)"
        rf"|{EMBEDDERS}|vector_in\.(in|out)_layer|{LAST}",
    ),
    "Flux2Transformer2DModel": (
        "lora_unet_",
        rf"double_blocks\.\d+\.{STREAMS}|single_blocks\.\d+\.linear[12]|{EMBEDDERS}|{LAST}"
        r"|(double_stream_modulation_(img|txt)|single_stream_modulation)\.lin",
    ),
    "QwenImageTransformer2DModel": (
        "diffusion_model.",
        rf"transformer_blocks\.\d+\.(attn\.({DIFFUSERS_ATTENTION})"
        r"|(img|txt)_mlp\.net\.(0\.proj|2)|(img|txt)_mod\.1)"
        r"|img_in|txt_in|proj_out|norm_out\.linear|time_text_embed\.timestep_embedder\.linear_[12]",
    ),
    "SD3Transformer2DModel": (
        "transformer.",
        rf"transformer_blocks\.\d+\.(attn\.({DIFFUSERS_ATTENTION})|attn2\.(to_[qkv]|to_out\.0)"
        r"|ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear)"
        r"|context_embedder|proj_out|norm_out\.linear"
        r"|time_text_embed\.(timestep|text)_embedder\.linear_[12]",
    ),
    "ZImageTransformer2DModel": (
        "diffusion_model.",
        r"(layers|(noise|context)_refiner)\.\d+\.(attention\.(to_[qkv]|to_out\.0)"
        r"|feed_forward\.w[123])|(layers|noise_refiner)\.\d+\.adaLN_modulation\.0"
        r"|all_final_layer\.2-1\.(linear|adaLN_modulation\.1)|all_x_embedder\.2-1"
        r"|cap_embedder\.1|t_embedder\.mlp\.[02]",
    ),
}
FACTORS = r"\.lora_(down|up|A|B)\.weight"
MODELS = {
    "FluxKontextPipeline": lambda: build_kontext().transformer,
    "Flux2KleinPipeline": lambda: build_klein().transformer,
    "Flux2Pipeline": lambda: flux2.transformer(embedded=True),
    "QwenImageEditPlusPipeline": qwen.transformer,
    "StableDiffusion3Pipeline": sd3.transformer,
    "ZImagePipeline": z_image.transformer,
}


def accepted(key, kind):
    """Whether ComfyUI finds a weight for a key. Names have dots, or underscores, as the prefix."""
    prefix, names = KNOWN[kind]
    if prefix.endswith("_"):
        names = names.replace(r"\.", "_")
    return re.fullmatch(f"{re.escape(prefix)}({names}){FACTORS}", key) is not None


def linear_layers(model):
    return {name: x for name, x in model.named_modules() if isinstance(x, torch.nn.Linear)}


def lora_of(layers):
    weights = {}
    for name, layer in layers.items():
        weights[f"{name}.lora_A.weight"] = torch.ones(1, layer.in_features)
        weights[f"{name}.lora_B.weight"] = torch.ones(layer.out_features, 1)
    return weights


def is_refused(name, layer, kind):
    try:
        comfyui_lora(lora_of({name: layer}), kind)
    except ValueError:
        return True
    return False


@pytest.fixture(scope="module", params=MODELS)
def family(request):
    return find_family(request.param), MODELS[request.param]()


def test_every_key_is_known_to_comfyui(family):
    """All linear layers of the real class that are not refused."""
    _, model = family
    kind = type(model).__name__
    layers = linear_layers(model)
    held = {name: x for name, x in some(layers.items()) if not is_refused(name, x, kind)}
    named = comfyui_lora(lora_of(held), kind)
    assert [key for key in some(named) if not accepted(key, kind)] == []


def test_the_layers_that_are_trained_by_default_are_exported_whole(family):
    described, model = family
    layers = linear_layers(model)
    chosen = {name: layers[name] for name in some(described.layers(model, None))}
    named = comfyui_lora(lora_of(chosen), type(model).__name__)
    rows = [len(x) for key, x in some(named.items()) if re.search(r"lora_(up|B)\.weight$", key)]
    assert sum(rows) == sum(layer.out_features for layer in chosen.values())


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight", "FluxTransformer2DModel"),
        ("lora_unet_double_blocks_0_img_mod_lin.lora_up.weight", "Flux2Transformer2DModel"),
        ("diffusion_model.layers.0.attention.to_q.weight", "ZImageTransformer2DModel"),
    ],
)
def test_keys_of_other_names_are_not_known(key, kind):
    assert not accepted(key, kind)
