"""Roll chains of edits out through a pipeline, and tell how good they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from torch import Tensor

from mteditflow import (
    bootstrap_interval,
    content_consistency,
    instruction_following,
    marginal_success,
    overall,
)

from .editor import call_options, enlarge, shrink
from .rewards import Scores, Truth, score
from .world import Chain, draw

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


def to_pil(image: Tensor) -> Image.Image:
    """Turn colours in [0, 1], ``[3, H, W]``, into a PIL image."""
    pixels = (255 * image.clamp(0, 1)).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


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


def summarise(scores: Scores, *, seed: int = 0) -> dict[str, list]:
    """Return every metric, in percent per turn, with its 95% bootstrap interval over chains."""
    generator = torch.Generator().manual_seed(seed)
    interval = bootstrap_interval(metrics_of, *samples_of(scores), generator=generator)
    estimate, low, high = (value.double().tolist() for value in interval)
    summary: dict[str, list] = {}
    for i, name in enumerate(METRICS):
        summary[name] = _rounded(estimate[i])
        summary[f"{name}_interval"] = [_rounded(ends) for ends in zip(low[i], high[i], strict=True)]
    return summary


def kept_share(success: Tensor) -> Tensor:
    """Marginal(N) / Marginal(1): the share of the first turn's success that the last one keeps."""
    marginal = marginal_success(success)
    return marginal[-1] / marginal[0]


def compare(before: Scores, after: Scores, *, seed: int = 0) -> dict[str, Any]:
    """Return paired differences at the last turn, in percent points with 95% intervals.

    ``kept`` and ``strict_kept`` hold Marginal(N) / Marginal(1) before and after, for success and
    for success of the whole picture: the lower, the worse the exposure bias. None stands for a
    share of no success at all.
    """

    def difference(*samples: Tensor) -> Tensor:
        first, second = samples[:3], samples[3:]
        kept = [
            kept_share(new) - kept_share(old)
            for old, new in zip(first[:2], second[:2], strict=True)
        ]
        return torch.cat(
            [(metrics_of(*second) - metrics_of(*first))[:, -1], 100 * torch.stack(kept)]
        )

    generator = torch.Generator().manual_seed(seed)
    samples = (*samples_of(before), *samples_of(after))
    interval = bootstrap_interval(difference, *samples, generator=generator)
    report: dict[str, Any] = {}
    names = (*METRICS, "kept_difference", "strict_kept_difference")
    for name, *values in zip(names, *(value.double() for value in interval), strict=True):
        estimate, low, high = (_finite(float(value)) for value in values)
        report[name], report[f"{name}_interval"] = estimate, [low, high]
    for name, field in {"kept": "success", "strict_kept": "strict"}.items():
        shares = (float(kept_share(getattr(scores, field))) for scores in (before, after))
        report[name] = [_finite(share, 3) for share in shares]
    return report


def _finite(value: float, digits: int = 2) -> float | None:
    """Round a number; None in place of NaN, which JSON does not know."""
    return round(value, digits) if math.isfinite(value) else None


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]
