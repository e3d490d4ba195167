"""One float32 copy for all adapted layers that take the same input, instead of one each."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


@contextmanager
def shared_casts(model: nn.Module) -> Iterator[None]:
    """Share one float32 input copy among adapted layers of the same input, to save memory.

    A layer of a half-precision model casts its input to the float32 of its adapter, and keeps the
    copy for the backward pass. Query, key and value layers take the same tensor, so inside the
    context they share the copy's memory. Each still has its own cast in the graph, so outputs and
    gradients are equal to the last bit. Nothing changes without gradients, in checkpointed blocks
    (which keep no copy), where input and adapter have one dtype, and in compiled code.

    Run forward and backward pass inside the context, since checkpointing runs the model again. Use
    the model in one thread at a time.

    Args:
        model: a model with LoRA adapters of peft; other layers stay as they are.

    Example:
        >>> from peft import LoraConfig, inject_adapter_in_model
        >>> model = nn.ModuleDict({"q": nn.Linear(2, 2), "k": nn.Linear(2, 2)}).bfloat16()
        >>> config = LoraConfig(r=1, target_modules=["q", "k"])
        >>> model = inject_adapter_in_model(config, model)
        >>> for name, weight in model.named_parameters():
        ...     weight.data = weight.data.float() if "lora_" in name else weight.data
        >>> x, copies = torch.ones(3, 2, dtype=torch.bfloat16), set()
        >>> def pack(saved):
        ...     if saved.shape == x.shape and saved.dtype == torch.float32:
        ...         copies.add(saved.untyped_storage().data_ptr())
        ...     return saved
        >>> with shared_casts(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ...     y = model["q"](x) + model["k"](x)
        >>> len(copies)
        1
    """
    cast = _SharedCast()
    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and layer.cast_input_dtype_enabled:
                stack.callback(setattr, layer, "cast_input_dtype_enabled", True)
                layer.cast_input_dtype_enabled = False  # peft's own cast; the hooks replace it
                for name, adapter in layer.lora_A.items():
                    hook = _hook(cast, adapter)
                    entrance = layer.lora_dropout[name]
                    stack.callback(entrance.register_forward_pre_hook(hook).remove)
        yield


def _hook(cast: _SharedCast, adapter: nn.Module) -> Any:
    """Return a hook that casts an adapter's input, before dropout, to the dtype of its weight."""

    def run(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (cast(inputs[0], adapter.weight.dtype),)  # type: ignore[arg-type]

    return run


class _SharedCast:
    """Cast that reuses its last copy while the graph of a forward pass keeps it alive."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]] | None = None

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype:
            return x
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.is_inference():
            return x.to(dtype)
        copy = self._found(x, dtype)
        if copy is None:
            copy = x.detach().to(dtype)
        cast: Tensor = _Cast.apply(x, copy)  # type: ignore[no-untyped-call]
        # Weak references: a copy that a checkpoint drops or a backward pass has used must be freed.
        self._last = weakref.ref(x), x._version, weakref.ref(cast)
        return cast

    def _found(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        if self._last is None:
            return None
        source, version, cast = self._last
        # The version excludes an input that was changed in place since.
        copy = cast() if source() is x and version == x._version else None
        return copy.detach() if copy is not None and copy.dtype == dtype else None


class _Cast(torch.autograd.Function):
    """Cast with a precomputed result; its gradient is that of ``x.to(copy.dtype)``."""

    @staticmethod
    def forward(x: Tensor, copy: Tensor) -> Tensor:  # noqa: ARG004
        return copy.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None
