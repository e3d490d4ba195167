"""Recognize how a pipeline calls its transformer, from the tensors of one denoising step.

Nothing depends on the pipeline's class. Three things are recognized by comparing values: the
argument that holds the noisy sample and the position in it (``Place``), the argument that holds the
flow time and its unit (``flow_times.Time``), and the formula that turns the outputs of one step's
calls into the scheduler's velocity (``guidance.Guidance``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class ReplayError(ValueError):
    """A recorded call could not be replayed faithfully; the message gives the reason."""


class Call(NamedTuple):
    """One call within a step: its module (None: the transformer), named arguments and output."""

    module: nn.Module | None
    arguments: dict[str, Any]
    output: Any


def repeat_rows(x: Tensor, copies: int) -> Tensor:
    """Repeat a batch along its first axis, [B, ...] to [copies * B, ...]."""
    return x if copies == 1 else torch.cat([x] * copies)


def memory_axes(x: Tensor) -> tuple[int, ...]:
    """Return the axes of a tensor from the largest stride to the smallest."""
    axes = range(x.ndim)
    # An axis of size 1 may have any stride; ``is_contiguous`` ignores it, sorting would not.
    return tuple(axes if x.is_contiguous() else sorted(axes, key=x.stride, reverse=True))


def in_memory(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return the same values stored with these axes from the largest stride to the smallest."""
    return x.permute(axes).contiguous().permute([axes.index(axis) for axis in range(x.ndim)])


class Part(NamedTuple):
    """Part of a tensor: the slice of one axis that begins at ``start``, or the whole tensor."""

    axis: int = 0
    start: int = 0
    whole: bool = True

    def split(self, x: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor | None] | None:
        """Return the part, which has this shape, and the rest; None if the shapes do not fit."""
        if self.whole or x.ndim != len(shape):
            return (x, None) if x.shape == shape else None
        stop = self.start + shape[self.axis]
        length = x.shape[self.axis]
        if length < stop or x.shape != (*shape[: self.axis], length, *shape[self.axis + 1 :]):
            return None
        before, part, after = x.tensor_split((self.start, stop), dim=self.axis)
        beside = after if self.start == 0 else torch.cat([before, after], dim=self.axis)
        return part, beside

    def join(self, part: Tensor, beside: Tensor | None) -> Tensor:
        """Return the tensor that ``split`` takes apart into this part and this rest."""
        if beside is None:
            return part
        before, after = beside.tensor_split((self.start,), dim=self.axis)
        return torch.cat([before, part, after], dim=self.axis)


def parts_equal(x: Tensor, sought: Tensor) -> Iterator[Part]:
    """Yield every part of ``x`` that equals ``sought``, compared in the dtype of ``x``.

    Both have the same number of axes. A part has all rows, and is a slice of one other axis.
    """
    differing = [a for a in range(sought.ndim) if x.shape[a] != sought.shape[a]]
    wanted = sought.to(x.dtype)
    if not differing and torch.equal(x, wanted):
        yield Part()
    axis = differing[0] if len(differing) == 1 else 0  # axis 0 is the batch, never sliced
    if axis == 0 or x.shape[axis] < sought.shape[axis]:
        return
    length = sought.shape[axis]
    # Compare the first slice at every offset at once; few offsets need the whole comparison.
    candidates = x.narrow(axis, 0, x.shape[axis] - length + 1).movedim(axis, 0)
    first = (candidates == wanted.select(axis, 0)).flatten(1).all(1)
    for start in first.nonzero().flatten().tolist():
        if torch.equal(x.narrow(axis, start, length), wanted):
            yield Part(axis, start, whole=False)


