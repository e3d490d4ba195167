"""Samples of a rollout, as objectives read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mteditflow._checks import (
    check_floating,
    check_full_precision,
    check_group,
    check_mask,
    check_rank,
    check_shape,
    check_values,
)
from mteditflow.flow.trajectory import Steps


@runtime_checkable
class Samples(Protocol):
    """Rollout of B trajectories, N turns and S denoising steps, as objectives read it."""

    @property
    def group(self) -> Tensor:
        """Integer group id of each trajectory, [B]."""

    @property
    def turn_mask(self) -> Tensor:
        """Turns that exist, boolean [B, N]."""

    @property
    def step_mask(self) -> Tensor:
        """Steps that exist and have a density, boolean [B, N, S]."""

    @property
    def reduction(self) -> str:
        """How the stored log-probs were reduced over elements, "mean" or "sum"."""

    def clean_at(self, at: Tensor) -> Tensor:
        """Return the final latents of (trajectory, turn) rows: int64 [M, 2] -> [M, ...]."""
        ...

    def steps_at(self, rows: Tensor) -> Steps:
        """Return stored steps of (trajectory, turn, step) rows: int64 [M, 3] -> M steps."""
        ...


@dataclass(frozen=True, eq=False)
class CleanSamples:
    """Final latents and nothing else: what NFT, AWM and DPO need, whatever sampler made them.

    Args:
        clean: final latent of every turn, [B, N, ...]; [B, 1, ...] for one turn.
        group: integer group id of each trajectory, [B].
        turn_mask: turns that exist, boolean [B, N]; ``None`` means all.

    Raises:
        ValueError: shapes do not match, or a latent of an existing turn is not finite.
        TypeError: a dtype is not the one stated.

    Example:
        >>> samples = CleanSamples(torch.randn(4, 1, 8), torch.tensor([0, 0, 1, 1]))
        >>> samples.clean_at(torch.tensor([[3, 0]])).shape
        torch.Size([1, 8])
    """

    clean: Tensor
    group: Tensor
    turn_mask: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_floating(clean=self.clean)
        check_rank("clean", self.clean, 3, "[B, N, ...]")
        if self.turn_mask is None:
            mask = torch.ones(self.clean.shape[:2], dtype=torch.bool, device=self.clean.device)
            object.__setattr__(self, "turn_mask", mask)
        check_mask("turn_mask", self.turn_mask, self.clean.shape[:2], "[B, N]")
        check_group(self.group, self.clean.shape[:1])
        absent = ~self.turn_mask.reshape(self.turn_mask.shape + (1,) * (self.clean.ndim - 2))
        finite = self.clean.isfinite() | absent
        check_values("clean", self.clean, finite, "finite latents in existing turns")

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def step_mask(self) -> Tensor:
        """No steps are stored: [B, N, 0]."""
        return self.turn_mask[..., None].expand(-1, -1, 0)

    @property
    def reduction(self) -> str:
        """No log-prob is stored; "mean"."""
        return "mean"

    def clean_at(self, at: Tensor) -> Tensor:
        """Return the final latents of (trajectory, turn) rows."""
        return self.clean[at[:, 0], at[:, 1]]

    def steps_at(self, rows: Tensor) -> Steps:
        """Raise ``ValueError``: no steps are stored."""
        raise ValueError("samples: expected stored steps, got CleanSamples, which have none")


def stored_steps(samples: Samples) -> Tensor:
    """Return the steps that exist and have a density, boolean [B, N, S] on the CPU.

    Raises:
        ValueError: there are none in the samples, S is 0.
    """
    if samples.step_mask.shape[2] == 0:
        raise ValueError("samples: expected stored steps, got samples without any")
    return samples.step_mask.cpu()


def turn_values(samples: Samples, advantage: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check advantages and validity and bring both to [B, N] on the CPU.

    Raises:
        ValueError: shapes do not match, or a valid advantage is not finite.
        TypeError: a dtype is not the one stated.
    """
    exists = samples.turn_mask.cpu()
    check_full_precision(advantage=advantage)
    shape = exists.shape if advantage.ndim == 2 else exists.shape[:1]
    check_shape("advantage", advantage, shape, "[B] or [B, N]")
    if valid is None:
        valid = torch.ones_like(advantage, dtype=torch.bool)
    check_mask("valid", valid, shape, "of advantage")
    values, own = advantage.detach().cpu(), valid.cpu()
    if values.ndim == 1:
        values, own = values[:, None].expand(exists.shape), own[:, None].expand(exists.shape)
    own = own & exists
    check_values("advantage", values, ~own | values.isfinite(), "finite values where valid")
    return torch.where(own, values, 0), own
