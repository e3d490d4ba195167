"""Train the lossy autoencoder of the world of pictures; half an hour on one core.

    python -m mteditflow_examples.pictures.autoencoder --seed 0

It is a small ``AutoencoderKL``. As in real editors, every round trip through it loses detail, which
chains of twenty turns reveal.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from mteditflow._command import program

from .chains import make_chains
from .drawing import SIZE, draw
from .scene import Scene
from .weights_files import WEIGHTS, save_weights

LATENT_CHANNELS = 32
WIDTHS = (24, 32, 64, 96)
RATE = 2e-3
LATENT_NOISE = 0.03  # std for latents of std about 1: nearby latents must decode alike
TRIPS = (1, 2, 3, 5, 10, 20)  # round trips after which the error is reported


def build_autoencoder(*, scaling_factor: float = 1.0, shift_factor: float = 0.0) -> AutoencoderKL:
    """Build the autoencoder, untrained: 64 x 64 pixels to 32 channels of 8 x 8."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


def as_tensor(scenes: list[Scene]) -> Tensor:
    """Render scenes, uint8 [M, 3, 64, 64]."""
    return torch.from_numpy(np.stack([draw(scene) for scene in scenes])).permute(0, 3, 1, 2)


def training_scenes(count: int, *, seed: int) -> list[Scene]:
    """Return distinct scenes of the training split, from chains of edits."""
    chains = make_chains(count // 4, turns=3, seed=seed, split="train")
    return list(dict.fromkeys(scene for chain in chains for scene in chain.scenes))


def fit(vae: AutoencoderKL, pictures: Tensor, *, steps: int, batch: int, seed: int) -> None:
    """Train in place on pictures, uint8 [M, 3, 64, 64], by absolute and squared error."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), RATE, weight_decay=0.0)
    bar = tqdm(range(steps), desc="autoencoder", mininterval=5.0)
    for step in bar:
        decayed = 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * decayed * min(1.0, (step + 1) / 50)
        chosen = torch.randint(len(pictures), (batch,), generator=generator)
        x = pictures[chosen].float() / 127.5 - 1
        latent = vae.encode(x).latent_dist.mean
        noise = torch.randn(latent.shape, generator=generator)
        error = vae.decode(latent + LATENT_NOISE * noise).sample - x
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-5 * latent.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix_str(f"error {float(error.detach().abs().mean()) / 2:.4f}")


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, pictures: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of the latents of pictures."""
    latents = torch.cat(
        [vae.encode(x.float() / 127.5 - 1).latent_dist.mean for x in pictures.split(64)]
    )
    return float(latents.mean()), float(latents.std())


@torch.no_grad()
def wear_of_trips(vae: AutoencoderKL, pictures: Tensor) -> dict[str, float]:
    """Return the mean absolute error, in [0, 1], by number of round trips through the VAE."""
    first = x = pictures.float() / 127.5 - 1
    wear = {}
    for trip in range(1, TRIPS[-1] + 1):
        x = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        if trip in TRIPS:
            wear[str(trip)] = round(float((x - first).abs().mean()) / 2, 4)  # from a range of 2
    return wear


def main(
    seed: Annotated[int, typer.Option(help="Seed of weights, pictures and noise.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="Pictures per step.")] = 16,
    scenes: Annotated[int, typer.Option(min=64, help="Pictures to train on.")] = 6000,
    out: Annotated[Path, typer.Option(help="Weights to write, with a card.")] = WEIGHTS
    / "autoencoder.safetensors",
) -> None:
    """Train the autoencoder and write its weights, in half precision, with a card."""
    started = time.monotonic()
    torch.manual_seed(seed)
    vae = build_autoencoder()
    pictures = as_tensor(training_scenes(scenes, seed=seed))
    fit(vae, pictures, steps=steps, batch=batch, seed=seed)
    shift, std = latent_statistics(vae, pictures[:1024])
    held_out = make_chains(64, turns=1, seed=seed, split="held_out")
    card: dict[str, Any] = {
        "build": {"scaling_factor": 1 / std, "shift_factor": shift},
        "command": f"python -m mteditflow_examples.pictures.autoencoder --seed {seed} "
        f"--steps {steps} --batch {batch} --scenes {scenes}",
        "parameters": sum(weight.numel() for weight in vae.parameters()),
        "mean absolute error after trips": wear_of_trips(
            vae, as_tensor([chain.initial for chain in held_out])
        ),
        "seconds": round(time.monotonic() - started),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        "license": "Apache-2.0",
    }
    save_weights(vae, out, card)
    print(card["mean absolute error after trips"])


app = program(main)

if __name__ == "__main__":
    app()
