"""Validation shared by every room: one message form, no device synchronisation where it is hot.

Checks of shape, dtype and Python numbers always run. Checks of tensor *values* are skipped where
there are none to read: under ``torch.compile`` (they would break the graph), ``torch.func.vmap``,
and of fake and meta tensors. Those of per-step quantities are skipped on accelerators too (they
would wait for the device).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum")
#: Numbers that functions of rewards and scores accept: a tensor, an array, or (nested) lists.
Numbers = Tensor | np.ndarray[Any, Any] | Sequence[Any]
_EXACT = 2**24  # integers below are float32 numbers


def check_tensor(name: str, x: object) -> None:
    """Raise ``TypeError`` unless ``x`` is a tensor."""
    if not isinstance(x, Tensor):
        lists = isinstance(x, (list, tuple, np.ndarray))
        fix = "; convert it with torch.as_tensor" if lists else ""
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}{fix}")


def as_numbers(name: str, x: object, *, device: torch.device | None = None) -> Tensor:
    """Return a tensor as it is, and a list, array or number as a tensor of the same numbers.

    Python's numbers become float64, int64 or booleans, which hold them exactly. ``device`` is that
    of a tensor made here; ``None`` is the CPU.
    """
    if isinstance(x, Tensor):
        return x
    if not isinstance(x, (list, tuple, np.ndarray, np.generic, int, float)):
        raise TypeError(f"{name}: expected numbers or a torch.Tensor, got {type(x).__name__}")
    try:
        array = np.asarray(x)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists, tensors with gradient
        raise ValueError(
            f"{name}: expected a tensor, or lists of numbers of one length, got "
            f"{type(x).__name__}: {error}; pad_turns takes chains of unequal length"
        ) from error
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise TypeError(
            f"{name}: expected numbers or booleans, got {type(x).__name__} of {array.dtype}; mark "
            "what is missing in a mask, as pad_turns does"
        )
    native = array.astype(array.dtype.newbyteorder("="), copy=True)
    return torch.from_numpy(native).to("cpu" if device is None else device)


def as_real(name: str, x: object, *, device: torch.device | None = None) -> Tensor:
    """``as_numbers``, with integers and booleans as float32 of the same value.

    Raises:
        ValueError: an integer is too large for that.
    """
    numbers = as_numbers(name, x, device=device)
    if numbers.is_floating_point() or numbers.is_complex():
        return numbers
    real = numbers.to(torch.float32)
    expected = f"integers below {_EXACT}, which float32 holds exactly (convert with .double())"
    check_values(name, real, real.abs() < _EXACT, expected)
    return real


def as_mask(name: str, mask: Numbers | None, like: Tensor) -> Tensor:
    """Return a mask as a tensor, all true if there is none; shape and dtype are not checked."""
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    return as_numbers(name, mask, device=like.device)


def check_floating(**tensors: Tensor) -> None:
    """Raise ``TypeError`` unless every tensor is real floating point."""
    for name, x in tensors.items():
        check_tensor(name, x)
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")


def check_full_precision(**tensors: Tensor) -> None:
    """Raise ``TypeError`` unless every tensor is float32 or float64."""
    for name, x in tensors.items():
        check_tensor(name, x)
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name}: expected float32 or float64, got {x.dtype}; half precision and integers "
                "would silently change the result (convert with .float())"
            )


def check_same_shape(**tensors: Tensor) -> None:
    """Raise ``ValueError`` unless all tensors share the shape of the first."""
    reference = next(iter(tensors))
    for name, x in tensors.items():
        check_tensor(name, x)
        if x.shape != tensors[reference].shape:
            raise ValueError(
                f"{name}: expected the shape of {reference}, {list(tensors[reference].shape)}, "
                f"got {list(x.shape)}"
            )


def check_shape(name: str, x: Tensor, expected: Sequence[int], axes: str) -> None:
    """Raise ``ValueError`` unless ``x`` has the expected shape, which ``axes`` puts in words."""
    check_tensor(name, x)
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {axes} = {list(expected)}, got {list(x.shape)}")


def check_rank(name: str, x: Tensor, minimum: int, axes: str, *, maximum: float = math.inf) -> None:
    """Raise ``ValueError`` unless ``x`` has ``minimum`` to ``maximum`` axes and no empty one."""
    check_tensor(name, x)
    if not minimum <= x.ndim <= maximum or 0 in x.shape:
        raise ValueError(
            f"{name}: expected a non-empty tensor of shape {axes}, got {list(x.shape)}"
        )


def check_mask(name: str, mask: Tensor, expected: Sequence[int], axes: str) -> None:
    """Raise unless ``mask`` is a boolean tensor of the expected shape."""
    check_shape(name, mask, expected, axes)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected a boolean mask, got {mask.dtype}")


def check_number(
    name: str,
    value: float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise unless ``value`` is a finite number in [low, high], without an end that is open."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {_kind(value, 'float')}")
    above = low < value if open_low else low <= value
    below = value < high if open_high else value <= high
    finite = -math.inf < value < math.inf  # math.isfinite does not trace
    if not (finite and above and below):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{name}: expected a finite number in {interval}, got {value!r}")


def check_count(name: str, value: int, *, low: int = 1) -> None:
    """Raise unless ``value`` is an integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {_kind(value, 'int')}")
    if value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {value}")


