"""Edit held-out chains by the untrained model or with an adapter, and score them exactly."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from mteditflow.chains import Chain, ChainDataset, read_chains
from mteditflow.evaluation import Evaluation, JudgedBy, MadeBy, Provenance
from mteditflow.objectives import keyed_generator
from mteditflow.pipelines import Editor
from mteditflow.rewards import LIKERT

from .editor import STEPS, TEXT_TOKENS
from .scoring import ExactRewards
from .world import IMAGE_SIZE

BATCH = 128


def edit_held_out(
    model: Path,
    chains: Path,
    *,
    seed: int,
    adapter: Path | None = None,
    steps: int = STEPS,
    size: int = IMAGE_SIZE,
    rows: Sequence[int] | None = None,
) -> tuple[list[Chain], list[list[Image]]]:
    """Edit chains, each from its own noise.

    Args:
        model: Folder of a tiny Kontext.
        chains: File of chains, all of one length.
        seed: Seed of the noise; equal seeds make two evaluations paired.
        adapter: Folder of a LoRA adapter; None: the untrained model.
        steps: Denoising steps of a turn.
        size: Height and width in pixels.
        rows: Rows of the file to edit; None: all. A chain's images do not depend on the others.

    Returns:
        The chains, and the images of each: the reference, then one per turn.
    """
    side = {"height": size, "width": size, "max_sequence_length": TEXT_TOKENS}
    editor = Editor.load(model, call={**side, "num_inference_steps": steps})
    if adapter is not None:
        editor.pipeline.load_lora_weights(adapter)
    examples = ChainDataset(read_chains(chains).chains)
    chosen = range(len(examples)) if rows is None else rows
    records = [examples.chains[row] for row in chosen]
    references = [examples[row].image for row in chosen]
    instructions = [chain.instructions for chain in records]
    noise = [keyed_generator(seed, "held out", row) for row in chosen]
    made = editor.edit(references, instructions, generators=noise, batch=BATCH)
    return records, [[first, *rest] for first, rest in zip(references, made, strict=True)]


def evaluate_held_out(
    model: Path,
    chains: Path,
    *,
    seed: int,
    adapter: Path | None = None,
    rounds: int = 0,
    steps: int = STEPS,
    size: int = IMAGE_SIZE,
    scorer: type = ExactRewards,
) -> Evaluation:
    """Edit all chains as ``edit_held_out`` does, and score the results.

    Args:
        model: Folder of a tiny Kontext.
        chains: File of chains, all of one length.
        seed: Seed of the noise; equal seeds make two evaluations paired.
        adapter: Folder of a LoRA adapter; None: the untrained model.
        rounds: Training rounds of the adapter.
        steps: Denoising steps of a turn.
        size: Height and width in pixels.
        scorer: Class of exact rewards with a term "following" in 1..5.
    """
    how = {"seed": seed, "steps": steps}
    records, images = edit_held_out(model, chains, adapter=adapter, size=size, **how)
    terms = asyncio.run(scorer().score(records, images))
    names = [chain.id for chain in records]
    provenance = Provenance(
        judged_by=JudgedBy(scorer=f"{scorer.__module__}:{scorer.__name__}", scale=LIKERT),
        made_by=MadeBy(editor=str(model), lora=adapter and str(adapter), **how),
    )
    instructions = [chain.instructions for chain in records]
    return Evaluation(rounds, names, instructions, terms, LIKERT.success, provenance)
