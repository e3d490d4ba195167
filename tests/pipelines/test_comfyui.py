"""LoRA under ComfyUI's names: products are the same, diffusers' converters read them back."""

import re

import diffusers
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tiny import roll_out
from tiny_pipelines import qwen, sd3, z_image

from mteditflow.pipelines import LoraPolicies, comfyui_lora, read_lora
from mteditflow.pipelines.comfyui import LAYOUTS, Original
from tests.loops import some

WIDTH = 3072  # of FLUX.1, which diffusers' converter of its single blocks counts on
DOUBLE = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_add_out"]
DOUBLE += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
FF = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
FF_2 = [f"{ff}.linear_{end}" for ff in ("ff", "ff_context") for end in ("in", "out")]
QWEN = [
    f"{stream}_{x}" for stream in ("img", "txt") for x in ("mlp.net.0.proj", "mlp.net.2", "mod.1")
]
Z_IMAGE = ["attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"]
Z_IMAGE += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"]


def blocks(name, layers):
    return [f"{name}.1.{layer}" for layer in layers]


def lora(layers, width=16, rank=2, seed=0):
    """Random factors of some layers: as wide as high, proj_mlp four times as high."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in layers:
        rows = 4 * width if layer.endswith("proj_mlp") else width
        weights[f"{layer}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        weights[f"{layer}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return weights


#: Transformer, pipeline that reads the file, layers, width.
FAMILIES = {
    "FLUX.1 double": (
        "FluxTransformer2DModel",
        diffusers.FluxKontextPipeline,
        blocks("transformer_blocks", [*DOUBLE, *FF, "norm1.linear", "norm1_context.linear"]),
        16,
    ),
    "FLUX.1 single": (
        "FluxTransformer2DModel",
        diffusers.FluxKontextPipeline,
        blocks(
            "single_transformer_blocks",
            ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out", "norm.linear"],
        ),
        WIDTH,
    ),
    "FLUX.1 others": (
        "FluxTransformer2DModel",
        diffusers.FluxKontextPipeline,
        [
            *("x_embedder", "context_embedder", "proj_out", "norm_out.linear"),
            *(
                f"time_text_embed.{x}_embedder.linear_{n}"
                for x in ("timestep", "guidance", "text")
                for n in (1, 2)
            ),
        ],
        16,
    ),
    "FLUX.2": (
        "Flux2Transformer2DModel",
        diffusers.Flux2KleinPipeline,
        [
            *blocks("transformer_blocks", [*DOUBLE, *FF_2]),
            *blocks("single_transformer_blocks", ["attn.to_qkv_mlp_proj", "attn.to_out"]),
            *("x_embedder", "context_embedder", "proj_out"),
            *(f"time_guidance_embed.timestep_embedder.linear_{n}" for n in (1, 2)),
        ],
        16,
    ),
    "Qwen-Image": (
        "QwenImageTransformer2DModel",
        diffusers.QwenImageEditPlusPipeline,
        [*blocks("transformer_blocks", [*DOUBLE, *QWEN]), "img_in", "norm_out.linear"],
        16,
    ),
    "SD3": (
        "SD3Transformer2DModel",
        diffusers.StableDiffusion3Pipeline,
        blocks("transformer_blocks", [*DOUBLE, *FF, "attn2.to_q"]),
        16,
    ),
    "Z-Image": (
        "ZImageTransformer2DModel",
        diffusers.ZImagePipeline,
        [*blocks("layers", Z_IMAGE), *blocks("context_refiner", Z_IMAGE[:7])],
        16,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_back_the_same_tensors(family, tmp_path):
    transformer, pipeline, layers, width = FAMILIES[family]
    weights = lora(layers, width)
    named = comfyui_lora(weights, transformer)
    save_file({name: x.contiguous() for name, x in named.items()}, tmp_path / "lora.safetensors")
    found = pipeline.lora_state_dict(str(tmp_path / "lora.safetensors"))
    back = {name.removeprefix("transformer."): x for name, x in found.items()}
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], x) for name, x in some(weights.items()))


def test_every_layer_of_a_family_is_tested():
    """Modulations of FLUX.2 are not: ComfyUI has them, diffusers' converter drops them."""
    tested = {layer for _, _, layers, _ in FAMILIES.values() for layer in layers}
    own = {layer.partition(".1.")[2] if ".1." in layer else layer for layer in tested}
    for name, layout in some(LAYOUTS.items()):
        if isinstance(layout, Original):
            known = {**layout.double, **layout.single, **layout.others}
            left = {part for parts in known.values() for part in parts} - own
            assert {x for x in left if not re.search("modulation|guidance_emb", x)} == set(), name


