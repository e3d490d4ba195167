"""Precision, broadcasting and reduction over the elements of a row."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mteditflow._checks import (
    Numbers,
    as_mask,
    as_real,
    check_floating,
    check_full_precision,
    check_number,
    check_rank,
    check_same_shape,
    check_step_values,
    check_values,
    read,
)

_CHUNK = 256  # elements whose squares are summed in float32; chunks are then summed in float64
_SMALLEST_SQUARE = 1e-30  # a mean square below this may have lost float32 squares to underflow


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Bring tensors to their common dtype, at least float32."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) for x in tensors)


def has_float64(device: torch.device) -> bool:
    """Whether a device can compute in float64; Apple's cannot."""
    return device.type != "mps"


def in_float64(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast floating-point tensors to float64; all move to the CPU if the device has no float64."""
    if not has_float64(tensors[0].device):
        tensors = tuple(x.cpu() for x in tensors)
    return tuple(x.double() if x.is_floating_point() else x for x in tensors)


def broadcast_rows(name: str, value: float | Numbers, x: Tensor) -> Tensor:
    """Give ``value`` trailing axes of size one, so that it broadcasts over ``x``.

    ``value`` is a number, or numbers whose shape is the leading part of ``x.shape``, such as [M],
    with or without trailing axes of size one, such as [M, 1, ...]. A number gets the dtype of
    ``x``.

    Raises:
        ValueError: the shape is not a leading part of ``x.shape``, or a number is not finite.
        TypeError: ``value`` is not floating point.
    """
    if isinstance(value, (int, float)):
        check_number(name, value)
        return torch.full((1,) * x.ndim, value, dtype=x.dtype, device=x.device)
    value = as_real(name, value, like=x)
    check_floating(**{name: value})
    ones = all(size == 1 for size in value.shape)
    leading = tuple(value.shape)
    while leading and leading[-1] == 1:
        leading = leading[:-1]
    # All ones stands for one number for all rows. A [1] beside several rows is refused instead: it
    # is more likely a batch of the wrong size.
    whole = value.ndim == 0 or value.ndim == x.ndim > 1 or x.shape[:1] == (1,)
    if leading != x.shape[: len(leading)] or (ones and not whole):
        raise ValueError(
            f"{name}: expected a number or a tensor whose shape is a leading part of "
            f"{list(x.shape)}, got {list(value.shape)}"
        )
    return value.reshape(leading + (1,) * (x.ndim - len(leading)))


def per_row(
    name: str, value: float | Numbers, x: Tensor, *, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """``broadcast_rows`` of a value in [low, high], in the dtype and on the device of ``x``.

    Callers pass ``x`` in float32 at least. With infinite bounds, values must still be finite.
    """
    if isinstance(value, (int, float)):
        check_number(name, value, low=low, high=high)
        return broadcast_rows(name, value, x)
    value = as_real(name, value, like=x)
    rows = broadcast_rows(name, value, x)
    if low > -math.inf:
        interval = f"values in [{low:g}, {high:g}]" if high < math.inf else f"values >= {low:g}"
        check_step_values(name, value, (value >= low) & (value <= high), interval)
    else:
        check_step_values(name, value, value.isfinite() & (value <= high), "finite values")
    return rows.to(x)


def row_values(
    name: str,
    value: float | Numbers,
    x: Tensor,
    *,
    low: float = 0.0,
    high: float = 1.0,
    valid: Tensor | None = None,
) -> Tensor:
    """Return one number per row of ``x``, [M] or [1], in any form of ``per_row``; 0 if invalid."""
    if not isinstance(value, (int, float)):
        value = as_real(name, value, like=x)
        if valid is not None and value.numel() == len(valid):
            value = torch.where(valid.reshape(value.shape), value, 0)
    return _one_per_row(name, per_row(name, value, x, low=low, high=high), x)


def token_values(
    name: str,
    value: float | Numbers,
    x: Tensor,
    *,
    low: float,
    high: float,
    valid: Tensor | None = None,
) -> Tensor:
    """Return values per row or token that broadcast over ``x`` [M, ...], detached; 0 if invalid.

    ``value`` has one number per row in any form of ``row_values``, or the rank of ``x`` (at least
    3) with M rows. Each other axis is then that of ``x`` or of size one: [M, L, 1], [M, 1, h, w].
    """
    value = full_precision(name, value, x)
    if not isinstance(value, Tensor) or not x.ndim == value.ndim > 2 or value.numel() <= len(value):
        rows = row_values(name, value, x, low=low, high=high, valid=valid)
        return rows.detach().reshape(-1, *(1,) * (x.ndim - 1))
    sides = zip(value.shape[1:], x.shape[1:], strict=True)
    if len(value) != len(x) or any(own not in (1, side) for own, side in sides):
        raise ValueError(
            f"{name}: expected one value per row, or per token in a shape that broadcasts over "
            f"{list(x.shape)}, got {list(value.shape)}"
        )
    value = value.detach().to(x) if valid is None else valid_rows(valid, value.detach().to(x))
    interval = "finite values" if low == -math.inf else f"finite values in [{low:g}, {high:g}]"
    inside = value.isfinite() & (value >= low) & (value <= high)
    check_step_values(name, value, inside, f"{interval} where valid")
    return value


def row_numbers(
    name: str, value: float | Numbers, x: Tensor, *, valid: Tensor | None = None
) -> Tensor:
    """Return one finite number of any sign per row of ``x``, [M]; 0 if invalid."""
    given = full_precision(name, value, x)
    rows = _one_per_row(name, broadcast_rows(name, given, x), x).to(x.dtype).expand(len(x))
    counted = rows if valid is None else torch.where(valid, rows, 0)
    check_values(name, rows, counted.isfinite(), "finite values where valid")
    return counted


def _one_per_row(name: str, rows: Tensor, x: Tensor) -> Tensor:
    """Flatten the result of ``broadcast_rows`` to [M] or [1]."""
    if rows.numel() != len(rows):
        raise ValueError(
            f"{name}: expected one value per row, a number, [M] or [M, 1, ...] against "
            f"{list(x.shape)}, got {list(rows.shape)}"
        )
    return rows.reshape(-1)


def group_mean(x: Tensor, group: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over each row's group of the rows in the mask, [M] -> [M]; 0 if there are none.

    In float64 where the device has it.
    """
    # By an [M, M] mask rather than by sorting, so that it runs under compile and vmap.
    same = group[:, None] == group
    return mean_where(x, same if mask is None else same & mask, dim=1)


def elements(x: Tensor) -> int:
    """Number of elements of one row of ``x`` [M, ...]."""
    return math.prod(x.shape[1:])


def row_mean_square(x: Tensor) -> Tensor:
    """Mean of the squared elements of each row, [M, ...] -> [M]; has all derivatives, also at 0.

    The result is float64 where the device has it; callers cast their final result, not this one.
    """
    # The compiler fuses this by itself, and does not trace a Function with ``jvp``.
    if torch.compiler.is_compiling():
        return _row_sum(_wide(x).square()) / elements(x)
    mean_square: Tensor = _RowMeanSquare.apply(x)  # type: ignore[no-untyped-call]
    return mean_square


def weighted_mean_square(x: Tensor, weight: Tensor) -> Tensor:
    """Mean of the weighted squares of each row, as ``row_mean_square``.

    ``weight`` is >= 0, from ``token_values``: one per row, or one per token.
    """
    if weight.numel() == len(weight):
        return weight.flatten() * row_mean_square(x)
    return row_mean_square(weight.sqrt() * x)


def row_mean_absolute(x: Tensor) -> Tensor:
    """Mean of the absolute elements of each row, [M, ...] -> [M], detached."""
    x = x.detach()
    if torch.compiler.is_compiling():
        return _row_sum(_wide(x).abs()) / elements(x)
    return _in_range(_wide(_row_sum(x.abs())), x, 1) / elements(x)


def row_mean(x: Tensor) -> Tensor:
    """Mean of the elements of each row, [M, ...] -> [M], in float64 where the device has it."""
    if torch.compiler.is_compiling():
        return _row_sum(_wide(x)) / elements(x)
    sums = torch.cat([part.sum(dim=-1) for part in _chunks(x)], dim=1)
    return _wide(sums).sum(dim=1) / elements(x)


def row_root_mean_square(x: Tensor) -> Tensor:
    """Root mean square of each row, [M, ...] -> [M]; all its derivatives are 0 where a row is 0."""
    # Divided by the largest element first: squares of tiny or huge elements leave float32.
    inner = torch.linalg.vector_norm(x.detach(), ord=math.inf, dim=-1)
    peak = inner.reshape(len(x), -1).amax(dim=1)
    zero = peak == 0  # a NaN is not
    peak = torch.where(zero | ~peak.isfinite(), 1, peak)
    mean_square = row_mean_square(x / peak.reshape(-1, *(1,) * (x.ndim - 1)))
    # The inner where keeps sqrt away from 0, where its derivative is infinite and 0 * inf is NaN.
    return peak * torch.where(zero, 0, torch.where(zero, 1, mean_square).sqrt())


class _RowMeanSquare(torch.autograd.Function):
    """Mean square of each row, without a temporary of the size of ``x``.

    Forward allocates none, and backward saves ``x`` alone. The square of ``vector_norm`` would have
    the same value, but its second derivative at 0 is NaN.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        # Norms of chunks: no square of ``x`` in memory, and no accumulator along a whole row.
        norms = [torch.linalg.vector_norm(part, dim=-1) for part in _chunks(x)]
        joined = _wide(norms[0] if len(norms) == 1 else torch.cat(norms, dim=1))
        return _in_range(joined.square().sum(dim=1), x, 2) / elements(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], _output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        scale = (gradient * (2 / elements(x))).to(x.dtype)
        return x * scale.reshape(-1, *(1,) * (x.ndim - 1))

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return row_mean(ctx.saved_tensors[0] * tangent) * 2


def _in_range(total: Tensor, x: Tensor, power: int) -> Tensor:
    """Return row sums of ``|x| ** power``, recomputed in float64 where float32 left its range.

    This happens on the CPU only, where reading values does not wait for a device.
    """
    if x.device.type != "cpu" or x.dtype == total.dtype:
        return total
    least = _SMALLEST_SQUARE * elements(x)
    bounds = read(torch.stack(total.aminmax()))
    if bounds and least < bounds[0] and bounds[1] < math.inf:
        return total
    in_range = (total > least) & total.isfinite()
    if bounds is None:  # no values to read, as under ``vmap``
        return torch.where(in_range, total, _row_sum(_wide(x).abs().pow(power)))
    again = _row_sum(_wide(x[~in_range]).abs().pow(power))
    return total.masked_scatter(~in_range, again)


def _chunks(x: Tensor) -> list[Tensor]:
    """Split the elements of each row into chunks [M, K, 256] and a remainder [M, 1, <256]."""
    flat = x.flatten(1)
    whole = flat.shape[1] // _CHUNK * _CHUNK
    parts = flat[:, :whole].reshape(len(flat), whole // _CHUNK, _CHUNK), flat[:, None, whole:]
    return [part for part in parts if part.shape[1] * part.shape[2] > 0]


def _row_sum(x: Tensor) -> Tensor:
    return x.flatten(1).sum(dim=1)


def _wide(x: Tensor) -> Tensor:
    """``x`` in float64 where the device has it."""
    return x.double() if has_float64(x.device) else x


def row_squared_error(valid: Numbers | None, /, **pair: Tensor) -> Tensor:
    """Mean squared difference of two named tensors, [M, ...] -> [M]; the second is a constant.

    Rows that are not ``valid`` give 0 with gradient 0.
    """
    error = row_error(valid, **pair)
    return row_mean_square(error).to(error.dtype)


def row_error(valid: Numbers | None, /, **pair: Tensor) -> Tensor:
    """Return the difference of two named tensors [M, ...]; 0 where rows are not ``valid``.

    The second is a constant.
    """
    check_floating(**pair)
    check_same_shape(**pair)
    (name, x), (_, constant) = pair.items()
    check_rank(name, x, 2, "[M, ...]")
    left, right = promote(x, constant.detach())
    return valid_rows(valid, left - right)


def row_displacements(
    velocity: Tensor, old_velocity: Tensor, target: Tensor, valid: Numbers | None
) -> tuple[Tensor, Tensor]:
    """Return velocity minus old velocity, and old velocity minus target, [M, ...].

    Inputs are checked, and promoted to float32 at least. Old velocity and target are constants.
    Both differences are 0 in rows that are not ``valid``.
    """
    check_floating(velocity=velocity, old_velocity=old_velocity, target=target)
    check_same_shape(velocity=velocity, old_velocity=old_velocity, target=target)
    check_rank("velocity", velocity, 2, "[M, ...]")
    v, v_old, v_target = promote(velocity, old_velocity.detach(), target.detach())
    return valid_rows(valid, v - v_old), valid_rows(valid, v_old - v_target)


def rows_mask(valid: Numbers | None, x: Tensor) -> Tensor | None:
    """Return the checked mask of the rows of ``x``, boolean [M]; ``None`` if there is none."""
    return None if valid is None else as_mask("valid", valid, x.flatten(1)[:, 0], "[M]")


def valid_rows(valid: Numbers | None, x: Tensor) -> Tensor:
    """Zero the rows [M, ...] that are not valid, so that nothing in them reaches a gradient."""
    mask = rows_mask(valid, x)
    if mask is None:
        return x
    # where, not a product: NaN * 0 is NaN.
    return torch.where(mask.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)


def row_std(std: float | Numbers, x: Tensor, valid: Numbers | None = None) -> tuple[Tensor, Tensor]:
    """Return per row of ``x`` [M] a std that is safe to divide by, and whether the row counts.

    A row counts if its step was stochastic (std not 0) and it is valid; the std of other rows is
    1. In float64 where the device has it.
    """
    mask = rows_mask(valid, x)
    std = full_precision("std", std, x)
    rows = _wide(row_values("std", std, x, high=math.inf, valid=mask)).expand(len(x))
    stochastic = rows != 0 if mask is None else (rows != 0) & mask  # a NaN is no 0
    return torch.where(stochastic, rows, 1), stochastic


def full_precision(name: str, value: float | Numbers, x: Tensor) -> float | Tensor:
    """Return values as a tensor, refused in half precision; a Python number as it is."""
    if isinstance(value, (int, float)):
        return value
    value = as_real(name, value, like=x)
    check_full_precision(**{name: value})
    return value


def stochastic_rows(x: Tensor, stochastic: Tensor) -> Tensor:
    """Zero the rows that do not count, so that no NaN in them reaches a gradient."""
    # Saves a copy. On an accelerator reading the mask would synchronize.
    if x.device.type == "cpu" and read(stochastic.all()):
        return x
    return torch.where(stochastic.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)


def reduce_elements(per_element: Tensor, stochastic: Tensor, x: Tensor, reduction: str) -> Tensor:
    """Return per-element means as "mean" or "sum", in the dtype of ``x``; 0 if not stochastic."""
    reduced = per_element if reduction == "mean" else per_element * elements(x)
    return torch.where(stochastic, reduced, 0).to(x.dtype)


def clipped_surrogate(
    log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """Return ``-min(ratio * A, clip(ratio) * A)`` from checked log-ratios."""
    check_number("clip_low", clip_low, low=0.0, high=1.0, open_high=True)
    check_number("clip_high", clip_high, low=0.0)
    # For A >= 0 the min clips from above only, for A < 0 from below only. On the log-ratio: an
    # infinite ratio would give inf * 0 in the backward pass of a clamp after the exponential.
    from_above = log_ratio.clamp(max=math.log1p(clip_high))
    from_below = log_ratio.clamp(min=math.log1p(-clip_low))
    return -torch.where(advantage >= 0, from_above, from_below).exp() * advantage


def masked_mean(values: Tensor, mask: Numbers | None = None) -> Tensor:
    r"""Mean of the entries where ``mask`` is true; the reduction after any unreduced loss.

    A masked entry affects neither the value nor the gradient, even if it is NaN. No mask can undo a
    NaN further upstream, because the backward pass of the model multiplies it by the zero gradient;
    leave such rows out of the forward pass. With no true entry the result is 0 with zero gradient,
    so that an empty update changes nothing.

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
    if mask is not None:
        mask = as_mask("mask", mask, values, "of values")
    return mean_where(values, mask).to(values.dtype)


def mean_where(x: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """Mean of the entries in a mask over one axis or all, 0 if there are none.

    In float64 where the device has it. A sum that overflows is recomputed in units of 2^64.
    """
    axes = tuple(range(x.ndim)) if dim is None else (dim,)
    kept = x if mask is None else torch.where(mask, x, 0)
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    count = mask.sum(dim=axes, keepdim=True).clamp(min=1)
    accumulator = torch.float64 if has_float64(x.device) else torch.float32
    mean = kept.sum(dim=axes, keepdim=True, dtype=accumulator) / count
    if x.dtype == accumulator:
        again = (kept * 2.0**-64).sum(dim=axes, keepdim=True) / count * 2.0**64
        mean = torch.where(mean.isfinite(), mean, again)
    return mean.squeeze(axes)
