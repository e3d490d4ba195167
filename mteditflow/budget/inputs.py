"""Inputs of diffusers' transformers by class, with the shapes of one or several training rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """Sizes of one row.

    Attributes:
        resolution: side of the square output, in pixels.
        text: number of text tokens.
        references: number of reference images that the model attends to.
        reference_resolution: side of each reference, in pixels.
        token: side of the square that one image token covers, in pixels.
    """

    resolution: int
    text: int
    references: int = 0
    reference_resolution: int = 0
    token: int = 16

    @property
    def side(self) -> int:
        """Return the number of tokens along a side of the output."""
        return self.resolution // self.token

    @property
    def reference_side(self) -> int:
        """Return the number of tokens along a side of a reference."""
        return self.reference_resolution // self.token

    @property
    def image_tokens(self) -> int:
        """Return the number of tokens of the output and of all references."""
        return self.side**2 + self.references * self.reference_side**2


Inputs = dict[str, Any]
_Zeros = Callable[..., torch.Tensor]


def make_inputs(kind: str, config: Any, rows: int, shape: Shape, dtype: torch.dtype) -> Inputs:
    """Return keyword arguments of a transformer's forward pass, zeros on the CPU.

    Args:
        kind: name of the transformer's class in diffusers, a key of ``INPUTS``.
        config: its configuration, with attribute access.
        rows: rows of the batch.
        shape: sizes of one row.
        dtype: dtype of latents and embeddings.

    Raises:
        ValueError: ``INPUTS`` has no entry for the class.
    """
    if kind not in INPUTS:
        raise ValueError(f"transformer: expected one of {', '.join(INPUTS)}, got {kind}")

    def zeros(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(*size, dtype=dtype, device="cpu")

    return INPUTS[kind](config, rows, shape, zeros)


def _flux(config: Any, rows: int, shape: Shape, zeros: _Zeros) -> Inputs:
    guidance = {"guidance": zeros(rows, dtype=torch.float32)} if config.guidance_embeds else {}
    return {
        "hidden_states": zeros(rows, shape.image_tokens, config.in_channels),
        "encoder_hidden_states": zeros(rows, shape.text, config.joint_attention_dim),
        "pooled_projections": zeros(rows, config.pooled_projection_dim),
        "timestep": zeros(rows),
        "img_ids": zeros(shape.image_tokens, 3),
        "txt_ids": zeros(shape.text, 3),
        **guidance,
    }


def _flux2(config: Any, rows: int, shape: Shape, zeros: _Zeros) -> Inputs:
    guidance = zeros(rows, dtype=torch.float32) if config.guidance_embeds else None
    return {
        "hidden_states": zeros(rows, shape.image_tokens, config.in_channels),
        "encoder_hidden_states": zeros(rows, shape.text, config.joint_attention_dim),
        "timestep": zeros(rows),
        "img_ids": zeros(shape.image_tokens, 4, dtype=torch.int64),
        "txt_ids": zeros(shape.text, 4, dtype=torch.int64),
        "guidance": guidance,
    }


def _qwen(config: Any, rows: int, shape: Shape, zeros: _Zeros) -> Inputs:
    reference = (1, shape.reference_side, shape.reference_side)
    images = [(1, shape.side, shape.side), *[reference] * shape.references]
    return {
        "hidden_states": zeros(rows, shape.image_tokens, config.in_channels),
        "encoder_hidden_states": zeros(rows, shape.text, config.joint_attention_dim),
        "timestep": zeros(rows),
        "img_shapes": [images] * rows,
    }


def _z_image(config: Any, rows: int, shape: Shape, zeros: _Zeros) -> Inputs:
    # Latents are not packed here: the model itself makes a token of 2 x 2 of them (SD3, Wan, too).
    size = (config.in_channels, 1, 2 * shape.side, 2 * shape.side)
    return {
        "x": [zeros(*size) for _ in range(rows)],
        "t": zeros(rows),
        "cap_feats": [zeros(shape.text, config.cap_feat_dim) for _ in range(rows)],
    }


def _sd3(config: Any, rows: int, shape: Shape, zeros: _Zeros) -> Inputs:
    return {
        "hidden_states": zeros(rows, config.in_channels, 2 * shape.side, 2 * shape.side),
        "encoder_hidden_states": zeros(rows, shape.text, config.joint_attention_dim),
        "pooled_projections": zeros(rows, config.pooled_projection_dim),
        "timestep": zeros(rows),
    }


def _wan(config: Any, rows: int, shape: Shape, zeros: _Zeros) -> Inputs:
    return {
        "hidden_states": zeros(rows, config.in_channels, 1, 2 * shape.side, 2 * shape.side),
        "encoder_hidden_states": zeros(rows, shape.text, config.text_dim),
        "timestep": zeros(rows, dtype=torch.int64),
    }


#: Input builders by the name of the transformer's class.
INPUTS: dict[str, Callable[[Any, int, Shape, _Zeros], Inputs]] = {
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "QwenImageTransformer2DModel": _qwen,
    "ZImageTransformer2DModel": _z_image,
    "SD3Transformer2DModel": _sd3,
    "WanTransformer3DModel": _wan,
}
