"""Precision, broadcasting and reduction over the elements of a row."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mteditflow._checks import (
    check_floating,
    check_full_precision,
    check_mask,
    check_number,
    check_rank,
    check_same_shape,
    check_step_values,
)


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Bring tensors to their common dtype, at least float32."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) for x in tensors)


def per_row(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """Give a ``value`` in [0, 1] trailing axes of size one, so that it broadcasts over ``x``.

    ``value`` is a number, or a tensor whose shape is the leading part of ``x.shape``. The result
    has the dtype and device of ``x`` (which is at least float32 where this is called).
    """
    if not isinstance(value, Tensor):
        check_number(name, value, low=0.0, high=1.0)
        return torch.full((1,) * x.ndim, value, dtype=x.dtype, device=x.device)
    check_floating(**{name: value})
    if value.shape != x.shape[: value.ndim]:
        raise ValueError(
            f"{name}: expected a number or a tensor whose shape is a leading part of "
            f"{list(x.shape)}, got {list(value.shape)}"
        )
    check_step_values(name, value, (value >= 0) & (value <= 1), "values in [0, 1]")
    value = value.to(x)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))


def elements(x: Tensor) -> int:
    """Number of elements of one row of ``x`` [M, ...]."""
    return math.prod(x.shape[1:])


def row_mean_square(x: Tensor) -> Tensor:
    """Mean of the squared elements of each row, [M, ...] -> [M]; has all derivatives, also at 0."""
    if torch.compiler.is_compiling():  # the compiler fuses this, and traces no ``Function.jvp``
        return x.square().mean(dim=_element_axes(x))
    mean_square: Tensor = _RowMeanSquare.apply(x)  # type: ignore[no-untyped-call]
    return mean_square


def row_root_mean_square(x: Tensor) -> Tensor:
    """Root of ``row_mean_square``; all its derivatives are 0 where a row is 0."""
    mean_square = row_mean_square(x)
    positive = mean_square > 0
    return torch.where(positive, torch.where(positive, mean_square, 1).sqrt(), 0)


class _RowMeanSquare(torch.autograd.Function):
    """Mean square without a temporary the size of ``x``, neither forward nor saved for backward.

    The square of a norm has this value as well, but its second derivative at 0 is NaN.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        # Nested norms: accurate, because no float32 accumulator runs over more than one axis.
        inner = torch.linalg.vector_norm(x, dim=-1)
        norm: Tensor = torch.linalg.vector_norm(inner.reshape(len(x), -1), dim=1)
        return norm.square() / elements(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], _output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        scale = gradient * (2 / elements(x))
        return x * scale.reshape(-1, *(1,) * (x.ndim - 1))

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return (x * tangent).mean(dim=_element_axes(x)) * 2


def row_squared_error(**pair: Tensor) -> Tensor:
    """Mean squared difference of two named tensors, [M, ...] -> [M]; the second is a constant."""
    check_floating(**pair)
    check_same_shape(**pair)
    (name, x), (_, constant) = pair.items()
    check_rank(name, x, 2, "[M, ...]")
    left, right = promote(x, constant.detach())
    return row_mean_square(left - right)


def row_mean_absolute(x: Tensor) -> Tensor:
    """Mean of the absolute elements of each row, [M, ...] -> [M], without a temporary as above."""
    if torch.compiler.is_compiling():
        return x.abs().mean(dim=_element_axes(x))
    inner: Tensor = torch.linalg.vector_norm(x, ord=1, dim=-1)
    return inner.reshape(len(x), -1).sum(dim=1) / elements(x)


def _element_axes(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def row_std(std: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of ``x`` [M]: a std that is safe to divide by, and whether the step was random."""
    check_full_precision(std=std)
    m = len(x)
    one_per_row = std.ndim == x.ndim and std.numel() == std.shape[0] and len(std) in (1, m)
    if not one_per_row:
        raise ValueError(
            f"std: expected one value per row, [M, 1, ...] or [1, 1, ...] against "
            f"{list(x.shape)}, got {list(std.shape)}"
        )
    check_step_values("std", std, std >= 0, "values >= 0")
    rows = std.reshape(-1).to(x.dtype).expand(m)
    stochastic = rows > 0
    return torch.where(stochastic, rows, 1), stochastic


def stochastic_rows(x: Tensor, stochastic: Tensor) -> Tensor:
    """Zero the rows that took a deterministic step, so that no NaN in them reaches a gradient."""
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and bool(stochastic.all()):  # spares a copy; elsewhere the test would wait
        return x
    return torch.where(stochastic.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)


def reduce_elements(per_element: Tensor, stochastic: Tensor, x: Tensor, reduction: str) -> Tensor:
    """A mean over the elements of ``x``, or their sum; 0 where the step was not random."""
    reduced = per_element if reduction == "mean" else per_element * elements(x)
    return torch.where(stochastic, reduced, 0)


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean of the entries where ``mask`` is true; the reduction after any unreduced loss.

    A masked entry reaches neither the value nor the gradient of ``values``, even if it is NaN.
    (No mask can undo a NaN further up: the backward pass of the model multiplies it by that zero
    gradient. Leave such rows out of the forward pass.) With no true entry the result is 0 with zero
    gradient: an update on nothing changes nothing.

    Args:
        values: any shape, floating point.
        mask: boolean, shape of ``values``; ``None`` takes every entry.

    Returns:
        A scalar. Gradient flows to the true entries, ``1 / mask.sum()`` each.

    Raises:
        ValueError: shapes differ, or ``values`` is empty.
        TypeError: ``values`` is not floating point, or ``mask`` is not boolean.

    Example:
        >>> masked_mean(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    check_floating(values=values)
    check_rank("values", values, 0, "[...]")
    if mask is None:
        return values.mean()
    check_mask("mask", mask, values.shape, "of values")
    total: Tensor = torch.where(mask, values, 0).sum()
    return total / mask.sum().clamp(min=1)
