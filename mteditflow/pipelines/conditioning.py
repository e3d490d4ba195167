"""Recorded arguments of the transformer: stored once per pipeline call, replayed row by row."""

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
    """Tensor with one row per trajectory along ``axis``; bare tensors are shared by all."""

    tensor: Tensor
    axis: int = 0


class Entries(NamedTuple):
    """List with one entry per trajectory: tensors of any length, or values such as shapes."""

    values: tuple[Any, ...]


class OutputOf(NamedTuple):
    """Placeholder for a tensor that an earlier call of the step returns, such as a ControlNet's.

    Attributes:
        call: index of that call among the step's.
        leaf: index of the tensor among the leaves of its output.
    """

    call: int
    leaf: int


class CallRecord(NamedTuple):
    """Call that is made at every step of a stage.

    Attributes:
        module: the module that is called; None: the transformer.
        place: position of the noisy sample among its arguments.
        times: arguments that hold the flow time.
        arguments: all other arguments, which are constant over the steps.
        rest: the rest of the argument that holds the sample, such as the reference; or None.
    """

    module: nn.Module | None
    place: Place
    times: tuple[Time, ...]
    arguments: dict[str, Any]
    rest: Rows | None


class Recipe(NamedTuple):
    """Formula that turns the transformer's outputs into one velocity.

    Attributes:
        grid: map from flow times to the scheduler's timesteps.
        velocity_dtype: dtype of the scheduler's velocity, in which branches combine.
        guidance: guidance of two branches; None for one branch.
        sign: -1 where the pipeline negates the velocity before the scheduler's step, else 1.
    """

    grid: Grid
    velocity_dtype: torch.dtype
    guidance: Guidance | ByGuider | None
    sign: int


