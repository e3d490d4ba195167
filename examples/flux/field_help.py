"""Help texts of options, from the docstrings under the fields of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import docstring_parser
import tyro

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def with_help(values: DataclassInstance) -> type:
    """Return a class of the same fields, with these values as defaults and explicit help texts.

    tyro keeps the line breaks of docstrings wherever a line begins with no letter, as continuation
    lines do by their indentation, and then wraps the text again.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Box:
        ...     '''A box.'''
        ...     size: int = 3
        >>> with_help(Box(4))().size
        4
    """
    kind, described = type(values), dict(_described(type(values)))
    hints = get_type_hints(kind, include_extras=True)
    shown: list[Any] = []
    for name in (f.name for f in fields(values)):
        value = getattr(values, name)
        told = tyro.conf.arg(help=described.get(name))
        if is_dataclass(value) and not isinstance(value, type):
            # Without a default, tyro lists the fields of the nested class.
            shown.append((name, Annotated[with_help(value), told]))
        else:
            as_is = field(default_factory=lambda x=value: x)
            shown.append((name, Annotated[hints[name], told], as_is))
    about = docstring_parser.parse(kind.__doc__ or "").description or ""
    namespace = {"__doc__": "\n\n".join(map(_one_line, about.split("\n\n")))}
    return make_dataclass(kind.__name__, shown, namespace=namespace, kw_only=True)


def _described(kind: type) -> Iterator[tuple[str, str]]:
    """Yield name and description of each documented field, those of base classes first."""
    for each in reversed(kind.__mro__[:-1]):
        for about in docstring_parser.parse_from_object(each).params:
            if about.description is not None:
                yield about.arg_name, _one_line(about.description)


def _one_line(text: str) -> str:
    return " ".join(text.split())
