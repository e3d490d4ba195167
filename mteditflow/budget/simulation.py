"""Costs of a transformer with adapters, from fake tensors: nothing is computed or downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

import diffusers
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mteditflow.budget.costs import Case, Costs
from mteditflow.budget.inputs import make_inputs
from mteditflow.budget.tracking import PeakMemory, count_flops
from mteditflow.pipelines.quantization import layers_in_blocks
from mteditflow.pipelines.shared_casts import shared_casts

# Arguments that count blocks of one kind, by class: costs are linear in each of them.
DEPTHS = {
    "FluxTransformer2DModel": ("num_layers", "num_single_layers"),
    "Flux2Transformer2DModel": ("num_layers", "num_single_layers"),
    "QwenImageTransformer2DModel": ("num_layers",),
    "ZImageTransformer2DModel": ("n_layers",),
    "SD3Transformer2DModel": ("num_layers",),
    "WanTransformer3DModel": ("num_layers",),
}
SHALLOW = 2  # blocks of each kind in the smallest model that is simulated for a deep one


def simulate(case: Case) -> Costs:
    """Predict the costs of a case by running it on fake tensors.

    A model with more than three blocks of a kind is replaced by models with two and three, whose
    costs are extrapolated linearly, since blocks of a kind are equal. Where they are not (dual
    attention in some of the blocks), the whole model is run, which takes minutes.

    Args:
        case: the model and its input.

    Returns:
        Costs of one row.

    Raises:
        ValueError: the class is unknown, its arguments are wrong, or no layer matches a target.

    Source: predicted over measured peaks in ``tests/budget/test_budget_accuracy.py``.
    """
    depth = _depth(case)
    if all(blocks <= SHALLOW + 1 for blocks in depth.values()):
        return simulate_at(case, {})
    base = {name: min(blocks, SHALLOW) for name, blocks in depth.items()}
    start = simulate_at(case, base)
    # cost(depths) = cost(start) + sum over kinds of (cost of one more block) * (missing blocks)
    total, block = list(astuple(start)), 0
    for name, blocks in depth.items():
        if blocks > base[name]:
            deeper = simulate_at(case, {**base, name: base[name] + 1})
            block = max(block, deeper.weights - start.weights)
            for place, (more, less) in enumerate(zip(astuple(deeper), astuple(start), strict=True)):
                total[place] += (more - less) * (blocks - base[name])
    return replace(Costs(*total), largest=start.largest, block=block)


def count_blocks(case: Case) -> int:
    """Return the number of blocks of the transformer of a case.

    Raises:
        ValueError: the class is unknown.
    """
    return sum(_blocks(case).values())


def _depth(case: Case) -> dict[str, int]:
    """Return the number of blocks of each kind; nothing if blocks of a kind differ."""
    blocks = _blocks(case)
    return {} if case.config.get("dual_attention_layers") else blocks


def _blocks(case: Case) -> dict[str, int]:
    if case.kind not in DEPTHS:
        raise ValueError(f"transformer: expected one of {', '.join(DEPTHS)}, got {case.kind}")
    defaults = inspect.signature(getattr(diffusers, case.kind).__init__).parameters
    return {name: case.config.get(name, defaults[name].default) for name in DEPTHS[case.kind]}


def build_model(case: Case, depth: Mapping[str, int], *, device: str) -> nn.Module:
    """Build the frozen transformer of a case with trainable float32 adapters.

    Args:
        case: the model.
        depth: numbers of blocks that replace the configuration's, by argument.
        device: "meta" or "cpu".

    Raises:
        ValueError: the class refuses its arguments, or no layer matches a target.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(case.dtype)
    try:
        with torch.device(device):
            model = getattr(diffusers, case.kind)(**{**case.config, **depth})
    except TypeError as error:
        raise ValueError(f"transformer: {case.kind}: {error}") from error
    finally:
        torch.set_default_dtype(before)
    model.eval().requires_grad_(False)
    layers = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    adapted = [name for name in layers if name.endswith(tuple(f".{x}" for x in case.targets))]
    if not adapted:
        raise ValueError(f"targets: expected endings of linear layers, got {case.targets}")
    with torch.device(device):
        model.add_adapter(
            LoraConfig(r=case.rank, target_modules=adapted, init_lora_weights="gaussian")
        )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model  # type: ignore[no-any-return]


