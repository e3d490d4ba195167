"""Assertions of laws on tensors, gradients, sums and precision."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from mteditflow.testing.law import call, expect_close, fail
from mteditflow.testing.reports import Returned, other_shape, text

Tensors = Mapping[str, Tensor]
Case = Mapping[str, object]


def expect_tensor(result: object, shape: torch.Size | tuple[int, ...], case: Case) -> Tensor:
    """Return the result if it is a real tensor of this shape; else break the law."""
    expected = f"shape {list(shape)}"
    if not isinstance(result, Tensor):
        fail(case, f"a tensor of {expected}", Returned(described(result)))
    if result.is_complex():
        fail(case, "a tensor of real numbers", Returned("complex numbers"))
    if result.shape != torch.Size(shape):
        fail(case, expected, other_shape(result.shape, shape))
    return result


def expect_array(
    result: object, shape: torch.Size | None, case: Case, *, of: str = "real numbers"
) -> Tensor:
    """Return an array or list of real numbers as a tensor on the CPU; else break the law.

    Args:
        result: result of the function.
        shape: required shape; ``None``: any.
        case: arguments of the call.
        of: expected elements, for the message.
    """
    array = result.detach().cpu() if isinstance(result, Tensor) else _numpy(result)
    if array is None:
        fail(case, f"an array of {of}", Returned(described(result)))
    if array.is_complex():
        fail(case, f"an array of {of}", Returned("complex numbers"))
    if shape is not None and array.shape != shape:
        fail(case, f"shape {list(shape)}", other_shape(array.shape, shape))
    return array


def _numpy(result: object) -> Tensor | None:
    """Return numbers as a float64 or complex128 tensor; ``None`` for anything else."""
    try:
        array = np.asarray(result)
    except (TypeError, ValueError):  # lists of unequal length
        return None
    if array.dtype.kind not in "biufc":
        return None
    return torch.from_numpy(array.astype(np.complex128 if array.dtype.kind == "c" else np.float64))


def described(result: object) -> str:
    """Return a description of a result that a law cannot read."""
    if inspect.iscoroutine(result):
        result.close()  # avoids the warning that it was never awaited
    if result is None or isinstance(result, (str, bytes)):
        return repr(result)
    if isinstance(result, (list, tuple)) and result:
        return f"a {type(result).__name__} of {type(result[0]).__name__}"
    name = type(result).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def gradients(
    total: Tensor, leaves: Tensors, case: Case, *, graph: bool = False
) -> dict[str, Tensor]:
    """Return the gradient of a scalar by each leaf; 0 for an unused one.

    A scalar without any gradient breaks the law, and so does an exception in the backward pass.
    """
    if not total.requires_grad:
        fail(case, f"a gradient to {', '.join(leaves)}", "no gradient")
    found = call(
        torch.autograd.grad, case, total, list(leaves.values()), allow_unused=True,
        create_graph=graph,
    )  # fmt: skip
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


def expect_pure(function: Callable[[Tensors], Tensor], arguments: Tensors, case: Case) -> None:
    """Fail unless a call leaves its arguments as they were, and a second one gives the same."""
    given = {name: x.clone() for name, x in arguments.items()}
    first = function(given).detach().clone()
    for name, before in arguments.items():
        if not torch.equal(given[name], before):
            wrong = given[name] != before
            got = f"{name} changed in place to {text(given[name])}"
            fail(case, f"{name} unchanged, {text(before)}", got, wrong=wrong)
    second = function({name: x.clone() for name, x in arguments.items()})
    expect_close(second, first, case, tolerance=0.0)


def expect_no_half(result: object, case: Case) -> None:
    """Fail if a result of float32 or float64 arguments is in half precision."""
    dtype = str(getattr(result, "dtype", "")).removeprefix("torch.")
    if dtype in ("float16", "bfloat16"):
        fail(case, "a result in the precision of the arguments", f"one in {dtype}")


def expect_zero_sums(advantage: Tensor, group: Tensor, case: Case, *, tolerance: float) -> None:
    """Fail unless each group's advantages sum to 0, within ``tolerance * max(1, sum of |A|)``."""
    for name in dict.fromkeys(group.tolist()):
        members = advantage[group == name].double()
        if not abs(float(members.sum())) <= tolerance * max(1.0, float(members.abs().sum())):
            fail(
                case,
                f"advantages of group {name} that add up to 0",
                f"{float(members.sum()):.6g}, of {text(members)}",
                wrong=group == name,
            )


def expect_float32_result(
    function: Callable[[Tensors], Tensor],
    half: Tensors,
    case: Case,
    *,
    float32: bool,
    refused: Callable[[], bool],
) -> None:
    """Fail unless half-precision inputs are refused, or give the result of float32 inputs.

    Without ``float32`` the result may have any dtype, and the error of a computation in half
    precision: as large as the change of the result if inputs change by their own rounding.

    Args:
        function: function from inputs by name to the result.
        half: inputs, some of them in half precision.
        case: arguments of the call.
        float32: the result must have dtype and accuracy of float32.
        refused: returns whether a call with ``half`` raises.
    """
    full = {name: x.float() for name, x in half.items()}
    expected = function(full).float()
    if refused():
        return
    got = function(half)
    if float32:
        if got.dtype in (torch.bfloat16, torch.float16):
            fail(case, "a result in float32", f"one in {str(got.dtype).removeprefix('torch.')}")
        expect_close(got.float(), expected, case, tolerance=1e-3)
        return
    eps = max(torch.finfo(x.dtype).eps for x in half.values())
    generator = torch.Generator(device="cpu").manual_seed(0)
    moved = torch.zeros_like(expected)
    for _ in range(4):  # toward 0, which keeps shares and flow times in their range
        nearby = {
            name: x
            * (
                1
                - 2
                * eps
                * torch.rand(x.shape, generator=generator, dtype=torch.float32, device="cpu")
            )
            for name, x in full.items()
        }
        moved = torch.maximum(moved, (function(nearby).float() - expected).detach().abs())
    # Sixteen roundings of the result itself, and the sensitivity to rounded inputs with a margin.
    allowed = 16 * eps * expected.abs().clamp(min=1) + 4 * moved
    same = (got.float() - expected).abs() <= allowed
    same |= got == expected.to(got.dtype)  # where it overflows in half precision
    if not bool(same.all()):
        fail(case, expected, got, wrong=~same)
