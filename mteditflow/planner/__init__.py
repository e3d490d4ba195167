"""Planning chains of edits that make sense at every turn, from images alone.

Needs the extra ``mteditflow[rewards]``: the planner asks through the judge's client and looks
through the detector of content consistency.
"""

from mteditflow.planner.edits import (
    EDITS,
    BackgroundChange,
    ColorAlter,
    CountChange,
    Edit,
    EditError,
    MaterialAlter,
    PositionChange,
    SubjectAdd,
    SubjectRemove,
    SubjectReplace,
    TextChange,
)
from mteditflow.planner.formatted import parse_formatted
from mteditflow.planner.objects import ListedObject, SceneObject
from mteditflow.planner.pool import Pool, chain_fields

__all__ = [
    "EDITS",
    "BackgroundChange",
    "ColorAlter",
    "CountChange",
    "Edit",
    "EditError",
    "ListedObject",
    "MaterialAlter",
    "Pool",
    "PositionChange",
    "SceneObject",
    "SubjectAdd",
    "SubjectRemove",
    "SubjectReplace",
    "TextChange",
    "chain_fields",
    "parse_formatted",
]