class Form(NamedTuple):
    """Form of an argument that can be read as a tensor with the axes of the sample.

    Attributes:
        listed: whether it is a list with one tensor per row, as Z-Image's is.
        single: an additional axis of size 1, such as that of a single frame; None: there is none.
    """

    listed: bool = False
    single: int | None = None

    def tensor(self, argument: Any) -> Tensor | None:
        """Return the argument as one tensor; None if it has another form."""
        if self.listed:
            argument = _stacked(argument)
        if not isinstance(argument, Tensor) or self.single is None:
            return argument if isinstance(argument, Tensor) else None
        fits = argument.ndim > self.single and argument.shape[self.single] == 1
        return argument.squeeze(self.single) if fits else None

    def argument(self, x: Tensor) -> Any:
        """Return the argument in this form that holds a tensor."""
        x = x if self.single is None else x.unsqueeze(self.single)
        return list(x) if self.listed else x


def _stacked(rows: Any) -> Tensor | None:
    """Stack rows of one shape; None if they are no tensors of one shape."""
    if not isinstance(rows, (list, tuple)) or not rows:
        return None
    if not all(isinstance(x, Tensor) and x.shape == rows[0].shape for x in rows):
        return None
    return torch.stack(list(rows))


def _forms(argument: Any, axes: int) -> Iterator[Form]:
    """Yield the forms in which an argument has as many axes as the sample."""
    x = argument if isinstance(argument, Tensor) else _stacked(argument)
    if x is None:
        return
    listed = x is not argument
    if x.ndim == axes:
        yield Form(listed)
    if x.ndim == axes + 1:
        yield from (Form(listed, single) for single in range(1, x.ndim) if x.shape[single] == 1)


