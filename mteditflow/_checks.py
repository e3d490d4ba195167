"""Shared validation: one form of messages, and no device synchronization in hot paths.

Checks of shape, dtype and Python numbers always run. Checks of tensor *values* are skipped if the
values cannot be read: under ``torch.compile`` (a read would break the graph), under
``torch.func.vmap``, and for fake and meta tensors. Checks of per-step quantities are also skipped
on accelerators, where they would synchronize with the device.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum")
#: Numbers that functions of rewards and scores accept: a tensor, an array, or (nested) lists.
Numbers = Tensor | np.ndarray[Any, Any] | Sequence[Any]
#: Every integer below these is exact in the dtype.
_EXACT = {torch.float32: 2**24, torch.float64: 2**53}
_LARGEST = 2**63 - 1  # int64's
_LONG = np.dtype(np.longdouble)
_AS_FLOAT = ".astype(float)"
_CONVERT = f"convert with {_AS_FLOAT}"
_MISSING = "mark what is missing in a mask, as pad_turns does"


def check_tensor(name: str, x: object) -> None:
    """Raise ``TypeError`` unless ``x`` is a dense tensor."""
    if not isinstance(x, Tensor):
        check_unmasked(name, x)
        lists = is_sequence(x) or isinstance(x, np.ndarray)
        fix = "; convert it with torch.as_tensor" if lists else ""
        if isinstance(x, tuple) and hasattr(x, "_fields"):  # a Signal, most likely
            fix = f"; give its tensors one by one: {', '.join(x._fields)}"
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}{fix}")
    if x.layout != torch.strided or x.is_nested:
        nested = "a nested tensor; call .to_padded_tensor()"
        got = nested if x.is_nested else f"layout {x.layout}; call .to_dense()"
        raise TypeError(f"{name}: expected a dense tensor, got {got}")


def is_sequence(x: object) -> bool:
    """Whether ``x`` is a list or any other sequence that may hold numbers."""
    return isinstance(x, Sequence) and not isinstance(x, (str, bytes, bytearray))


def as_numbers(
    name: str, x: object, *, device: torch.device | None = None, fix: str | None = None
) -> Tensor:
    """Return a tensor as it is, and a sequence, array or number as a tensor of the same values.

    Python numbers become float64, int64 or bool, which hold them exactly. Tensors in a list are
    stacked and keep their gradient. ``device`` is that of a new tensor; ``None`` means the CPU.
    ``fix`` is the advice in the error for content that is not numeric; ``None`` derives it from the
    content.

    Raises:
        ValueError: lists are ragged, or tensors in a list differ in shape or device.
        TypeError: the content is not numeric, or an array is masked.
    """
    if isinstance(x, Tensor):
        check_tensor(name, x)
        return x
    if not (is_sequence(x) or isinstance(x, (np.ndarray, np.generic, int, float))):
        iterable = isinstance(x, Iterable) and not isinstance(x, (str, bytes, bytearray))
        listed = "; give a list or an array of them" if iterable else ""
        if isinstance(x, Mapping):
            listed = "; give one for all names, such as the product of their masks"
        raise TypeError(
            f"{name}: expected numbers or a torch.Tensor, got {type(x).__name__}{listed}"
        )
    check_unmasked(name, x)
    if isinstance(x, Sequence) and _holds_tensors(x):
        return _stacked(name, x, device)
    try:
        array = np.asarray(x)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists
        raise ValueError(
            f"{name}: expected a tensor, or lists of numbers of one length, got "
            f"{type(x).__name__}: {error}; pad_turns takes chains of unequal length"
        ) from error
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        content, own = _content(array)
        listed = f"np.asarray({name}, dtype=float)"
        own = own.replace(_AS_FLOAT, _AS_FLOAT if isinstance(x, np.ndarray) else listed)
        advice = own if fix is None else fix
        raise TypeError(
            f"{name}: expected numbers or booleans, got {type(x).__name__} of {content}"
            + f"; {advice}" * bool(advice)
        )
    # torch takes native byte order only, and a copy must not share memory with the caller.
    native = array.astype(array.dtype.newbyteorder("="), copy=True)
    return torch.from_numpy(native).to("cpu" if device is None else device)


def _holds_tensors(x: Sequence[Any]) -> bool:
    """Whether a sequence, or a list or tuple nested in it, holds tensors."""
    return any(
        isinstance(item, Tensor) or (isinstance(item, (list, tuple)) and _holds_tensors(item))
        for item in x
    )


def _stacked(name: str, x: Sequence[Any], device: torch.device | None) -> Tensor:
    """Stack tensors and numbers of one shape; mixed dtypes become float64, or int64 if no float."""
    first = first_tensor(*x)
    place = device if first is None else first.device
    parts = [as_numbers(f"{name}[{i}]", item, device=place) for i, item in enumerate(x)]
    if any(part.shape != parts[0].shape or part.device != parts[0].device for part in parts):
        shapes = ", ".join(sorted({f"{list(p.shape)} on {p.device}" for p in parts})[:3])
        raise ValueError(
            f"{name}: expected tensors of one shape on one device, got {shapes}; pad_turns takes "
            "chains of unequal length"
        )
    if len({part.dtype for part in parts}) > 1:
        mixed = any(part.is_floating_point() for part in parts)
        parts = [part.to(torch.float64 if mixed else torch.int64) for part in parts]
    stacked = torch.stack(parts)
    return stacked if device is None else stacked.to(device)


def check_unmasked(name: str, x: object) -> None:
    """Raise ``TypeError`` for masked arrays, also in lists: ``np.asarray`` would drop the mask."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: expected numbers or a torch.Tensor, got a masked array, whose mask would be "
            "lost; give its .data, and ~np.ma.getmaskarray(...) as a mask of its own"
        )
    for item in x if isinstance(x, (list, tuple)) else ():
        check_unmasked(name, item)


