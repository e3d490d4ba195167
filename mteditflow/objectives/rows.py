"""Which turns and steps of a round are trained on, in which order, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mteditflow._checks import check_count, check_number, check_rank, check_tensor


def training_rows(
    exists: Tensor,
    *,
    generators: Sequence[torch.Generator],
    share: float = 1.0,
    minibatches: int = 1,
) -> list[Tensor]:
    r"""Draw the rows (trajectory, turn, step) of each minibatch of a round.

    Of every turn of every trajectory :math:`\lceil share \cdot S_n \rceil` of its existing steps
    are drawn. Of ``minibatches`` neighbouring trajectories each goes to another minibatch, drawn
    too: every minibatch has an equal part of every group, and every rank an equal part of every
    minibatch. All draws come from the trajectories' own generators: ranks that hold consecutive
    parts of a round (a multiple of ``minibatches`` each) draw what one process would.

    Args:
        exists: steps that can be trained, boolean [B, N, S]; for GRPO ``trajectory.step_mask``, for
            NFT ``trajectory.turn_mask[..., None]`` expanded to the noise levels per turn.
        generators: one per trajectory, such as ``keyed_generator(seed, "rows", round, index)``.
        share: of the steps of a turn, in (0, 1].
        minibatches: optimiser steps in the round; divides B.

    Returns:
        For each minibatch int64 rows [M, 3] on the CPU, in the order of trajectories, turns, steps.

    Raises:
        ValueError: shapes, counts or the share are out of range, or B is no multiple of
            ``minibatches``.
        TypeError: ``exists`` is not boolean.

    Example:
        >>> exists = torch.ones(4, 3, 2, dtype=torch.bool)
        >>> generators = [torch.Generator().manual_seed(i) for i in range(4)]
        >>> first, second = training_rows(exists, generators=generators, share=0.5, minibatches=2)
        >>> first.shape, sorted({*first[:, 0].tolist(), *second[:, 0].tolist()})
        (torch.Size([6, 3]), [0, 1, 2, 3])
    """
    check_tensor("exists", exists)
    if exists.dtype != torch.bool:
        raise TypeError(f"exists: expected booleans, got {exists.dtype}")
    check_rank("exists", exists, 3, "[B, N, S]", maximum=3)
    check_number("share", share, low=0.0, high=1.0, open_low=True)
    check_count("minibatches", minibatches)
    if len(exists) % minibatches:
        raise ValueError(
            f"minibatches: expected a divisor of the {len(exists)} trajectories, got {minibatches}"
        )
    if len(generators) != len(exists):
        raise ValueError(
            f"generators: expected one per trajectory, {len(exists)}, got {len(generators)}"
        )
    mask = exists.cpu()
    if share < 1:
        mask = torch.stack([_draw(own, share, g) for own, g in zip(mask, generators, strict=True)])
    order = _spread(len(mask), minibatches, generators)
    rows = mask.nonzero()
    return [rows[torch.isin(rows[:, 0], chosen)] for chosen in order]


def _draw(exists: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Keep a share of the existing steps of every turn, [N, S]."""
    count = (exists.sum(dim=1) * share - 1e-4).ceil().clamp(min=1)  # 0.1 of 10 is 1
    score = torch.rand(exists.shape, generator=generator, dtype=torch.float32, device="cpu")
    score = score.masked_fill(~exists, 2.0)
    rank = score.argsort(dim=1).argsort(dim=1)
    return (rank < count[:, None]) & exists


def _spread(
    trajectories: int, minibatches: int, generators: Sequence[torch.Generator]
) -> list[Tensor]:
    """Trajectories of each minibatch: of each stratum of neighbours one."""
    strata = [
        start + torch.randperm(minibatches, generator=generators[start], device="cpu")
        for start in range(0, trajectories, minibatches)
    ]
    return list(torch.stack(strata, dim=1)) if strata else []
