"""What one pipeline call told its transformer, kept once, and handed out again row by row."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mteditflow.pipelines.recognise import Clock, Guidance, Layout


class Rows(NamedTuple):
    """A tensor with one row per trajectory on its first axis; bare tensors are shared by all."""

    tensor: Tensor


class Recipe(NamedTuple):
    """How a noisy sample and its flow time become calls, and their outputs one velocity.

    Attributes:
        sample_name: the argument that holds the sample.
        sample_dtype: its dtype.
        layout: where in that argument.
        time_name: the argument that tells the flow time.
        time_dtype: its dtype.
        clock: what makes it of the scheduler's timestep.
        timesteps: the timestep of sigma = 1, 1000 in all known pipelines.
        velocity_dtype: dtype of the scheduler's velocity, in which branches combine.
        guidance: how two branches combine; None for one branch.
    """

    sample_name: str
    sample_dtype: torch.dtype
    layout: Layout
    time_name: str
    time_dtype: torch.dtype
    clock: Clock
    timesteps: int
    velocity_dtype: torch.dtype
    guidance: Guidance | None


class Branch(NamedTuple):
    """The constant arguments of one call per step, and what the sample's argument held besides."""

    arguments: dict[str, Any]
    rest: Rows | None


def map_leaves(leaf: Callable[[Any], Any], tree: Any) -> Any:
    """Rebuild nested dicts, lists and tuples with ``leaf`` applied to all that they hold."""
    if isinstance(tree, dict):
        return {key: map_leaves(leaf, value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map_leaves(leaf, value) for value in tree)
    return leaf(tree)


def leaves(tree: Any) -> list[Any]:
    """All that nested dicts, lists and tuples hold, in order."""
    found: list[Any] = []
    map_leaves(found.append, tree)
    return found


def select_rows(trees: Sequence[Any], rows: Sequence[int], device: torch.device) -> Any:
    """One tree of plain tensors on ``device`` whose row m is row ``rows[m]`` of ``trees[m]``.

    The trees are alike: equal but for the rows of their ``Rows``. Rows that come from the host go
    to a CUDA device through pinned memory, in the order of the device's stream.
    """
    first = trees[0]
    if isinstance(first, dict):
        return {k: select_rows([tree[k] for tree in trees], rows, device) for k in first}
    if type(first) in (list, tuple):
        parts = (select_rows(list(part), rows, device) for part in zip(*trees, strict=True))
        return type(first)(parts)
    if isinstance(first, Rows):
        if all(tree is first for tree in trees):
            taken = first.tensor
            if list(rows) != list(range(len(taken))):
                taken = taken[torch.tensor(rows, device=taken.device)]
        else:
            taken = torch.stack([t.tensor[row] for t, row in zip(trees, rows, strict=True)])
        return _moved(taken, device)
    return _moved(first, device) if isinstance(first, Tensor) else first


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``; from the host through pinned memory, so that the host runs on."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The constant part of one pipeline call (one turn of some trajectories).

    Attributes:
        recipe: how to call the transformer.
        branches: one entry per call of a step; tensors they share are one object.
    """

    recipe: Recipe
    branches: tuple[Branch, ...]

    @cached_property
    def signature(self) -> Hashable:
        """Equal for two records exactly if rows of both fit into one call."""
        return self.recipe, map_signature([tuple(branch) for branch in self.branches])


def map_tensors(
    records: Sequence[Conditioning], change: Callable[[Tensor], Tensor]
) -> tuple[Conditioning, ...]:
    """The records with every tensor changed; a tensor held several times is changed once."""
    memo: dict[int, Tensor] = {}

    def once(x: Tensor) -> Tensor:
        if id(x) not in memo:
            memo[id(x)] = change(x)
        return memo[id(x)]

    def leaf(x: Any) -> Any:
        if isinstance(x, Rows):
            return Rows(once(x.tensor))
        return once(x) if isinstance(x, Tensor) else x

    return tuple(
        Conditioning(
            record.recipe,
            tuple(Branch(map_leaves(leaf, b.arguments), leaf(b.rest)) for b in record.branches),
        )
        for record in records
    )


def map_signature(tree: Any) -> Hashable:
    """A hashable stand-in for a tree: shapes of rows, identities of shared tensors, values."""
    if isinstance(tree, dict):
        return tuple((key, map_signature(value)) for key, value in tree.items())
    if isinstance(tree, Rows):
        return "rows", tree.tensor.shape[1:], tree.tensor.dtype, tree.tensor.device
    if isinstance(tree, Tensor):
        return "shared", id(tree)
    if type(tree) in (list, tuple):
        return type(tree), tuple(map_signature(value) for value in tree)
    return tree if isinstance(tree, Hashable) else id(tree)


def share_equal_tensors(records: Sequence[Conditioning]) -> tuple[Conditioning, ...]:
    """Make shared tensors that are equal one object, over all records, so that their rows mix."""
    pool: dict[Hashable, list[Tensor]] = {}

    def pooled(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        kept = pool.setdefault((x.shape, x.dtype, x.device), [])
        for other in kept:
            if other is x or torch.equal(other, x):
                return other
        kept.append(x)
        return x

    return tuple(
        Conditioning(
            record.recipe,
            tuple(Branch(map_leaves(pooled, b.arguments), b.rest) for b in record.branches),
        )
        for record in records
    )
