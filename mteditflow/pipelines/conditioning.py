"""Recorded arguments of the transformer, stored once per pipeline call and replayed row by row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mteditflow.pipelines.guidance import Guidance
from mteditflow.pipelines.recognize import Clock, Place, ReplayError, in_memory, repeat_rows


class Rows(NamedTuple):
    """A tensor with one row per trajectory on its first axis; bare tensors are shared by all."""

    tensor: Tensor


class Entries(NamedTuple):
    """A list with one entry per trajectory: tensors of any length, or values that are all alike."""

    values: tuple[Any, ...]


class Recipe(NamedTuple):
    """How a noisy sample and its flow time become calls, and their outputs one velocity.

    Attributes:
        place: where a call holds the sample, of all its branches.
        time_name: the argument that holds the flow time.
        time_dtype: its dtype.
        clock: the function from the scheduler's timestep to it.
        timesteps: the timestep of sigma = 1, 1000 in all known pipelines.
        time_axes: its shape behind the batch, such as (tokens,) for one time per token.
        velocity_dtype: dtype of the scheduler's velocity, in which branches combine.
        guidance: how two branches combine; None for one branch.
        sign: -1 where the scheduler is given the opposite of that, else 1.
    """

    place: Place
    time_name: str
    time_dtype: torch.dtype
    clock: Clock
    timesteps: int
    time_axes: tuple[int, ...]
    velocity_dtype: torch.dtype
    guidance: Guidance | None
    sign: int


class Branch(NamedTuple):
    """The constant arguments of one branch, and what the sample's argument held besides."""

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


def by_row(name: str, value: Any, batch: int, shared: Collection[str], listed: bool) -> Any:
    """An argument with what belongs to single rows of its batch wrapped.

    Args:
        name: of the argument.
        value: of the argument.
        batch: rows of the call.
        shared: names of arguments in which nothing is wrapped.
        listed: whether the sample is a list of rows too, so that lists of tensors are.
    """
    if name in shared:
        return value
    if isinstance(value, (list, tuple)) and len(value) == batch:
        if all(isinstance(entry, Tensor) for entry in value) and listed:
            return Entries(tuple(value))
        if all(isinstance(entry, (list, tuple)) and entry == value[0] for entry in value):
            return Entries(tuple(value))
        if not all(isinstance(entry, (int, float, str)) for entry in value):
            raise ReplayError(
                f"{name}: a {type(value).__name__} as long as the batch cannot be replayed in "
                "other batches; name it in `shared` if it is the same for all trajectories"
            )

    def leaf(x: Any) -> Any:
        ids = isinstance(x, Tensor) and x.ndim == 2 and name.endswith("_ids")
        alone = not isinstance(x, Tensor) or ids or x.ndim == 0 or len(x) != batch
        return x if alone else Rows(x)

    return map_leaves(leaf, value)


def branch_of(tree: Any, index: int, copies: int) -> Any:
    """One branch's share of what a call held for ``copies`` branches along its batch."""

    def leaf(x: Any) -> Any:
        if isinstance(x, Rows):
            return Rows(x.tensor.chunk(copies)[index])
        if isinstance(x, Entries):
            rows = len(x.values) // copies
            return Entries(x.values[rows * index : rows * (index + 1)])
        return x

    return tree if copies == 1 else map_leaves(leaf, tree)


def select_rows(trees: Sequence[Any], rows: Sequence[int], device: torch.device) -> Any:
    """One tree of plain tensors on ``device`` whose row m is row ``rows[m]`` of ``trees[m]``.

    The trees are alike: equal but for their ``Rows`` and ``Entries``. Rows that come from the host
    go to a CUDA device through pinned memory, in the order of the device's stream.
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
                taken = taken[torch.tensor(rows, dtype=torch.int64, device=taken.device)]
        else:
            taken = torch.stack([t.tensor[row] for t, row in zip(trees, rows, strict=True)])
        return _moved(taken, device)
    if isinstance(first, Entries):
        return [_moved(t.values[row], device) for t, row in zip(trees, rows, strict=True)]
    return _moved(first, device)


def _moved(x: Any, device: torch.device) -> Any:
    """A tensor on ``device``; from the host through pinned memory, so that the host runs on."""
    if not isinstance(x, Tensor):
        return x
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
        if isinstance(x, Entries):
            return Entries(tuple(leaf(value) for value in x.values))
        return once(x) if isinstance(x, Tensor) else x

    return _map_branches(records, leaf)


def map_signature(tree: Any) -> Hashable:
    """A hashable stand-in for a tree: shapes of rows, identities of shared tensors, values."""
    if isinstance(tree, dict):
        return tuple((key, map_signature(value)) for key, value in tree.items())
    if isinstance(tree, Rows):
        return "rows", tree.tensor.shape[1:], tree.tensor.dtype, tree.tensor.device
    if isinstance(tree, Entries):
        first = tree.values[0]
        ragged = isinstance(first, Tensor)
        return "entries", (first.dtype, first.device) if ragged else map_signature(first)
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

    return _map_branches(records, pooled)


def _map_branches(
    records: Sequence[Conditioning], leaf: Callable[[Any], Any]
) -> tuple[Conditioning, ...]:
    """The records with ``leaf`` applied to the arguments and rest of every branch."""
    return tuple(
        Conditioning(
            record.recipe,
            tuple(Branch(map_leaves(leaf, b.arguments), leaf(b.rest)) for b in record.branches),
        )
        for record in records
    )


def replay_rows(
    model: nn.Module,
    records: Sequence[Conditioning],
    rows: Sequence[int],
    x_t: Tensor,
    sigma: Tensor,
) -> Tensor:
    """Velocity [M, ...] where row m has the conditioning of row ``rows[m]`` of ``records[m]``.

    The records have equal signatures: their rows fit into one batch.
    """
    recipe = records[0].recipe
    place = recipe.place
    sample = in_memory(repeat_rows(x_t.to(place.dtype), place.copies), place.axes)
    time = recipe.clock(sigma.float() * recipe.timesteps, recipe.time_dtype)
    time = repeat_rows(time, place.copies).reshape(-1, *[1] * len(recipe.time_axes))
    picked = [*rows] * place.copies
    outputs: list[Tensor] = []
    branches = list(zip(*(record.branches for record in records), strict=True))
    for first in range(0, len(branches), place.copies):
        held = [branch for batch in branches[first : first + place.copies] for branch in batch]
        rests = [branch.rest for branch in held]
        rest = None if rests[0] is None else select_rows(rests, picked, x_t.device)
        arguments = select_rows([branch.arguments for branch in held], picked, x_t.device)
        arguments[place.name] = place.layout.join(sample, rest)
        arguments[recipe.time_name] = time.expand(-1, *recipe.time_axes)
        output = place.layout.velocity(model(**arguments)[0], sample)
        outputs += output.to(recipe.velocity_dtype).chunk(place.copies)
    combined = outputs[0] if recipe.guidance is None else recipe.guidance(outputs)
    turned = combined if recipe.sign > 0 else -combined
    return turned.to(torch.promote_types(turned.dtype, torch.float32))
