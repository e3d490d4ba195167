"""Samplers beside the model in training: a distilled sibling, or a LoRA for few steps."""

from __future__ import annotations

import os

import diffusers

from mteditflow.budget.local import find_model
from mteditflow.budget.models import Model
from mteditflow.pipelines.lora_files import read_lora
from mteditflow.pipelines.siblings import check_alike


def find_sibling(model: Model, source: str | os.PathLike[str]) -> Model:
    """Return the model that samples while another is trained; see ``find_model``.

    Args:
        model: the model in training.
        source: hub id of a known model, or a folder of a pipeline in diffusers format.

    Raises:
        ValueError: the source is neither, or its pipeline or transformer differs from the model's.
        OSError: a file in the folder cannot be read.

    Example:
        >>> from mteditflow.budget import MODELS
        >>> find_sibling(MODELS["klein-9b"], "black-forest-labs/FLUX.2-klein-9B").distilled
        True
    """
    try:
        sibling = find_model(source)
    except ValueError as error:
        raise ValueError(f"source: {str(error).removeprefix('model: ')}") from error
    if sibling.pipeline != model.pipeline:
        raise ValueError(f"source: expected a {model.pipeline}, got a {sibling.pipeline}")
    kind = getattr(diffusers, model.behavior.transformer)
    check_alike(kind, sibling.config, model.config)
    return sibling


def count_lora(model: Model, path: str | os.PathLike[str]) -> int:
    """Return the number of weights of a LoRA of a model's transformer.

    Args:
        model: the model.
        path: a safetensors file, or a folder with one in diffusers' format.

    Raises:
        ValueError: it is not a LoRA of the transformer alone.
        OSError: there is no such file.
    """
    weights = read_lora(getattr(diffusers, model.pipeline), path)
    return sum(x.numel() for x in weights.values())
