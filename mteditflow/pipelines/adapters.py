"""LoRA adapters of policies: configurations, weights, and switching."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DataParallel, DistributedDataParallel

#: Fields of ``LoraConfig`` whose values are free: ``LoraPolicies`` keeps its guarantees with any.
SUPPORTED = frozenset(
    (
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("fan_in_fan_out", "lora_bias"),
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    )
)
#: Reason why each other field must keep its default; fields of a later peft are missing here.
REFUSED = {
    name: reason
    for reason, names in {
        "only True and 'gaussian' are an exact no-op on an unchanged base": "init_lora_weights",
        "norms of a forward pass equal those it starts with up to rounding alone": "use_dora",
        "the base model, which is the reference, would change": "bias layer_replication",
        "it trains what is no adapter of a layer": "modules_to_save trainable_token_indices "
        "target_parameters",
        "weights that adapters share would be averaged twice": "ensure_weight_tying",
        "the current policy is trained": "inference_mode",
        "it is another method than LoRA, or a variant not proved to keep the policies": "peft_type "
        "velora_config use_qalora monteclora_config use_bdlora kasa_config arrow_config "
        "alora_invocation_tokens megatron_config",
        "it acts only with other fields that are refused": "loftq_config eva_config corda_config "
        "lora_ga_config qalora_group_size runtime_config megatron_core",
    }.items()
    for name in names.split()
}


def check_config(config: LoraConfig) -> None:
    """Raise unless ``LoraPolicies`` can keep its guarantees with this configuration.

    Raises:
        TypeError: it is not exactly a ``LoraConfig``.
        ValueError: a field has a value with which a guarantee would be broken.
    """
    if type(config) is not LoraConfig:
        raise TypeError(f"config: expected a peft.LoraConfig, got {type(config).__name__}")
    default = LoraConfig()
    for name in [field.name for field in fields(config) if field.name not in SUPPORTED]:
        value, expected = getattr(config, name), [getattr(default, name)]
        if name == "init_lora_weights":
            expected.append("gaussian")
        if value not in expected:
            reason = REFUSED.get(name, "this version of mteditflow does not know the field")
            wanted = " or ".join(map(repr, expected))
            raise ValueError(f"config.{name}: expected {wanted}, got {value!r}: {reason}")
    for alpha in (config.lora_alpha, *config.alpha_pattern.values()):
        if not math.isfinite(alpha) or alpha == 0:
            raise ValueError(
                f"config.lora_alpha: expected a finite number other than 0, got {alpha!r}"
            )
    if not 0 <= config.lora_dropout < 1:
        raise ValueError(f"config.lora_dropout: expected in [0, 1), got {config.lora_dropout!r}")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside ``torch.compile``'s wrapper, which would prefix the weights' names.

    Raises:
        ValueError: it is wrapped by DataParallel, DDP or FSDP, which would not synchronize adapters
            that are added now.
    """
    model = getattr(model, "_orig_mod", model)
    wrappers = (DataParallel, DistributedDataParallel, FullyShardedDataParallel)
    if isinstance(model, wrappers) or any(isinstance(x, FSDPModule) for x in model.modules()):
        raise ValueError(
            f"model: expected one that is not wrapped or sharded yet, got {type(model).__name__}, "
            "which would not synchronize adapters added now; make LoraPolicies first"
        )
    return model


