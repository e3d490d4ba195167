"""Hypothesis strategies for the tensors of the method; they shrink to small readable cases.

Axes: ``B`` trajectories, ``N`` turns, ``S`` denoising steps, ``M`` rows. Numbers are mostly
multiples of 1/8, which are exact in every dtype, so rounding causes no failures; laws about
rounding draw decimals. All numbers of a tensor are drawn as one string of bytes, which is fast and
shrinks to zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

LOST = (float("nan"), float("inf"), float("-inf"), 1e30)
Number = Callable[[int], float]  # maps a byte to a number, 0 to the simplest one


def eighths(byte: int) -> float:
    """Map a byte to a multiple of 1/8 in [-10, 10]."""
    return _signed(byte) / 8


def signs(byte: int) -> float:
    """Map a byte to 0, 1 or -1, so that ties and rewards at the mean are frequent."""
    return (0.0, 1.0, -1.0)[byte % 3]


def tenths(byte: int) -> float:
    """Map a byte to a multiple of 1/10 in [-8, 8], not exact in binary."""
    return _signed(byte) / 10


class RewardBatch(NamedTuple):
    """Rewards of grouped trajectories.

    Attributes:
        reward: rewards, [B].
        group: integer group ids, [B].
        valid: False for lost rewards, boolean [B].
    """

    reward: Tensor
    group: Tensor
    valid: Tensor


class TurnBatch(NamedTuple):
    """Scores of chains of unequal length.

    Attributes:
        score: scores, [B, N].
        turn_mask: turns that exist, at least the first of each chain, boolean [B, N].
    """

    score: Tensor
    turn_mask: Tensor


@cache
def group_ids(
    *, dtype: torch.dtype = torch.int64, least: int = 1, most: int = 3, far: bool = True
) -> SearchStrategy[list[int]]:
    """Strategy for distinct group ids: small, or neighbors anywhere in the dtype's range.

    Args:
        dtype: an integer dtype.
        least: smallest number of ids.
        most: largest number of ids.
        far: whether ids may be negative or large; otherwise they are in 0..8.
    """
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    small = st.integers(max(low, -3) if far else 0, 8)
    start = st.sampled_from([low, high - 8]) | st.integers(low, high - 8)

    def distinct(ids: SearchStrategy[int]) -> SearchStrategy[list[int]]:
        return st.lists(ids, min_size=least, max_size=most, unique=True)

    def near(first: int) -> SearchStrategy[list[int]]:
        strides = [stride for stride in (1, 16, 1024) if first + 8 * stride <= high]
        return st.sampled_from(strides).flatmap(
            lambda stride: distinct(st.integers(0, 8).map(lambda k: first + k * stride))
        )

    return distinct(small) | start.flatmap(near) if far else distinct(small)


@cache
def moderate_ids(dtype: torch.dtype, count: int) -> SearchStrategy[list[int]]:
    """Strategy for distinct group ids that no function needs much memory for.

    A function that uses ids as positions counts up to the largest: at an id of 2**63 - 1 it may
    end the process. Moderate ids find most such functions without.

    Args:
        dtype: an integer dtype.
        count: number of ids.
    """
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    ids = st.integers(max(low, -3), 8) | st.integers(max(low, -(10**5)), min(high, 10**5))
    return st.lists(ids, min_size=count, max_size=count, unique=True)


@cache
def far_ids(dtype: torch.dtype, count: int) -> SearchStrategy[list[int]]:
    """Strategy for distinct group ids anywhere in a dtype, often equal in a smaller one.

    Args:
        dtype: an integer dtype.
        count: number of ids.
    """
    anywhere = group_ids(dtype=dtype, least=count, most=count)
    if dtype != torch.int64:
        return anywhere
    # Ids that agree in their low 32 bits, and neighbors beyond 2^24, equal in float32.
    merging = st.sampled_from([(7, 2**32), (2**40, 1)]).map(
        lambda start: [start[0] + k * start[1] for k in range(count)]
    )
    return st.booleans().flatmap(lambda merged: merging if merged else anywhere)


@cache
@st.composite
def reward_batches(
    draw: DrawFn,
    *,
    ragged: bool = True,
    lost: bool = True,
    constant: bool = True,
    min_members: int = 1,
    max_members: int = 4,
    max_groups: int = 3,
    number: Number = eighths,
    dtype: torch.dtype = torch.float64,
    id_dtype: torch.dtype = torch.int64,
    far_ids: bool = True,
) -> RewardBatch:
    """Strategy for rewards in groups, in any order.

    Args:
        draw: given by hypothesis.
        ragged: groups may differ in size.
        lost: some entries may be invalid; a group may lose all, and so may the batch.
        constant: a group's rewards may all be equal.
        min_members: smallest size of a group.
        max_members: largest size of a group.
        max_groups: largest number of groups.
        number: maps a byte to a reward.
        dtype: dtype of ``reward``.
        id_dtype: dtype of ``group``.
        far_ids: whether ids may be negative or large, as in ``group_ids``.

    Returns:
        A strategy for ``RewardBatch``.

    Example:
        >>> from hypothesis import find
        >>> batch = find(reward_batches(), lambda batch: not batch.valid.all())
        >>> batch.reward.shape == batch.group.shape == batch.valid.shape
        True
    """
    # Strings have a fixed length, independent of earlier draws, so that each part shrinks alone.
    most = max_groups * max_members
    ids = draw(group_ids(dtype=id_dtype, most=max_groups, far=far_ids))
    more, equal = _bytes(draw, max_groups), _bytes(draw, max_groups)
    whole = _bytes(draw, max_groups + 1)  # groups, and last the batch, without a valid member
    numbers, lost_at, keys = (_bytes(draw, most) for _ in range(3))
    sizes = [
        min_members + more[group if ragged else 0] % (max_members - min_members + 1)
        for group in range(len(ids))
    ]
    place = np.repeat(np.arange(len(ids)), sizes)
    reward = np.array([number(byte) for byte in numbers[: len(place)]])
    for group in range(len(ids)):
        members = np.flatnonzero(place == group)
        if constant and equal[group] % 3 == 1:
            reward[members] = reward[members[0]]
        elif not constant and len(members) > 1 and len(set(reward[members])) == 1:
            reward[members[-1]] += 1
    valid = np.array([byte % 4 != 1 for byte in lost_at[: len(place)]])
    for group in range(len(ids)):
        valid[place == group] &= whole[group] % 16 != 1
    valid &= whole[-1] % 16 != 1
    valid |= not lost
    order = np.argsort(np.frombuffer(keys[: len(place)], dtype=np.uint8), kind="stable")
    return RewardBatch(
        torch.from_numpy(reward[order]).to(dtype),
        as_ids([ids[group] for group in place[order]], id_dtype),
        torch.from_numpy(valid[order]),
    )


def beside_others(rewards: Sequence[float], *, dtype: torch.dtype) -> RewardBatch:
    """Return a group between two others of its size, at least two; ``valid`` marks its members.

    With other groups in the batch, statistics that mix groups become visible.
    """
    size = max(2, len(rewards))
    before, after = [1.0, -2.0] + [0.5] * (size - 2), [3.0] * (size - 1) + [8.0]
    sizes = [size, len(rewards), size]
    names = torch.tensor([9, 7, 8], dtype=torch.int64, device="cpu")
    group = names.repeat_interleave(torch.tensor(sizes, dtype=torch.int64, device="cpu"))
    reward = torch.tensor([*before, *rewards, *after], dtype=dtype, device="cpu")
    return RewardBatch(reward, group, group == 7)


@cache
@st.composite
def turn_batches(
    draw: DrawFn,
    *,
    values: tuple[float, ...] = (0.0, 1.0),
    max_chains: int = 3,
    max_turns: int = 10,
    dtype: torch.dtype = torch.float64,
) -> TurnBatch:
    """Strategy for turn scores of chains of unequal length.

    Args:
        draw: given by hypothesis.
        values: possible scores; the first is the simplest.
        max_chains: largest B.
        max_turns: largest N.
        dtype: dtype of ``score``.

    Returns:
        A strategy for ``TurnBatch``.

    Example:
        >>> from hypothesis import find
        >>> batch = find(turn_batches(), lambda batch: not batch.turn_mask.all())
        >>> batch.score.shape == batch.turn_mask.shape
        True
    """
    chains, turns = draw(st.integers(1, max_chains)), draw(st.integers(1, max_turns))
    table = draw(tensors((max_chains, max_turns), number=_one_of(values), dtype=dtype))
    padding = [byte % turns for byte in _bytes(draw, max_chains)[:chains]]
    mask = [[turn < turns - pad for turn in range(turns)] for pad in padding]
    return TurnBatch(
        table[:chains, :turns].clone(), torch.tensor(mask, dtype=torch.bool, device="cpu")
    )


@st.composite
def named_rewards(
    draw: DrawFn, /, names: Sequence[str] = ("a", "b"), **options: Any
) -> tuple[Mapping[str, Tensor], Tensor, Tensor]:
    """Strategy for several rewards of one batch: (rewards by name, group, valid).

    Args:
        draw: given by hypothesis.
        names: names of the rewards.
        **options: options of ``reward_batches``, applied to the first reward.
    """
    first, group, valid = draw(reward_batches(**options))
    most = options.get("max_groups", 3) * options.get("max_members", 4)
    others = [draw(tensors((most,), dtype=first.dtype))[: len(first)] for _ in names[1:]]
    return dict(zip(names, [first, *others], strict=True)), group, valid


@cache
@st.composite
def sigma_grids(draw: DrawFn, *, max_steps: int = 8, to_zero: bool = True) -> Tensor:
    """Strategy for a decreasing grid of flow times from 1, float64 [S + 1].

    Args:
        draw: given by hypothesis.
        max_steps: largest S.
        to_zero: the grid ends at 0; otherwise at any flow time below 1.
    """
    inner = {1 + byte % 63 for byte in draw(st.binary(max_size=max_steps - 1))}
    grid = [64, *sorted(inner, reverse=True)]
    if to_zero or len(grid) == 1:
        grid.append(0)
    return torch.tensor(grid, dtype=torch.float64, device="cpu") / 64


@cache
@st.composite
def tensors(
    draw: DrawFn,
    shape: tuple[int, ...],
    *,
    number: Number = eighths,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Strategy for a tensor such as a latent or log-probs.

    Args:
        draw: given by hypothesis.
        shape: shape of the tensor.
        number: maps a byte to an element.
        dtype: dtype of the tensor.
    """
    drawn = _bytes(draw, int(torch.Size(shape).numel()))
    elements = [number(byte) for byte in drawn]
    return torch.tensor(elements, dtype=dtype, device="cpu").reshape(shape)


def named_anew(dense: Tensor, ids: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return group ids [B] of any integer dtype in place of 0, 1, ..."""
    return as_ids([ids[i] for i in dense.tolist()], dtype)  # torch 2.6 indexes no uint16


def as_ids(values: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return integers as a tensor [B] of any integer dtype, through numpy for large uint64."""
    return torch.from_numpy(np.array(values, dtype=str(dtype).removeprefix("torch.")))


def _bytes(draw: DrawFn, count: int) -> bytes:
    return draw(_strings(count))


@cache  # building a strategy costs as much as drawing from it
def _strings(count: int) -> SearchStrategy[bytes]:
    return st.binary(min_size=count, max_size=count)


@cache
def _one_of(values: tuple[float, ...]) -> Number:
    return lambda byte: values[byte % len(values)]


def _signed(byte: int) -> int:
    """Map a byte to 0, 1, ..., 80, -1, ..., -80."""
    number = byte % 161
    return number if number <= 80 else 80 - number
