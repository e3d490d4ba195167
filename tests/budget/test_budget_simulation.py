"""Costs from fake tensors: FLOPs by hand, depth in a straight line, stored costs as simulated."""

from dataclasses import asdict, replace

import diffusers
import pytest
import torch

from mteditflow.budget import (
    MODELS,
    PIPELINES,
    Case,
    Passes,
    Plan,
    Shape,
    case_of,
    costs_of,
    phases,
    simulate,
    simulation,
)
from mteditflow.budget.components import simulate_encoder, simulate_vae
from mteditflow.budget.inputs import INPUTS
from mteditflow.budget.models import ENCODERS, VAES
from mteditflow.budget.simulation import DEPTHS, build_model, simulate_at
from mteditflow.budget.stored import _row_costs, key_of, stored
from mteditflow.budget.tracking import PeakMemory, count_flops
from mteditflow.pipelines.families import FAMILIES
from tests.loops import some

TINY = Case(
    "WanTransformer3DModel",
    {
        "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128,
        "text_dim": 16, "freq_dim": 16,
    },
    Shape(512, 32),
    PIPELINES["WanPipeline"].targets,
    rank=4,
)  # fmt: skip


def test_attention_of_the_cpu_is_counted():
    query, key = (torch.zeros(1, 2, n, 16, requires_grad=True) for n in (5, 7))

    def attend():
        torch.nn.functional.scaled_dot_product_attention(query, key, key).sum().backward()

    # forward: q k^T and scores v, each 2 * 2 heads * 5 * 7 * 16; backward: scores again, four more
    assert count_flops(attend) == (2 + 5) * 2 * 2 * 5 * 7 * 16


def test_the_peak_counts_what_is_alive_at_once_in_blocks():
    kept = torch.zeros(1000)
    with PeakMemory([kept], block=512) as memory:
        first = kept + 1  # 4000 bytes take 4096
        second = first * 2
        del first
        third = second[:10]  # a view takes nothing
        _ = third + 1
    assert memory.peak == 2 * 4096
    assert memory.now == 4096 + 512


@pytest.fixture(scope="module")
def one_branch():
    return simulate(TINY)


@pytest.mark.slow
def test_a_deep_model_costs_what_shallow_ones_say(one_branch):
    # four blocks alike, run whole, against two and three of them and a straight line
    deep = replace(TINY, config={**TINY.config, "num_layers": 4})
    extended = simulate(deep)
    assert extended == replace(simulate_at(deep, {}), block=extended.block)
    assert 2 * extended.block == extended.weights - one_branch.weights


def test_adapters_and_checkpointing(one_branch):
    costs = one_branch
    # rank 4 on 8 projections of 64 and two layers of the feed-forward, in each of two blocks
    assert costs.adapters == 2 * 4 * (8 * (64 + 64) + 2 * (64 + 128))
    # frozen weights need no gradient; attention's backward takes 2.5 times its forward
    assert 2 < costs.train_plain / costs.forward < 3.5
    assert 0.8 < (costs.train - costs.train_plain) / costs.forward <= 1
    assert costs.sample < costs.update < costs.update_plain


def test_errors():
    with pytest.raises(ValueError, match="transformer: expected one of FluxTransformer2DModel"):
        simulate(replace(TINY, kind="UNet2DModel"))
    with pytest.raises(ValueError, match="targets: expected endings of linear layers"):
        simulate(replace(TINY, targets=("attn.nothing",)))
    with pytest.raises(ValueError, match=r"transformer: WanTransformer3DModel: .*'depth'"):
        simulate(replace(TINY, config={"depth": 3}))


def shallow(model):
    """One block of each kind."""
    depth = dict.fromkeys(DEPTHS[model.behavior.transformer], 1)
    dual = {"dual_attention_layers": (0,)} if "dual_attention_layers" in model.config else {}
    return {**depth, **dual}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_built_as_published(name):
    # billions of parameters by the papers and model cards
    published = {
        "kontext": 12, "klein-4b": 4, "klein-9b": 9, "klein-4b-distilled": 4,
        "klein-9b-distilled": 9, "flux2-dev": 32, "qwen-edit-2509": 20, "qwen-edit-2511": 20,
        "z-image": 6, "sd3.5-medium": 2.5, "sd3.5-large": 8.1, "wan2.1-1.3b": 1.4, "wan2.1-14b": 14,
    }  # fmt: skip
    model = MODELS[name]
    case = case_of(model, model.behavior.shape(512), rank=32, branches=model.branches(4.0))
    row = stored()["rows"][key_of(name, case)]
    assert (row["weights"] + row["buffers"]) / 1e9 == pytest.approx(published[name], rel=0.04)
    assert model.behavior.transformer in INPUTS
    assert model.behavior.transformer in DEPTHS
    built = build_model(case, shallow(model), device="meta")
    assert sum("lora_A" in x for x, _ in built.named_parameters()) > 0


def test_stored_costs_are_only_of_the_stored_token_size(monkeypatch):
    model = MODELS["kontext"]
    simulated = []
    monkeypatch.setattr(simulation, "simulate", lambda case: simulated.append(case) or "simulated")
    for token in (16, 32):
        case = case_of(model, model.behavior.shape(512, token=token), rank=64, branches=1)
        assert key_of("kontext", case) in stored()["rows"]
        found = _row_costs(model, case)
        assert (found == "simulated") == (token == 32)
    assert [case.shape.token for case in simulated] == [32]


