"""One float32 copy for layers that take one tensor: equal gradients, fewer bytes kept."""

import pytest
import torch
from mteditflow_examples.shapes.editor import build_klein, build_kontext
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from mteditflow.budget.inputs import Shape, make_inputs
from mteditflow.budget.tracking import PeakMemory
from mteditflow.pipelines import LoraPolicies, shared_casts
from tests.loops import some

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "add_q_proj", "add_k_proj"]


def policies_of(build, dtype=torch.bfloat16, dropout=0.0):
    model = build().transformer.to(dtype)
    config = LoraConfig(r=2, target_modules=TARGETS, lora_dropout=dropout)
    policies = LoraPolicies(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policies.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return policies


def inputs_of(model, dtype=torch.bfloat16):
    given = make_inputs(type(model).__name__, model.config, 2, Shape(64, 8, 1, 64), dtype)
    generator = torch.Generator().manual_seed(2)
    for name in ("hidden_states", "encoder_hidden_states"):
        given[name] = torch.randn(given[name].shape, generator=generator).to(dtype)
    return given


def velocity_and_gradients(policies, dtype=torch.bfloat16):
    """Velocity, gradients of the adapters and of the input, bytes of float32 that are kept."""
    model = policies.model
    given = inputs_of(model, dtype)
    x = given["hidden_states"].requires_grad_()
    kept = {}

    def pack(saved):
        if saved.dtype == torch.float32 and not isinstance(saved, nn.Parameter):
            storage = saved.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes(), saved  # held: no address is used again
        return saved

    torch.manual_seed(3)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        velocity = model(**given, return_dict=False)[0]
    for weight in policies.parameters():
        weight.grad = None
    velocity.float().square().sum().backward()
    gradients = [weight.grad for weight in policies.parameters()]
    return [velocity.detach(), *gradients, x.grad], sum(size for size, _ in kept.values())


@pytest.fixture(scope="module", params=[build_kontext, build_klein], ids=["kontext", "klein"])
def policies(request):
    return policies_of(request.param)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_velocity_and_gradients_are_equal_and_fewer_bytes_are_kept(policies, checkpointing):
    model = policies.model
    if checkpointing:
        model.enable_gradient_checkpointing()
    else:
        model.disable_gradient_checkpointing()
    expected, before = velocity_and_gradients(policies)
    with shared_casts(model):
        found, after = velocity_and_gradients(policies)
    for one, other in some(list(zip(found, expected, strict=True))):
        assert torch.equal(one, other)
    # Inside of checkpointed blocks nothing is kept but while one is run again.
    assert after == before if checkpointing else after < 0.9 * before


def test_checkpointed_blocks_take_no_more_memory():
    model = policies_of(build_kontext).model
    model.enable_gradient_checkpointing()
    given = inputs_of(model)

    def peak():
        with PeakMemory([*model.parameters(), *model.buffers()]) as memory:
            model(**given, return_dict=False)[0].sum().backward()
        return memory.peak

    peak()  # gradients exist from now on
    before = peak()
    with shared_casts(model):
        assert peak() == before


def test_dropout_draws_the_same_masks():
    policies = policies_of(build_kontext, dropout=0.5)
    policies.model.train()
    expected, _ = velocity_and_gradients(policies)
    policies.model.train()
    with shared_casts(policies.model):
        found, _ = velocity_and_gradients(policies)
    for one, other in some(list(zip(found, expected, strict=True))):
        assert torch.equal(one, other)


def two_layers():
    """Layers of bfloat16 with float32 adapters."""
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)}).bfloat16()
    config = LoraConfig(r=2, target_modules=["q", "k"], init_lora_weights=False)
    model = inject_adapter_in_model(config, model)
    for name, weight in model.named_parameters():
        weight.data = weight.data.float() if "lora_" in name else weight.data
    return model


def test_a_tensor_that_has_changed_in_place_is_cast_again():
    model, x = two_layers(), torch.ones(3, 4, dtype=torch.bfloat16)
    with shared_casts(model):
        kept = model["q"](x)  # with its graph, which keeps the copy
        x.mul_(2)
        found = model["k"](x)
    assert kept.requires_grad
    assert torch.equal(found, model["k"](x))


def test_another_tensor_of_the_same_shape_is_cast_again():
    model, x = two_layers(), torch.ones(3, 4, dtype=torch.bfloat16)
    other = 2 * x
    with shared_casts(model):
        kept = model["q"](x)
        found = model["k"](other)
    assert kept.requires_grad
    assert torch.equal(found, model["k"](other))


def test_the_copy_is_kept_by_the_graph_alone():
    model = two_layers()
    with shared_casts(model), PeakMemory(model.parameters()) as memory:
        x = torch.ones(3, 4, dtype=torch.bfloat16)
        alone = memory.now
        with torch.no_grad():
            model["q"](x)
        assert memory.now == alone
        y = model["q"](x)
        kept = memory.now
        z = model["k"](x)
        assert memory.now - kept < kept - alone  # by a copy
        del y, z
        assert memory.now == alone


def test_everything_is_as_before_after_the_context():
    model = two_layers()
    layers = [model["q"], model["k"]]
    layers[1].cast_input_dtype_enabled = False  # by layerwise casting: left alone

    def state():
        hooks = [len(x.lora_dropout["default"]._forward_pre_hooks) for x in layers]
        return [x.cast_input_dtype_enabled for x in layers], hooks

    with shared_casts(model):
        assert state() == ([False, False], [1, 0])
    assert state() == ([True, False], [0, 0])
    with pytest.raises(RuntimeError), shared_casts(model):
        model["q"](torch.ones(1, 3, dtype=torch.bfloat16))
    assert state() == ([True, False], [0, 0])


def test_second_derivatives_pass_through_the_cast():
    model = two_layers()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()

    def second():
        y = model["q"](x).float().pow(3).sum()
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(gradient.float().square().sum(), x)[0]

    expected = second()
    with shared_casts(model):
        assert torch.equal(second(), expected)