def map_leaves(leaf: Callable[[Any], Any], tree: Any) -> Any:
    """Rebuild nested dicts, lists and tuples with ``leaf`` applied to each leaf.

    Named tuples and other subclasses count as leaves.
    """
    if isinstance(tree, dict):
        return {key: map_leaves(leaf, value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map_leaves(leaf, value) for value in tree)
    return leaf(tree)


def leaves(tree: Any) -> list[Any]:
    """Return the leaves of nested dicts, lists and tuples, in order."""
    found: list[Any] = []
    map_leaves(found.append, tree)
    return found


def readings(name: str, value: Any, batch: int, listed: bool) -> list[Any]:
    """Return the possible readings of an argument, the likeliest first.

    A reading decides which tensors and lists have one row or entry per row of the batch
    (``Rows``, ``Entries``), and which are shared by all rows.

    Args:
        name: name of the argument.
        value: value of the argument.
        batch: rows of the call.
        listed: whether the sample is a list of rows, so that other lists of tensors likely are.
    """
    found = [map_leaves(partial(_rows, name, batch, axes), value) for axes in ((0, 1), (1, 0))]
    found.append(value)
    if isinstance(value, (list, tuple)) and len(value) == batch:
        plain = all(isinstance(entry, (int, float, str)) for entry in value)
        blocks = all(isinstance(entry, Tensor) and len(entry) == batch for entry in value)
        # B tensors of B rows each are rather one per block, as the residuals of a ControlNet.
        likely = not plain and (listed or not blocks)
        found.insert(0 if likely else len(found), Entries(tuple(value)))
    distinct: dict[Hashable, Any] = {}
    for reading in found:
        distinct.setdefault(map_signature(reading), reading)
    return list(distinct.values())


def _rows(name: str, batch: int, axes: Sequence[int], x: Any) -> Any:
    """Return a tensor as ``Rows`` of the first of these axes that is as long as the batch.

    Two-axis position ids (``..._ids``) are always shared. Rows along axis 1 need three axes.
    """
    if not isinstance(x, Tensor) or (x.ndim == 2 and name.endswith("_ids")):
        return x
    for axis in axes:
        if x.ndim > 2 * axis and x.shape[axis] == batch:
            return Rows(x, axis)
    return x


def select_rows(trees: Sequence[Any], rows: Sequence[int], device: torch.device) -> Any:
    """Return one tree of plain tensors on ``device``; row m is row ``rows[m]`` of ``trees[m]``.

    The trees differ only in the values of their ``Rows`` and ``Entries``. Rows on the host are
    copied to a CUDA device through pinned memory, in the order of the device's stream.
    """
    first = trees[0]
    if isinstance(first, dict):
        return {k: select_rows([tree[k] for tree in trees], rows, device) for k in first}
    if type(first) in (list, tuple):
        parts = (select_rows(list(part), rows, device) for part in zip(*trees, strict=True))
        return type(first)(parts)
    if isinstance(first, Rows):
        # Rows of a single record need one index, or no copy at all if they are all, in order.
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
    """Return a tree with its tensors on ``device``; copies from the host use pinned memory."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        pinned = x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
        return pinned.to(device, non_blocking=True)

    return map_leaves(leaf, x)


class Stage(NamedTuple):
    """Consecutive steps of a pipeline call in which the same modules are called.

    Attributes:
        sigma: flow time of the first step, the largest of the stage.
        batch: number of trajectories.
        recipe: formula from outputs to the velocity.
        calls: calls of each step; tensors that they share are one object.
    """

    sigma: float
    batch: int
    recipe: Recipe
    calls: tuple[CallRecord, ...]


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Constant part of one pipeline call, which is one turn of some trajectories.

    Attributes:
        stages: in the order of the steps; several where guidance is active in only some steps.
    """

    stages: tuple[Stage, ...]

    @cached_property
    def _signatures(self) -> list[Hashable]:
        return [(stage.recipe, map_signature([*map(tuple, stage.calls)])) for stage in self.stages]

    def at(self, sigma: float) -> tuple[Stage, Hashable]:
        """Return the stage of a flow time and its signature; rows of equal ones share a call.

        Flow times above the first stage's belong to the first stage.
        """
        number = max([i for i, stage in enumerate(self.stages) if stage.sigma >= sigma], default=0)
        return self.stages[number], self._signatures[number]


def map_tensors(
    records: Sequence[Conditioning], change: Callable[[Tensor], Tensor]
) -> tuple[Conditioning, ...]:
    """Return the records with ``change`` applied once to every distinct tensor."""
    memo: dict[int, Tensor] = {}

    def once(x: Tensor) -> Tensor:
        if id(x) not in memo:
            memo[id(x)] = change(x)
        return memo[id(x)]

    # Neither closure refers to itself: such a cycle would keep the memo, and a turn's tensors on
    # the device, until Python's garbage collector runs, which does not count device memory.
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
    """Return the kinds of a tree's leaves, independent of shapes: rows of an axis, or a type."""
    if isinstance(tree, dict):
        return tuple((key, map_kinds(value)) for key, value in tree.items())
    if isinstance(tree, Rows):
        return "rows", tree.axis
    if type(tree) in (list, tuple):
        return type(tree).__name__, tuple(map_kinds(value) for value in tree)
    return type(tree).__name__


def map_signature(tree: Any) -> Hashable:
    """Return a hashable signature of a tree: shapes of rows, identities of shared tensors, values.

    Trees of equal signatures can be merged by ``select_rows``.
    """
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
    """Replace equal shared tensors of all records by one object, so that rows can share a call."""
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
    """Return the records with ``leaf`` applied to the arguments and the rest of every call."""

    def mapped(call: CallRecord) -> CallRecord:
        return call._replace(arguments=map_leaves(leaf, call.arguments), rest=leaf(call.rest))

    return tuple(
        Conditioning(
            tuple(stage._replace(calls=tuple(map(mapped, stage.calls))) for stage in record.stages)
        )
        for record in records
    )


def check_groups(conditioning: Conditioning, group: Tensor) -> None:
    """Raise ``ValueError`` if the conditioning differs within a group; ``group`` is integer [B]."""
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
    """Return the first trajectory that differs from the first of its group; None: none does.

    ``firsts`` [B] is the first trajectory of each one's group.
    """
    if isinstance(leaf, Rows):
        rows = [*leaf.tensor.movedim(leaf.axis, 0).double()]
    elif isinstance(leaf, Entries) and all(isinstance(x, Tensor) for x in leaf.values):
        rows = [x.double() for x in leaf.values]
    else:
        return None
    batch = len(firsts)
    for number, row in enumerate(rows):
        # Rows of a doubled batch repeat the trajectories: compare within the same copy.
        wanted = rows[number - number % batch + firsts[number % batch]]
        # A tenth: references of one group may be separate samples of the VAE's posterior.
        if row is not wanted and (
            row.shape != wanted.shape or (row - wanted).norm() > 0.1 * wanted.norm()
        ):
            return number % batch
    return None


def replay_rows(
    model: nn.Module, stages: Sequence[Stage], rows: Sequence[int], x_t: Tensor, sigma: Tensor
) -> Tensor:
    """Return the velocity [M, ...] of ``x_t`` [M, ...] at flow times ``sigma`` [M].

    Row m has the conditioning of row ``rows[m]`` of ``stages[m]``. The stages must have equal
    signatures, so that their rows fit into one batch. The result is float32 at least.
    """
    recipe = stages[0].recipe
    returned: list[list[Any]] = []
    velocities: list[Tensor] = []
    for number, call in enumerate(stages[0].calls):
        place, calls = call.place, [stage.calls[number] for stage in stages] * call.place.copies
        sample = repeat_rows(x_t.to(place.dtype), place.copies)
        timestep = repeat_rows(recipe.grid.timestep(sigma), place.copies)
        # A call with both guidance branches has its rows twice: all of one branch, then the other.
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
    """Return an argument's leaf, or the output of an earlier call that it stands for."""
    return returned[leaf.call][leaf.leaf] if isinstance(leaf, OutputOf) else leaf
