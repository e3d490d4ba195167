"""Pre-train the editor of the world of pictures on single edits; an hour on two cores.

    python -m mteditflow_examples.pictures.pretrain competent --seed 0
    python -m mteditflow_examples.pictures.pretrain careless --seed 0

The first stage trains on true edits, and on an instruction that asks for no change. The second
trains a LoRA with a share of corrupted targets (instruction ignored, another edit), so the editor
becomes a competent but mixed policy for reinforcement learning to sharpen. Source images in both
are true pictures, never the editor's own, so errors accumulate in chains.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, NamedTuple

import diffusers
import peft
import torch
import transformers
import typer
from mteditflow_examples.shapes.conditioning import Conditioner
from mteditflow_examples.shapes.pretrain import fit
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from mteditflow import shift_sigmas
from mteditflow._command import program

from .autoencoder import as_tensor
from .chains import Chain, corrupted, make_chains
from .editor import LORA_RANK, SHIFT, STEPS, TARGETS, build_editor
from .rewards import Truth, score
from .scene import Scene, Split, no_change
from .weights_files import WEIGHTS, load_weights, save_weights

HARD = ("color_alter", "material_alter", "subject_replace", "count_change")
EASY_SHARE = 0.35  # share of the edits of other types that are kept
UNCHANGED = 0.06  # share of edits that ask for no change
CORRUPTION = 0.4  # share of corrupted targets in the careless stage
BATCH = 64
LORA_RATE = 2e-3


class Pairs(NamedTuple):
    """M single edits.

    Attributes:
        source: packed latents of the source pictures, [M, tokens, 4 C].
        target: packed latents of the target pictures, [M, tokens, 4 C].
        chains: the edits, each a chain of one turn.
    """

    source: Tensor
    target: Tensor
    chains: list[Chain]


def single_edits(count: int, *, seed: int, split: Split) -> list[Chain]:
    """Return single edits from chains, as chains of one turn; a share asks for no change."""
    rng = random.Random(f"single edits {seed}")
    edits = []
    for chain in make_chains(math.ceil(count / 3), turns=3, seed=seed, split=split):
        for scene, edit in zip(chain.scenes, chain.edits, strict=False):
            edits.append(Chain(scene, (no_change(scene) if rng.random() < UNCHANGED else edit,)))
    return edits[:count]


def drawn_more_often(edits: list[Chain], *, seed: int) -> list[Chain]:
    """Return all edits of hard types, and ``EASY_SHARE`` of the others, which train faster."""
    rng = random.Random(f"shares {seed}")
    return [e for e in edits if e.edits[0].task_type in HARD or rng.random() < EASY_SHARE]


def encoded(conditioner: Conditioner, edits: list[Chain], targets: list[Scene]) -> Pairs:
    """Return the latents of single edits and their targets; each distinct scene is encoded once."""
    row = {scene: i for i, scene in enumerate(dict.fromkeys(targets))}
    for chain in edits:
        row.setdefault(chain.initial, len(row))
    scenes = list(row)
    latents = torch.cat(
        [
            conditioner.encode(as_tensor(scenes[i : i + 64]).float() / 255)
            for i in range(0, len(scenes), 64)
        ]
    )
    sources = torch.tensor([row[chain.initial] for chain in edits])
    return Pairs(latents[sources], latents[torch.tensor([row[s] for s in targets])], edits)


@torch.no_grad()
def success_by_type(conditioner: Conditioner, pairs: Pairs, *, seed: int) -> dict[str, float]:
    """Edit the sources, and return the share of followed instructions by type and overall."""
    pipeline = conditioner.pipeline
    grid = shift_sigmas(torch.linspace(1, 0, STEPS + 1), SHIFT)
    x = torch.randn(pairs.source.shape, generator=torch.Generator().manual_seed(seed))
    rows = torch.tensor([conditioner.row[chain.instructions[0]] for chain in pairs.chains])
    for sigma, next_sigma in pairwise(grid):
        velocity = conditioner.velocity(x, sigma.expand(len(x)), pairs.source, rows)
        x = x + (next_sigma - sigma) * velocity
    side = pipeline.vae.config.sample_size
    latents = pipeline._unpack_latents(x, side, side, pipeline.vae_scale_factor)
    config = pipeline.vae.config
    latents = latents / config.scaling_factor + config.shift_factor
    images = ((pipeline.vae.decode(latents).sample + 1) / 2).clamp(0, 1)
    success: dict[str, list[float]] = defaultdict(list)
    for image, chain in zip(images, pairs.chains, strict=True):
        followed = float(score(image[None], Truth.of(chain)).following == 5)
        for name in ("all", chain.edits[0].task_type):
            success[name].append(followed)
    return {name: round(sum(x) / len(x), 3) for name, x in sorted(success.items())}


def train_competent(
    conditioner: Conditioner, pairs: Pairs, *, steps: int, rate: float, seed: int
) -> None:
    """Train on true edits; the learning rate, relative to the peak, falls along a cosine."""
    rates = [
        rate * min(1.0, (k + 1) / 50) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * k / steps)))
        for k in range(steps)
    ]
    rows = torch.tensor([conditioner.row[chain.instructions[0]] for chain in pairs.chains])
    fit(
        conditioner,
        pairs.source,
        pairs.target,
        rows,
        rates,
        batch=BATCH,
        averaging=0.998,
        generator=torch.Generator().manual_seed(seed),
        name="competent",
        encode=lambda latents: latents,
    )


def train_careless(conditioner: Conditioner, pairs: Pairs, *, steps: int, seed: int) -> None:
    """Train a LoRA on corrupted edits; the adapter stays in the transformer."""
    transformer = conditioner.pipeline.transformer
    torch.manual_seed(seed)
    transformer.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=TARGETS))
    weights = [weight for weight in transformer.parameters() if weight.requires_grad]
    rows = torch.tensor([conditioner.row[chain.instructions[0]] for chain in pairs.chains])
    fit(
        conditioner,
        pairs.source,
        pairs.target,
        rows,
        [min(1.0, (k + 1) / 20) * (1 - k / steps) for k in range(steps)],
        batch=BATCH,
        averaging=0.98,
        generator=torch.Generator().manual_seed(seed + 1),
        name="careless",
        encode=lambda latents: latents,
        parts=[torch.optim.AdamW(weights, lr=LORA_RATE, weight_decay=0.0)],
    )


def main(
    stage: Annotated[Literal["competent", "careless"], typer.Argument(help="Stage to train.")],
    seed: Annotated[int, typer.Option(help="Seed of weights, edits and noise.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps; default: 3000, or 250.")
    ] = None,
    rate: Annotated[
        float,
        typer.Option(min=0, help="Learning rate of the competent stage, as a share of the peak."),
    ] = 1.0,
    start: Annotated[
        Path | None, typer.Option(help="Weights to start the competent stage from.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=64, help="Edits to train on.")] = 30_000,
    held_out: Annotated[
        int, typer.Option(min=1, help="Held-out edits for the success rate.")
    ] = 512,
    folder: Annotated[Path, typer.Option(help="Folder of the weights.")] = WEIGHTS,
) -> None:
    """Train one stage, and write its weights with a card."""
    started = time.monotonic()
    steps = steps or (3000 if stage == "competent" else 250)
    before = folder / "competent.safetensors" if stage == "careless" else start
    weights, origin = (None, None) if before is None else load_weights(before)
    build = {"seed": seed} if origin is None else origin["build"]
    pipeline = build_editor(**build)
    if weights is not None:
        pipeline.transformer.load_state_dict(weights)
    edits = drawn_more_often(single_edits(pairs, seed=seed, split="train"), seed=seed)
    checked = single_edits(held_out, seed=seed, split="held_out")
    rng = random.Random(f"corrupted {seed}")
    share = CORRUPTION if stage == "careless" else 0.0
    targets = [
        corrupted(rng, chain.initial, chain.edits[0])
        if rng.random() < share
        else chain.edits[0].result
        for chain in edits
    ]
    instructions = [chain.instructions[0] for chain in (*edits, *checked)]
    conditioner = Conditioner(pipeline, instructions)
    data = encoded(conditioner, edits, targets)
    if stage == "competent":
        train_competent(conditioner, data, steps=steps, rate=rate, seed=seed)
    else:
        train_careless(conditioner, data, steps=steps, seed=seed)
    checked_pairs = encoded(conditioner, checked, [chain.edits[0].result for chain in checked])
    card: dict[str, Any] = {
        "build": build,
        "command": f"python -m mteditflow_examples.pictures.pretrain {stage} --seed {seed} "
        f"--steps {steps} --pairs {pairs} --rate {rate}"
        + (f" --start {start.name}" if start is not None else ""),
        "start": origin,
        "parameters": sum(w.numel() for w in pipeline.transformer.parameters() if w.requires_grad),
        "held-out single edits that succeed": success_by_type(
            conditioner, checked_pairs, seed=seed
        ),
        "seconds": round(time.monotonic() - started),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "threads": torch.get_num_threads(),
        "license": "Apache-2.0",
    }
    out = folder / f"{stage}.safetensors"
    if stage == "competent":
        save_weights(pipeline.transformer, out, card)
    else:
        _save_lora(pipeline, out, card)
    print(json.dumps(card["held-out single edits that succeed"]))


def _save_lora(pipeline: Any, out: Path, card: dict[str, Any]) -> None:
    """Write the adapter in diffusers' format, in half precision, with a card."""
    layers = {
        name: x.to(torch.float16)
        for name, x in get_peft_model_state_dict(pipeline.transformer).items()
    }
    with TemporaryDirectory(dir=out.parent) as part:
        pipeline.save_lora_weights(part, transformer_lora_layers=layers)
        (Path(part) / "pytorch_lora_weights.safetensors").replace(out)
    out.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


app = program(main)

if __name__ == "__main__":
    app()