def check_passes_gradients(model: nn.Module) -> None:
    """Raise ``ValueError`` if a quantized layer passes no gradient to its input.

    Its output may still require one, as that of torchao's dynamic int8 does. Adapters before such a
    layer would silently be trained through the residual connections around it only.
    """
    seen = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        weight = layer.weight
        if weight.device.type == "cpu" and getattr(layer, "support_avx512bf16_for_cpu", False):
            raise ValueError(
                f"model: expected layers that pass gradients, but {name} of bitsandbytes would "
                "pass none on this CPU once a forward pass without gradients has packed its "
                "weights; set support_avx512bf16_for_cpu = False on every Linear4bit"
            )
        if not type(weight).__module__.startswith("torchao"):
            continue
        kind = type(weight), getattr(weight, "act_quant_kwargs", None) is None
        if kind in seen:
            continue
        seen.add(kind)
        if not _passes_gradient(layer):
            raise ValueError(
                f"model: expected layers that pass gradients, but {name} ({type(weight).__name__}) "
                "passes none; quantize weights only, as by torchao's Int8WeightOnlyConfig"
            )


def _passes_gradient(layer: nn.Linear) -> bool:
    """Return whether the layer's input gets a gradient."""
    weight = layer.weight
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(1, layer.in_features, dtype=weight.dtype, device=weight.device)
        y = layer(x.requires_grad_()).sum()
        passes = y.requires_grad and torch.autograd.grad(y, x, allow_unused=True)[0]
    return isinstance(passes, Tensor)


def add_adapters(
    model: nn.Module, config: LoraConfig, names: Sequence[str], seed: int
) -> dict[str, LoraLayer]:
    """Add float32 adapters to a model; the global generators do not change.

    Args:
        model: the model.
        config: configuration of the adapters.
        names: names of the adapters, initialized in this order.
        seed: seed of the initial weights.

    Returns:
        Layers with adapters, by their names in the model.

    Raises:
        ValueError: torch would read a layer's weights without calling the adapted layer.
    """
    config = copy.deepcopy(config)  # peft keeps it, and resolves its targets in place
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
    if hasattr(model, "_keep_in_fp32_modules"):
        # diffusers reports the dtype of the first weight outside this list as the model's dtype.
        kept = cast(Any, model)
        kept._keep_in_fp32_modules = [*(kept._keep_in_fp32_modules or ()), "lora_"]
    for module, layer in layers.items():
        inside = isinstance(layer.get_base_layer(), NonDynamicallyQuantizableLinear)
        if inside or isinstance(layer, MultiheadAttention):
            raise ValueError(
                f"config.target_modules: expected layers that the model calls, got {module!r} of "
                "a torch.nn.MultiheadAttention; exclude it, and reload the model"
            )
        layer.train(layer.get_base_layer().training)  # dropout included
    for name in names:
        for weight in adapter_weights(layers, name).values():
            weight.data = weight.data.float()
    return layers


def tuned(model: nn.Module) -> dict[str, Any]:
    """Return the layers of a model with adapters, by their names in the uncompiled model."""
    return {
        plain(name): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def plain(name: str) -> str:
    """Return the name of a module without what wrappers of its parents add to it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def adapter_weights(layers: Mapping[str, LoraLayer], name: str) -> dict[str, nn.Parameter]:
    """Return the weights of one adapter in the order of the modules, under peft's saved names.

    peft's own function finds no weights inside torch's ``CheckpointWrapper``.
    """
    found: dict[str, nn.Parameter] = {}
    for module, layer in layers.items():
        for attribute in layer.adapter_layer_names:
            held = getattr(layer, attribute)
            if name not in held:
                continue
            if isinstance(held[name], nn.Parameter):
                found[f"{module}.{attribute}"] = held[name]
            else:
                found.update(held[name].named_parameters(prefix=f"{module}.{attribute}"))
    return found


def activate(layers: Iterable[LoraLayer], stack: Sequence[str]) -> None:
    """Activate the adapters in ``stack``, and no others; an empty stack disables all.

    peft's own ``set_adapter`` and ``enable_adapters`` also change ``requires_grad``, which would
    have to be undone for every weight at every switch. Its forward passes read only the two fields
    that are set here.
    """
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = active_names(stack), not stack


def active_names(stack: Sequence[str]) -> list[str]:
    """Return the adapters that a layer lists as active; "current" where all are disabled."""
    return list(stack) or ["current"]
