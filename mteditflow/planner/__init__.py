"""Planning of chains of edits that are possible at every turn, from images alone.

Needs the extra ``mteditflow[rewards]``: the planner uses the client of the judge and the
detector of content consistency.
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
    parse_formatted,
)
from mteditflow.planner.plan import Planner, PlanningStoppedError, Refused, Scene
from mteditflow.planner.pool import ListedObject, Pool, SceneObject, chain_fields
from mteditflow.planner.run import Planned, RefusedChain, plan_folder

__all__ = [
    "EDITS",
    "BackgroundChange",
    "ColorAlter",
    "CountChange",
    "Edit",
    "EditError",
    "ListedObject",
    "MaterialAlter",
    "Planned",
    "Planner",
    "PlanningStoppedError",
    "Pool",
    "PositionChange",
    "Refused",
    "RefusedChain",
    "Scene",
    "SceneObject",
    "SubjectAdd",
    "SubjectRemove",
    "SubjectReplace",
    "TextChange",
    "chain_fields",
    "parse_formatted",
    "plan_folder",
]
