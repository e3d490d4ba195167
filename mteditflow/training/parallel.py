"""One policy on several devices: weights sharded by FSDP2 or DeepSpeed, gradients summed."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

DEEPSPEED = (0, 19, 8)  # earlier versions fail in the first forward pass, or were not tested
# Threshold 0: partition small weights, too. ``memory_efficient_linear`` would patch torch globally.
PARTITIONED = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "memory_efficient_linear": False,
}


def shard_model(model: nn.Module, *, blocks: Sequence[str]) -> None:
    """Shard a model over all ranks in place, block by block (FSDP2, ZeRO-3).

    Weights are gathered one block at a time, in the forward and the backward pass. Every rank must
    then run the same number of forward passes. Parameters become new objects (``DTensor``), so
    construct the optimizer afterwards. Backward passes leave the SUM over ranks in the sharded
    gradients, where FSDP's default is the mean: the caller divides by its count of units.

    Args:
        model: model on this rank's device, equal on all ranks, with its adapters.
        blocks: names of the classes whose modules are sharded one by one, such as a diffusers
            transformer's ``_no_split_modules``.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized.
        ValueError: the model has no such blocks.
    """
    _require_ranks("shard_model")
    found = [module for module in model.modules() if type(module).__name__ in blocks]
    if not found:
        raise ValueError(
            f"blocks: expected classes of modules of {type(model).__name__}, got {list(blocks)}"
        )
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for module in (*found, model):
        fully_shard(module, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Factor 1 gives the sum; the second call reduces by plain SUM, not NCCL's PreMulSum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def partition_model(model: nn.Module, zero: Mapping[str, Any] | None = None) -> None:
    """Partition a base model over all ranks in place with DeepSpeed (ZeRO-3), and freeze it.

    Weights are gathered one module at a time, in the forward and the backward pass. Every rank must
    then run the same number of forward passes. Add adapters AFTERWARDS: they are whole on every
    rank, and are trained, summed over ranks and saved as on a model that is not partitioned. Call
    the model itself and ``loss.backward()``; there is no DeepSpeed engine to call.

    Args:
        model: model on this rank's device, equal on all ranks, without adapters. Without gradient
            checkpointing, every gathered weight is kept until the backward pass.
        zero: further entries of DeepSpeed's ``zero_optimization``, such as
            ``{"offload_param": {"device": "cpu"}}``.

    Raises:
        ImportError: deepspeed is absent, or older than 0.19.8.
        RuntimeError: ``torch.distributed`` is not initialized, or ``LOCAL_RANK`` is not set.
        ValueError: the model has adapters, or ``zero`` has another stage, offloads an optimizer, or
            enables ``memory_efficient_linear``, which replaces ``torch.nn.functional.linear`` in
            the whole process.

    Warns:
        UserWarning: no module of the model has gradient checkpointing enabled.

    Source: ZeRO (arXiv 1910.02054), stage 3.

    Example:
        In each of several processes::

            partition_model(editor.transformer)
            policies = LoraPolicies(editor.transformer, editor.lora(rank=64, alpha=128))
    """
    require_deepspeed()
    if getattr(model, "peft_config", None) or any(
        type(module).__module__.startswith("peft.") for module in model.modules()
    ):
        raise ValueError(
            "model: expected one without adapters, which would be partitioned too; make them after "
            "partition_model"
        )
    settings = {**PARTITIONED, **(zero or {})}
    for name in ("stage", "memory_efficient_linear"):
        if settings[name] != PARTITIONED[name]:
            raise ValueError(f"zero.{name}: expected {PARTITIONED[name]}, got {settings[name]!r}")
    if (settings.pop("offload_optimizer", None) or {}).get("device", "none") != "none":
        raise ValueError("zero.offload_optimizer: expected none, since there is no optimizer in it")
    _require_ranks("partition_model")
    if "LOCAL_RANK" not in os.environ:
        raise RuntimeError("LOCAL_RANK: expected this process's number on its machine, got none")
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        warnings.warn(
            "partition_model: without gradient checkpointing all gathered weights are kept until "
            "the backward pass, which saves no memory there",
            stacklevel=2,
        )
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    model.requires_grad_(False)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": settings}
    # The engine that it returns is not used: the model's weights are partitioned in place.
    deepspeed.initialize(model=model, config=config)


def require_deepspeed() -> None:
    """Raise ``ImportError`` unless a deepspeed is installed that ``partition_model`` supports."""
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        found = "none"
    numbers = tuple(int(x) for x in found.split("+")[0].split(".") if x.isdigit())
    if numbers < DEEPSPEED:
        wanted = ".".join(map(str, DEEPSPEED))
        raise ImportError(
            f"deepspeed: expected {wanted} or newer, got {found}; pip install 'mteditflow[zero]'",
            name="deepspeed",
        )


def _require_ranks(function: str) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{function}: expected several processes; start them with accelerate launch or torchrun"
        )


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over ranks in place, once per update and after the last backward pass.

    This is a collective call where ``torch.distributed`` is initialized. Sharded parameters are
    skipped, since FSDP has reduced them already. A parameter without a gradient on this rank counts
    as 0. One without a gradient on every rank keeps none, so that an optimizer skips it as it does
    in a single process.

    Args:
        parameters: trained parameters, in the same order on every rank.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> weight.sum().backward()
        >>> sum_gradients([weight])
        >>> weight.grad
        tensor([1., 1.])
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    weights = [weight for weight in parameters if not isinstance(weight, DTensor)]
    if not weights:
        return
    # Ranks must agree on the tensors of the next collective, also where one had idle units only.
    counts = torch.tensor(
        [weight.grad is not None for weight in weights],
        dtype=torch.int32,
        device=weights[0].device,
    )
    dist.all_reduce(counts)
    gradients = []
    for weight, count in zip(weights, counts.tolist(), strict=True):
        if count:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            gradients.append(weight.grad)
    for kind in dict.fromkeys(gradient.dtype for gradient in gradients):
        _all_reduce([gradient for gradient in gradients if gradient.dtype == kind])


def _all_reduce(tensors: Sequence[Tensor]) -> None:
    """Sum tensors of one dtype over ranks in one collective, in place."""
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat)
    for x, part in zip(tensors, torch.split(flat, [x.numel() for x in tensors]), strict=True):
        x.copy_(part.view_as(x))
