"""Pre-train the tiny Kontext on single edits by flow matching; minutes on two cores.

    python -m examples.shapes.pretrain --seed 0

A share of the targets is corrupted on purpose (instruction ignored, another edit, collateral
damage): the editor then holds a competent but mixed policy, as real editors do, which is what
reinforcement learning has to sharpen. The editor sees true pictures only, never its own: that is
the exposure bias which chains of edits then reveal.
"""

from __future__ import annotations

import copy
import math
import random
import time
from pathlib import Path
from typing import Annotated

import diffusers
import torch
import transformers
import typer
from torch import Tensor, nn
from tqdm import tqdm

from mteditflow.path import flow_matching_loss, interpolate, shift_sigmas

from .conditioning import Conditioner
from .editor import WEIGHTS, build_kontext, save_weights
from .world import corrupt, draw_index, make_chains, paint


def single_edits(chains: int, *, seed: int, corruption: float) -> tuple[Tensor, Tensor, list[str]]:
    """Return source and target pictures as palette indices ``[M, H, W]``, and instructions."""
    rng = random.Random(f"single edits {seed}")
    sources, targets, instructions = [], [], []
    for chain in make_chains(chains, turns=3, seed=seed, split="train"):
        for state, edit, wanted in zip(chain.states, chain.edits, chain.states[1:], strict=False):
            careless = rng.random() < corruption
            sources.append(draw_index(state))
            targets.append(draw_index(corrupt(rng, state, edit) if careless else wanted))
            instructions.append(edit.instruction)
    return torch.from_numpy(_stack(sources)), torch.from_numpy(_stack(targets)), instructions


def optimizers(transformer: nn.Module, *, muon_lr: float, adam_lr: float) -> list:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    inside = [
        weight
        for name, weight in transformer.named_parameters()
        if weight.ndim == 2 and "transformer_blocks" in name
    ]
    chosen = {id(weight) for weight in inside}
    rest = [weight for weight in transformer.parameters() if id(weight) not in chosen]
    return [
        torch.optim.Muon(inside, lr=muon_lr, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def main(
    seed: Annotated[int, typer.Option(help="Seed of weights, data and noise.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 6000,
    batch: Annotated[int, typer.Option(help="Edits per step.")] = 64,
    chains: Annotated[int, typer.Option(help="Chains of three whose edits are the data.")] = 16_000,
    corruption: Annotated[float, typer.Option(help="Share of careless targets.")] = 0.4,
    muon_lr: Annotated[float, typer.Option(help="Peak learning rate of Muon.")] = 0.02,
    adam_lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 3e-3,
    sigma_shift: Annotated[float, typer.Option(help="Above 1: train more at high noise.")] = 3.0,
    num_layers: Annotated[int, typer.Option(help="Double-stream blocks.")] = 1,
    num_single_layers: Annotated[int, typer.Option(help="Single-stream blocks.")] = 2,
    out: Annotated[Path, typer.Option(help="Where the weights go.")] = WEIGHTS
    / "kontext.safetensors",
) -> None:
    """Pre-train the tiny Kontext and write its weights with a card beside them."""
    started = time.monotonic()
    build = {"seed": seed, "num_layers": num_layers, "num_single_layers": num_single_layers}
    pipeline = build_kontext(**build)
    transformer = pipeline.transformer.train()
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    average = copy.deepcopy(transformer)

    sources, targets, instructions = single_edits(chains, seed=seed, corruption=corruption)
    conditioner = Conditioner(pipeline, instructions)
    rows = torch.tensor([conditioner.row[text] for text in instructions])
    generator = torch.Generator().manual_seed(seed)
    parts = optimizers(transformer, muon_lr=muon_lr, adam_lr=adam_lr)
    peaks = [part.param_groups[0]["lr"] for part in parts]
    progress = tqdm(range(steps), desc="pre-training", mininterval=1.0)
    running = 1.0
    for step in progress:
        rate = min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for part, peak in zip(parts, peaks, strict=True):
            part.param_groups[0]["lr"] = peak * rate
        chosen = torch.randint(len(rows), (batch,), generator=generator)
        clean = conditioner.encode(paint(targets[chosen]))
        reference = conditioner.encode(paint(sources[chosen]))
        noise = torch.randn(clean.shape, generator=generator)
        sigma = shift_sigmas(torch.rand(batch, generator=generator), sigma_shift)
        x_t = interpolate(clean, noise, sigma)
        velocity = conditioner.velocity(x_t, sigma, reference, rows[chosen])
        loss = flow_matching_loss(velocity, clean, noise).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for part in parts:
            part.step()
            part.zero_grad(set_to_none=True)
        with torch.no_grad():
            decay = min(0.999, (step + 1) / (step + 10))
            for slow, fast in zip(average.parameters(), transformer.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        running = 0.99 * running + 0.01 * float(loss.detach())
        progress.set_postfix(loss=f"{running:.3f}")
        if (step + 1) % 500 == 0 or step + 1 == steps:
            card = {
                "family": "kontext",
                "build": build,
                "command": f"python -m examples.shapes.pretrain --seed {seed} --steps {steps} "
                f"--batch {batch} --chains {chains} --corruption {corruption} "
                f"--muon-lr {muon_lr} --adam-lr {adam_lr}",
                "seed": seed,
                "steps_done": step + 1,
                "seconds": round(time.monotonic() - started),
                "parameters": sum(weight.numel() for weight in transformer.parameters()),
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "transformers": transformers.__version__,
                "licence": "Apache-2.0",
            }
            save_weights(average, out, card)


def _stack(arrays: list) -> object:
    import numpy as np

    return np.stack(arrays)


if __name__ == "__main__":
    typer.run(main)