def _content(array: np.ndarray[Any, Any]) -> tuple[str, str]:
    """Return a name for the content of an array that torch cannot hold, and advice to fix it."""
    if array.dtype != object:
        strings = array.dtype.kind in "US"
        return "strings" if strings else str(array.dtype), _CONVERT * (
            strings or array.dtype == _LONG
        )
    if any(item is None for item in array.flat):
        return "None", _MISSING
    if any(isinstance(item, int) and not -(2**63) <= item < 2**64 for item in array.flat):
        return "integers that 64 bits do not hold", ""
    other = next((x for x in array.flat if not isinstance(x, (Real, Decimal, np.bool_))), None)
    return ("dtype object", _CONVERT) if other is None else (type(other).__name__, "")


def as_real(name: str, x: object, *, like: Tensor | None = None) -> Tensor:
    """Apply ``as_numbers``, then convert integers and booleans to floats of the same value.

    A floating-point tensor keeps its dtype. Everything else gets the dtype of ``like``, float32 at
    least; lists and arrays are created on its device. Without ``like`` integers become float32.

    Raises:
        ValueError: an integer is not exact in that dtype.
    """
    numbers = as_numbers(name, x, device=None if like is None else like.device)
    dtype = None if like is None else torch.promote_types(like.dtype, torch.float32)
    if numbers.is_floating_point() or numbers.is_complex():
        follows = not isinstance(x, Tensor) and numbers.dtype in _EXACT and dtype in _EXACT
        return numbers.to(dtype) if follows else numbers
    dtype = dtype if dtype in _EXACT else torch.float32
    real, largest = numbers.to(dtype), _EXACT[dtype]
    expected = f"integers below {largest}, which {dtype} holds exactly"
    fix = "" if dtype == torch.float64 else " (give larger ones as float64)"
    check_values(name, numbers, real.abs() < largest, expected + fix)
    return real


def first_tensor(*values: object) -> Tensor | None:
    """Return the first tensor, whose dtype and device lists and arrays beside it follow."""
    return next((x for x in values if isinstance(x, Tensor)), None)


