"""Loads the two halves of an editor: what samples on the device, what embeds text on the host."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from mteditflow.pipelines.families import Family
from mteditflow.pipelines.prompts import Prompts


def load_sampling(
    source: str | os.PathLike[str], family: Family, dtype: torch.dtype, device: torch.device | str
) -> DiffusionPipeline:
    """The pipeline without its text parts, on the device, frozen, quiet and in eval mode."""
    without = dict.fromkeys(family.text_parts)
    pipeline = family.pipeline.from_pretrained(source, dtype=dtype, **without).to(device)
    pipeline.set_progress_bar_config(disable=True)
    for module in _modules(pipeline):
        module.eval().requires_grad_(False)
    return pipeline


def load_prompts(
    source: str | os.PathLike[str],
    family: Family,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    options: Mapping[str, Any],
    capacity: int,
) -> Prompts:
    """The text parts alone, on the host, with a cache of ``capacity`` embeddings.

    They encode as a call of the full pipeline with these call options does.
    """
    texts = family.pipeline.from_pretrained(source, dtype=dtype, transformer=None, vae=None)
    encoders = _modules(texts)
    for module in encoders:
        module.eval().requires_grad_(False)
    text_options = family.text_options(options)

    def encode(text: str) -> Sequence[Tensor]:
        *embeddings, _ = texts.encode_prompt(prompt=text, device="cpu", **text_options)
        return list(embeddings)

    return Prompts(encode, encoders, device, capacity=capacity)


def _modules(pipeline: DiffusionPipeline) -> list[nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
