"""One policy on many devices: blocks sharded by FSDP2, and gradients summed over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


def shard_model(model: nn.Module, *, blocks: Sequence[str]) -> None:
    """Shard a model over all ranks in place, block by block (FSDP2, ZeRO-3).

    Weights are gathered for one block at a time, forward and backward. Every rank must then run
    the same number of forward passes. Parameters become new objects, ``DTensor``: make the
    optimizer afterwards. Backward passes leave the SUM over ranks in the sharded gradients, where
    FSDP's default is their mean: the caller divides by what it summed over.

    Args:
        model: on this rank's device, equal on all ranks; adapters are in it already.
        blocks: names of the classes to shard one by one, such as a diffusers transformer's
            ``_no_split_modules``.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized.
        ValueError: the model has no such blocks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "shard_model: expected several processes; start them with accelerate launch or torchrun"
        )
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
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add gradients up over ranks, in place: once per update, after the last backward pass.

    A collective call where ``torch.distributed`` is initialized. Sharded parameters have been
    reduced by FSDP already; one without a gradient on this rank counts as 0.

    Args:
        parameters: in the same order on every rank.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> weight.sum().backward()
        >>> sum_gradients([weight])
        >>> weight.grad
        tensor([1., 1.])
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    gradients = []
    for weight in parameters:
        if not isinstance(weight, DTensor):
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