def check_no_booleans(name: str, x: object, expected: str) -> None:
    """Raise ``TypeError`` for booleans, also in lists: on a scale such as 1..5, True is not 1."""
    if isinstance(x, (Tensor, np.ndarray)):
        boolean = x.dtype == torch.bool if isinstance(x, Tensor) else x.dtype.kind == "b"
    else:
        boolean = isinstance(x, (bool, np.bool_))
    if boolean:
        raise TypeError(f"{name}: expected {expected}, got booleans, which are 0 and 1")
    for item in x if isinstance(x, Sequence) and is_sequence(x) else ():
        check_no_booleans(name, item, expected)


def as_ids(group: Numbers, device: torch.device) -> Tensor:
    """Return group ids as a tensor; shape and dtype are not checked."""
    fix = "number such ids with np.unique(ids, return_inverse=True)[1]"
    return as_numbers("group", group, device=device, fix=fix)


def as_row_ids(group: Numbers, x: Tensor) -> Tensor:
    """Return checked ids of the groups of the rows of ``x``, [M]."""
    ids = as_ids(group, x.device)
    check_integers("group", ids, "ids")
    check_shape("group", ids, x.shape[:1], "[M]")
    return ids


def as_mask(name: str, mask: Numbers | None, like: Tensor, axes: str) -> Tensor:
    """Return a checked mask in the shape of ``like``, all true for ``None``."""
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    mask = as_numbers(name, mask, device=like.device)
    check_mask(name, mask, like.shape, axes)
    return mask


def check_real(**tensors: Tensor) -> None:
    """Raise ``TypeError`` for complex tensors."""
    for name, x in tensors.items():
        if x.is_complex():
            raise TypeError(f"{name}: expected real numbers, got {x.dtype}")


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
        if x.dtype in (torch.float32, torch.float64):
            continue
        half = "half precision would silently change the result " if x.is_floating_point() else ""
        fix = "" if x.is_complex() else f"; {half}(convert with .float())"
        raise TypeError(f"{name}: expected float32 or float64, got {x.dtype}{fix}")


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
    """Raise ``ValueError`` unless ``x`` has the expected shape; ``axes`` names it in the error."""
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
        raise TypeError(
            f"{name}: expected a boolean mask, got {mask.dtype}; convert 0 and 1 with .bool()"
        )


def check_number(
    name: str,
    value: float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise unless ``value`` is a finite number in [low, high]; open ends are excluded."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {_kind(value, 'float')}")
    above = low < value if open_low else low <= value
    below = value < high if open_high else value <= high
    # Also false for NaN and for integers beyond float64; math.isfinite does not trace.
    finite = abs(value) <= sys.float_info.max
    if not (finite and above and below):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{name}: expected a finite number in {interval}, got {shown(value)}")


def check_count(name: str, value: int, *, low: int = 1, high: int = _LARGEST) -> None:
    """Raise unless ``value`` is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {_kind(value, 'int')}")
    if value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {shown(value)}")
    if value > high:
        raise ValueError(f"{name}: expected an integer <= {high}, got {shown(value)}")


def shown(value: object) -> str:
    """Render a value for an error message: long integers by their size, other objects by type."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    plain = isinstance(value, (str, int, float)) or value is None
    return repr(value) if plain else type(value).__name__


def _kind(value: object, conversion: str) -> str:
    """Return the type of a value, with advice to convert tensors and numpy scalars."""
    fix = f"; convert it with {conversion}()" if isinstance(value, (Tensor, np.generic)) else ""
    return type(value).__name__ + fix


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {list(choices)}, got {shown(value)}")


