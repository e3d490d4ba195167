"""Batches spread over processes: gather them, then call the same pure function on every rank.

Groups may be split over ranks. Each rank gathers the whole batch, computes the advantages of all
trajectories with the function used in a single process, and keeps its own slice. The result does
not depend on the number of ranks (bit for bit if the function is deterministic)::

    (reward, group, valid), own = gather_ranks(reward, group, valid)
    advantage = group_advantage(reward, group, valid=valid)[own]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from mteditflow._checks import check_tensor


def gather_ranks(
    *tensors: Tensor, process_group: dist.ProcessGroup | None = None
) -> tuple[tuple[Tensor, ...], slice]:
    """Concatenate each tensor over ranks along its first axis.

    If ``torch.distributed`` is initialized, this is a collective call: every rank of the process
    group makes it with the same number of tensors. Local batches may differ in size and may be
    empty. Without ``torch.distributed`` the tensors are returned detached.

    Args:
        *tensors: each [B_local, ...] with the same B_local, on the backend's device. Dtypes are
            kept: integers, such as group ids, are not converted to floats.
        process_group: process group of ``torch.distributed``; ``None`` is the default group.

    Returns:
        The gathered tensors, each [B, ...] in the order of ranks, detached; and the slice of this
        rank's rows in them.

    Raises:
        ValueError: there is no tensor, a tensor has no axes, or first axes differ.
        TypeError: an argument is not a tensor.

    Example:
        >>> (reward,), own = gather_ranks(torch.tensor([1.0, 2.0]))
        >>> reward[own]
        tensor([1., 2.])
    """
    if not tensors:
        raise ValueError("tensors: expected at least one tensor, got none")
    for position, x in enumerate(tensors):
        check_tensor(f"tensors[{position}]", x)
        if x.ndim == 0 or x.shape[0] != tensors[0].shape[0]:
            expected = "[B_local, ...] with the B_local of tensors[0]"
            raise ValueError(f"tensors[{position}]: expected {expected}, got {list(x.shape)}")
    rows = len(tensors[0])
    if not (dist.is_available() and dist.is_initialized()):
        return tuple(x.detach() for x in tensors), slice(0, rows)
    # Sizes first: every rank must pad to the same largest batch.
    counts = _row_counts(rows, tensors[0].device, process_group)
    start = sum(counts[: dist.get_rank(process_group)])
    gathered = tuple(_gather(x.detach(), counts, process_group) for x in tensors)
    return gathered, slice(start, start + rows)


def _row_counts(
    rows: int, device: torch.device, process_group: dist.ProcessGroup | None
) -> list[int]:
    local = torch.tensor([rows], dtype=torch.int64, device=device)
    counts = [torch.empty_like(local) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(counts, local, group=process_group)
    return [int(count) for count in counts]


def _gather(x: Tensor, counts: list[int], process_group: dist.ProcessGroup | None) -> Tensor:
    """Pad to the largest rank, gather, and cut, because ``all_gather`` needs equal shapes."""
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=process_group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
