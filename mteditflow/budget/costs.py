"""Cases to simulate, and their costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mteditflow.budget.inputs import Shape


@dataclass(frozen=True)
class Case:
    """Transformer with adapters, and one row of its input.

    Attributes:
        kind: class of the transformer in diffusers.
        config: arguments of the class where they differ from its defaults.
        shape: sizes of one row.
        targets: endings of the names of adapted layers.
        rank: rank of the adapters.
        branches: forward passes for one velocity: 2 under classifier-free guidance, else 1.
        dtype: dtype of weights and arithmetic; adapters are float32.
    """

    kind: str
    config: Mapping[str, Any]
    shape: Shape
    targets: tuple[str, ...]
    rank: int = 32
    branches: int = 1
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Costs:
    """Costs of one row; memory and FLOPs of a batch are linear in its rows.

    Attributes:
        weights: number of parameters of the base model.
        linear: number of those in linear layers of blocks, which quantization packs.
        buffers: number of elements of buffers and plain tensor attributes.
        largest: parameters of the largest layer that quantization packs.
        block: parameters of the largest block; 0 if the whole model was run.
        adapters: number of weights of one set of adapters.
        forward: FLOPs of a forward pass of one branch (F), without gradient.
        train: FLOPs of forward and backward of one branch with gradient checkpointing.
        train_plain: the same without checkpointing.
        update: peak bytes of forward passes of all branches, loss and backward, with checkpointing.
        update_plain: the same without checkpointing.
        sample: peak bytes of a forward pass without gradient.
    """

    weights: int
    linear: int
    buffers: int
    largest: int
    block: int
    adapters: int
    forward: int
    train: int
    train_plain: int
    update: int
    update_plain: int
    sample: int


@dataclass(frozen=True)
class EncoderCosts:
    """Size of a text encoder, and memory of one instruction.

    Attributes:
        weights: number of parameters.
        linear: number of those in linear layers of blocks, which quantization packs.
        encode: peak bytes of encoding one instruction.
    """

    weights: int
    linear: int
    encode: int


@dataclass(frozen=True)
class VaeCosts:
    """Size of an autoencoder, and memory of one square image.

    Attributes:
        weights: number of parameters.
        decode: peak bytes of decoding one image.
        decode_tiled: the same with tiling.
        encode: peak bytes of encoding one image.
    """

    weights: int
    decode: int
    decode_tiled: int
    encode: int


@dataclass(frozen=True)
class ModelCosts:
    """Costs of a model's parts.

    Attributes:
        row: costs of the transformer for one row.
        vae: costs of the autoencoder.
        encoders: costs of all text encoders together.
    """

    row: Costs
    vae: VaeCosts
    encoders: EncoderCosts
