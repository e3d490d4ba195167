"""Immutable container of sampled trajectories, validated once on construction."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mteditflow._checks import (
    REDUCTIONS,
    check_choice,
    check_floating,
    check_full_precision,
    check_group,
    check_mask,
    check_rank,
    check_shape,
    check_tensor,
    check_values,
)
from mteditflow._files import load_tensors, save_tensors

_FORMAT = "mteditflow.Trajectory/1"


class Steps(NamedTuple):
    """Stored denoising steps as M rows, as replays need them."""

    x_t: Tensor  # [M, ...] state before the step
    next_x: Tensor  # [M, ...] state after it
    sigma: Tensor  # [M] flow time before
    next_sigma: Tensor  # [M] flow time after
    log_prob: Tensor  # [M] under the policy that sampled


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Multi-turn rollouts: B trajectories of N turns of S denoising steps.

    Args:
        latents: every state of every turn, [B, N, S + 1, ...], from noise (first) to clean (last).
        sigmas: grid of each turn, [N, S + 1], strictly decreasing within [0, 1].
        log_prob: log-prob of each step under the sampling policy, [B, N, S], float32 or float64; 0
            where the step was deterministic.
        stochastic: steps that were sampled from a density, boolean [N, S].
        group: integer group id of each trajectory, [B].
        turn_mask: turns that exist, boolean [B, N]; chains may be shorter than N.
        reduction: reduction of ``log_prob`` over elements, "mean" or "sum"; stored with it so that
            training cannot mix the two.

    No gradient flows through a rollout. Tensors are stored without a copy and must not be modified.

    Raises:
        ValueError: shapes or devices do not match, a grid does not decrease, a trajectory has no
            turn, states or log-probs of existing turns are not finite.
        TypeError: a dtype is not the one stated.

    Example:
        >>> trajectory = Trajectory(
        ...     latents=torch.zeros(4, 3, 3, 8),
        ...     sigmas=torch.tensor([[1.0, 0.5, 0.0]]).expand(3, -1),
        ...     log_prob=torch.zeros(4, 3, 2),
        ...     stochastic=torch.ones(3, 2, dtype=torch.bool),
        ...     group=torch.tensor([0, 0, 1, 1]),
        ...     turn_mask=torch.ones(4, 3, dtype=torch.bool),
        ...     reduction="mean",
        ... )
        >>> trajectory
        Trajectory(B=4, N=3, S=2, latent=[8], dtype=torch.float32, device=cpu)
        >>> len(trajectory.select(trajectory.group == 1))
        2
    """

    latents: Tensor
    sigmas: Tensor
    log_prob: Tensor
    stochastic: Tensor
    group: Tensor
    turn_mask: Tensor
    reduction: str

    def __post_init__(self) -> None:
        check_floating(latents=self.latents)
        check_full_precision(sigmas=self.sigmas, log_prob=self.log_prob)
        check_rank("latents", self.latents, 4, "[B, N, S + 1, ...]")
        b, n, states = self.latents.shape[:3]
        if states < 2:
            raise ValueError(f"latents: expected at least one step (two states), got {states}")
        check_shape("sigmas", self.sigmas, (n, states), "[N, S + 1]")
        check_shape("log_prob", self.log_prob, (b, n, states - 1), "[B, N, S]")
        check_mask("stochastic", self.stochastic, (n, states - 1), "[N, S]")
        check_group(self.group, (b,))
        check_mask("turn_mask", self.turn_mask, (b, n), "[B, N]")
        check_choice("reduction", self.reduction, REDUCTIONS)
        for name, x in self._tensors().items():
            if x.device != self.latents.device:
                raise ValueError(
                    f"{name}: expected the device of latents, {self.latents.device}, got {x.device}"
                )
        self._check_values()

    def _check_values(self) -> None:
        within = (self.sigmas >= 0) & (self.sigmas <= 1)
        check_values("sigmas", self.sigmas, within, "values in [0, 1]")
        fall = self.sigmas[:, :-1] - self.sigmas[:, 1:]
        check_values("sigmas", fall, fall > 0, "strictly decreasing grids, a fall > 0")
        has_turn = self.turn_mask.any(dim=1)
        check_values("turn_mask", has_turn, has_turn, "at least one turn in each trajectory")
        for name, x in (("log_prob", self.log_prob), ("latents", self.latents)):
            # Absent turns hold whatever the sampler left there, NaN included.
            absent = ~self.turn_mask.reshape(self.turn_mask.shape + (1,) * (x.ndim - 2))
            check_values(name, x, x.isfinite() | absent, "finite values in existing turns")

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)[:-1]}

    def __len__(self) -> int:
        return len(self.latents)

    def __repr__(self) -> str:
        b, n, states, *latent = self.latents.shape
        return (
            f"Trajectory(B={b}, N={n}, S={states - 1}, latent={latent}, "
            f"dtype={self.latents.dtype}, device={self.latents.device})"
        )

    @property
    def clean(self) -> Tensor:
        """Final latents of every turn, [B, N, ...]; NFT re-noises and the next turn edits them."""
        return self.latents[:, :, -1]

    @property
    def step_mask(self) -> Tensor:
        """Steps that exist and have a density, boolean [B, N, S]: GRPO can train these."""
        return self.turn_mask[:, :, None] & self.stochastic[None]

    def steps(self, trajectory: Tensor, turn: Tensor, step: Tensor) -> Steps:
        """Gather steps as rows, by indices of trajectory, turn and step.

        Args:
            trajectory: index of each row, integer [M].
            turn: index of each row, integer [M].
            step: index of each row, integer [M].

        Returns:
            Steps of M rows, in the order of the indices.

        Raises:
            ValueError: the indices are not of one shape [M], or one is out of range.
            TypeError: an index is not int64 or int32.

        Example:
            To take every step that GRPO can train:

            >>> rollouts = Trajectory(
            ...     latents=torch.zeros(2, 3, 5, 8),
            ...     sigmas=torch.linspace(1, 0, 5).expand(3, -1),
            ...     log_prob=torch.zeros(2, 3, 4),
            ...     stochastic=torch.tensor([True, True, True, False]).expand(3, -1),
            ...     group=torch.tensor([0, 0]),
            ...     turn_mask=torch.ones(2, 3, dtype=torch.bool),
            ...     reduction="mean",
            ... )
            >>> rollouts.steps(*rollouts.step_mask.nonzero(as_tuple=True)).x_t.shape
            torch.Size([18, 8])
        """
        names = ("trajectory", "turn", "step")
        self._check_indices(names, (trajectory, turn, step))
        return Steps(
            x_t=self.latents[trajectory, turn, step],
            next_x=self.latents[trajectory, turn, step + 1],
            sigma=self.sigmas[turn, step],
            next_sigma=self.sigmas[turn, step + 1],
            log_prob=self.log_prob[trajectory, turn, step],
        )

    def steps_at(self, rows: Tensor) -> Steps:
        """Gather steps as rows, by one index tensor.

        Args:
            rows: trajectory, turn and step of each row, integer [M, 3].

        Returns:
            Steps of M rows, in the order of ``rows``.

        Raises:
            ValueError: ``rows`` is not [M, 3], or an index is out of range.
            TypeError: ``rows`` is not int64 or int32.
        """
        check_shape("rows", rows, (*rows.shape[:1], 3), "[M, 3]")
        return self.steps(*rows.unbind(1))

    def clean_at(self, at: Tensor) -> Tensor:
        """Gather final latents of turns as rows.

        Args:
            at: trajectory and turn of each row, integer [M, 2].

        Returns:
            [M, ...]: rows of ``clean``, in the order of the indices.

        Raises:
            ValueError: ``at`` is not [M, 2], or an index is out of range.
            TypeError: ``at`` is not int64 or int32.
        """
        check_shape("at", at, (*at.shape[:1], 2), "[M, 2]")
        trajectory, turn = at.unbind(1)
        self._check_indices(("trajectory", "turn"), (trajectory, turn))
        return self.latents[trajectory, turn, -1]

    def _check_indices(self, names: Sequence[str], indices: Sequence[Tensor]) -> None:
        """Raise unless the indices are integer [M], each within its axis of [B, N, S]."""
        check_tensor(names[0], indices[0])
        check_shape(names[0], indices[0], (indices[0].numel(),), "[M]")
        for name, index, size in zip(names, indices, self.log_prob.shape, strict=False):
            check_shape(name, index, indices[0].shape, f"of {names[0]}")
            if index.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"{name}: expected int64 or int32 indices, got {index.dtype}")
            within = (index >= 0) & (index < size)
            check_values(name, index, within, f"indices in 0..{size - 1}")

    def select(self, index: Tensor | slice) -> Trajectory:
        """Select trajectories.

        Args:
            index: integer indices [M], a boolean mask [B] or a slice.

        Returns:
            The trajectories in the order of ``index``; a slice shares memory with this one.

        Raises:
            ValueError: no trajectory is left.
            TypeError: the index is uint8, which torch reads as a mask.
            IndexError: an index is out of range, or a mask is not [B].
        """
        if isinstance(index, Tensor) and index.dtype == torch.uint8:
            raise TypeError(
                "index: expected int64 or int32 indices, or a boolean mask, got torch.uint8; "
                "convert indices with .long() and a mask with .bool()"
            )
        return replace(
            self,
            latents=self.latents[index],
            log_prob=self.log_prob[index],
            group=self.group[index],
            turn_mask=self.turn_mask[index],
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Trajectory:
        """Copy to another device; dtypes are kept.

        Args:
            device: target device.
            non_blocking: as in ``Tensor.to``: do not read the copy before the transfer is over.

        Returns:
            Trajectory; tensors that are already on the device are shared.
        """
        # Without validation, which would read tensors whose transfer may still be under way.
        moved = copy.copy(self)
        for name, x in self._tensors().items():
            object.__setattr__(moved, name, x.to(device, non_blocking=non_blocking))
        return moved

    @classmethod
    def concatenate(cls, parts: Sequence[Trajectory]) -> Trajectory:
        """Concatenate along the batch.

        Parts that differ in shape or grid train together in ``objectives.Buckets``.

        Args:
            parts: at least one; all of the same turns, grid, stochastic steps, reduction, device
                and dtypes. Group ids are kept: give different groups different ids beforehand.

        Returns:
            The trajectories of all parts, in their order.

        Raises:
            ValueError: there is no part, or the parts differ in turns, grid, stochastic steps,
                reduction, device or latent shape.
            TypeError: the parts differ in a dtype.
        """
        if not parts:
            raise ValueError("parts: expected at least one Trajectory, got none")
        first = parts[0]
        for position, part in enumerate(parts):
            part._check_joins(first, f"parts[{position}]")
        joined: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("latents", "log_prob", "group", "turn_mask")
        }
        return replace(first, **joined)

    def _check_joins(self, first: Trajectory, part: str) -> None:
        """Raise unless ``concatenate`` can join this trajectory, named ``part``, to the first."""
        for name, x in self._tensors().items():
            expected = getattr(first, name)
            if x.dtype != expected.dtype:
                raise TypeError(f"{part}.{name}: expected {expected.dtype}, got {x.dtype}")
            if x.device != expected.device:
                raise ValueError(
                    f"{part}.{name}: expected device {expected.device}, got {x.device}"
                )
        for name in ("sigmas", "stochastic"):
            if not torch.equal(getattr(self, name), getattr(first, name)):
                raise ValueError(f"{part}.{name}: differs from that of parts[0]")
        check_choice(f"{part}.reduction", self.reduction, [first.reduction])
        shape = (len(self), *first.latents.shape[1:])
        check_shape(f"{part}.latents", self.latents, shape, "[B, ...] like parts[0]")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file atomically: a failure leaves an existing file unchanged.

        Args:
            path: path of the file, in an existing folder.

        Raises:
            OSError: the file cannot be written.
        """
        metadata = {"format": _FORMAT, "reduction": self.reduction}
        save_tensors(path, self._tensors(), metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trajectory:
        """Read and validate a file that ``save`` wrote.

        Args:
            path: path of the file.

        Returns:
            Trajectory on the CPU.

        Raises:
            ValueError: the file is damaged, or does not hold a trajectory.
            OSError: the file cannot be read.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{os.fspath(path)}: expected format {_FORMAT!r}, got {metadata.get('format')!r}"
            )
        expected = {field.name for field in fields(cls)} - {"reduction"}
        if set(tensors) != expected:
            raise ValueError(
                f"{os.fspath(path)}: expected tensors {sorted(expected)}, got {sorted(tensors)}"
            )
        try:
            return cls(**tensors, reduction=metadata.get("reduction", ""))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: not a valid trajectory, {error}") from error
