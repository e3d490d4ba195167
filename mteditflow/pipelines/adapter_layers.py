"""The layers that peft has put adapters into: found, read and switched without side effects."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def add_adapters(
    model: nn.Module, config: LoraConfig, names: Sequence[str], seed: int
) -> list[BaseTunerLayer]:
    """Give a model float32 adapters, drawn in this order; the global generators are left alone."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        torch.manual_seed(seed)
        for name in names:
            if hasattr(model, "add_adapter"):
                cast(Any, model).add_adapter(config, adapter_name=name)
            else:
                inject_adapter_in_model(config, model, adapter_name=name)
    layers = tuned(model)
    for name in names:
        for weight in adapter_weights(layers, name):
            weight.data = weight.data.float()
    return layers


def tuned(model: nn.Module) -> list[BaseTunerLayer]:
    """The layers of a model that hold adapters."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapter_weights(layers: list[BaseTunerLayer], name: str) -> list[nn.Parameter]:
    """Weights of one adapter, in the order of the model's modules."""
    found: list[nn.Parameter] = []
    for layer in layers:
        for attribute in layer.adapter_layer_names:
            held = getattr(layer, attribute)
            if name in held:
                part = held[name]
                found += [part] if isinstance(part, nn.Parameter) else part.parameters()
    return found


def activate(states: list[tuple[BaseTunerLayer, list[str], bool]]) -> None:
    """Set which adapters are active or disabled, and nothing else.

    peft's own ``set_adapter`` and ``enable_adapters`` also turn ``requires_grad`` on and off, which
    would have to be undone for every weight at every switch; these two fields are what its forward
    passes read.
    """
    for layer, active, disabled in states:
        layer._active_adapter, layer._disable_adapters = active, disabled
