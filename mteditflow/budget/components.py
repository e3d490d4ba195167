"""Costs of text encoders and autoencoders, from fake tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from mteditflow.budget.costs import EncoderCosts, VaeCosts
from mteditflow.budget.local import pixels_of_latent
from mteditflow.budget.models import Part
from mteditflow.budget.simulation import fill_fake, packed_sizes, peak_of

TOKENS = 512  # tokens of a padded instruction


def simulate_encoder(part: Part, *, dtype: torch.dtype) -> EncoderCosts:
    """Return a text encoder's number of parameters, and the predicted memory of one instruction.

    Args:
        part: class and configuration of the text encoder.
        dtype: dtype of weights and arithmetic.

    Raises:
        ValueError: transformers has no such class, or the class refuses its configuration.
    """
    kind = getattr(transformers, part.kind, None)
    if kind is None:
        raise ValueError(f"text encoder: expected a class of transformers, got {part.kind}")
    with _building(f"text encoder: {part.kind}", dtype):
        model = kind(kind.config_class(**part.config)).eval().requires_grad_(False)
    linear = sum(packed_sizes(model))
    limit = getattr(model.config, "max_position_embeddings", None) or TOKENS
    options = {} if model.config.is_encoder_decoder else {"use_cache": False}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fill_fake(model)
        # CLIP has only 77 positions.
        tokens = torch.zeros(1, min(TOKENS, limit), dtype=torch.int64, device="cpu")
        mask = torch.ones_like(tokens)
        encode = peak_of(
            lambda: model(tokens, attention_mask=mask, output_hidden_states=True, **options),
            [*model.parameters(), *model.buffers()],
        )
    return EncoderCosts(sum(x.numel() for x in model.parameters()), linear, encode)


@contextmanager
def _building(name: str, dtype: torch.dtype) -> Iterator[None]:
    """Build a model on the meta device; raise ``ValueError`` if the class refuses its arguments."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    finally:
        torch.set_default_dtype(before)


def simulate_vae(part: Part, *, resolution: int, dtype: torch.dtype) -> VaeCosts:
    """Return an autoencoder's number of parameters, and the predicted memory of one image.

    Args:
        part: class and arguments of the autoencoder.
        resolution: side of the image, in pixels.
        dtype: dtype of weights and arithmetic.

    Raises:
        ValueError: diffusers has no such class, or the class refuses its arguments.
    """
    kind = getattr(diffusers, part.kind, None)
    if kind is None:
        raise ValueError(f"vae: expected a class of diffusers, got {part.kind}")
    with _building(f"vae: {part.kind}", dtype):
        vae = kind(**part.config).eval().requires_grad_(False)
    latents, pixels = _sizes(vae, resolution)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fill_fake(vae)
        exists = [*vae.parameters(), *vae.buffers()]

        def peak(coder: Any, size: Sequence[int]) -> int:
            x = torch.zeros(*size, dtype=dtype, device="cpu")
            return peak_of(lambda: coder(x), exists)

        encode, decode = peak(vae.encode, pixels), peak(vae.decode, latents)
        vae.enable_tiling()
        tiled = peak(vae.decode, latents)
    return VaeCosts(sum(x.numel() for x in vae.parameters()), decode, tiled, encode)


def _sizes(vae: Any, resolution: int) -> tuple[list[int], list[int]]:
    """Return the shapes of one image's latents and pixels; a video autoencoder has one frame."""
    video = hasattr(vae.config, "z_dim")
    channels = vae.config.z_dim if video else vae.config.latent_channels
    frames = [1] if video else []
    side = resolution // pixels_of_latent(vae.config)
    return [1, channels, *frames, side, side], [1, 3, *frames, resolution, resolution]
