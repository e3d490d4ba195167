"""State of a model on which outputs or gradients depend: dropout, caches, offload."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from mteditflow.pipelines.recognize import ReplayError


def attention_modules(model: nn.Module) -> list[Any]:
    """Return the modules with an attention processor, which pipelines may replace in a call."""
    return [module for module in model.modules() if hasattr(module, "processor")]


_PROBABILITIES = ("dropout", "dropout_p", "dropout_prob", "drop_prob", "attention_dropout")


def check_repeatable(model: nn.Module) -> None:
    """Raise ``ReplayError`` if a module has active dropout, or batch norm in training mode."""
    for module in model.modules():
        if not module.training:
            continue
        # ``p`` is a probability in torch's dropout only; elsewhere it may mean anything.
        names = ("p", *_PROBABILITIES) if isinstance(module, _DropoutNd) else _PROBABILITIES
        held = [vars(module).get(n) for n in names]
        draws = any(isinstance(p, (int, float)) and p > 0 for p in held)
        if draws or isinstance(module, _BatchNorm):
            name = next(name for name, each in model.named_modules() if each is module)
            raise ReplayError(
                "model: expected no dropout or batch norm in training mode, got "
                f"{name} ({type(module).__name__}); call model.eval() before sampling"
            )


def caches(model: nn.Module) -> bool:
    """Return whether a cache of diffusers is enabled on a model."""
    return bool(getattr(model, "is_cache_enabled", False))


def is_group_offloaded(model: nn.Module) -> bool:
    """Return whether diffusers moves groups of a model's weights to another device or to disk."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook("group_offloading")
        group = getattr(hook, "group", None)
        if group is not None and (
            group.offload_to_disk_path or group.offload_device != group.onload_device
        ):
            return True
    return False


@contextmanager
def fresh_cache(model: nn.Module) -> Iterator[None]:
    """Start with an empty cache inside the context, and empty it on exit; no-op without a cache."""
    if not caches(model):
        yield
        return
    cached = cast(Any, model)
    cached._reset_stateful_cache()  # as pipelines do at the end; not all caches have contexts
    try:
        with cached.cache_context("mteditflow"):
            yield
    finally:
        cached._reset_stateful_cache()
