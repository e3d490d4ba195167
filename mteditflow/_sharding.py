"""Tensors that FSDP2 may have split over ranks: read whole, written from whole, compared.

``fully_shard`` swaps a module's parameters for DTensors in place. Everything here takes plain
tensors too, and costs no communication for them. DeepSpeed's own sharding is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def reshard(model: nn.Module) -> None:
    """Make FSDP2's modules hold their shards again: after a forward pass the root keeps copies."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def refuse_deepspeed(weights: Iterable[Tensor]) -> None:
    """Raise ``RuntimeError`` where DeepSpeed has weights of its own that would not be met."""
    if any(hasattr(weight, "ds_id") or hasattr(weight, "_hp_mapping") for weight in weights):
        raise RuntimeError(
            "DeepSpeed keeps these weights elsewhere (ZeRO): read or set them before "
            "deepspeed.initialize, or shard with FSDP2 (fully_shard) in its place"
        )


def local(x: Tensor) -> Tensor:
    """Shard of a tensor on this rank, sharing memory with it."""
    return x.to_local().detach() if isinstance(x, DTensor) else x.detach()


def whole(x: Tensor) -> Tensor:
    """A copy of the whole tensor, plain and on the CPU; every rank calls it."""
    x = x.detach()
    if isinstance(x, DTensor):
        x = cast(DTensor, x.to(x.device_mesh.device_type)).full_tensor()
    return x.to("cpu", copy=True)


@torch.no_grad()
def fill(target: Tensor, full: Tensor) -> None:
    """Set a tensor in place from a whole one of its shape; every rank calls it with the same."""
    if isinstance(target, DTensor):
        full = distribute_tensor(full, target.device_mesh, target.placements).to_local()
    local(target).copy_(full)


def agreed(verdict: bool, tensors: Iterable[Tensor]) -> bool:
    """Whether the verdict is true on every rank that shares these tensors.

    Plain tensors are the same on every rank, and so is the verdict: no communication.
    """
    sharded = next((x for x in tensors if isinstance(x, DTensor)), None)
    if sharded is None:
        return verdict
    mesh = sharded.device_mesh
    flag = torch.tensor(int(verdict), dtype=torch.int64, device=mesh.device_type)
    for axis in range(mesh.ndim):
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=mesh.get_group(axis))
    return bool(flag)