def _kind(value: object, conversion: str) -> str:
    """Type of a value, with the conversion that makes it a Python number where there is one."""
    fix = f"; convert it with {conversion}()" if isinstance(value, (Tensor, np.generic)) else ""
    return type(value).__name__ + fix


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}")


def read(x: Tensor) -> Any:
    """Return the numbers of a tensor as Python's; ``None`` where it has none to read.

    So under compilation and ``vmap``, and of fake and meta tensors.
    """
    if torch.compiler.is_compiling():
        return None
    try:
        return x.tolist()
    except RuntimeError:
        if x.is_meta or _stands_for_values(x):
            return None
        raise


def _stands_for_values(x: Tensor) -> bool:
    """Whether a tensor is one of a ``vmap``, or fake."""
    from torch._C._functorch import is_functorch_wrapped_tensor
    from torch._subclasses.fake_tensor import is_fake

    return is_functorch_wrapped_tensor(x) or is_fake(x)


def check_values(name: str, x: Tensor, ok: Tensor, expected: str) -> None:
    """Raise ``ValueError`` at the first element where ``ok`` is false, if values can be read."""
    if read(ok.all()) is not False:
        return
    index = (~ok).nonzero()[0].tolist()
    raise ValueError(f"{name}: expected {expected}, got {x[tuple(index)].item()} at index {index}")


def check_step_values(name: str, x: Tensor, ok: Tensor, expected: str) -> None:
    """``check_values`` of per-step quantities: not on accelerators, where it would synchronise."""
    if x.device.type == "cpu":
        check_values(name, x, ok, expected)


def as_rewards(
    reward: Numbers, group: Numbers, valid: Numbers | None, *, name: str = "reward"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rewards, group ids and mask as checked tensors; see ``as_real``."""
    values = as_real(name, reward)
    ids = as_numbers("group", group, device=values.device)
    return values, ids, check_rewards({name: values}, ids, as_mask("valid", valid, values))


def check_group(group: Tensor, expected: Sequence[int]) -> None:
    """Raise unless ``group`` holds integer ids, of any width and sign, [B]."""
    check_shape("group", group, expected, "[B]")
    if group.is_floating_point() or group.is_complex() or group.dtype == torch.bool:
        raise TypeError(f"group: expected integer ids, got {group.dtype}")


def check_rewards(
    rewards: Mapping[str, Tensor],
    group: Tensor | None,
    valid: Tensor | None,
    measured: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Validate rewards of one shape with their groups; return the mask, all true if none given.

    A reward is read where it is valid and, if it is named there, ``measured``.
    """
    first = next(iter(rewards))
    shape = rewards[first].shape if isinstance(rewards[first], Tensor) else ()
    for name, reward in rewards.items():
        check_full_precision(**{name: reward})
        check_rank(name, reward, 1, "[B] or [B, N]", maximum=2)
        check_shape(name, reward, shape, f"of {first}")
    if valid is None:
        valid = torch.ones_like(rewards[first], dtype=torch.bool)
    check_mask("valid", valid, shape, f"of {first}")
    if group is not None:
        check_group(group, shape[:1])
    marks = "mark lost ones in valid"
    if measured is not None:
        marks += ", unmeasured ones in measured"
    for name, reward in rewards.items():
        finite = ~valid | reward.isfinite()
        if measured and name in measured:
            finite = finite | ~measured[name]
        check_values(name, reward, finite, f"finite values ({marks})")
    return valid
