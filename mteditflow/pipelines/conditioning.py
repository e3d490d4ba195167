"""Recorded arguments of the transformer, stored once per pipeline call and replayed row by row."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mteditflow.pipelines.flow_times import Grid, Time
from mteditflow.pipelines.guidance import ByGuider, Guidance
from mteditflow.pipelines.recognize import Place, repeat_rows


class Rows(NamedTuple):
    """A tensor with one row per trajectory along an axis; bare tensors are shared by all."""

    tensor: Tensor
    axis: int = 0


class Entries(NamedTuple):
    """A list with one entry per trajectory: tensors of any length, or values that are all alike."""

    values: tuple[Any, ...]


class OutputOf(NamedTuple):
    """In place of a tensor that an earlier call of the step returned, such as a ControlNet's.

    Attributes:
        call: number of that call among the step's.
        leaf: number of the tensor in what it returned.
    """

    call: int
    leaf: int


class CallRecord(NamedTuple):
    """One call of each step.

    Attributes:
        module: what is called; None for the transformer.
        place: where it holds the sample.
        times: its arguments that hold the flow time.
        arguments: all others, which are constant.
        rest: what the sample's argument held besides.
    """

    module: nn.Module | None
    place: Place
    times: tuple[Time, ...]
    arguments: dict[str, Any]
    rest: Rows | None


class Recipe(NamedTuple):
    """How the transformer's outputs become one velocity.

    Attributes:
        grid: the scheduler's timestep of a flow time.
        velocity_dtype: dtype of the scheduler's velocity, in which branches combine.
        guidance: how branches combine; None for one branch.
        sign: -1 where the scheduler is given the opposite of that, else 1.
    """

    grid: Grid
    velocity_dtype: torch.dtype
    guidance: Guidance | ByGuider | None
    sign: int


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


def readings(name: str, value: Any, batch: int, listed: bool) -> list[Any]:
    """Ways to tell what in an argument belongs to single rows of its batch, the likeliest first.

    Args:
        name: of the argument.
        value: of the argument.
        batch: rows of the call.
        listed: whether the sample is a list of rows too, so that lists of tensors are.
    """
    found = [map_leaves(partial(_rows, name, batch, axes), value) for axes in ((0, 1), (1, 0))]
    found.append(value)
    if isinstance(value, (list, tuple)) and len(value) == batch:
        plain = all(isinstance(entry, (int, float, str)) for entry in value)
        blocks = all(isinstance(entry, Tensor) and len(entry) == batch for entry in value)
        likely = not plain and (listed or not blocks)
        found.insert(0 if likely else len(found), Entries(tuple(value)))
    distinct: dict[Hashable, Any] = {}
    for reading in found:
        distinct.setdefault(map_signature(reading), reading)
    return list(distinct.values())


def _rows(name: str, batch: int, axes: Sequence[int], x: Any) -> Any:
    """A tensor with its rows along the first of these axes that is as long as the batch.

    Position ids of two axes and vectors of numbers are known to be shared, and what has rows along
    its second axis has more than two.
    """
    if not isinstance(x, Tensor) or (x.ndim == 2 and name.endswith("_ids")):
        return x
    for axis in axes:
        if x.ndim > 2 * axis and x.shape[axis] == batch:
            return Rows(x, axis)
    return x


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
        axis, taken = first.axis, first.tensor
        if any(tree is not first for tree in trees):
            picked = [t.tensor.select(axis, row) for t, row in zip(trees, rows, strict=True)]
            taken = torch.stack(picked, dim=axis)
        elif list(rows) != list(range(taken.shape[axis])):
            at = torch.tensor(rows, dtype=torch.int64, device=taken.device)
            taken = taken.index_select(axis, at)
        return _moved(taken, device)
    if isinstance(first, Entries):
        return [_moved(t.values[row], device) for t, row in zip(trees, rows, strict=True)]
    return _moved(first, device)


def _moved(x: Any, device: torch.device) -> Any:
    """A tree with its tensors on ``device``; from the host through pinned memory, for speed."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        pinned = x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
        return pinned.to(device, non_blocking=True)

    return map_leaves(leaf, x)


class Stage(NamedTuple):
    """Steps of a pipeline call with the same calls.

    Attributes:
        sigma: flow time of the first of them, and of all up to the next stage's.
        batch: number of trajectories.
        recipe: how outputs become a velocity.
        calls: of each step; tensors they share are one object.
    """

    sigma: float
    batch: int
    recipe: Recipe
    calls: tuple[CallRecord, ...]


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The constant part of one pipeline call (one turn of some trajectories).

    Attributes:
        stages: in the order of the steps; several where guidance is active in only some steps.
    """

    stages: tuple[Stage, ...]

    @cached_property
    def _signatures(self) -> list[Hashable]:
        return [(stage.recipe, map_signature([*map(tuple, stage.calls)])) for stage in self.stages]

    def at(self, sigma: float) -> tuple[Stage, Hashable]:
        """The stage of a flow time, and its signature, equal where rows fit into one call."""
        number = max([i for i, stage in enumerate(self.stages) if stage.sigma >= sigma], default=0)
        return self.stages[number], self._signatures[number]


def map_tensors(
    records: Sequence[Conditioning], change: Callable[[Tensor], Tensor]
) -> tuple[Conditioning, ...]:
    """The records with every tensor changed; a tensor held several times is changed once."""
    memo: dict[int, Tensor] = {}

    def once(x: Tensor) -> Tensor:
        if id(x) not in memo:
            memo[id(x)] = change(x)
        return memo[id(x)]

    # Neither names itself: a cycle would hold the memo, and all that a turn had on the device,
    # until Python's collector runs, which knows nothing of that memory.
    def plain(x: Any) -> Any:
        return once(x) if isinstance(x, Tensor) else x

    def leaf(x: Any) -> Any:
        if isinstance(x, Rows):
            return x._replace(tensor=once(x.tensor))
        if isinstance(x, Entries):
            return Entries(tuple(map_leaves(plain, value) for value in x.values))
        return plain(x)

    return _map_calls(records, leaf)


def map_kinds(tree: Any) -> Hashable:
    """Kinds of a tree's leaves: rows of an axis, or a type, whatever the shapes."""
    if isinstance(tree, dict):
        return tuple((key, map_kinds(value)) for key, value in tree.items())
    if isinstance(tree, Rows):
        return "rows", tree.axis
    if type(tree) in (list, tuple):
        return type(tree).__name__, tuple(map_kinds(value) for value in tree)
    return type(tree).__name__


