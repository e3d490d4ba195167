"""Distill the tiny Kontext into a two-step LoRA by reflow; minutes on two cores.

    python -m mteditflow_examples.shapes.files runs/shapes
    python -m examples.shapes.distill runs/shapes --seed 0

The base editor edits chains in four steps, each turn from its previous result. Its sampler is
deterministic, so the noise of a turn determines the clean latent. The student, the same editor with
a LoRA, is regressed onto the straight path between the two, at the sigmas of a two-step sampler.
``train_flux.py`` samples with the result by ``--sampling.lora``.

Source: reflow of Rectified Flow (arXiv 2209.03003).
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import diffusers
import peft
import torch
import typer
from tqdm import tqdm

from mteditflow import flow_matching_loss, interpolate
from mteditflow._command import program
from mteditflow.chains import ChainDataset, read_chains
from mteditflow.objectives import keyed_generator
from mteditflow.pipelines import Editor, LoraPolicies, Rollout, RolloutVelocity

from .editor import STEPS, TEXT_TOKENS, WEIGHTS
from .world import IMAGE_SIZE

FILE = WEIGHTS / "kontext-two-steps.safetensors"
RANK, PEAK, AVERAGING = 8, 4e-3, 0.99  # LoRA rank, peak learning rate, decay of the average
TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out", "linear", "ff.net.0.proj",
           "ff.net.2", "linear_1", "linear_2")  # fmt: skip


def roll_out(editor: Editor, chains: ChainDataset, rows: list[int], *, seed: int) -> Rollout:
    """Record the editor's edits of some chains, with noise keyed by seed and row."""
    examples = chains.__getitems__(rows)
    parts = editor.roll_out(
        [example.image for example in examples],
        [example.chain.instructions for example in examples],
        generators=[keyed_generator(seed, "distillation", row) for row in rows],
        group=torch.arange(len(rows), dtype=torch.int64, device="cpu"),
        batch=len(rows),
        verify=False,
    )
    return Rollout.concatenate([part.rollout for part in parts])


def fit(
    policies: LoraPolicies,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    sigmas: torch.Tensor,
    updates: int,
    batch: int,
    generator: torch.Generator,
) -> float:
    """Regress the current policy on the recorded pairs of noise and clean latents.

    Args:
        policies: policies of the editor's transformer.
        optimizer: optimizer of their parameters.
        rollout: recorded pairs.
        sigmas: flow times at which the student will be evaluated, [S].
        updates: optimizer steps.
        batch: rows per step.
        generator: generator of rows and flow times.

    Returns:
        Mean loss of the last update.
    """
    velocity = RolloutVelocity(policies, rollout)
    turns = rollout.turn_mask.nonzero()
    for _ in range(updates):
        at = turns[torch.randint(len(turns), (batch,), generator=generator)]
        clean = rollout.clean_at(at)
        noise = rollout.trajectory.latents[at[:, 0], at[:, 1], 0]  # sigma 1: the initial latent
        sigma = sigmas[torch.randint(len(sigmas), (batch,), generator=generator)]
        predicted = velocity("current", interpolate(clean, noise, sigma), sigma, at)
        loss = flow_matching_loss(predicted, clean, noise).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policies.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        policies.update_ema(decay=AVERAGING)
    return float(loss.detach())


def main(
    world: Annotated[Path, typer.Argument(help="Folder written by files.py, with Kontext.")],
    seed: Annotated[int, typer.Option(help="Seed of adapters, chains and noise.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the student.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each with new edits.")] = 60,
    chains: Annotated[int, typer.Option(min=1, help="Chains per round.")] = 64,
    updates: Annotated[int, typer.Option(min=1, help="Updates per round.")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Pairs per update.")] = 96,
    out: Annotated[Path, typer.Option(help="LoRA to write; its card goes next to it.")] = FILE,
) -> None:
    """Distill the tiny Kontext into a few-step LoRA, and write it with a card."""
    started = time.monotonic()
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "max_sequence_length": TEXT_TOKENS}
    call = {**side, "guidance_scale": 1.0, "num_inference_steps": STEPS}
    editor = Editor.load(world / "model", call=call)
    config = editor.lora(rank=RANK, alpha=RANK, targets=TARGETS)
    policies = LoraPolicies(editor.transformer, config, seed=seed, ema=True)
    optimizer = torch.optim.AdamW(policies.parameters(), lr=PEAK, weight_decay=0.0)
    data = ChainDataset(read_chains(world / "train.jsonl").chains)
    sigmas = 1 - torch.arange(steps, dtype=torch.float32, device="cpu") / steps
    generator = keyed_generator(seed, "pairs")
    bar = tqdm(range(rounds), mininterval=2.0)
    for done in bar:
        share = min(1.0, (done + 1) / 3) * (0.5 + 0.5 * math.cos(math.pi * done / rounds))
        optimizer.param_groups[0]["lr"] = PEAK * share
        rows = torch.randint(len(data), (chains,), generator=generator).tolist()
        with policies.use("reference"):
            rollout = roll_out(editor, data, rows, seed=seed + 1000 * done)
        loss = fit(policies, optimizer, rollout, sigmas, updates, batch, generator)
        bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
    card: dict[str, Any] = {
        "family": "kontext",
        "seed": seed,
        "steps": steps,
        "command": f"python -m examples.shapes.distill WORLD --seed {seed} --steps {steps} "
        f"--rounds {rounds} --chains {chains} --updates {updates} --batch {batch}",
        "parameters": sum(x.numel() for x in policies.parameters()),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
        "threads": torch.get_num_threads(),
        "license": "Apache-2.0",
        "seconds": round(time.monotonic() - started),
    }
    with TemporaryDirectory(dir=out.parent) as folder:
        policies.save(editor.pipeline, folder, policy="ema")
        (Path(folder) / "pytorch_lora_weights.safetensors").replace(out)
    out.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


app = program(main)

if __name__ == "__main__":
    app()
