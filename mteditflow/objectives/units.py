"""Units of training: the rows of each minibatch of a round, independent of the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

import torch
from torch import Tensor

from mteditflow._checks import check_count, check_number, check_rank, check_tensor
from mteditflow.objectives.keys import RoundKey
from mteditflow.objectives.samples import Samples, bucket_of, named_parts, padded, starts_of

Rows = Tensor | slice  # indices of some of M rows, int64 on the CPU, or ALL
ALL = slice(None)
Some = TypeVar("Some", Tensor, "Tensor | None")


@dataclass(frozen=True, eq=False)
class Units:
    """Units of training, one loss entry each: a row (K = 1), a pair (2) or a group (G, padded).

    Attributes:
        rows: (trajectory, turn, k) of each member, int64 [U, K, 3] on the CPU; k is the denoising
            step for objectives that replay steps, else the noise level.
        mask: members that exist, boolean [U, K]. A unit without members is idle: its loss is 0.
        advantage: [U, K], or [U, K, ...] for one per latent token, float32 or float64; ``None`` for
            objectives without a reward.
        seed: seed of each member's random numbers, int64 [U, K]; ``None`` if none are drawn.
        count: number of valid units of the minibatch, including units that were left out because
            they cannot change the gradient. Divide the summed loss by it.
        spare: an existing (trajectory, turn), which idle units use.
        starts: index of the first trajectory of each bucket; (0,) if the samples are not
            ``Buckets``.
        kl_weight: weight of each unit's KL to the reference, float32 [U], 0 where it is not
            computed; ``None`` if it is 1 everywhere.

    Raises:
        ValueError: the members of a unit lie in several buckets.
    """

    rows: Tensor
    mask: Tensor
    advantage: Tensor | None
    seed: Tensor | None
    count: int
    spare: tuple[int, int] = (0, 0)
    starts: tuple[int, ...] = (0,)
    kl_weight: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.starts) > 1:
            self._check_buckets()

    def _check_buckets(self) -> None:
        """Raise unless all members of every unit are in one bucket."""
        apart = (bucket_of(self.rows[..., 0], self.starts) != self.bucket[:, None]) & self.mask
        for unit in apart.any(dim=1).nonzero()[:1, 0]:
            trajectories = self.rows[unit, :, 0][self.mask[unit]].tolist()
            raise ValueError(
                f"units: expected the members of a unit in one bucket, got trajectories "
                f"{trajectories} in several; give each bucket groups of its own"
            )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lead(self) -> Tensor:
        """Row of each unit's first existing member, int64 [U, 3]; its first row if it is idle."""
        first = self.mask.int().argmax(dim=1)
        return self.rows.take_along_dim(first[:, None, None], dim=1)[:, 0]

    @property
    def bucket(self) -> Tensor:
        """Index of each unit's bucket, int64 [U]."""
        return bucket_of(self.lead[:, 0], self.starts)

    def split(self, size: int, *, parts: int | None = None) -> list[Units]:
        """Split into micro-batches of at most ``size`` units, each with the ``count`` of the whole.

        Each micro-batch holds units of one bucket, so that it takes one forward pass.

        Args:
            size: largest number of units in a part, >= 1.
            parts: total number of parts, at least as many as needed; the extra ones hold one idle
                unit each. With sharded weights pass the largest number over ranks, because every
                forward pass is a collective call there.

        Returns:
            The parts; an empty list if there are no units and ``parts`` is ``None`` or 0.

        Raises:
            ValueError: more parts are needed than ``parts``, or ``size`` is below 1.
        """
        check_count("size", size)
        # By bucket first: a forward pass needs one latent shape.
        buckets = [self[self.bucket == number] for number in range(len(self.starts))]
        cut = [own[start : start + size] for own in buckets for start in range(0, len(own), size)]
        needed = len(cut)
        if parts is not None and parts < needed:
            expected = f"{needed} or more for {len(self)} units, {size} in each"
            raise ValueError(f"parts: expected {expected}, got {parts}")
        return cut + [self.idle()] * ((needed if parts is None else parts) - needed)

    def __getitem__(self, index: slice | Tensor) -> Units:
        """Return the units of a slice, mask [U] or index tensor; ``count`` stays that of all."""
        if not isinstance(index, slice | Tensor):
            raise TypeError(f"index: expected a slice or a tensor, got {type(index).__name__}")
        advantage, seed, kl_weight = (
            None if x is None else x[index] for x in (self.advantage, self.seed, self.kl_weight)
        )
        rows, mask = self.rows[index], self.mask[index]
        return replace(
            self, rows=rows, mask=mask, advantage=advantage, seed=seed, kl_weight=kl_weight
        )

    def idle(self) -> Units:
        """Return one masked unit: it takes a forward pass and has no effect on any gradient."""
        width = self.rows.shape[1]
        zeros = self.rows.new_zeros(1, width)
        return replace(
            self,
            rows=self.rows.new_tensor([*self.spare, 0]).expand(1, width, 3),
            mask=zeros.bool(),
            advantage=None
            if self.advantage is None
            else self.advantage.new_zeros(1, *self.advantage.shape[1:]),
            seed=None if self.seed is None else zeros.to(self.seed),
            kl_weight=None if self.kl_weight is None else self.kl_weight.new_zeros(1),
        )

    def within(self, start: int) -> Units:
        """Return units of one bucket, with trajectories counted from ``start``, its first one.

        Padding members get the row of the unit's lead, because their own may lie in another bucket.
        """
        lead = self.lead
        rows = torch.where(self.mask[..., None], self.rows, lead[:, None])
        first = self.rows.new_tensor([start, 0, 0])
        trajectory, turn, _ = (lead[0] - first).tolist()
        return replace(self, rows=rows - first, starts=(0,), spare=(trajectory, turn))


