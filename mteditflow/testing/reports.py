"""Values, exceptions and wrong entries as text, for the message of a broken law."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

LONGEST = 12  # longest list that a message shows in full


class Raised(NamedTuple):
    """Exception of the function under test.

    Attributes:
        error: the exception.
    """

    error: BaseException

    def __str__(self) -> str:
        first = str(self.error).strip().partition("\n")[0]
        return f"the exception {type(self.error).__name__}{': ' * bool(first)}{first}"

    @property
    def of_the_call(self) -> bool:
        """Whether the call itself raised a TypeError: the arguments do not fit the signature."""
        frames = [frame for frame, _ in traceback.walk_tb(self.error.__traceback__)]
        # Python raises it in the caller's frame, so the innermost frame is one of this package.
        ours = bool(frames) and Path(frames[-1].f_code.co_filename).parent == Path(__file__).parent
        return isinstance(self.error, TypeError) and ours


class Returned(str):
    """Description of a result with a type or rank that the kind does not allow."""

    __slots__ = ()


class OtherSize(Returned):
    """Description of a result of the kind's rank with another number of entries."""

    __slots__ = ()


def other_shape(got: torch.Size, expected: torch.Size | tuple[int, ...]) -> Returned:
    """Return a description of a shape that is not the expected one."""
    kind = OtherSize if len(got) == len(expected) else Returned
    return kind(f"shape {list(got)}")


def text(value: object) -> str:
    """Return a value as a short literal; long lists are shortened."""
    if isinstance(value, Tensor):
        numbers = _list(value.detach().cpu().tolist())
        plain = value.dtype in (torch.float64, torch.int64, torch.bool)
        return numbers if plain else f"{numbers} ({str(value.dtype).removeprefix('torch.')})"
    if isinstance(value, (Raised, str)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return _list(value)
    if callable(value) and not inspect.isclass(value):
        return getattr(value, "__qualname__", repr(value))
    return repr(value)


def _list(values: Any) -> str:
    if not isinstance(values, (list, tuple)):
        return text(values)
    if len(values) <= LONGEST:
        return f"[{', '.join(map(_list, values))}]"
    ends = [*map(_list, values[:6]), "...", *map(_list, values[-2:])]
    return f"[{', '.join(ends)}] ({len(values)} in all)"


def located(
    case: Mapping[str, object], expected: object, got: object, wrong: Tensor | None
) -> list[str]:
    """Return lines that name the first wrong entry, its values, and the members of its group.

    Args:
        case: arguments of the call by name; ids of groups [B] are called "group".
        expected: required result, or a property as text.
        got: result of the function, or a description as text.
        wrong: True at wrong entries of the result, boolean [B] or [B, ...]; ``None``: there is
            nothing to locate.
    """
    if wrong is None or wrong.numel() < 2 or not bool(wrong.any()):
        return []
    at: list[int] = wrong.nonzero()[0].tolist()
    group = case.get("group")
    grouped = isinstance(group, Tensor) and len(group) == len(wrong)
    name = f" of group {int(group[at[0]])}" if isinstance(group, Tensor) and grouped else ""
    entry = f"entry {at[0] if len(at) == 1 else at}"
    values = [
        f"{word} {text(x[tuple(at)].item())}"
        for word, x in (("expected", expected), ("got", got))
        if isinstance(x, Tensor) and x.shape == wrong.shape
    ]
    lines = [f"  first wrong: {entry}{name}: {', '.join(values)}"] if values else []
    if isinstance(group, Tensor) and grouped:
        members = group.cpu() == group[at[0]].cpu()  # torch 2.6 compares no ids of uint16
        own = {
            key: value.cpu()[members]
            for key, value in case.items()
            if isinstance(value, Tensor) and value.shape[:1] == group.shape and key != "group"
        }
        shown = [f"{key} {text(value)}" for key, value in own.items()]
        entries = text(members.nonzero()[:, 0])
        lines.append(f"  members{name}: {'; '.join([f'entries {entries}', *shown])}")
    return lines
