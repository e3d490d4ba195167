"""The function under test and its options, with the checks that all kinds share."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

#: Reason to skip a law that no gradient leaves a loss or an advantage through its constants.
NOT_DETACHED = (
    "not checked, since a caller may detach them before the call; --detaches promises that the "
    "function does, and has it checked"
)


@dataclass(frozen=True)
class Subject:
    """A function under test; types and ranges of its options are checked on creation.

    Attributes:
        function: function under test.
    """

    function: Callable[..., Any]

    def __post_init__(self) -> None:
        check_function(self.function, classes=self.takes_classes)
        for option in fields(self)[1:]:  # the first field is the function
            value, kind = getattr(self, option.name), str(option.type)
            if kind == "bool" and not isinstance(value, bool):
                raise TypeError(f"{option.name}: expected True or False, got {value!r}")
            if kind == "float":
                check_number(option.name, value)
            if kind == "int":
                check_integer(option.name, value, low=0)

    @property
    def takes_classes(self) -> bool:
        """Whether a class is accepted in place of a function."""
        return False

    def misfit(self) -> str | None:
        """Return which option must be another one for a single call to succeed, or ``None``."""
        return None


def check_function(function: object, *, classes: bool = False) -> None:
    """Raise ``TypeError`` unless ``function`` is callable and returns its result directly."""
    name = getattr(function, "__name__", type(function).__name__)
    if not callable(function):
        raise TypeError(f"function: expected a callable, got {type(function).__name__}")
    if inspect.isclass(function) and not classes:
        raise TypeError(f"function: expected a function, got the class {name}; pass an instance")
    if inspect.iscoroutinefunction(function):
        raise TypeError(
            f"function: expected a result, but {name} is async and returns a coroutine; wrap it, "
            f"as in lambda *x: asyncio.run({name}(*x))"
        )
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(
            f"function: expected a result, but {name} yields and returns a generator; return a list"
        )


def check_number(name: str, value: object, *, high: float = math.inf, none: bool = False) -> None:
    """Raise unless ``value`` is a number in [0, high), or ``None`` if ``none`` is set."""
    if none and value is None:
        return
    interval = "a number >= 0" if high == math.inf else f"a number in [0, {high:g})"
    message = f"{name}: expected {interval}{', or None' * none}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, Real):  # a bool is an int in Python
        raise TypeError(message)
    if not 0 <= float(value) < high:
        raise ValueError(message)


def check_integer(name: str, value: object, *, low: int, high: int | None = None) -> None:
    """Raise unless ``value`` is an integer of at least ``low``, and at most ``high``."""
    interval = f"an integer >= {low}" if high is None else f"an integer in {low}..{high}"
    message = f"{name}: expected {interval}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(message)
    if int(value) < low or (high is not None and int(value) > high):
        raise ValueError(message)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
