"""Call the tiny Kontext's transformer directly, as its pipeline would: for pre-training only."""

from __future__ import annotations

import torch
from diffusers import FluxKontextPipeline
from torch import Tensor

from .editor import TEXT_TOKENS


class Conditioner:
    """Text embeddings computed once per instruction, and position ids of both images."""

    def __init__(self, pipeline: FluxKontextPipeline, instructions: list[str]) -> None:
        self.pipeline = pipeline
        self.row = {text: i for i, text in enumerate(dict.fromkeys(instructions))}
        with torch.no_grad():
            self.embeds, self.pooled, self.text_ids = pipeline.encode_prompt(
                list(self.row), None, max_sequence_length=TEXT_TOKENS
            )
        side = pipeline.vae.config.sample_size // 2
        ids = pipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
        reference_ids = ids.clone()
        reference_ids[:, 0] = 1
        self.image_ids = torch.cat([ids, reference_ids])

    def encode(self, images: Tensor) -> Tensor:
        """Encode images in [0, 1], ``[M, 3, H, W]``, into packed latents ``[M, tokens, 16]``."""
        with torch.no_grad():
            latents = self.pipeline._encode_vae_image(2 * images - 1, None)
        return self.pipeline._pack_latents(latents, *latents.shape)

    def velocity(self, x_t: Tensor, sigma: Tensor, reference: Tensor, rows: Tensor) -> Tensor:
        """Predict the velocity of ``x_t`` ``[M, tokens, 16]`` at ``sigma`` ``[M]``."""
        output = self.pipeline.transformer(
            hidden_states=torch.cat([x_t, reference], dim=1),
            timestep=sigma,
            pooled_projections=self.pooled[rows],
            encoder_hidden_states=self.embeds[rows],
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]]