def at_rows(x: Some, rows: Rows) -> Some:
    """Return some rows of a tensor [M, ...] on any device, or the tensor itself for a slice."""
    if x is None or isinstance(rows, slice):
        return x
    return x[rows.to(x.device)]


def member_rows(units: Units) -> Tensor:
    """Return the rows of all members, int64 [K * U, 3], ordered by member, then by unit.

    Raises:
        ValueError: there are no units.
    """
    if not len(units):
        raise ValueError("units: expected at least one, got none; skip an empty minibatch")
    return units.rows.transpose(0, 1).flatten(0, 1)


def member_advantages(units: Units, like: Tensor) -> Tensor:
    """Return the members' advantages in the order of ``member_rows``, in the dtype of ``like``.

    [K * U], or [K * U, ...] if units have one per latent token.
    """
    if units.advantage is None:
        raise TypeError("units: expected units with advantages, got None")
    return units.advantage.transpose(0, 1).flatten(0, 1).to(like)


def member_mask(units: Units, like: Tensor) -> Tensor | None:
    """Return the mask of existing members, boolean [K * U], in the order of ``member_rows``.

    ``None`` if all exist, so that losses skip their masked copies.
    """
    if bool(units.mask.all()):
        return None
    return units.mask.T.flatten().to(like.device)


def member_mean(units: Units, x: Tensor) -> Tensor:
    """Mean over the existing members of each unit, [K * U] -> [U]; ``x`` must be 0 for others."""
    count = units.mask.sum(dim=1).clamp(min=1).to(x)
    return x.view(-1, len(units)).sum(dim=0) / count


def check_units(units: Units, *, members: int | None, drawn: bool) -> None:
    """Raise unless units fit an objective.

    Args:
        units: units that an objective was called with.
        members: members of a unit, K; ``None``: a group of any size, 2 or more.
        drawn: whether members must have seeds.

    Raises:
        ValueError: the units were drawn for another objective.
    """
    width, seeded = units.rows.shape[1], units.seed is not None
    if not (width > 1 if members is None else width == members) or seeded != drawn:
        numbers = {True: "with", False: "without"}
        expected = "2 or more" if members is None else members
        raise ValueError(
            f"units: expected those of this objective, K = {expected} {numbers[drawn]} seeds, got "
            f"K = {width} {numbers[seeded]} seeds"
        )


def draw_units(
    samples: Samples,
    exists: Tensor,
    advantage: Tensor | None,
    valid: Tensor,
    *,
    key: RoundKey,
    share: float,
    minibatches: int,
    zero_matters: bool,
    whole_groups: bool = False,
) -> list[Units]:
    """Draw single rows as units; see ``Objective.units``.

    Args:
        samples: B trajectories.
        exists: entries that can be trained, boolean [B, N, K].
        advantage: [B, N], [B, N, ...] for one per latent token, or ``None``.
        valid: turns that are trained, boolean [B, N].
        key: source of the random numbers.
        share: share of the K entries of a turn that is drawn.
        minibatches: optimizer steps.
        zero_matters: whether a unit of advantage 0 can change the gradient.
        whole_groups: whether groups, not trajectories, are spread over the minibatches. Use it for
            units of several members, where the number of units that a trajectory leads varies.
    """
    # One generator per trajectory, used first for the share and then for the strata: the draw of
    # a trajectory does not depend on rank or batch.
    generators = [key.generator("rows", b) for b in range(len(exists))]
    taken = _draw_share(samples, exists, share, generators)
    drawn = training_rows(taken, generators=generators, minibatches=minibatches)
    if whole_groups:
        chosen, rows = _spread_groups(samples.group, minibatches, key), taken.nonzero()
        drawn = [rows[chosen[rows[:, 0]] == number] for number in range(minibatches)]
    trajectory, turn = (samples.turn_mask.cpu().nonzero().tolist() or [[0, 0]])[0]
    found = []
    for rows in drawn:
        counts = valid[rows[:, 0], rows[:, 1]]
        kept = counts
        if advantage is not None and not zero_matters:
            own = advantage[rows[:, 0], rows[:, 1]][:, None].flatten(1)
            kept = counts & (own != 0).any(dim=1)
        left = rows[kept]
        # ``count`` includes rows dropped for advantage 0: they would add 0 to the sum of losses.
        found.append(
            Units(
                rows=left[:, None],
                mask=torch.ones_like(left[:, :1], dtype=torch.bool),
                advantage=None if advantage is None else advantage[left[:, 0], left[:, 1]][:, None],
                seed=None,
                count=int(counts.sum()),
                spare=(trajectory, turn),
                starts=starts_of(samples),
            )
        )
    return found


