"""Validation shared by every room: one message form, no device synchronisation where it is hot.

Checks of shape, dtype and Python numbers always run. Checks of tensor *values* are skipped under
``torch.compile`` (they would break the graph); those of per-step quantities are skipped on
accelerators too (they would wait for the device).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum")


def check_tensor(name: str, x: object) -> None:
    """Raise ``TypeError`` unless ``x`` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")


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
                "would silently change the result"
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
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    above = low < value if open_low else low <= value
    below = value < high if open_high else value <= high
    finite = -math.inf < value < math.inf  # math.isfinite does not trace
    if not (finite and above and below):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{name}: expected a finite number in {interval}, got {value!r}")


def check_count(name: str, value: int, *, low: int = 1) -> None:
    """Raise unless ``value`` is an integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {value}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}")


def check_values(name: str, x: Tensor, ok: Tensor, expected: str) -> None:
    """Raise ``ValueError`` at the first element where ``ok`` is false; not under compilation."""
    if torch.compiler.is_compiling() or bool(ok.all()):
        return
    index = (~ok).nonzero()[0].tolist()
    raise ValueError(f"{name}: expected {expected}, got {x[tuple(index)].item()} at index {index}")


def check_step_values(name: str, x: Tensor, ok: Tensor, expected: str) -> None:
    """``check_values`` of per-step quantities: not on accelerators, where it would synchronise."""
    if x.device.type == "cpu":
        check_values(name, x, ok, expected)


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
        check_shape("group", group, shape[:1], "[B]")
        if group.is_floating_point() or group.is_complex() or group.dtype == torch.bool:
            raise TypeError(f"group: expected integer ids, got {group.dtype}")
    marks = "mark lost ones in valid"
    if measured is not None:
        marks += ", unmeasured ones in measured"
    for name, reward in rewards.items():
        finite = ~valid | reward.isfinite()
        if measured and name in measured:
            finite = finite | ~measured[name]
        check_values(name, reward, finite, f"finite values ({marks})")
    return valid
