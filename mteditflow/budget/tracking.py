"""Measurement of torch operations: peak memory, and FLOPs including the CPU's flash attention."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

BLOCK = 512  # bytes to a multiple of which CUDA's caching allocator rounds up


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Peak of the bytes in storages that operations have created and that are still referenced.

    It counts results of operations only, without workspaces inside kernels and fragmentation. It
    works on real and fake tensors, but not with ``FlopCounterMode``, which keeps references.

    Args:
        ignored: tensors whose storages do not count, such as existing weights and gradients.
        block: bytes to a multiple of which the size of a storage is rounded up.

    Attributes:
        now: bytes that are currently alive.
        peak: largest number of bytes that were alive at once.

    Example:
        >>> with PeakMemory(()) as memory:
        ...     x = torch.zeros(1024, dtype=torch.float32, device="cpu")
        ...     y = (x + 1).sum()
        >>> memory.peak, memory.now  # x, x + 1 and their sum; then without x + 1
        (8704, 4608)
    """

    def __init__(self, ignored: Iterable[Tensor], *, block: int = BLOCK) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._block = block
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        # Kept alive, so that no new storage gets one of their addresses.
        self._ignored = [x.untyped_storage() for x in ignored]
        self._addresses = {storage._cdata for storage in self._ignored}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and track the storages of its results."""
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._watch(x.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata  # identifies the storage, also for views of it
        if address in self._addresses or address in self._sizes:
            return
        size = -(-storage.nbytes() // self._block) * self._block
        self._sizes[address] = size
        self._watched[address] = weakref.ref(storage, lambda _: self._released(address))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _released(self, address: int) -> None:
        self.now -= self._sizes.pop(address)
        del self._watched[address]


def _attention(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return sdpa_flop_count(query, key, value)  # type: ignore[no-any-return, no-untyped-call]


def _attention_backward(
    gradient: Sequence[int],
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)  # type: ignore[no-any-return, no-untyped-call]


def count_flops(run: Callable[[], object]) -> int:
    """Return the number of floating-point operations of products, convolutions and attention.

    ``FlopCounterMode`` has no formula for the CPU's flash attention, without which a fifth to a
    half of a transformer's operations would be missing.

    Example:
        >>> x = torch.zeros(2, 3, dtype=torch.float32, device="cpu")
        >>> count_flops(lambda: x @ x.T)  # 2 * 2 * 2 * 3
        24
    """
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return int(counter.get_total_flops())