def training_rows(
    exists: Tensor,
    *,
    generators: Sequence[torch.Generator],
    share: float = 1.0,
    minibatches: int = 1,
) -> list[Tensor]:
    r"""Draw the rows (trajectory, turn, step) of each minibatch of a round.

    For every turn of every trajectory, :math:`\lceil share \cdot S_n \rceil` of its existing steps
    are drawn. Trajectories are assigned to minibatches in strata: of ``minibatches`` consecutive
    trajectories, each goes to a different minibatch in random order. Every minibatch thus has an
    equal part of every group, and every rank an equal part of every minibatch. All draws come from
    the trajectories' own generators, so that ranks that hold consecutive parts of a round (a
    multiple of ``minibatches`` each) draw the same rows as a single process.

    Args:
        exists: steps that can be trained, boolean [B, N, S]; for GRPO ``trajectory.step_mask``, for
            NFT ``trajectory.turn_mask[..., None]`` expanded to the noise levels per turn.
        generators: one per trajectory, such as ``keyed_generator(seed, "rows", round, index)``.
        share: share of the steps of a turn that is drawn, in (0, 1].
        minibatches: optimizer steps in the round; divides B.

    Returns:
        For each minibatch int64 rows [M, 3] on the CPU, ordered by trajectory, turn and step.

    Raises:
        ValueError: shapes, counts or the share are out of range, or B is not a multiple of
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
    mask = _drawn(exists.cpu(), share, generators)
    order = _spread(len(mask), minibatches, generators)
    rows = mask.nonzero()
    return [rows[torch.isin(rows[:, 0], chosen)] for chosen in order]


def _draw_share(
    samples: Samples, exists: Tensor, share: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Keep a share of the entries of every turn; a part's draw does not depend on other parts."""
    if share == 1:
        return exists
    starts, masks = [*starts_of(samples), len(exists)], []
    for part, start, end in zip(named_parts(samples).values(), starts, starts[1:], strict=False):
        own, (turns, steps) = exists[start:end], part.step_mask.shape[1:]
        # Without the padding of longer parts, which would change the number of draws. Entries
        # beyond the part's steps mean that the last axis counts noise levels, not steps.
        if not bool(own[..., steps:].any()):
            own = own[:, :turns, :steps]
        masks.append(_drawn(own, share, generators[start:end]))
    return padded(masks)


def _drawn(exists: Tensor, share: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Keep a share of the existing steps of every turn, [B, N, S]."""
    if share == 1 or not len(exists):
        return exists
    return torch.stack([_draw(own, share, g) for own, g in zip(exists, generators, strict=True)])


def _draw(exists: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Keep a share of the existing steps of every turn, [N, S]."""
    # 0.07 * 100 is 7.000000000000001 in float64; its ceiling has to be 7.
    count = (exists.sum(dim=1).double() * share - 1e-9).ceil().clamp(min=1)
    score = torch.rand(exists.shape, generator=generator, dtype=torch.float32, device="cpu")
    score = score.masked_fill(~exists, 2.0)  # above every draw, so that absent steps rank last
    rank = score.argsort(dim=1).argsort(dim=1)
    return (rank < count[:, None]) & exists


def _spread_groups(group: Tensor, minibatches: int, key: RoundKey) -> Tensor:
    """Return the minibatch of each trajectory's group, int64 [B].

    Of ``minibatches`` consecutive groups of equal size, each goes to a different minibatch. A
    group's position follows from the trajectories before it, so that the assignment is the same
    for any ranks and buckets that hold groups whole.
    """
    names = group.tolist()
    number, before = dict.fromkeys(names, 0), key.first
    for name in number:
        size = names.count(name)
        # With groups of one size, before // size is the group's index over all ranks.
        stratum, place = divmod(before // size, minibatches)
        order = list(range(minibatches))
        Random(key.number("groups", stratum)).shuffle(order)
        number[name] = order[place]
        before += size
    return torch.tensor([number[name] for name in names], dtype=torch.int64, device="cpu")


def _spread(
    trajectories: int, minibatches: int, generators: Sequence[torch.Generator]
) -> list[Tensor]:
    """Return the trajectories of each minibatch: one of every stratum of consecutive ones."""
    strata = [
        start
        + torch.randperm(minibatches, generator=generators[start], dtype=torch.int64, device="cpu")
        for start in range(0, trajectories, minibatches)
    ]
    return list(torch.stack(strata, dim=1)) if strata else []