def map_signature(tree: Any) -> Hashable:
    """A hashable stand-in for a tree: shapes of rows, identities of shared tensors, values."""
    if isinstance(tree, dict):
        return tuple((key, map_signature(value)) for key, value in tree.items())
    if isinstance(tree, Rows):
        shape = (*tree.tensor.shape[: tree.axis], *tree.tensor.shape[tree.axis + 1 :])
        return "rows", tree.axis, shape, tree.tensor.dtype, tree.tensor.device
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

    return _map_calls(records, pooled)


def _map_calls(
    records: Sequence[Conditioning], leaf: Callable[[Any], Any]
) -> tuple[Conditioning, ...]:
    """The records with ``leaf`` applied to the arguments and rest of every call."""

    def mapped(call: CallRecord) -> CallRecord:
        return call._replace(arguments=map_leaves(leaf, call.arguments), rest=leaf(call.rest))

    return tuple(
        Conditioning(
            tuple(stage._replace(calls=tuple(map(mapped, stage.calls))) for stage in record.stages)
        )
        for record in records
    )


def check_groups(conditioning: Conditioning, group: Tensor) -> None:
    """Raise ``ValueError`` where rows of one group, integer ids [B], differ."""
    ids = group.tolist()
    firsts = [ids.index(i) for i in ids]
    for call in (call for stage in conditioning.stages for call in stage.calls):
        for name, value in (call.arguments | {call.place.name: call.rest}).items():
            for leaf in leaves(value):
                row = _differing_row(leaf, firsts)
                if row is not None:
                    raise ValueError(
                        "group: expected members with the same instruction and reference, but "
                        f"trajectories {firsts[row]} and {row} of group {ids[row]} differ in "
                        f"{name} at the first turn; a pipeline that repeats its inputs "
                        "(num_images_per_prompt) may order prompts and images differently"
                    )


def _differing_row(leaf: Any, firsts: Sequence[int]) -> int | None:
    """The first trajectory that differs from the one that it should equal."""
    if isinstance(leaf, Rows):
        rows = [*leaf.tensor.movedim(leaf.axis, 0).double()]
    elif isinstance(leaf, Entries) and all(isinstance(x, Tensor) for x in leaf.values):
        rows = [x.double() for x in leaf.values]
    else:
        return None
    batch = len(firsts)
    for number, row in enumerate(rows):
        wanted = rows[number - number % batch + firsts[number % batch]]
        if row is not wanted and (
            row.shape != wanted.shape or (row - wanted).norm() > 0.1 * wanted.norm()
        ):
            return number % batch
    return None


def replay_rows(
    model: nn.Module, stages: Sequence[Stage], rows: Sequence[int], x_t: Tensor, sigma: Tensor
) -> Tensor:
    """Velocity [M, ...] where row m has the conditioning of row ``rows[m]`` of ``stages[m]``.

    The stages have equal signatures: their rows fit into one batch.
    """
    recipe = stages[0].recipe
    returned: list[list[Any]] = []
    velocities: list[Tensor] = []
    for number, call in enumerate(stages[0].calls):
        place, calls = call.place, [stage.calls[number] for stage in stages] * call.place.copies
        sample = repeat_rows(x_t.to(place.dtype), place.copies)
        timestep = repeat_rows(recipe.grid.timestep(sigma), place.copies)
        picked = [
            row + copy * stage.batch
            for copy in range(place.copies)
            for row, stage in zip(rows, stages, strict=True)
        ]
        arguments = select_rows([each.arguments for each in calls], picked, x_t.device)
        arguments = map_leaves(partial(_given, returned), arguments)
        rests = [each.rest for each in calls]
        rest = None if call.rest is None else select_rows(rests, picked, x_t.device)
        arguments[place.name] = place.join(sample, rest)
        arguments |= {time.name: time.argument(timestep) for time in call.times}
        output = (model if call.module is None else call.module)(**arguments)
        returned.append(leaves(output))
        if call.module is None:
            velocity = place.velocity(output[0], sample).to(recipe.velocity_dtype)
            velocities += velocity.chunk(place.copies)
    combined = velocities[0] if recipe.guidance is None else recipe.guidance(velocities)
    turned = combined if recipe.sign > 0 else -combined
    return turned.to(torch.promote_types(turned.dtype, torch.float32))


def _given(returned: Sequence[Sequence[Any]], leaf: Any) -> Any:
    """An argument's leaf, or what an earlier call returned for it."""
    return returned[leaf.call][leaf.leaf] if isinstance(leaf, OutputOf) else leaf