def run_update(model: nn.Module, inputs: Mapping[str, Any], branches: int) -> None:
    """Run one row of an update: a velocity from all branches, a loss, and the backward pass."""
    with shared_casts(model):
        outputs = [_velocity(model, inputs) for _ in range(branches)]
        velocity = outputs[0]
        for other in outputs[1:]:
            velocity = velocity + 4.0 * (other - velocity)  # guidance; any scale costs the same
        velocity.float().pow(2).mean().backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def run_sample(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Run a forward pass without gradient."""
    _velocity(model, inputs)


def _velocity(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    output = model(**inputs, return_dict=False)[0]
    velocity: Tensor = torch.stack(output) if isinstance(output, list) else output
    return velocity


def resident(model: nn.Module) -> list[Tensor]:
    """Return the tensors that exist before a row is run: weights, gradients and buffers.

    Missing gradients are created, as they exist after the first micro-batch of an update.
    """
    parameters = list(model.parameters())
    for x in parameters:
        if x.requires_grad and x.grad is None:
            x.grad = torch.zeros_like(x)
    gradients = [x.grad for x in parameters if x.grad is not None]
    return [*parameters, *gradients, *_constants(model)]


def _constants(model: nn.Module) -> list[Tensor]:
    """Return buffers and plain tensor attributes."""
    plain = [x for part in model.modules() for x in vars(part).values() if isinstance(x, Tensor)]
    return [*model.buffers(), *plain]


def simulate_at(case: Case, depth: Mapping[str, int]) -> Costs:
    """Return the costs of a whole model with these numbers of blocks, without extrapolation.

    Args:
        case: the model and its input.
        depth: numbers of blocks that replace the configuration's, by argument.

    Raises:
        ValueError: as in ``simulate``.
    """
    model = build_model(case, depth, device="meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill_fake(model)
        inputs = make_inputs(case.kind, model.config, 1, case.shape, case.dtype)
        exists = resident(model)

        def sample() -> None:
            run_sample(model, inputs)

        def update() -> None:
            run_update(model, inputs, case.branches)

        def train() -> None:
            run_update(model, inputs, 1)

        # FLOPs are of one branch, memory is of all: activations of both branches are alive at once.
        plain = count_flops(train), peak_of(update, exists)
        forward = count_flops(sample), peak_of(sample, exists)
        model.enable_gradient_checkpointing()  # type: ignore[operator]
        checkpointed = count_flops(train), peak_of(update, exists)
    adapters = sum(x.numel() for name, x in model.named_parameters() if "lora_" in name)
    linear = packed_sizes(model)
    return Costs(
        weights=sum(x.numel() for x in model.parameters()) - adapters,
        linear=sum(linear),
        buffers=sum(x.numel() for x in _constants(model)),
        largest=max(linear, default=0),
        block=0,
        adapters=adapters,
        forward=forward[0],
        train=checkpointed[0],
        train_plain=plain[0],
        update=checkpointed[1],
        update_plain=plain[1],
        sample=forward[1],
    )


def packed_sizes(model: nn.Module) -> list[int]:
    """Return the number of parameters of each layer that ``model.quantize`` packs."""
    layers = [model.get_submodule(name) for name in layers_in_blocks(model) if "lora_" not in name]
    return [layer.weight.numel() for layer in layers]  # type: ignore[operator]


def peak_of(run: Callable[[], object], exists: Sequence[Tensor]) -> int:
    """Return the peak bytes that a call allocates in addition to existing tensors."""
    with PeakMemory(exists) as memory:
        run()
    return int(memory.peak)


def fill_fake(model: nn.Module) -> None:
    """Replace every meta tensor of a model by a fake CPU tensor; call it in ``FakeTensorMode``.

    Tied weights stay tied. On the CPU, attention uses a flash kernel, which saves the same tensors
    as CUDA's; on meta tensors it would use the math path, which saves the attention scores.
    """

    def fake(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device="cpu")

    before = list(model.parameters())  # kept alive, so that no id is reused
    made = {id(x): nn.Parameter(fake(x), x.requires_grad) for x in before}
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = made[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fake(buffer)
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor):
                setattr(part, name, fake(value))
