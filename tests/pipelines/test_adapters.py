"""Promises of LoraPolicies: every field of LoraConfig, wrapper, foreign file and outside change."""

import dataclasses
from contextlib import contextmanager
from functools import partial

import peft
import pytest
import torch
from diffusers import FluxTransformer2DModel
from mteditflow_examples.shapes.editor import build_kontext
from peft import LoraConfig
from peft.tuners.lora import config as variants
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

from mteditflow.pipelines import LoraPolicies
from mteditflow.pipelines.adapters import REFUSED, SUPPORTED
from mteditflow.testing import check_adapter, check_average, check_saved
from tests.loops import some

TARGETS = ["to_q", "to_k", "to_out.0", "proj_mlp"]
LAYERS = 6  # to_q and to_k of both blocks, to_out of the first, proj_mlp of the second

#: Options with which every promise holds; each supported field is in one.
HOLDS = {
    "rank and scale": {"r": 3, "lora_alpha": 0.3, "lora_dropout": 0.5},
    "rslora": {"use_rslora": True, "lora_alpha": -2},
    "patterns": {"alpha_pattern": {"to_q": 3}, "rank_pattern": {"to_k": 2, "to_out.0": 8}},
    "all linear": {"target_modules": "all-linear"},
    "excluded": {
        "target_modules": r".*\.to_[qk]",
        "exclude_modules": r"transformer_blocks\.0\.attn\.to_q",
    },
    "some layers": {"layers_to_transform": [0], "layers_pattern": "single_transformer_blocks"},
    "biases": {"lora_bias": True, "fan_in_fan_out": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "notes": {
        "task_type": "FEATURE_EXTRACTION",
        "auto_mapping": {"base_model_class": "X"},
        "peft_version": "0.1",
        "base_model_name_or_path": "no/where",
        "revision": "main",
    },
}
#: Values that are refused, by field; every way to initialize is one of peft's documentation.
BREAKS = {
    "init_lora_weights": [
        *(False, None, "pissa", "pissa_niter_4", "olora", "loftq", "orthogonal", "mica"),
        *("eva", "corda", "lora_ga"),
    ],
    "use_dora": [True],
    "bias": ["all", "lora_only"],
    "modules_to_save": [["proj_out"]],
    "trainable_token_indices": [[0], {"embed": [0]}],
    "target_parameters": [["to_q.weight"]],
    "layer_replication": [[(0, 1), (0, 1)]],
    "ensure_weight_tying": [True],
    "inference_mode": [True],
    "megatron_config": [{"hidden_size": 1}],
    "megatron_core": ["other.core"],
    "alora_invocation_tokens": [[1]],
    "arrow_config": [variants.ArrowConfig()],
    "velora_config": [variants.VeloraConfig()],
    "monteclora_config": [variants.MontecloraConfig()],
    "use_bdlora": [variants.BdLoraConfig()],
    "kasa_config": [variants.KasaConfig()],
    "use_qalora": [True],
    "qalora_group_size": [8],
    "runtime_config": [variants.LoraRuntimeConfig(ephemeral_gpu_offload=True)],
    "peft_type": [peft.PeftType.LOHA],
    "loftq_config": [{"loftq_bits": 4}],
    "eva_config": [peft.EvaConfig()],
    "corda_config": [variants.CordaConfig()],
    "lora_ga_config": [variants.LoraGAConfig()],
}


def config(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | options)


@pytest.fixture(scope="module")
def build():
    """Pipelines with equal weights, each with a transformer of its own."""
    pipeline = build_kontext(num_layers=1, num_single_layers=1, num_attention_heads=2)
    weights = pipeline.transformer.state_dict()

    def made():
        transformer = FluxTransformer2DModel.from_config(pipeline.transformer.config).eval()
        transformer.load_state_dict(weights)
        parts = pipeline.components | {"transformer": transformer, "text_encoder": None}
        return type(pipeline)(**parts)

    return made


@pytest.fixture(scope="module")
def velocity():
    g = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(2, 4, 16, generator=g),
        "timestep": torch.tensor([0.3, 0.8]),
        "pooled_projections": torch.randn(2, 32, generator=g),
        "encoder_hidden_states": torch.randn(2, 3, 64, generator=g),
        "img_ids": torch.randn(4, 3, generator=g),
        "txt_ids": torch.zeros(3, 3),
    }
    return lambda model: model(**given, return_dict=False)[0]


