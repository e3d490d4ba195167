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

#: Fields of ``LoraConfig`` that may have any value: promises of ``LoraPolicies`` hold with it.
SUPPORTED = frozenset(
    (
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("fan_in_fan_out", "lora_bias"),
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    )
)
#: Why a field must keep its default; one of a later peft has no reason yet.
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
    """Raise unless policies with these adapters keep what ``LoraPolicies`` promises.

    Raises:
        TypeError: it is not exactly a ``LoraConfig``.
        ValueError: a field has a value with which a promise would be broken.
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
            raise ValueError(f"config.lora_alpha: expected a finite number but 0, got {alpha!r}")
    if not 0 <= config.lora_dropout < 1:
        raise ValueError(f"config.lora_dropout: expected in [0, 1), got {config.lora_dropout!r}")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s wrapper, whose name would be in those of the weights.

    Raises:
        ValueError: it is wrapped for several processes, which would miss adapters added now.
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
    """Raise ``ValueError`` where a quantized layer gives its inputs no gradient.

    Its output may need one all the same, as torchao's of dynamic int8 does: adapters before it
    would silently be trained by what goes around it.
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
    """Whether the layer's input gets a gradient."""
    weight = layer.weight
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(1, layer.in_features, dtype=weight.dtype, device=weight.device)
        y = layer(x.requires_grad_()).sum()
        passes = y.requires_grad and torch.autograd.grad(y, x, allow_unused=True)[0]
    return isinstance(passes, Tensor)


def add_adapters(
    model: nn.Module, config: LoraConfig, names: Sequence[str], seed: int
) -> dict[str, LoraLayer]:
    """Give a model float32 adapters, drawn in this order; the global generators are left alone.

    Returns:
        Layers with adapters, by their names in the model.

    Raises:
        ValueError: torch would not call an adapted layer.
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
        # diffusers takes the first floating-point weight's dtype for the model's, but for these.
        kept = cast(Any, model)
        kept._keep_in_fp32_modules = [*(kept._keep_in_fp32_modules or ()), "lora_"]
    for module, layer in layers.items():
        inside = isinstance(layer.get_base_layer(), NonDynamicallyQuantizableLinear)
        if inside or isinstance(layer, MultiheadAttention):
            raise ValueError(
                f"config.target_modules: expected layers that the model calls, got {module!r} of "
                "a torch.nn.MultiheadAttention; exclude it, and load the model anew"
            )
        layer.train(layer.get_base_layer().training)  # dropout included
    for name in names:
        for weight in adapter_weights(layers, name).values():
            weight.data = weight.data.float()
    return layers


def tuned(model: nn.Module) -> dict[str, Any]:
    """Layers of a model that hold adapters, by the names they have in a model not compiled."""
    return {
        plain(name): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def plain(name: str) -> str:
    """Name of a module without the parts that wrappers of its parents add."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def adapter_weights(layers: Mapping[str, LoraLayer], name: str) -> dict[str, nn.Parameter]:
    """Weights of one adapter, in the order of the model's modules, named as peft saves them.

    peft's own function finds none inside of torch's ``CheckpointWrapper``.
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
    """Set which adapters are active, none by an empty stack, and nothing else.

    peft's own ``set_adapter`` and ``enable_adapters`` also turn ``requires_grad`` on and off, which
    would have to be undone for every weight at every switch; these two fields are what its forward
    passes read.
    """
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = active_names(stack), not stack


def active_names(stack: Sequence[str]) -> list[str]:
    """Adapters that a layer names as active; where all are disabled the current one."""
    return list(stack) or ["current"]