def test_a_fused_layer_adds_what_its_parts_add():
    """q, k, v of FLUX.1 one upon the other; k has no LoRA, v another rank."""
    q, v = (f"transformer_blocks.0.attn.to_{x}" for x in "qv")
    weights = lora([q], rank=2) | lora([v], rank=3, seed=1)
    named = comfyui_lora(weights, "FluxTransformer2DModel")
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    assert list(named) == [f"{key}.lora_down.weight", f"{key}.lora_up.weight"]
    added = named[f"{key}.lora_up.weight"] @ named[f"{key}.lora_down.weight"]
    q, v = (weights[f"{x}.lora_B.weight"] @ weights[f"{x}.lora_A.weight"] for x in (q, v))
    torch.testing.assert_close(added, torch.cat([q, torch.zeros(16, 16), v]))


def test_the_mlp_of_a_single_block_lies_below_q_k_and_v():
    layer = "single_transformer_blocks.3.proj_mlp"
    weights = lora([layer])
    named = comfyui_lora(weights, "FluxTransformer2DModel")
    key = "lora_unet_single_blocks_3_linear1"
    added = named[f"{key}.lora_up.weight"] @ named[f"{key}.lora_down.weight"]
    expected = weights[f"{layer}.lora_B.weight"] @ weights[f"{layer}.lora_A.weight"]
    assert added.shape == (7 * 16, 16)
    assert not added[: 3 * 16].any()
    torch.testing.assert_close(added[3 * 16 :], expected)


def test_a_file_loads_to_the_same_velocity(pipeline, tmp_path):
    """FLUX.1 without the single blocks, whose width diffusers' converter has as a constant."""
    rollout = roll_out(pipeline, turns=1)
    rows = torch.tensor([0, 1])
    given = rollout.trajectory.clean[:, 0], torch.tensor([0.3, 0.8]), rows, rows * 0
    targets = r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_k_proj)|ff\..*(proj|_out))"
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets)
    plain = pipeline.transformer.state_dict()
    kept = {name: x.clone() for name, x in plain.items()}
    policies = LoraPolicies(pipeline.transformer, config)
    with torch.no_grad():
        for weight in policies.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    expected = rollout.velocity(pipeline.transformer, *given).detach()
    policies.save(pipeline, tmp_path)
    kind = type(pipeline.transformer)
    named = comfyui_lora(read_lora(type(pipeline), tmp_path), kind.__name__)
    save_file(named, tmp_path / "comfyui.safetensors")
    fresh = kind.from_config(pipeline.transformer.config).eval()
    fresh.load_state_dict(kept)
    other = type(pipeline)(**(pipeline.components | {"transformer": fresh}))
    base = rollout.velocity(fresh, *given).detach()
    other.load_lora_weights(tmp_path / "comfyui.safetensors")
    found = rollout.velocity(fresh, *given).detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - base).abs().max() > 1e-3


@pytest.mark.parametrize("build", [qwen.transformer, sd3.transformer, z_image.transformer])
def test_names_that_are_kept_are_those_of_the_model(build):
    """Attention and feed-forward of the blocks of the real classes."""
    model = build()
    layers = [name for name, x in model.named_modules() if isinstance(x, torch.nn.Linear)]
    inner = [x for x in layers if "block" in x or "layers." in x or "refiner." in x]
    inner = [x for x in inner if "norm" not in x]
    named = comfyui_lora(lora(some(inner)), type(model).__name__)
    assert len(named) == 2 * len(inner)


@pytest.mark.parametrize(
    ("layers", "transformer", "message"),
    [
        (
            ["x"],
            "WanTransformer3DModel",
            r"^transformer: expected one of \['Flux2Trans.*, got 'Wan",
        ),
        (
            ["nowhere"],
            "FluxTransformer2DModel",
            r"got nowhere: ComfyUI's name of it is not known; ",
        ),
        (
            ["norm_out.linear"],
            "Flux2Transformer2DModel",
            r"got norm_out.linear: converters disagre",
        ),
        (["pos_embed.proj"], "SD3Transformer2DModel", r"got pos_embed\.proj: ComfyUI's name of it"),
    ],
)
def test_what_has_no_exact_form_is_refused(layers, transformer, message):
    with pytest.raises(ValueError, match=message):
        comfyui_lora(lora(layers), transformer)


def test_parts_of_another_width_are_refused():
    weights = lora(["transformer_blocks.0.attn.to_q"]) | lora(["transformer_blocks.0.attn.to_k"], 8)
    with pytest.raises(ValueError, match=r"double_blocks\.0\.img_attn\.qkv: its parts have rows "):
        comfyui_lora(weights, "FluxTransformer2DModel")
