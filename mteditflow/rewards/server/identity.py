"""Which models score, told by what decides on a score: their classes, settings and weights."""

from __future__ import annotations

import hashlib
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from mteditflow.rewards.consistency.scorer import ConsistencyScorer
from mteditflow.rewards.consistency.wire import Info, Limits
from mteditflow.rewards.transport.cache import request_key

LIBRARIES = ("mteditflow", "torch", "transformers", "pillow")


def describe(scorer: ConsistencyScorer, limits: Limits) -> Info:
    """Describe what a server scores with; reads all weights once.

    Example:
        >>> scorer = ConsistencyScorer(lambda images, names: [])
        >>> describe(scorer, Limits()).models["tokens"]
        'strict'
    """
    models = {
        "tokens": scorer.tokens,
        "detector": _describe(scorer.detector),
        "features": _describe(scorer.features),
    }
    return Info(scorer=request_key(models), models=models, versions=_versions(), limits=limits)


def _describe(model: Any) -> dict[str, Any] | None:
    if model is None:
        return None
    kind = model if hasattr(model, "__qualname__") else type(model)
    parts = getattr(model, "__dict__", {})
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        **{name.lstrip("_"): x for name, x in parts.items() if isinstance(x, (bool, int, float))},
        "weights": {
            name.lstrip("_"): _digest(x) for name, x in parts.items() if isinstance(x, nn.Module)
        },
    }


def _digest(module: nn.Module) -> str:
    """sha256 of all parameters and buffers, whatever device they are on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
