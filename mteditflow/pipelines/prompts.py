"""Embeddings of instructions, computed once each, with text encoders that stay on the host."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mteditflow._checks import check_count


class Prompts:
    """Looks up the embeddings of instructions, and computes those that are new.

    Each instruction is embedded alone: in another batch its embedding could differ in the last
    bits, and then a trajectory would depend on its neighbours. All new ones of a call share one
    stay of the encoders on the device.

    Args:
        encode: the embeddings of one instruction, tensors with one row each.
        encoders: the modules that ``encode`` uses, on the host.
        device: where they work.
        capacity: embeddings of how many instructions are kept on the host, the last used.

    Raises:
        ValueError: the capacity is below 1.

    Example:
        >>> prompts = Prompts(lambda p: [torch.full((1, 2), float(len(p)))], [], "cpu", capacity=8)
        >>> prompts(["Remove it", "Add", "Add"])["Add"]
        [tensor([[3., 3.]])]
    """

    def __init__(
        self,
        encode: Callable[[str], Sequence[Tensor]],
        encoders: Iterable[nn.Module],
        device: torch.device | str,
        *,
        capacity: int,
    ) -> None:
        check_count("capacity", capacity)
        self._encode, self._encoders, self._device = encode, list(encoders), torch.device(device)
        self._capacity = capacity
        self._kept: OrderedDict[str, list[Tensor]] = OrderedDict()

    @torch.no_grad()
    def __call__(self, instructions: Iterable[str]) -> dict[str, list[Tensor]]:
        """Embeddings of each instruction, on the host, however many there are."""
        wanted = list(dict.fromkeys(instructions))
        found = {text: self._kept[text] for text in wanted if text in self._kept}
        new = [text for text in wanted if text not in found]
        if new:
            with working_on(self._encoders, self._device):
                for text in new:
                    found[text] = [x.cpu() for x in self._encode(text)]
        for text in wanted:
            self._kept[text] = found[text]
            self._kept.move_to_end(text)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return found


@contextmanager
def working_on(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Let modules be on a device inside the context.

    Afterwards their weights are the very tensors that they were before: frozen weights need no copy
    back, and the device's memory is free.
    """
    tensors = [x for module in modules for x in (*module.parameters(), *module.buffers())]
    home = [x.data for x in tensors]
    try:
        for x in tensors:
            x.data = x.data.to(device, non_blocking=True)
        yield
    finally:
        for x, data in zip(tensors, home, strict=True):
            x.data = data
