"""The native record of a chain: one reference image and N instructions that make sense in order."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

TaskType = Literal[
    "subject_add",
    "subject_remove",
    "subject_replace",
    "position_change",
    "count_change",
    "color_alter",
    "material_alter",
    "text_change",
    "background_change",
]
TASK_TYPES: tuple[str, ...] = get_args(TaskType)

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
Names = tuple[Text, ...]

PER_TURN = (
    "task_types",
    "formatted_instructions",
    "unchanged_objects",
    "turn_unchanged_objects",
    "all_objects",
    "available_objects",
    "background_consistency",
)


class Chain(BaseModel):
    """One reference image and N instructions; lists over turns have N entries, ``None`` if unknown.

    Unknown keys are kept, and written again.

    Attributes:
        id: names the chain; unique in a file.
        image: path of the reference image, relative to the file that the chain stands in.
        instructions: what to do at each turn, in words.
        task_types: one of the nine edit types at each turn.
        formatted_instructions: the instruction in the fixed form of its edit type.
        unchanged_objects: originals that no turn up to this one edited and that are still there.
        turn_unchanged_objects: objects that this turn alone leaves as they were.
        all_objects: every object name used up to this turn.
        available_objects: the object pool after this turn.
        background_consistency: whether the background must still be that of the reference, so
            false from the first background change on.
        root: folder that ``image`` is relative to; not written.

    Source: EdiVal-Bench (arXiv 2509.13399) for the fields, MT-EditFlow (arXiv 2606.01985).

    Example:
        >>> chain = Chain(id="7", image="7.png", instructions=("Remove the cat", "Add a dog"))
        >>> chain.turns
        2
        >>> Chain.model_validate_json(chain.model_dump_json(exclude_none=True)) == chain
        True
    """

    model_config = ConfigDict(frozen=True, extra="allow", title="mteditflow chain")

    id: Text
    image: Text
    instructions: Annotated[tuple[Text, ...], Field(min_length=1)]
    task_types: tuple[TaskType, ...] | None = None
    formatted_instructions: tuple[Text, ...] | None = None
    unchanged_objects: tuple[Names, ...] | None = None
    turn_unchanged_objects: tuple[Names, ...] | None = None
    all_objects: tuple[Names, ...] | None = None
    available_objects: tuple[Names, ...] | None = None
    background_consistency: tuple[bool, ...] | None = None
    root: Annotated[Path, Field(exclude=True)] = Path()

    @model_validator(mode="after")
    def _one_entry_per_turn(self) -> Chain:
        for name in PER_TURN:
            values = getattr(self, name)
            if values is not None and len(values) != self.turns:
                raise ValueError(
                    f"{name}: expected one entry for each of the {self.turns} instructions, "
                    f"got {len(values)}"
                )
        return self

    @property
    def turns(self) -> int:
        """Number of instructions, N."""
        return len(self.instructions)

    @property
    def image_path(self) -> Path:
        """Where the reference image lies."""
        return self.root / self.image