class Place(NamedTuple):
    """Position of the noisy sample among the arguments of a call.

    Attributes:
        name: name of the argument.
        dtype: dtype of the argument.
        copies: number of copies along the batch: 2 where both guidance branches share one call.
        form: form of the argument.
        part: part of the argument that is the sample.
        axes: the sample's axes there from the largest stride to the smallest. The memory layout
            selects the kernels, and with them the last bits of the result.
        output: part of the output that is the velocity.
    """

    name: str
    dtype: torch.dtype
    copies: int
    form: Form
    part: Part
    axes: tuple[int, ...]
    output: Part = Part()

    def split(self, argument: Any, rows: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Return the part of an argument in the sample's place, and the rest; None: none fits."""
        x = self.form.tensor(argument)
        return None if x is None else self.part.split(x, rows.shape)

    def join(self, rows: Tensor, rest: Tensor | None) -> Any:
        """Return the argument that holds these rows and this rest."""
        return self.form.argument(self.part.join(in_memory(rows, self.axes), rest))

    def velocity(self, output: Any, rows: Tensor) -> Tensor:
        """Return the part of the transformer's output that is the velocity of these rows.

        Raises:
            ReplayError: no part of the output has the shape of the rows.
        """
        x = self._returned(output, rows)
        found = None if x is None else self.output.split(x, rows.shape)
        if found is None:
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ReplayError(
                f"the transformer returned {shape}, of which no part has the shape of the sample, "
                f"{list(rows.shape)}, that it was given in {self.name}"
            )
        return found[0]

    def with_output(
        self, output: Any, rows: Tensor, velocity: Tensor, outputs: Sequence[Any]
    ) -> Place:
        """Return the place with the part of the output that explains the scheduler's velocity.

        The output may be longer than the rows: by references, as the argument is, by text tokens
        before them, or by a predicted variance after them. Under guidance the velocity is a
        weighted sum of that part of all ``outputs`` and may resemble none of them. The candidate
        with the best least-squares fit is chosen.
        """
        x, axis, part = self._returned(output, rows), self.part.axis, self.part
        if x is None or x.shape == rows.shape:
            return self
        differing = [a for a in range(1, x.ndim) if x.shape[a] != rows.shape[a]]
        axis = differing[0] if len(differing) == 1 else part.axis
        # At the front, at the end (after text), or where the argument holds the sample.
        starts = {0, x.shape[axis] - rows.shape[axis]} | (
            {part.start} if axis == part.axis else set()
        )
        returned, likeness = [self._returned(other, rows) for other in outputs], {}
        for start in starts:
            candidate = Part(axis, start, whole=False)
            found = [None if x is None else candidate.split(x, rows.shape) for x in returned]
            parts = [x for split in found if split for x in split[0].chunk(self.copies)]
            if parts and all(x.shape == velocity.shape for x in parts):
                likeness[candidate] = _explained(velocity, parts)
        return self._replace(output=max(likeness, key=likeness.__getitem__, default=part))

    def _returned(self, output: Any, rows: Tensor) -> Tensor | None:
        """Return the output as a tensor with the axes of the rows, whichever form it has."""
        for form in (self.form, Form(self.form.listed), Form(), Form(True, self.form.single)):
            x = form.tensor(output)
            if x is not None and x.ndim == rows.ndim:
                return x
        return None

    def __str__(self) -> str:
        """Return a phrase for messages, such as "`hidden_states` begins with it on axis 1"."""
        name = f"`{self.name}`"
        listed = " as a list of its rows" if self.form.listed else ""
        if self.part.whole:
            where = f"{name} is it{listed}"
        elif self.part.start == 0:
            where = f"{name} begins with it on axis {self.part.axis}{listed}"
        else:
            where = f"{name} holds it behind a prefix on axis {self.part.axis}{listed}"
        return where + ("" if self.copies == 1 else ", twice along the batch")


def _explained(velocity: Tensor, parts: Sequence[Tensor]) -> float:
    """Return the share of ``|velocity|^2`` that a weighted sum of the parts explains, in [0, 1]."""
    wanted = velocity.double().flatten()
    columns = torch.stack([x.double().flatten() for x in parts])
    products = columns @ wanted
    # Normal equations: |projection|^2 = b^T (A A^T)^+ b. The pseudoinverse allows equal branches.
    explained = products @ torch.linalg.pinv(columns @ columns.T, hermitian=True) @ products
    power = wanted.square().sum()
    return float(explained / power) if power > 0 else 0.0


def find_sample(arguments: Mapping[str, Any], sample: Tensor) -> Place:
    """Return the one place that holds ``sample``, compared in the argument's dtype.

    Raises:
        ReplayError: none holds it, or several do.
    """
    found = []
    for (name, argument), copies in product(arguments.items(), (1, 2)):
        rows = repeat_rows(sample, copies)
        for form in _forms(argument, sample.ndim):
            x = form.tensor(argument)
            assert x is not None
            for part in parts_equal(x, rows):
                split = part.split(x, rows.shape)
                assert split is not None
                found.append(Place(name, x.dtype, copies, form, part, memory_axes(split[0])))
    if len(found) != 1:
        raise ReplayError(
            "exactly one argument of the transformer should hold the scheduler's sample "
            f"{list(sample.shape)}, whole or as a part of one axis, once or twice along the batch, "
            f"but {'several do' if found else 'none does'}: "
            + ("; ".join(map(str, found)) if found else _nearest(arguments, sample))
        )
    return found[0]


def _nearest(arguments: Mapping[str, Any], sample: Tensor) -> str:
    """Describe the argument that comes nearest to the sample, for an error message."""
    held = {n: list(x.shape) for n, x in arguments.items() if isinstance(x, Tensor)}
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.shape == sample.shape:
            equal = (x == sample.to(x.dtype)).double().mean().item()
            where = (
                f"{name} has its shape, and equals it in {equal:.0%} of its numbers: the pipeline "
                "changes the sample before the call (clean frames in the place of noisy ones, a "
                "scaled input)"
            )
            return f"{where}; its tensors are {held}"
        if isinstance(x, Tensor) and x.shape[1:] == sample.shape[1:] and len(x) > 2 * len(sample):
            return f"{name} has {len(x)} rows for {len(sample)}: guidance of more than two branches"
    sizes = {n: x.numel() for n, x in arguments.items() if isinstance(x, Tensor)}
    packed = [n for n, size in sizes.items() if size and size % sample.numel() == 0]
    told = f"{packed} may hold it in another layout" if packed else "none has its size"
    return f"{told}; its tensors are {held}"
