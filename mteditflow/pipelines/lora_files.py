"""LoRA files: read weights at a given scale, join two adapters into one, and split them again."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import get_peft_kwargs
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from mteditflow.pipelines.adapters import check_config

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name of the file in a folder
FACTOR_A = re.compile(r"(\.lora_(?:embedding_)?)A\b")  # in the name of a first factor


def read_lora(pipeline: type[DiffusionPipeline], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the weights of a LoRA at scale 1, for ``Start``.

    The scale of each layer, from its alpha, rank and rslora, is multiplied into the factor B.

    Args:
        pipeline: class of the pipeline, which converts files of other formats.
        path: a safetensors file, or a folder with ``pytorch_lora_weights.safetensors``.

    Returns:
        Float32 weights on the CPU, named as peft saves them: ``<layer>.lora_A.weight``, [r, in],
        and ``<layer>.lora_B.weight``, [out, r].

    Raises:
        ValueError: it is no LoRA, it has weights for more than the transformer, such as text
            encoders, or its method is one that ``LoraPolicies`` refuses.
        OSError: there is no such file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from diffusers import FluxPipeline
        >>> pair = {"proj_out.lora_A.weight": torch.ones(1, 2)}
        >>> pair["proj_out.lora_B.weight"] = torch.ones(2, 1)
        >>> scale = {"r": 1, "lora_alpha": 3, "target_modules": ["proj_out"]}
        >>> with TemporaryDirectory() as folder:
        ...     FluxPipeline.save_lora_weights(
        ...         folder, pair, transformer_lora_adapter_metadata=scale
        ...     )
        ...     weights = read_lora(FluxPipeline, folder)
        >>> weights["proj_out.lora_B.weight"].tolist()
        [[3.0], [3.0]]
    """
    loaded = load_file(pipeline, path)
    named = [name.removeprefix("transformer.") for name in loaded[0]]
    weights = weights_of_file(loaded, dict.fromkeys(map(layer_of, named), 1.0))
    if not weights or (wrong := _unpaired(weights)):
        raise ValueError(
            f"{path}: expected a LoRA of the transformer alone, two factors for each layer, got "
            + (f"{wrong[:4]} beside it" if weights else "no weights")
        )
    return {name: x.detach().to("cpu", torch.float32) for name, x in weights.items()}


def load_file(pipeline: type[DiffusionPipeline], path: str | os.PathLike[str]) -> tuple[Any, ...]:
    """Return weights, alphas and metadata as a pipeline reads them from a safetensors file.

    Raises:
        ValueError: it is no such file.
        OSError: it cannot be read.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected a LoRA in diffusers' format, got no file")
    try:
        loaded: tuple[Any, ...] = pipeline.lora_state_dict(
            str(file), use_safetensors=True, return_alphas=True, return_lora_metadata=True
        )
    except (OSError, ValueError):
        raise
    except Exception as error:  # safetensors and the converters raise many types for other files
        raise ValueError(f"{file}: expected a LoRA in diffusers' format: {error}") from error
    return loaded


def layer_of(name: str) -> str:
    """Return the layer that a weight belongs to.

    Example:
        >>> layer_of("blocks.0.attn.to_q.lora_A.weight")
        'blocks.0.attn.to_q'
    """
    return name.rpartition(".lora_")[0]


def scaled(weights: Mapping[str, Tensor], factors: Mapping[str, float]) -> dict[str, Tensor]:
    """Return weights whose factors B are multiplied by the factor of their layer."""
    return {name: x * factors[layer_of(name)] if is_b(name) else x for name, x in weights.items()}


def joined(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return one adapter whose product is the sum of two, B1 A1 + B2 A2, at scale 1.

    The factors are concatenated along the rank. Both adapters must be at scale 1.
    """
    both = {
        name: torch.cat([first[name], x], dim=rank_axis(name))
        for name, x in second.items()
        if name in first
    }
    return {**first, **second, **both}


