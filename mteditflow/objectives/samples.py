"""Samples of a rollout: the protocol that objectives read, and containers that implement it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mteditflow._checks import (
    check_choice,
    check_floating,
    check_full_precision,
    check_group,
    check_kind,
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
        """Reduction of the stored log-probs over elements, "mean" or "sum"."""

    def clean_at(self, at: Tensor) -> Tensor:
        """Return the final latents of (trajectory, turn) rows: int64 [M, 2] -> [M, ...]."""
        ...

    def steps_at(self, rows: Tensor) -> Steps:
        """Return stored steps of (trajectory, turn, step) rows: int64 [M, 3] -> M steps."""
        ...


@dataclass(frozen=True, eq=False)
class CleanSamples:
    """Final latents without steps, from any sampler: sufficient for NFT, AWM and DPO.

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


@dataclass(frozen=True, eq=False)
class Buckets:
    """Samples of several latent shapes, grids or lengths, held as separate parts.

    Trajectories are numbered consecutively over all parts. Groups may span parts, and advantages
    are computed over all of them. N and S are the maxima over parts, with masks for the padding. An
    objective computes the units of each part separately, with the results of separate calls, and a
    unit of several members (a pair, a group) must lie within one part. ``Units.split`` fills each
    micro-batch from one part.

    Args:
        parts: at least one ``Samples``, such as rollouts, all of one reduction and device. Nested
            ``Buckets`` are flattened. Group ids are kept: give different groups different ids
            beforehand.

    Raises:
        ValueError: there is no part, or they differ in reduction or device.
        TypeError: a part does not implement ``Samples``.

    Example:
        >>> square = CleanSamples(torch.randn(2, 1, 4, 4), torch.tensor([0, 0]))
        >>> wide = CleanSamples(torch.randn(2, 3, 2, 8), torch.tensor([1, 1]))
        >>> samples = Buckets([square, wide])
        >>> samples.turn_mask.shape, samples.clean_at(torch.tensor([[3, 2]])).shape
        (torch.Size([4, 3]), torch.Size([1, 2, 8]))
    """

    parts: Sequence[Samples]

    def __post_init__(self) -> None:
        check_kind("parts", self.parts, Sequence, "a sequence of Samples")
        if not self.parts:
            raise ValueError("parts: expected at least one Samples, got none")
        for position, part in enumerate(self.parts):
            name = f"parts[{position}]"
            check_kind(name, part, Samples, "Samples")
            check_choice(f"{name}.reduction", part.reduction, [self.reduction])
            device = self.parts[0].group.device
            for mask in ("group", "turn_mask", "step_mask"):
                own = getattr(part, mask).device
                if own != device:
                    raise ValueError(f"{name}.{mask}: expected device {device}, got {own}")
        flat = [
            own
            for part in self.parts
            for own in (part.parts if isinstance(part, Buckets) else [part])
        ]
        object.__setattr__(self, "parts", tuple(flat))

    def __len__(self) -> int:
        return len(self.group)

    @cached_property
    def group(self) -> Tensor:
        """Integer group id of each trajectory, [B]."""
        groups = [part.group for part in self.parts]
        if len({group.dtype for group in groups}) > 1:  # unsigned dtypes do not promote
            groups = [group.long() for group in groups]
        return torch.cat(groups)

    @cached_property
    def turn_mask(self) -> Tensor:
        """Turns that exist, boolean [B, N]; N of the longest part."""
        return padded([part.turn_mask for part in self.parts])

    @cached_property
    def step_mask(self) -> Tensor:
        """Steps that exist and have a density, boolean [B, N, S]; S of the longest part."""
        return padded([part.step_mask for part in self.parts])

    @property
    def reduction(self) -> str:
        """Reduction of the stored log-probs over elements, "mean" or "sum"."""
        return self.parts[0].reduction

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Index of the first trajectory of each part."""
        return tuple(accumulate((len(part.group) for part in self.parts[:-1]), initial=0))

    def clean_at(self, at: Tensor) -> Tensor:
        """Return the final latents of (trajectory, turn) rows of one latent shape."""
        (clean,) = self.gather(at, lambda part, _, own: (self.parts[part].clean_at(own),))
        return clean

    def steps_at(self, rows: Tensor) -> Steps:
        """Return stored steps of (trajectory, turn, step) rows of one latent shape."""
        return Steps(*self.gather(rows, lambda part, _, own: self.parts[part].steps_at(own)))

    def gather(
        self, rows: Tensor, read: Callable[[int, Tensor, Tensor], Sequence[Tensor]]
    ) -> list[Tensor]:
        """Read rows from the parts that hold them.

        Args:
            rows: int64 [M, ...] on the CPU, each beginning with its trajectory.
            read: function that is called once for each part with rows. It takes the part's index,
                the positions of its m rows among the M, and these rows with trajectories counted
                within the part, and returns tensors [m, ...].

        Returns:
            The tensors of all rows, [M, ...], in the order of ``rows``.

        Raises:
            ValueError: a trajectory is out of range, or the tensors differ in shape.
        """
        trajectory = rows[:, 0].cpu()
        inside = (trajectory >= 0) & (trajectory < len(self))
        check_values("trajectory", trajectory, inside, f"indices in 0..{len(self) - 1}")
        part_of = bucket_of(trajectory, self.starts)
        places, found = [], []
        # With no rows the first part still answers, so that the tensors have dtype and shape.
        for part in sorted(set(part_of.tolist())) or [0]:
            here = (part_of == part).nonzero()[:, 0]
            own = rows[here.to(rows.device)].clone()
            own[:, 0] -= self.starts[part]
            places.append(here)
            found.append(read(part, here, own))
        return [_in_order(places, pieces) for pieces in zip(*found, strict=True)]


def named_parts(samples: Samples) -> dict[str, Samples]:
    """Return the parts of ``Buckets``, or the samples themselves, by their names in errors."""
    if not isinstance(samples, Buckets):
        return {"samples": samples}
    return {f"samples.parts[{number}]": part for number, part in enumerate(samples.parts)}


def starts_of(samples: Samples) -> tuple[int, ...]:
    """Return the index of the first trajectory of each part; (0,) if not ``Buckets``."""
    return samples.starts if isinstance(samples, Buckets) else (0,)


def bucket_of(trajectory: Tensor, starts: Sequence[int]) -> Tensor:
    """Return the index of the part that holds each trajectory, int64 of the same shape."""
    first = torch.tensor(starts, dtype=torch.int64, device=trajectory.device)
    return torch.bucketize(trajectory.contiguous(), first, right=True) - 1


def _in_order(places: Sequence[Tensor], pieces: Sequence[Tensor]) -> Tensor:
    """Join rows of parts, each [m, ...], in the order of their positions."""
    if len(pieces) == 1:
        return pieces[0]
    shapes = sorted({tuple(piece.shape[1:]) for piece in pieces})
    if len(shapes) > 1:
        raise ValueError(
            f"rows: expected those of one latent shape in a call, got {shapes}; cut them by "
            "bucket, as Units.split does"
        )
    return torch.cat(list(pieces))[torch.cat(list(places)).argsort().to(pieces[0].device)]


def padded(masks: Sequence[Tensor]) -> Tensor:
    """Join masks [B, ...] along the batch, padded with False to the longest of each axis."""
    axes = [max(sizes) for sizes in zip(*(mask.shape[1:] for mask in masks), strict=True)]
    full = masks[0].new_zeros(sum(map(len, masks)), *axes)
    for rows, mask in zip(torch.split(full, [len(mask) for mask in masks]), masks, strict=True):
        rows[tuple(map(slice, mask.shape))] = mask
    return full


def stored_steps(samples: Samples) -> Tensor:
    """Return the steps that exist and have a density, boolean [B, N, S] on the CPU.

    Raises:
        ValueError: the samples, or one of their parts, store no steps (S is 0).
    """
    for name, part in named_parts(samples).items():
        if part.step_mask.shape[2] == 0:
            raise ValueError(f"{name}: expected stored steps, got samples without any")
    return samples.step_mask.cpu()


def recorded_steps(samples: Samples) -> Tensor:
    """Return the steps of turns that exist, with or without a density: [B, N, S] on the CPU.

    Raises:
        ValueError: as ``stored_steps``.
    """
    stored_steps(samples)
    turns = [
        (part.turn_mask.cpu(), part.step_mask.shape[2]) for part in named_parts(samples).values()
    ]
    return padded([mask[..., None].expand(-1, -1, steps) for mask, steps in turns])


def valid_turns(samples: Samples, valid: Tensor | None) -> Tensor:
    """Return the turns that exist and are valid, boolean [B, N] on the CPU.

    Raises:
        ValueError: the shape of ``valid`` is neither [B] nor [B, N].
        TypeError: it is not boolean.
    """
    exists = samples.turn_mask.cpu()
    if valid is None:
        return exists
    shape = exists.shape[: max(valid.ndim, 1)]
    check_mask("valid", valid, shape, "[B] or [B, N]")
    return exists & valid.cpu().view(*shape, *[1] * (2 - valid.ndim))


def turn_values(
    samples: Samples, advantage: Tensor, valid: Tensor | None, *, tokens: bool = False
) -> tuple[Tensor, Tensor]:
    """Check advantages and validity, and expand both to [B, N] on the CPU.

    With ``tokens`` advantages may be [B, N, ...], one per latent token, and keep that shape.
    Advantages are 0 where not valid, and validity includes that the turn exists.

    Raises:
        ValueError: shapes do not match, or a valid advantage is not finite.
        TypeError: a dtype is not the one stated.
    """
    exists = samples.turn_mask.cpu()
    check_full_precision(advantage=advantage)
    per_token = tokens and advantage.ndim > 2
    shape = exists.shape if per_token or advantage.ndim == 2 else exists.shape[:1]
    if per_token:
        check_shape("advantage", advantage, (*shape, *advantage.shape[2:]), "[B, N, ...]")
    else:
        check_shape("advantage", advantage, shape, "[B] or [B, N]")
    if valid is None:
        valid = torch.ones(shape, dtype=torch.bool, device=advantage.device)
    check_mask("valid", valid, shape, "of advantage")
    values, own = advantage.detach().cpu(), valid.cpu()
    if values.ndim == 1:
        values, own = values[:, None].expand(exists.shape), own[:, None].expand(exists.shape)
    own = own & exists
    read = own.reshape(*own.shape, *(1,) * (values.ndim - 2))
    check_values("advantage", values, ~read | values.isfinite(), "finite values where valid")
    return torch.where(read, values, 0), own
