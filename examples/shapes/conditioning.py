"""Call a tiny editor's transformer directly, as its pipeline does; for pre-training only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, FluxKontextPipeline
from einops import rearrange
from torch import Tensor

from .editor import LATENT_CHANNELS, TEXT_LAYERS, TEXT_TOKENS, enlarge
from .world import IMAGE_SIZE, PALETTE, paint


class Conditioner:
    """Cached text embeddings of instructions, and position ids of both images.

    Args:
        pipeline: A tiny Kontext or klein.
        instructions: All instructions of the training; ``row`` maps each to its row.
    """

    def __init__(
        self, pipeline: FluxKontextPipeline | Flux2KleinPipeline, instructions: Sequence[str]
    ) -> None:
        self.pipeline = pipeline
        self.row = {text: i for i, text in enumerate(dict.fromkeys(instructions))}
        self.klein = isinstance(pipeline, Flux2KleinPipeline)
        prepare = _klein_inputs if self.klein else _kontext_inputs
        with torch.no_grad():
            self.of_rows, self.of_all = prepare(pipeline, list(self.row))

    @cached_property
    def colors(self) -> Tensor:
        """Latent of one pixel of each palette color, float32 ``[colors, C]``."""
        plain = torch.arange(len(PALETTE))[:, None, None].expand(-1, IMAGE_SIZE, IMAGE_SIZE)
        return self.encode(paint(plain))[:, 0].view(-1, LATENT_CHANNELS, 4)[..., 0]

    def encode(self, images: Tensor) -> Tensor:
        """Encode images in [0, 1], ``[M, 3, H, W]``, into packed latents ``[M, tokens, 4 C]``."""
        images = enlarge(images) if self.klein else images
        with torch.no_grad():
            latents = self.pipeline._encode_vae_image(2 * images - 1, None)
        if self.klein:
            return self.pipeline._pack_latents(latents)
        return self.pipeline._pack_latents(latents, *latents.shape)

    def encode_index(self, index: Tensor) -> Tensor:
        """Encode drawings, palette indices ``[M, H, W]``, with the result of :meth:`encode`.

        The autoencoder encodes every pixel separately, so a lookup by color suffices. Encoding with
        klein's takes longer than a training step of its transformer.
        """
        patches = "m (h p) (w q) c -> m (h w) (c p q)"
        return rearrange(self.colors[index.long()], patches, p=2, q=2)

    def velocity(self, x_t: Tensor, sigma: Tensor, reference: Tensor, rows: Tensor) -> Tensor:
        """Predict the velocity of ``x_t`` ``[M, tokens, 4 C]`` at ``sigma`` ``[M]``.

        Args:
            x_t: Noisy packed latents.
            sigma: Flow times in [0, 1].
            reference: Packed latents of the reference, ``[M, tokens, 4 C]``.
            rows: Row of each instruction, ``[M]``.
        """
        output = self.pipeline.transformer(
            hidden_states=torch.cat([x_t, reference], dim=1),
            timestep=sigma,
            **{name: value[rows] for name, value in self.of_rows.items()},
            **{name: self._shared(value, len(rows)) for name, value in self.of_all.items()},
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]]

    def _shared(self, ids: Tensor, count: int) -> Tensor:
        """Return position ids per row for klein, and shared ones for Kontext."""
        return ids.expand(count, -1, -1) if self.klein else ids


def _kontext_inputs(pipeline: Any, texts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    embeds, pooled, text_ids = pipeline.encode_prompt(texts, None, max_sequence_length=TEXT_TOKENS)
    side = pipeline.vae.config.sample_size // (2 * pipeline.vae_scale_factor)
    ids = pipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    reference_ids = ids.clone()
    reference_ids[:, 0] = 1  # Kontext marks tokens of the reference by 1 in the first id
    of_all = {"txt_ids": text_ids, "img_ids": torch.cat([ids, reference_ids])}
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}, of_all


def _klein_inputs(pipeline: Any, texts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    embeds, text_ids = pipeline.encode_prompt(
        texts, max_sequence_length=TEXT_TOKENS, text_encoder_out_layers=TEXT_LAYERS
    )
    side = pipeline.vae.config.sample_size // (2 * pipeline.vae_scale_factor)
    latents = torch.empty(1, pipeline.transformer.config.in_channels, side, side)
    ids = [pipeline._prepare_latent_ids(latents), pipeline._prepare_image_ids([latents])]
    of_all = {"txt_ids": text_ids[:1], "img_ids": torch.cat(ids, dim=1)}
    return {"encoder_hidden_states": embeds}, of_all
