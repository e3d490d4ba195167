"""Public names and modules of a package that are imported on first use (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazy(
    package: str, table: Mapping[str, str], extra: str | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` of a package.

    Assign them in the ``else`` of ``if TYPE_CHECKING:``, whose body imports the same names. A type
    checker then sees the names and reports all others.

    Args:
        package: ``__name__`` of the package.
        table: public name to the module that defines it, such as ``".judge.judge"``.
        extra: the extra of mteditflow to install where an import fails, named in the message; None
            where every installation has what is imported.
    """

    def load(name: str) -> Any:
        module = f"{package}.{name}"
        if name not in table and find_spec(module) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            if name not in table:  # a module of the package, as if it had imported it
                return import_module(module)
            value = getattr(import_module(table[name], package), name)
        except ImportError as error:
            missing = (error.name or "").partition(".")[0]
            if extra is None or missing in ("", "mteditflow"):
                raise
            fix = f"pip install 'mteditflow[{extra}]'"
            raise ImportError(f"{package}.{name} needs {missing}: {fix}", name=missing) from error
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: sorted({*vars(sys.modules[package]), *table})
