"""Tiny pipelines of the real diffusers classes: what ``make support`` records and trains.

Every module here may expose ``FAMILIES``, ``REFUSED`` and ``NOT_BUILT`` (class to reason).
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from .base import Family, Refused

_MODULES = [
    importlib.import_module(f".{module.name}", __name__)
    for module in pkgutil.iter_modules(__path__)
]


def _joined(name: str) -> dict[str, Any]:
    """All entries of the modules' tables of that name."""
    return {key: x for module in _MODULES for key, x in getattr(module, name, {}).items()}


FAMILIES: dict[str, Family] = _joined("FAMILIES")
REFUSED: dict[str, Refused] = _joined("REFUSED")
NOT_BUILT: dict[str, str] = _joined("NOT_BUILT")
