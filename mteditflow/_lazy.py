"""Lazy import of a package's public names and modules on first use (PEP 562)."""

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

    Assign them in the ``else`` branch of ``if TYPE_CHECKING:``, whose body imports the same names.
    A type checker then resolves these names, and reports all others.

    Args:
        package: ``__name__`` of the package.
        table: relative name of the defining module by public name, such as ``".judge.judge"``.
        extra: extra of mteditflow that the message of a failed import suggests; None if every
            installation has all imports.
    """

    def load(name: str) -> Any:
        module = f"{package}.{name}"
        if name not in table and find_spec(module) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            if name not in table:  # a submodule, as if the package had imported it
                return import_module(module)
            value = getattr(import_module(table[name], package), name)
        except ImportError as error:
            missing = (error.name or "").partition(".")[0]
            # A failed import of mteditflow's own is a fault of ours, which an extra does not mend.
            if extra is None or missing in ("", "mteditflow"):
                raise
            fix = f"pip install 'mteditflow[{extra}]'"
            raise ImportError(f"{package}.{name} needs {missing}: {fix}", name=missing) from error
        setattr(sys.modules[package], name, value)  # later accesses do not come here
        return value

    return load, lambda: sorted({*vars(sys.modules[package]), *table})
