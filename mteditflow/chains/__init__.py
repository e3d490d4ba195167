"""Chains of edits: the native record, the formats that users hold, data sets and samplers.

Needs the extra ``mteditflow[chains]``.
"""

try:
    import PIL  # noqa: F401
    import pydantic  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"mteditflow.chains needs {error.name}: pip install 'mteditflow[chains]'"
    ) from error

from mteditflow.chains.errors import ChainError
from mteditflow.chains.record import TASK_TYPES, Chain, TaskType

__all__ = ["TASK_TYPES", "Chain", "ChainError", "TaskType"]
