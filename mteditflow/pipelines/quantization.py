"""Frozen linear layers in 8 or 4 bits, to save memory while adapters are trained."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from mteditflow._checks import check_choice

#: Package that each kind of quantization needs.
QUANTIZATIONS = {"int8": "torchao", "nf4": "bitsandbytes"}


def check_quantization(kind: str) -> None:
    """Raise unless this kind of quantization is available.

    Raises:
        ValueError: the kind is neither "int8" nor "nf4", or its package is not installed.
    """
    check_choice("quantize", kind, tuple(QUANTIZATIONS))
    package = QUANTIZATIONS[kind]
    if find_spec(package) is None:
        raise ValueError(
            f"quantize: {kind} needs {package}, which is not installed; "
            "pip install 'mteditflow[quantized]'"
        )


def quantize(model: nn.Module, kind: str, device: torch.device) -> None:
    """Quantize the linear layers of a model's blocks, in place and one by one, on a device.

    Layers outside of blocks (embedders, head) and those that the model keeps in float32 do not
    change, and are not moved. Only weights are quantized; inputs and outputs keep their dtype.

    Args:
        model: a frozen model on the host.
        kind: "int8", symmetric per row; or "nf4", in blocks of 64 weights (QLoRA).
        device: device on which layers are quantized, and on which they stay.

    Raises:
        ValueError: as ``check_quantization``.

    Source: QLoRA (arXiv 2305.14314), section 3, for nf4.
    """
    check_quantization(kind)
    layer_of = _int8 if kind == "int8" else _nf4
    for name in layers_in_blocks(model):
        model.set_submodule(name, layer_of(model.get_submodule(name).to(device)))


def is_quantized(model: nn.Module) -> bool:
    """Return whether a model has weights of another class than ``nn.Parameter``."""
    return any(type(x) is not nn.Parameter for x in model.parameters())


def layers_in_blocks(model: nn.Module) -> list[str]:
    """Return the names of the linear layers in lists of blocks, without those kept in float32."""
    blocks = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear)
        and any(name.startswith(f"{block}.") for block in blocks)
        and kept.isdisjoint(name.split("."))
    ]


def _int8(layer: Any) -> nn.Module:
    torchao: Any = importlib.import_module("torchao.quantization")
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    layer.weight.requires_grad_(False)
    return layer  # type: ignore[no-any-return]


def _nf4(layer: Any) -> nn.Module:
    bnb: Any = importlib.import_module("bitsandbytes").nn
    weight, bias = layer.weight.data, layer.bias
    quantized = bnb.Linear4bit(
        *(layer.in_features, layer.out_features, bias is not None),
        compute_dtype=weight.dtype,
        quant_type="nf4",
        compress_statistics=False,
        device="meta",
    )
    quantized.weight = bnb.Params4bit(
        weight,
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=False,
        module=quantized,
    )
    quantized.bias = bias
    # On CPUs with AVX512-BF16 the first forward pass would pack weights, which stops gradients.
    quantized.support_avx512bf16_for_cpu = False
    return quantized.to(weight.device).eval()  # type: ignore[no-any-return]
