"""Access to tensors that FSDP2 may have sharded: gather, fill from a full tensor, agree on a flag.

``fully_shard`` replaces a module's parameters by DTensors in place. All functions here also take
plain tensors, without any communication. DeepSpeed's own sharding is refused.
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
    """Free the unsharded copies that FSDP2's root module keeps after a forward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def refuse_deepspeed(weights: Iterable[Tensor]) -> None:
    """Raise ``RuntimeError`` if DeepSpeed holds the actual weights elsewhere."""
    if any(hasattr(weight, "ds_id") or hasattr(weight, "_hp_mapping") for weight in weights):
        raise RuntimeError(
            "DeepSpeed keeps these weights elsewhere (ZeRO): read or set them before "
            "deepspeed.initialize, or shard with FSDP2 (fully_shard) in its place"
        )


def local(x: Tensor) -> Tensor:
    """Shard of a tensor on this rank, sharing memory with it."""
    return x.to_local().detach() if isinstance(x, DTensor) else x.detach()


def whole(x: Tensor) -> Tensor:
    """Return a copy of the full tensor as a plain CPU tensor; a collective call for DTensors."""
    x = x.detach()
    if isinstance(x, DTensor):
        # Gathering runs on the mesh's device; CPU-offloaded shards are moved there first.
        x = cast(DTensor, x.to(x.device_mesh.device_type)).full_tensor()
    return x.to("cpu", copy=True)


@torch.no_grad()
def fill(target: Tensor, full: Tensor) -> None:
    """Set a tensor in place from a full one of its shape; every rank passes the same values."""
    if isinstance(target, DTensor):
        full = distribute_tensor(full, target.device_mesh, target.placements).to_local()
    local(target).copy_(full)


def agreed(verdict: bool, tensors: Iterable[Tensor]) -> bool:
    """Whether ``verdict`` is true on every rank that shares these tensors.

    Plain tensors are equal on every rank, and so is the verdict, which needs no communication.
    """
    sharded = next((x for x in tensors if isinstance(x, DTensor)), None)
    if sharded is None:
        return verdict
    mesh = sharded.device_mesh
    flag = torch.tensor(int(verdict), dtype=torch.int64, device=mesh.device_type)
    # One reduction per mesh axis: a minimum over all axes is a logical AND over all ranks.
    for axis in range(mesh.ndim):
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=mesh.get_group(axis))
    return bool(flag)
