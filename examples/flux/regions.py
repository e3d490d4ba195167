"""Per-token advantages: each reward counts within its region of the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL.Image import Image
from torch import Tensor

import mteditflow as mt
from mteditflow.pipelines import Rollout

from .run import Run
from .sampling import RoundChains, await_all, judged_images
from .scorers import ScorerError


def token_advantages(
    run: Run,
    drawn: RoundChains,
    rollout: Rollout,
    images: Sequence[Sequence[Image | None]],
    advantages: Mapping[str, Tensor],
) -> Tensor:
    """Return per-token advantages from the scorer's regions; a collective call.

    Args:
        run: the run; its metrics get "regions/<reward>", the mean share of an image that a region
            covers, and "regions/clamped", the share of token advantages that were clamped.
        drawn: this rank's chains.
        rollout: their rollout.
        images: reference and result of each turn, [B][N + 1].
        advantages: this rank's share of each reward in the advantage of a turn, by name, [B, N].

    Returns:
        Advantages that broadcast over latents, [B, N, ...].

    Raises:
        ScorerError: the scorer raises, or gives no region for any trained reward.
        Stopped: a signal arrived while waiting.
    """
    config = run.config.rewards
    regions = _regions(run, drawn, images)
    known = [name for name in advantages if name in regions]
    if not known:
        raise ScorerError(
            f"rewards.scorer: expected regions of a reward among {sorted(advantages)}, got "
            f"{sorted(regions)} of {config.scorer}"
        )
    latent = tuple(rollout.trajectory.latents.shape[3:])
    coverage = {}
    for name in known:
        tile = mt.token_tile(latent, tuple(regions[name].shape[-2:]))
        coverage[name] = mt.mask_coverage(regions[name], tile)
    weights = {
        name: mt.token_weights(
            share,
            latent,
            outside=config.region_outside,
            normalization=config.region_normalization,
        )
        for name, share in coverage.items()
    }
    advantage = mt.region_advantage(advantages, weights)
    clamped = mt.clamp_advantage(advantage, limit=config.advantage_limit)
    _log(run, {**coverage, "clamped": (clamped != advantage).float()})
    return clamped


def _regions(
    run: Run, drawn: RoundChains, images: Sequence[Sequence[Image | None]]
) -> dict[str, Tensor]:
    """Return the regions of every turn by reward, float32 [B, N, H, W].

    Identity turns are not sent to the scorer; their region is the whole image.
    """
    size, count = run.config.sampling.batch, len(images)
    judged = judged_images(images, drawn.edits)
    waiting = [
        run.submit.regions(drawn.chains[start : start + size], judged[start : start + size])
        for start in range(0, count, size)
    ]
    found = await_all(run, waiting, "regions")
    height, width = found[0][next(iter(found[0]))].shape[-2:]
    edits, regions = drawn.edits, {}
    for name in found[0]:
        whole = torch.ones(*edits.shape, height, width, dtype=torch.float32, device="cpu")
        for start, part in zip(range(0, count, size), found, strict=True):
            # The scorer packs a chain's edits at the front and pads; the mask of edits puts each
            # back at its turn. Both masks enumerate the same pairs in the same order.
            own = edits[start : start + size]
            turns = own.sum(dim=1)
            given = torch.arange(part[name].shape[1], device="cpu") < turns[:, None]
            whole[start : start + size][own] = part[name].cpu()[given]
        regions[name] = whole
    return regions


def _log(run: Run, values: Mapping[str, Tensor]) -> None:
    """Add means over all ranks to the metrics of the round; a collective call."""
    means = torch.stack([x.double().mean() for x in values.values()])
    (ranks,), _ = mt.gather_ranks(means[None].to(run.device))
    for name, mean in zip(values, ranks.mean(dim=0).tolist(), strict=True):
        run.numbers[f"regions/{name}"] = mean