def change(policies, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policies.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=g))


def velocity_of_file(build, velocity, folder):
    """Velocity of a plain pipeline that loads the file."""
    plain = build()
    plain.load_lora_weights(folder)
    return velocity(plain.transformer).detach()


def average_of(policies):
    """The update of the old policy, as a function of lists of tensors: a number at a time."""

    @torch.no_grad()
    def average(old, current, decay):
        for x, y in zip(old, current, strict=True):
            for value, target in zip(x.view(-1), y.view(-1), strict=True):
                for weights, number in (
                    (policies.old_parameters(), value),
                    (policies.parameters(), target),
                ):
                    for weight in some(weights):
                        weight.fill_(number)
                policies.update_old(decay=decay)
                (result,) = {float(v) for w in policies.old_parameters() for v in w.unique()}
                value.fill_(result)

    return average


# Configurations.


def test_a_field_of_a_new_peft_is_decided_here():
    """Whoever updates peft proves that a new field's values keep the promises, or refuses them."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert SUPPORTED | REFUSED.keys() == fields
    assert not SUPPORTED & REFUSED.keys()
    assert {name for options in HOLDS.values() for name in options} == SUPPORTED | {
        "init_lora_weights"
    }
    assert BREAKS.keys() == REFUSED.keys()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")
@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")  # plain: matched by its file
@pytest.mark.parametrize("case", HOLDS)
def test_all_promises_hold(case, build, velocity, tmp_path):
    pipeline, options, made = build(), HOLDS[case], []
    model = pipeline.transformer
    base, weights = velocity(model).detach(), list(model.state_dict().values())
    kept = [x.clone() for x in weights]

    def add():
        made.append(LoraPolicies(model, config(**options), ema=True))

    def reference():
        with made[0].use("reference"):
            return velocity(model)

    check_adapter(
        model,
        lambda: velocity(model),
        add,
        parameters=lambda: made[0].parameters(),
        reference=reference,
    )
    (policies,) = made
    for policy in ("current", "old", "ema"):
        with policies.use(policy):
            assert torch.equal(velocity(model), base)
    check_saved(
        lambda: velocity(model),
        lambda: change(policies),
        lambda: policies.save(pipeline, tmp_path),
        lambda: policies.load(pipeline, tmp_path),
        elsewhere=lambda: velocity_of_file(build, velocity, tmp_path),
    )
    saved = velocity(model).detach()
    other = LoraPolicies(build().transformer, config(**options | {"lora_alpha": 7}))
    other.load(pipeline, tmp_path)
    torch.testing.assert_close(velocity(other.model), saved, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"^state: expected .*lora_scale .*, got "):
        other.load_state_dict(policies.state_dict())
    assert torch.equal(reference(), base)
    assert all(torch.equal(x, y) for x, y in some(zip(weights, kept, strict=True)))
    check_average(average_of(policies), examples=1)


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BREAKS.items() for value in values]
)
def test_what_breaks_a_promise_is_refused_and_changes_nothing(field, value):
    """Set after construction, which overwrites some, and needs scipy for one."""
    model, given = nn.Sequential(nn.Linear(2, 2)), config(target_modules=["0"])
    setattr(given, field, value)
    with pytest.raises(
        ValueError, match=rf"^config\.{field}: expected .*, got .*: {REFUSED[field]}"
    ):
        LoraPolicies(model, given)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": 0}, r"^config\.lora_alpha: expected a finite number other than 0, got 0$"),
        ({"lora_alpha": float("nan")}, r"^config\.lora_alpha: .* got nan$"),
        ({"alpha_pattern": {"0": 0.0}}, r"^config\.lora_alpha: .* got 0\.0$"),
        ({"lora_dropout": 1.0}, r"^config\.lora_dropout: expected in \[0, 1\), got 1\.0$"),
        ({"lora_dropout": -0.5}, r"^config\.lora_dropout: expected in \[0, 1\), got -0\.5$"),
    ],
)
def test_an_adapter_that_would_never_act_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraPolicies(nn.Sequential(nn.Linear(2, 2)), config(target_modules=["0"], **options))


def test_a_field_that_nobody_decided_is_refused(monkeypatch):
    monkeypatch.delitem(REFUSED, "use_dora")
    with pytest.raises(ValueError, match=r"use_dora: .* mteditflow does not know the field"):
        LoraPolicies(nn.Linear(2, 2), config(use_dora=True))


@pytest.mark.parametrize(
    "other", [peft.LoHaConfig(), peft.IA3Config(), peft.AdaLoraConfig(total_step=1), {"r": 4}]
)
def test_a_config_of_another_method_is_refused(other):
    name = type(other).__name__
    with pytest.raises(TypeError, match=rf"^config: expected a peft\.LoraConfig, got {name}$"):
        LoraPolicies(nn.Linear(2, 2), other)


@pytest.mark.parametrize("target", ["0", "out_proj"])
def test_layers_of_torch_attention_are_refused(target):
    """It never calls its projection, and peft merges adapters of the whole in each forward."""
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    with pytest.raises(ValueError, match=r"got '0.*' of a torch\.nn\.MultiheadAttention"):
        LoraPolicies(model, config(target_modules=[target]))


def test_a_config_changed_later_changes_nothing(build, velocity, tmp_path):
    pipeline, given = build(), config()
    policies = LoraPolicies(pipeline.transformer, given)
    change(policies)
    given.lora_alpha = 60
    policies.save(pipeline, tmp_path)
    assert torch.equal(velocity_of_file(build, velocity, tmp_path), velocity(pipeline.transformer))


# Wrappers.


@contextmanager
def one_process(folder):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def compile_blocks_by_replacing(model):
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        blocks[0] = torch.compile(blocks[0], backend="eager")


def checkpoint_blocks(model):
    blocks = (model.transformer_blocks[0], model.single_transformer_blocks[0])
    apply_activation_checkpointing(model, check_fn=lambda module: module in blocks)
    assert isinstance(model.transformer_blocks[0], CheckpointWrapper)


def checkpoint_in_training(model):
    model.enable_gradient_checkpointing()
    model.train()


#: Wrappers of a model, some in place.
WRAPPERS = {
    "compiled": partial(torch.compile, backend="eager"),
    "compiled-in-place": lambda model: model.compile(backend="eager"),
    "blocks-compiled": compile_blocks_by_replacing,
    "blocks-compiled-in-place": lambda m: m.compile_repeated_blocks(backend="eager"),
    "blocks-checkpointed": checkpoint_blocks,
    "checkpointing": checkpoint_in_training,
    "layerwise-casting": lambda m: m.enable_layerwise_casting(
        storage_dtype=torch.bfloat16, compute_dtype=torch.float32
    ),
    "ddp": DistributedDataParallel,
}


def wrapped(name, model):
    made = WRAPPERS[name](model)
    return model if made is None else made


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by dynamo
@pytest.mark.parametrize(
    ("name", "when"),
    [
        *(("compiled", "before"), ("compiled", "after"), ("compiled-in-place", "before")),
        *(("blocks-compiled", "before"), ("blocks-compiled-in-place", "after")),
        *(("blocks-checkpointed", "before"), ("blocks-checkpointed", "after")),
        *(("checkpointing", "after"), ("ddp", "after")),
        *(("layerwise-casting", "before"), ("layerwise-casting", "after")),
    ],
)
def test_promises_hold_in_a_wrapper(name, when, build, velocity, tmp_path):
    pipeline, plain = build(), build()
    if name == "layerwise-casting":  # weights that it rounds
        for x in (pipeline.transformer, plain.transformer):
            x.to(torch.bfloat16).float()
    with one_process(tmp_path):
        model = pipeline.transformer
        if when == "before":
            model = wrapped(name, model)
        policies = LoraPolicies(model, config())
        if when == "after":
            model = wrapped(name, model)
        base = velocity(plain.transformer)
        change(policies)
        with policies.use("reference"), torch.no_grad():
            torch.testing.assert_close(velocity(model), base, rtol=0, atol=1e-6)
        velocity(model).square().sum().backward()
        assert all(x.grad.abs().max() > 0 for x in some(policies.parameters()))
        policies.save(pipeline, tmp_path / "lora")
        plain.load_lora_weights(tmp_path / "lora")
        ours, theirs = velocity(model), velocity(plain.transformer)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert (ours - base).abs().max() > 1e-3
        policies.load(pipeline, tmp_path / "lora", policy="old")
        assert policies.old_equals_current


@pytest.mark.parametrize(
    "wrap",
    [
        *(DataParallel, DistributedDataParallel, fully_shard),
        lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
    ],
)
def test_a_wrapper_for_several_processes_is_refused(wrap, tmp_path):
    """It would not synchronize parameters that come after."""
    with one_process(tmp_path):
        model = wrap(nn.Sequential(nn.Linear(2, 2)))
        with pytest.raises(ValueError, match=r"^model: expected one that is not wrapped or sharde"):
            LoraPolicies(model, config(target_modules=["0"]))


# Changes from outside.


def load_another(pipeline, folder):
    """The LoRA of a style, on other layers."""
    layer = "transformer.x_embedder"
    weights = {f"{layer}.lora_A.weight": torch.ones(1, 16)}
    weights[f"{layer}.lora_B.weight"] = torch.ones(32, 1)
    save_file(weights, folder / "style.safetensors")
    pipeline.load_lora_weights(folder, weight_name="style.safetensors", adapter_name="style")


def unload_another(pipeline):
    pipeline.delete_adapters("style")
    pipeline.set_adapters("current")


def both(pipeline, _):
    pipeline.set_adapters(["current", "old"])


#: What others do to the pipeline, its error, and what undoes it.
CHANGES = {
    "load": (load_another, r"adapters \['current', 'old'\], got .*'style'", unload_another),
    "set": (lambda p, _: p.set_adapters("old"), "'current', got .'old'", None),
    "both": (both, r"'current', got \['current', 'old'\]", None),
    "weigh": (lambda p, _: p.set_adapters("current", 0.5), "scale 1.5 in", None),
    "fuse": (lambda p, _: p.fuse_lora(), "fused into them", lambda p: p.unfuse_lora()),
    "disable": (lambda p, _: p.disable_lora(), "disabled", lambda p: p.enable_lora()),
    "delete": (lambda p, _: p.delete_adapters("old"), r"got \['current'\]", False),
    "unload": (lambda p, _: p.unload_lora_weights(), r"got \[\]", False),
    "cast": (lambda p, _: p.to(torch.bfloat16), r"float32 weights, got \['torch.bfl", False),
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.filterwarnings("ignore:Adapter style was active")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_from_outside_is_an_error_until_undone(name, build, velocity, tmp_path):
    pipeline = build()
    policies = LoraPolicies(pipeline.transformer, config())
    change(policies)
    before, at_start = velocity(pipeline.transformer).detach(), velocity(build().transformer)
    act, message, undo = CHANGES[name]
    act(pipeline, tmp_path)
    uses = [
        policies.parameters,
        partial(policies.update_old, decay=0.5),
        partial(policies.save, pipeline, tmp_path / "lora"),
        lambda: policies.load_state_dict({}),
    ]
    if name != "cast":  # takes no weights
        uses.append(lambda: policies.use("reference").__enter__())
    for use in some(uses):
        undo_it = r".* or load the pipeline anew and restore state_dict\(\)$"
        with pytest.raises(RuntimeError, match=rf"^model: expected .*{message}{undo_it}"):
            use()
    if undo is False:
        return
    (undo or (lambda p: p.set_adapters("current")))(pipeline)
    torch.testing.assert_close(velocity(pipeline.transformer), before, rtol=0, atol=1e-6)
    velocity(pipeline.transformer).sum().backward()
    assert len([x for x in policies.parameters() if x.grad is not None]) == 2 * LAYERS
    with policies.use("reference"):
        torch.testing.assert_close(velocity(pipeline.transformer), at_start, rtol=0, atol=1e-6)


def test_frozen_weights_are_not_given_to_an_optimizer(build):
    """An adapter set inside of ``use``, which restores all but the gradients."""
    pipeline = build()
    policies = LoraPolicies(pipeline.transformer, config())
    with policies.use("old"):
        pipeline.set_adapters("old")
    with pytest.raises(RuntimeError, match="weights of the current policy that need gradients, "):
        policies.parameters()
    pipeline.set_adapters("current")
    assert len(policies.parameters()) == 2 * LAYERS


# Files of others.


def as_kohya(weights):
    """File of one layer, with an alpha of its own."""
    name, layer = "lora_unet_double_blocks_0_img_attn_proj", "transformer_blocks.0.attn.to_out.0"
    return {
        f"{name}.lora_down.weight": weights[f"{layer}.lora_A.weight"],
        f"{name}.lora_up.weight": weights[f"{layer}.lora_B.weight"],
        f"{name}.alpha": torch.tensor(10.0),
    }


def with_alphas(weights, alphas):
    named = {f"transformer.{name}": x for name, x in weights.items()}
    layers = sorted({name.rpartition(".lora_")[0] for name in named})
    given = zip(layers, alphas, strict=False)
    return named | {f"{layer}.alpha": torch.tensor(alpha) for layer, alpha in given}


FOREIGN = {
    "without-metadata": (TARGETS, partial(with_alphas, alphas=[])),
    "one-alpha": (TARGETS, partial(with_alphas, alphas=[9.0] * LAYERS)),
    "alphas": (TARGETS, partial(with_alphas, alphas=[9.0, 5.0, 9.0, 2.0])),
    "half-precision": (
        TARGETS,
        lambda weights: {k: x.half() for k, x in with_alphas(weights, []).items()},
    ),
    "kohya": (r"transformer_blocks\.0\.attn\.to_out\.0", as_kohya),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_others_is_what_a_pipeline_makes_of_it(name, build, velocity, tmp_path):
    targets, convert = FOREIGN[name]
    pipeline = build()
    policies = LoraPolicies(pipeline.transformer, config(target_modules=targets))
    change(policies)
    weights = {k: x for k, x in policies.state_dict().items() if not k.endswith("lora_scale")}
    save_file(convert(weights), tmp_path / "pytorch_lora_weights.safetensors")
    expected = velocity_of_file(build, velocity, tmp_path)
    policies.load(pipeline, tmp_path)
    torch.testing.assert_close(velocity(pipeline.transformer), expected, rtol=0, atol=1e-5)
    with policies.use("reference"):
        assert (velocity(pipeline.transformer) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"use_dora": True}, r"^config\.use_dora: expected False, got True"),
        ({"init_lora_weights": "pissa"}, r"^config\.init_lora_weights: "),
        ({"r": 8}, r"lora_B\.weight: expected rank 8 of metadata, got 4"),
        ({"of_tomorrow": 1}, r"^metadata: expected fields of peft\.LoraConfig: .*of_tomorrow"),
    ],
)
def test_a_file_of_another_method_is_refused(edit, message, build, tmp_path):
    pipeline = build()
    policies = LoraPolicies(pipeline.transformer, config())
    state = {k: x for k, x in policies.state_dict().items() if not k.endswith("lora_scale")}
    type(pipeline).save_lora_weights(
        tmp_path,
        transformer_lora_layers=state,
        transformer_lora_adapter_metadata=config().to_dict() | edit,
    )
    with pytest.raises(ValueError, match=message):
        policies.load(pipeline, tmp_path)


def test_a_file_with_more_than_the_model_is_refused(build, tmp_path):
    pipeline = build()
    policies = LoraPolicies(pipeline.transformer, config())
    policies.save(pipeline, tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    extra = {"text_encoder.q.lora_A.weight": torch.ones(1, 1)}
    for state in (load_file(path) | extra, {"transformer.x.lora.down.weight": torch.ones(1, 1)}):
        save_file(state, path)
        with pytest.raises(ValueError, match="names or shapes are not those of the adapter"):
            policies.load(pipeline, tmp_path)


def test_a_state_of_another_scale_is_not_saved(build, tmp_path):
    """One rank saves a state at hand; metadata would say another alpha."""
    pipeline = build()
    policies = LoraPolicies(pipeline.transformer, config())
    other = LoraPolicies(build().transformer, config(lora_alpha=12)).state_dict()
    with pytest.raises(ValueError, match=r"^state: expected .*lora_scale 1\.5, got 3; make "):
        policies.save(pipeline, tmp_path, state=other)
    assert not list(tmp_path.iterdir())