def without(weights: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the second adapter of ``joined``.

    Raises:
        ValueError: the weights do not begin with ``first``.
    """
    left = dict(weights)
    for name, x in first.items():
        axis, rank = rank_axis(name), x.shape[rank_axis(name)]
        both = weights.get(name)
        # ``min``: a file of a lower rank must differ here rather than fail in ``narrow``.
        if both is None or not torch.equal(both.narrow(axis, 0, min(rank, both.shape[axis])), x):
            raise ValueError(f"{name}: expected the frozen start in the file, got other weights")
        left[name] = both.narrow(axis, rank, both.shape[axis] - rank)
    return {name: x for name, x in left.items() if x.numel()}


def unit_config(weights: Mapping[str, Tensor]) -> LoraConfig:
    """Return the configuration of an adapter at scale 1, with its layers and their ranks."""
    ranks = {layer_of(name): x.shape[1] for name, x in weights.items() if is_b(name)}
    ((usual, _),) = Counter(ranks.values()).most_common(1)
    # "^": without it peft matches a pattern with every layer whose name ends like this one.
    others = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != usual}
    return LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules="|".join(map(re.escape, ranks)),
    )


def weights_of_file(
    loaded: tuple[Any, ...], scales: Mapping[str, float], prefix: str = "transformer."
) -> dict[str, Tensor]:
    """Return a LoRA file's weights rescaled for adapters of other scales; products stay the same.

    Args:
        loaded: result of a pipeline's ``lora_state_dict``, with alphas and metadata.
        scales: scale of each layer's adapter that gets the weights.
        prefix: prefix of the model's names in the file.

    Raises:
        ValueError: the metadata is of a refused method, or contradicts the weights.
    """
    state = {name.removeprefix(prefix): x for name, x in loaded[0].items()}
    ranks = {f"^{k}": x.shape[1] for k, x in state.items() if is_b(k) and x.ndim > 1}
    if not ranks:
        return state
    config = _file_config(state, ranks, loaded[1:], prefix)
    for name, x in state.items():
        module = layer_of(name)
        if is_b(name) and module in scales:
            rank, scale = _rank_and_scale(config, module)
            if x.ndim > 1 and x.shape[1] != rank:
                raise ValueError(f"{name}: expected rank {rank} of metadata, got {x.shape[1]}")
            # The product is scale * B A, so that B takes the ratio of the two scales.
            state[name] = x.float() * (scale / scales[module])
    return state


def is_b(name: str) -> bool:
    """Return whether a weight is of the factor B, [out, r], into which scales are multiplied."""
    return ".lora_B." in name or name.endswith(".lora_embedding_B")


def rank_axis(name: str) -> int:
    """Return the axis of a factor that runs over the rank: 1 of B [out, r], 0 of A [r, in]."""
    return 1 if is_b(name) else 0


def _unpaired(names: Iterable[str]) -> list[str]:
    """Return the names of weights that are no factor, or whose other factor is missing."""
    second = {name for name in names if is_b(name)}
    others = set(names) - second
    return sorted({FACTOR_A.sub(r"\1B", name) for name in others} ^ second)


def _file_config(
    state: Mapping[str, Tensor], ranks: dict[str, int], known: tuple[Any, ...], prefix: str
) -> LoraConfig:
    """Return the configuration that diffusers would give a file's adapter.

    It comes from the file's metadata, or from ranks and alphas if there is none.

    Raises:
        ValueError: the metadata is not that of a supported ``LoraConfig``.
    """
    *alphas, metadata = known
    if metadata is None:
        given = {k.removeprefix(prefix): x for k, x in ((alphas or [{}])[0] or {}).items()}
        return LoraConfig(**get_peft_kwargs(ranks, given, state))
    own = {k.removeprefix(prefix): x for k, x in metadata.items() if k.startswith(prefix)}
    try:
        config = LoraConfig(**(own | {"inference_mode": False}))
    except TypeError as error:
        raise ValueError(f"metadata: expected fields of peft.LoraConfig: {error}") from error
    check_config(config)
    return config


def _rank_and_scale(config: LoraConfig, module: str) -> tuple[int, float]:
    """Return rank and scale of a layer's adapter: alpha / rank, or alpha / sqrt(rank) (rslora)."""
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module))
    alpha = float(config.lora_alpha if alpha is None else alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)
