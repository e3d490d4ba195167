"""Held-out chains edited by the untrained model or with an adapter, and scored exactly."""

from __future__ import annotations

import asyncio
from pathlib import Path

from mteditflow.chains import ChainDataset, read_chains
from mteditflow.evaluation import Evaluation, JudgedBy, MadeBy, Provenance
from mteditflow.objectives import keyed_generator
from mteditflow.pipelines import Editor
from mteditflow.rewards import LIKERT

from .editor import STEPS, TEXT_TOKENS
from .scoring import ExactRewards
from .world import IMAGE_SIZE

BATCH = 128


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
    """Edit all chains, each from noise of its own, and score what came of it.

    Args:
        model: Folder of a tiny Kontext.
        chains: File of chains of any equal length.
        seed: Of the noise; equal seeds make pairs.
        adapter: Folder of a LoRA adapter; none: the untrained model.
        rounds: Of training that the adapter has behind it.
        steps: Denoising steps of a turn.
        size: Height and width in pixels.
        scorer: Class of exact rewards with a term "following" in 1..5.
    """
    side = {"height": size, "width": size, "max_sequence_length": TEXT_TOKENS}
    editor = Editor.load(model, call={**side, "num_inference_steps": steps})
    if adapter is not None:
        editor.pipeline.load_lora_weights(adapter)
    examples = ChainDataset(read_chains(chains).chains)
    references = [example.image for example in examples]
    instructions = [chain.instructions for chain in examples.chains]
    noise = [keyed_generator(seed, "held out", row) for row in range(len(examples))]
    made = editor.edit(references, instructions, generators=noise, batch=BATCH)
    images = [[first, *rest] for first, rest in zip(references, made, strict=True)]
    terms = asyncio.run(scorer().score(examples.chains, images))
    names = [chain.id for chain in examples.chains]
    provenance = Provenance(
        judged_by=JudgedBy(scorer=f"{scorer.__module__}:{scorer.__name__}", scale=LIKERT),
        made_by=MadeBy(editor=str(model), lora=adapter and str(adapter), seed=seed, steps=steps),
    )
    return Evaluation(rounds, names, instructions, terms, LIKERT.success, provenance)
