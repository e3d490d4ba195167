"""Chains of edits: the native record, file formats, data sets and samplers.

Needs the extra ``mteditflow[chains]``.
"""

try:
    import PIL  # noqa: F401
    import pydantic  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"mteditflow.chains needs {error.name}: pip install 'mteditflow[chains]'"
    ) from error

from mteditflow.chains.dataset import Batch, ChainDataset, Example, collate_chains
from mteditflow.chains.edited import EditedImages
from mteditflow.chains.files import (
    Reading,
    Refused,
    Skipped,
    Writing,
    iter_chains,
    read_chains,
    recognize,
    write_chains,
)
from mteditflow.chains.formats import FORMATS
from mteditflow.chains.no_change import no_change_chains
from mteditflow.chains.record import NO_CHANGE, TASK_TYPES, Chain, ChainError, History, TaskType
from mteditflow.chains.sampler import GroupSampler, InformativeSampler
from mteditflow.chains.split import Shared, Split, shared, split_chains

__all__ = [
    "FORMATS",
    "NO_CHANGE",
    "TASK_TYPES",
    "Batch",
    "Chain",
    "ChainDataset",
    "ChainError",
    "EditedImages",
    "Example",
    "GroupSampler",
    "History",
    "InformativeSampler",
    "Reading",
    "Refused",
    "Shared",
    "Skipped",
    "Split",
    "TaskType",
    "Writing",
    "collate_chains",
    "iter_chains",
    "no_change_chains",
    "read_chains",
    "recognize",
    "shared",
    "split_chains",
    "write_chains",
]