def test_adapted_layers_are_those_of_the_editor():
    seen = 0
    for family in some(FAMILIES):
        name = family.pipeline.__name__
        model = next((x for x in MODELS.values() if x.pipeline == name), None)
        if model is None:
            continue
        case = case_of(model, model.behavior.shape(512), rank=1, branches=1)
        built = build_model(case, shallow(model), device="meta")
        adapted = [x for x, part in built.named_modules() if hasattr(part, "lora_A")]
        with torch.device("meta"):
            plain = getattr(diffusers, case.kind)(**{**case.config, **shallow(model)})
        assert sorted(adapted) == sorted(family.layers(plain, None)), name
        assert model.behavior.one_by_one == (not family.takes_batch), name
        seen += 1
    assert seen >= 2


def test_branches_and_tokens():
    kontext, klein, z_image = (MODELS[x] for x in ("kontext", "klein-9b", "z-image"))
    assert (kontext.branches(2.5), klein.branches(4.0), klein.branches(1.0)) == (1, 2, 1)
    assert MODELS["klein-9b-distilled"].branches(4.0) == 1
    assert (z_image.branches(0.5), z_image.branches(0.0)) == (2, 1)
    negative = {"negative_prompt": "", "true_cfg_scale": 2.0}
    assert kontext.branches(2.5, negative) == 2
    assert kontext.branches(2.5, {"true_cfg_scale": 2.0}) == 1  # has no effect without the prompt
    assert kontext.behavior.shape(512, text=128).text == 128
    assert z_image.behavior.shape(512, text=512).text == 256  # the length of usual instructions
    assert MODELS["sd3.5-large"].behavior.shape(512).text == 77 + 256
    # 1024 of the output and 4096 of a reference that is brought to a megapixel
    assert MODELS["qwen-edit-2511"].behavior.shape(512).image_tokens == 1024 + 4096


@pytest.mark.slow
def test_published_runs_of_flux_on_gpus():
    # FLUX.1-dev at 512 x 768, batch 1, rank 4 on attention, no reference: 26 GB in bf16, 9 GB in
    # nf4, by Hugging Face's post on its QLoRA; embeddings and latents were computed before
    shape = Shape(512, 512, references=2, reference_resolution=256)  # 1536 image tokens in all
    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    case = case_of(MODELS["kontext"], shape, rank=4, branches=1, targets=targets)
    costs = costs_of(MODELS["kontext"], case)
    assert costs.row.adapters == 4_669_440
    for quantize, gigabytes in (("none", 26), ("nf4", 9)):
        plan = Plan(costs, Passes(1, 0, 0, 1), training_batch=1, average=False, quantize=quantize)
        update = next(x for x in phases(plan) if x.name == "update")
        assert (update.total + 0.5e9) / 1e9 == pytest.approx(gigabytes, rel=0.05)  # and the context


def test_stored_costs_are_what_is_simulated():
    model = MODELS["wan2.1-1.3b"]
    case = case_of(model, model.behavior.shape(512), rank=32, branches=2)
    assert asdict(simulate(case)) == stored()["rows"][key_of(model.name, case)]
    vae = simulate_vae(VAES["flux2"], resolution=512, dtype=torch.bfloat16)
    assert asdict(vae) == stored()["vaes"]["flux2, 512 px"]
    encoder = simulate_encoder(ENCODERS["qwen3-4b"], dtype=torch.bfloat16)
    assert asdict(encoder) == stored()["encoders"]["qwen3-4b"]


def kontext_case():
    model = MODELS["kontext"]
    return case_of(model, model.behavior.shape(512), rank=32, branches=1)


def test_facts_of_kontext():
    # F at 512 with a reference and 512 text tokens, and forward + backward in units of it
    costs = costs_of(MODELS["kontext"], kontext_case())
    assert costs.row.weights == 11_901_408_320
    assert costs.row.forward / 1e12 == pytest.approx(38.2, abs=0.05)
    assert costs.row.train / costs.row.forward == pytest.approx(3.19, abs=0.005)
    assert costs.row.update / 2**30 == pytest.approx(1.53, abs=0.005)
    assert costs.encoders.weights == 4_762_310_656 + 123_060_480
    assert costs.vae.decode == costs.vae.decode_tiled  # its tile is 1024 pixels


def test_what_is_not_stored_is_simulated():
    config = {
        "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1,
        "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12), "joint_attention_dim": 32,
        "pooled_projection_dim": 16, "guidance_embeds": False,
    }  # fmt: skip
    small = replace(MODELS["kontext"], name="mine", config=config)
    case = case_of(small, small.behavior.shape(512, text=8), rank=2, branches=1)
    costs = costs_of(small, case)
    assert 0 < costs.row.weights < 10**6
    wrong = replace(small, config={**config, "axes_dims_rope": (8, 12, 16)})  # of heads of 32
    with pytest.raises(ValueError, match="model: mine cannot be run"):
        costs_of(wrong, replace(case, config=wrong.config))
    assert costs.encoders == costs_of(MODELS["kontext"], kontext_case()).encoders
