"""Roll chains of edits out by a plain pipeline, without the library's editor, and judge them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from mteditflow_examples.shapes.editor import call_options, enlarge, shrink
from mteditflow_examples.shapes.rewards import Scores, Truth, score
from mteditflow_examples.shapes.vision import to_pil
from mteditflow_examples.shapes.world import Chain, draw
from torch import Tensor

from mteditflow import (
    content_consistency,
    instruction_following,
    marginal_success,
    overall,
)

METRICS = (
    "instruction_following",
    "marginal",
    "content_consistency",
    "overall",
    "strict",
    "strict_marginal",
)


def edit_chains(
    pipeline: Any, chains: Sequence[Chain], generator: torch.Generator, *, steps: int
) -> Tensor:
    """Let a pipeline make every edit of every chain, each turn on the picture that it made before.

    Args:
        pipeline: A tiny Kontext, or a tiny klein, which takes one chain at a time: it would take a
            list of pictures as several references of one prompt.
        chains: B chains of equal length N.
        generator: Of the initial noise of every turn.
        steps: Denoising steps per turn.

    Returns:
        Pictures in [0, 1], ``[B, N, 3, H, W]``.
    """
    images = torch.stack([draw(chain.initial) for chain in chains])
    klein = takes_one(pipeline)
    if klein and len(chains) > 1:
        parts = [edit_chains(pipeline, [chain], generator, steps=steps) for chain in chains]
        return torch.cat(parts)
    pictures = []
    for instructions in zip(*(chain.instructions for chain in chains), strict=True):
        images = pipeline(
            image=to_pil(enlarge(images[0])) if klein else images,
            prompt=list(instructions),
            generator=generator,
            **call_options(pipeline, steps=steps),
        ).images
        images = shrink(images) if klein else images
        pictures.append(images)
    return torch.stack(pictures, dim=1)


def takes_one(pipeline: Any) -> bool:
    """Whether a pipeline edits one picture at a time, as klein's does."""
    return isinstance(pipeline, Flux2KleinPipeline)


def evaluate(
    pipeline: Any, chains: Sequence[Chain], *, seed: int, steps: int, batch: int = 128
) -> tuple[Scores, Tensor]:
    """Score a pipeline on chains; equal seeds mean equal initial noise, so results are paired."""
    generator = torch.Generator().manual_seed(seed)
    parts = [chains[start : start + batch] for start in range(0, len(chains), batch)]
    pictures = torch.cat([edit_chains(pipeline, part, generator, steps=steps) for part in parts])
    return score(pictures, Truth.of(chains)), pictures


def metrics_of(*samples: Tensor) -> Tensor:
    """Compute the METRICS of success, strict success and consistency ``[C, N]``: ``[6, N]``."""
    success, strict, consistency = samples
    following, content = instruction_following(success), content_consistency(consistency)
    return 100 * torch.stack(
        [
            following,
            marginal_success(success),
            content,
            overall(following, content),
            instruction_following(strict),
            marginal_success(strict),
        ]
    )


def samples_of(scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`metrics_of` takes."""
    return scores.success, scores.strict, scores.consistency