def check_kind(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Raise ``TypeError`` unless ``value`` is of the kind, described by ``expected``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


def check_named(name: str, value: object, content: str) -> None:
    """Raise ``TypeError`` unless ``value`` maps names to ``content``."""
    check_kind(name, value, Mapping, f"a mapping of names to {content}")


def check_generator(name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a ``torch.Generator``."""
    fix = "torch.Generator().manual_seed(seed)"
    check_kind(name, value, torch.Generator, f"a torch.Generator, such as {fix}")


def check_callable(name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` can be called."""
    if not callable(value):
        raise TypeError(f"{name}: expected a function, got {type(value).__name__}")


def as_device(name: str, value: str | torch.device) -> torch.device:
    """Return a ``torch.device`` from a device or its name."""
    check_kind(name, value, (str, torch.device), "a torch.device or its name")
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{name}: expected a device such as 'cpu', got {value!r}") from error


def read(x: Tensor) -> Any:
    """Return a tensor's values as Python numbers; ``None`` if they cannot be read.

    That is the case under compilation and ``vmap``, and for fake and meta tensors.
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
    """Whether a tensor is wrapped by ``vmap``, or fake."""
    # Private torch modules: there is no public test for either. Imported only after a failed read.
    from torch._C._functorch import is_functorch_wrapped_tensor
    from torch._subclasses.fake_tensor import is_fake

    return is_functorch_wrapped_tensor(x) or is_fake(x)


def check_values(name: str, x: Tensor, ok: Tensor, expected: str) -> None:
    """Raise ``ValueError`` at the first element where ``ok`` is false, if values can be read."""
    if read(ok.all()) is not False:
        return
    index = (~ok).nonzero()[0].tolist()
    place = f" at index {index}" if index else ""  # a number has none
    raise ValueError(f"{name}: expected {expected}, got {x[tuple(index)].item()}{place}")


def check_step_values(name: str, x: Tensor, ok: Tensor, expected: str) -> None:
    """Apply ``check_values`` to per-step quantities, on the CPU only: elsewhere it synchronizes."""
    if x.device.type == "cpu":
        check_values(name, x, ok, expected)


def as_rewards(
    reward: Numbers, group: Numbers, valid: Numbers | None, *, name: str = "reward"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rewards, group ids and mask as checked tensors; see ``as_real``."""
    values = as_real(name, reward)
    check_full_precision(**{name: values})
    check_rank(name, values, 1, "[B] or [B, N]", maximum=2)
    mask = as_mask("valid", valid, values, f"of {name}")
    ids = as_ids(group, values.device)
    return values, ids, check_rewards({name: values}, ids, mask)


def check_group(group: Tensor, reward: Sequence[int]) -> None:
    """Raise unless ``group`` holds integer ids [B], signed or not, for rewards of this shape."""
    check_tensor("group", group)
    if group.shape != reward[:1] and group.numel() == math.prod(reward):
        raise ValueError(
            f"group: expected shape [B] = [{reward[0]}], one id for each trajectory, got "
            f"{list(group.shape)}; flatten the reward and the ids of rewards laid out "
            "[prompts, samples]"
        )
    if group.ndim == 1 and 1 < len(group) < reward[0] and reward[0] % len(group) == 0:
        times = reward[0] // len(group)
        raise ValueError(
            f"group: expected shape [B] = [{reward[0]}], one id for each trajectory, got "
            f"[{len(group)}]; if there are {times} trajectories of each id in a row, use "
            f"group.repeat_interleave({times})"
        )
    check_shape("group", group, reward[:1], "[B]")
    check_integers("group", group, "ids")


def check_integers(name: str, x: Tensor, content: str) -> None:
    """Raise ``TypeError`` unless a tensor holds integers, of any width, signed or not."""
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected integer {content}, got {x.dtype}")


def check_rewards(
    rewards: Mapping[str, Tensor],
    group: Tensor | None,
    valid: Tensor | None,
    measured: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Validate rewards of one shape with their groups; return the mask, all true for ``None``.

    Values are checked where a reward is valid and, if ``measured`` has an entry for it, measured.
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
        check_group(group, shape)
    marks = "mark lost ones in valid"
    if measured is not None:
        marks += ", unmeasured ones in measured"
    for name, reward in rewards.items():
        finite = ~valid | reward.isfinite()
        if measured and name in measured:
            finite = finite | ~measured[name]
        check_values(name, reward, finite, f"finite values ({marks})")
    return valid
