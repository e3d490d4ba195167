"""Pre-train a tiny editor on single edits by flow matching; minutes on two cores.

    python -m examples.shapes.pretrain --family kontext --seed 0

Stage 1 trains on true edits. Stage 2, short, has a share of corrupted targets (instruction ignored,
another edit, collateral damage), so the editor becomes a competent but mixed policy, like real
editors, for reinforcement learning to sharpen. Source images in both are true pictures, never the
editor's own; chains of edits reveal this exposure bias. Klein is also trained on edits without
instruction, for classifier-free guidance.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import transformers
import typer
from torch import Tensor, nn
from tqdm import tqdm

from mteditflow import flow_matching_loss, interpolate, shift_sigmas, update_old_policy
from mteditflow._command import program

from .conditioning import Conditioner
from .editor import WEIGHTS, Family, build_klein, build_kontext, load_editor, save_weights
from .world import corrupt, draw_index, make_chains

MUON, ADAM = 0.02, 3e-3  # peak learning rates of stage 1
BUILD: dict[Family, tuple[Any, dict[str, Any]]] = {
    Family.kontext: (build_kontext, {}),
    Family.klein: (build_klein, {"num_single_layers": 3}),
}
SIGMA_SHIFT = 3.0  # favors high noise levels, where the content of an edit is decided


def single_edits(chains: int, *, seed: int, corruption: float) -> tuple[Tensor, list[str]]:
    """Return palette indices ``[M, 3, H, W]`` and M instructions.

    The three pictures are the source, the true target, and a target that is corrupted with
    probability ``corruption``.
    """
    rng = random.Random(f"single edits {seed}")
    pictures, instructions = [], []
    for chain in make_chains(chains, turns=3, seed=seed, split="train"):
        for state, edit, wanted in zip(chain.states, chain.edits, chain.states[1:], strict=False):
            late = corrupt(rng, state, edit) if rng.random() < corruption else wanted
            pictures.append([draw_index(each) for each in (state, wanted, late)])
            instructions.append(edit.instruction)
    return torch.from_numpy(np.array(pictures)), instructions


def without(instructions: list[str], share: float, *, seed: int) -> list[str]:
    """Replace a share of the instructions by the empty one."""
    rng = random.Random(f"without instruction {seed}")
    return ["" if rng.random() < share else instruction for instruction in instructions]


def optimizers(transformer: nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for matrices inside the blocks, and AdamW for all other weights."""
    inside = [
        weight
        for name, weight in transformer.named_parameters()
        if weight.ndim == 2 and "transformer_blocks" in name
    ]
    chosen = {id(weight) for weight in inside}
    rest = [weight for weight in transformer.parameters() if id(weight) not in chosen]
    return [
        torch.optim.Muon(inside, lr=MUON, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=ADAM, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def fit(
    conditioner: Conditioner,
    sources: Tensor,
    targets: Tensor,
    rows: Tensor,
    rates: list[float],
    *,
    batch: int,
    averaging: float,
    generator: torch.Generator,
    name: str,
    encode: Callable[[Tensor], Tensor],
    parts: Sequence[torch.optim.Optimizer] | None = None,
) -> None:
    """Train the conditioner's transformer in place; it ends with its averaged (EMA) weights.

    Args:
        conditioner: Conditioner whose pipeline is trained.
        sources: Pictures before the edit, ``[M, ...]``.
        targets: Pictures after the edit, ``[M, ...]``.
        rows: The conditioner's row of each instruction, ``[M]``.
        rates: Learning rate of every step, relative to the peak.
        batch: Edits per step.
        averaging: Decay of the exponential moving average of the weights.
        generator: Generator of edits, noise and noise levels.
        name: Label of the progress bar.
        encode: Function from pictures to packed latents.
        parts: Optimizers at their peak rates; default: Muon and AdamW on all weights.
    """
    transformer = conditioner.pipeline.transformer.train()
    average = copy.deepcopy(transformer)
    parts = optimizers(transformer) if parts is None else parts
    peaks = [part.param_groups[0]["lr"] for part in parts]
    bar = tqdm(rates, desc=name, mininterval=2.0)
    running = None
    for step, rate in enumerate(bar):
        for part, peak in zip(parts, peaks, strict=True):
            part.param_groups[0]["lr"] = peak * rate
        chosen = torch.randint(len(rows), (batch,), generator=generator)
        clean, reference = encode(targets[chosen]), encode(sources[chosen])
        noise = torch.randn(clean.shape, generator=generator)
        sigma = shift_sigmas(torch.rand(batch, generator=generator), SIGMA_SHIFT)
        x_t = interpolate(clean, noise, sigma)
        velocity = conditioner.velocity(x_t, sigma, reference, rows[chosen])
        loss = flow_matching_loss(velocity, clean, noise).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for part in parts:
            part.step()
            part.zero_grad(set_to_none=True)
        decay = min(averaging, (step + 1) / (step + 10))  # lower at first: forgets the random start
        update_old_policy(average.parameters(), transformer.parameters(), decay=decay)
        value = float(loss.detach())
        running = value if running is None else 0.99 * running + 0.01 * value
        bar.set_postfix_str(f"loss {running:.3f}", refresh=False)
    transformer.load_state_dict(average.state_dict())
    transformer.eval()


def main(
    family: Annotated[Family, typer.Option(help="Editor to train.")] = Family.kontext,
    seed: Annotated[int, typer.Option(help="Seed of weights, data and noise.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps of stage 1.")] = 3000,
    horizon: Annotated[int, typer.Option(help="Steps until its cosine schedule is at 0.")] = 5000,
    careless_steps: Annotated[int, typer.Option(help="Steps of stage 2.")] = 500,
    corruption: Annotated[float, typer.Option(help="Share of corrupted targets, stage 2.")] = 0.25,
    careless_rate: Annotated[
        float, typer.Option(help="Learning rate of stage 2, as a share of the peak.")
    ] = 0.4,
    batch: Annotated[int, typer.Option(help="Edits per step.")] = 32,
    chains: Annotated[int, typer.Option(help="Chains of three edits to train on.")] = 16_000,
    unprompted: Annotated[
        float, typer.Option(help="Share of edits without instruction, for guidance.")
    ] = 0.0,
    start: Annotated[Path | None, typer.Option(help="Weights in place of stage 1.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Weights file to write; default: the repository's.")
    ] = None,
) -> None:
    """Pre-train a tiny editor and write its weights, with a card next to them."""
    started = time.monotonic()
    out = out or WEIGHTS / f"{family.value}.safetensors"
    builder, sizes = BUILD[family]
    build = {"seed": seed} | sizes
    pipeline = builder(**build) if start is None else load_editor(start)
    pictures, instructions = single_edits(chains, seed=seed, corruption=corruption)
    instructions = without(instructions, unprompted, seed=seed)
    conditioner = Conditioner(pipeline, instructions)
    rows = torch.tensor([conditioner.row[text] for text in instructions])
    card = {
        "family": family.value,
        "build": build,
        "command": f"python -m examples.shapes.pretrain --family {family.value} --seed {seed} "
        f"--steps {steps} --horizon {horizon} "
        f"--careless-steps {careless_steps} --corruption {corruption} "
        f"--careless-rate {careless_rate} --batch {batch} --chains {chains} "
        f"--unprompted {unprompted}",
        "parameters": sum(weight.numel() for weight in pipeline.transformer.parameters()),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "license": "Apache-2.0",
    }
    if start is None:
        # Velocity 0 at the start: a random output layer would only be unlearned.
        for weight in pipeline.transformer.proj_out.parameters():
            nn.init.zeros_(weight)
        rates = [
            min(1.0, (k + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * k / horizon))
            for k in range(steps)
        ]
        fit(
            conditioner,
            pictures[:, 0],
            pictures[:, 1],
            rows,
            rates,
            batch=batch,
            averaging=0.999,
            generator=torch.Generator().manual_seed(seed),
            name="stage 1, true edits",
            encode=conditioner.encode_index,
        )
        save_weights(pipeline.transformer, out.with_stem(out.stem + "-stage1"), card)
    fit(
        conditioner,
        pictures[:, 0],
        pictures[:, 2],
        rows,
        [careless_rate * (1 - k / careless_steps) for k in range(careless_steps)],
        batch=batch,
        averaging=0.99,
        generator=torch.Generator().manual_seed(seed + 1),
        name="stage 2, careless edits",
        encode=conditioner.encode_index,
    )
    card["seconds"] = round(time.monotonic() - started)
    save_weights(pipeline.transformer, out, card)


app = program(main)

if __name__ == "__main__":
    app()
