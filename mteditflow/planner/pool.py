"""Object pool: the objects of an image, and the effect of each edit on them. No model is called.

A pool is immutable: ``Pool.apply`` returns the next one, or raises if the edit is impossible. A
name denotes one object in the whole chain, and is never reused for another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict

from mteditflow.chains import TaskType
from mteditflow.planner.edits import (
    LENGTH_MAX,
    BackgroundChange,
    ColorAlter,
    Count,
    CountChange,
    Edit,
    EditError,
    MaterialAlter,
    Name,
    Slot,
    SubjectAdd,
    SubjectRemove,
    SubjectReplace,
    TextChange,
)

TEXT = "text"  # name of text that an edit adds to the image, as in EdiVal-Bench


class ListedObject(BaseModel):
    """Object as a model lists it; an unknown attribute is ``None``.

    Attributes:
        name: name, unique in the image.
        color: color, one or two words.
        material: material of the object.
        text: text that is written on the object.
        count: number of such objects, in [1, 20].
        foreground: whether it is an object in front rather than a part of the background.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: Name
    color: Slot | None = None
    material: Slot | None = None
    text: Slot | None = None
    count: Count | None = None
    foreground: bool = True


class SceneObject(ListedObject):
    """Object of the pool.

    Attributes:
        original: whether it comes from the reference image, or replaces an object that does.
        edited: whether an edit has changed it.
    """

    original: bool = True
    edited: bool = False


def changed(x: SceneObject, edit: Edit) -> SceneObject | None:
    """Return the object after the edit; ``None`` if it is removed.

    Raises:
        EditError: an attribute would stay the same, or the old text is another one.
    """
    if isinstance(edit, BackgroundChange):
        return x if x.original and x.foreground else None
    if x.name not in edit.touched:
        return x
    new: dict[str, Any] = {}
    match edit:
        case SubjectRemove():
            return None
        case SubjectReplace():
            new = {"name": edit.name}
        case CountChange():
            new = _another(x, "count", edit.count)
        case ColorAlter():
            new = _another(x, "color", edit.color) | _reworded(x, x.color, edit.color)
        case MaterialAlter():
            new = _another(x, "material", edit.material) | _reworded(x, x.material, edit.material)
        case TextChange():
            if x.text != edit.old:
                raise EditError(f"{x.name}: expected the old text {x.text!r}, got {edit.old!r}")
            new = {"text": edit.new}
    return x.model_copy(update={**new, "edited": True})


def _another(x: SceneObject, attribute: str, value: Any) -> dict[str, Any]:
    known = getattr(x, attribute)
    if known is not None and str(known).casefold() == str(value).casefold():
        raise EditError(f"{x.name}: expected another {attribute} than {known!r}")
    return {attribute: value}


def _reworded(x: SceneObject, old: str | None, new: str) -> dict[str, Any]:
    """Return the update of a name by a new attribute: it replaces the old word or comes first."""
    if _has_word(x.name, new):
        raise EditError(f"{x.name}: its name already contains {new!r}")
    if old and _has_word(x.name, old):
        # A function as replacement: backslashes in the new word must not act as escapes.
        return {"name": re.sub(_word(old), lambda _: new, x.name, count=1, flags=re.IGNORECASE)}
    return {"name": f"{new} {x.name}"}


def _word(text: str) -> str:
    return rf"(?<!\w){re.escape(text)}(?!\w)"


def _has_word(text: str, word: str) -> bool:
    return re.search(_word(word), text, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Pool:
    """Objects of an image after some edits of one chain.

    Attributes:
        objects: objects that currently exist.
        names: every name used so far, in the order of use.
        edits: edits so far, in order.

    Source: EdiVal-Bench (arXiv 2509.13399) and MT-EditFlow (arXiv 2606.01985) for the rules.

    Example:
        >>> from mteditflow.planner import ColorAlter, ListedObject, SubjectRemove
        >>> pool = Pool.of([ListedObject(name="red car", color="red"), ListedObject(name="dog")])
        >>> pool = pool.apply(ColorAlter(target="red car", color="blue"))
        >>> pool.available, pool.unchanged, pool.names
        (('blue car', 'dog'), ('dog',), ('red car', 'dog', 'blue car'))
        >>> pool.apply(SubjectRemove(target="red car"))
        Traceback (most recent call last):
        mteditflow.planner.edits.EditError: expected one of ['blue car', 'dog'], got 'red car'
    """

    objects: tuple[SceneObject, ...]
    names: tuple[str, ...]
    edits: tuple[Edit, ...] = ()

    @classmethod
    def of(cls, objects: Sequence[ListedObject]) -> Pool:
        """Return the pool of an unedited image.

        Raises:
            ValueError: two objects have the same name, ignoring case.
        """
        names = tuple(listed.name for listed in objects)
        repeated = [name for i, name in enumerate(names) if _among(name, names[:i])]
        if repeated:
            raise ValueError(f"objects: expected unique names, got {repeated[0]!r} twice")
        return cls(tuple(SceneObject(**listed.model_dump()) for listed in objects), names)

    @property
    def available(self) -> tuple[str, ...]:
        """Return the names of the objects that currently exist."""
        return tuple(x.name for x in self.objects)

    @property
    def unchanged(self) -> tuple[str, ...]:
        """Return the names of the original objects that no edit has changed or removed."""
        return tuple(x.name for x in self.objects if x.original and not x.edited)

    @property
    def lasting(self) -> tuple[str, ...]:
        """Return the names of the original foreground objects, which a new background keeps."""
        return tuple(x.name for x in self.objects if x.original and x.foreground)

    @property
    def same_background(self) -> bool:
        """Return whether the background is still that of the reference image."""
        return not any(isinstance(edit, BackgroundChange) for edit in self.edits)

    def obstacle(self, task: TaskType) -> str | None:
        """Return the reason why no edit of this type is possible now; ``None`` if one may be."""
        needed = {
            "subject_add": 0,
            "text_change": 0,
            "subject_remove": 2,
            "position_change": 2,
        }.get(task, 1)
        if len(self.objects) < needed:
            return f"{task} needs {needed} objects, there are {len(self.objects)}"
        if task == "background_change" and not self.lasting:
            return "background_change needs an original object in the foreground"
        if task == "background_change" and self.edits[-1:] and self.edits[-1].task == task:
            return "background_change has only just been made"
        return None

    def apply(self, edit: Edit) -> Pool:
        """Return the pool after an edit.

        - ``subject_remove`` deletes the object, and ``subject_add`` inserts one.
        - ``subject_replace`` renames it and keeps the attributes.
        - ``color_alter`` and ``material_alter`` set the attribute and put its word into the name,
          in place of the old word or before the name.
        - ``count_change`` and ``text_change`` set the attribute. Text added to the image itself is
          no object to edit, but its name counts as used.
        - ``position_change`` changes no attribute.
        - After ``background_change`` only the original foreground objects remain.

        The touched objects count as edited: both objects of a position, none of an addition.

        Args:
            edit: an edit of one of the nine types.

        Raises:
            EditError: the edit is impossible in this pool.
        """
        self._check(edit)
        objects = [changed(x, edit) for x in self.objects]
        new = [y.name for x, y in zip(self.objects, objects, strict=True) if y and y.name != x.name]
        if isinstance(edit, SubjectAdd):
            objects.append(SceneObject(name=edit.name, original=False))
            new.append(edit.name)
        if isinstance(edit, TextChange) and edit.target is None and not _among(TEXT, self.names):
            new.append(TEXT)
        for name in new:
            if _among(name, self.names) or len(name) > LENGTH_MAX:
                raise EditError(
                    f"expected a name of up to {LENGTH_MAX} characters that the chain has not "
                    f"used, got {name!r}"
                )
        there = tuple(x for x in objects if x is not None)
        return Pool(there, (*self.names, *new), (*self.edits, edit))

    def _check(self, edit: Edit) -> None:
        """Raise ``EditError`` for faults that are evident before the edit is applied."""
        if reason := self.obstacle(edit.task):
            raise EditError(reason)
        for name in (*edit.touched, getattr(edit, "reference", None)):
            if name is not None and name not in self.available:
                raise EditError(f"expected one of {list(self.available)}, got {name!r}")
        if isinstance(edit, BackgroundChange) and set(edit.kept) != set(self.lasting):
            raise EditError(f"expected kept to be {list(self.lasting)}, got {list(edit.kept)}")


def chain_fields(pools: Sequence[Pool]) -> dict[str, Any]:
    """Return the fields of a ``Chain`` that follow from its pools, one entry per turn.

    Args:
        pools: N + 1 pools: that of the image, then the pool after each edit.

    Example:
        >>> from mteditflow.planner import ListedObject, SubjectRemove
        >>> pool = Pool.of([ListedObject(name="cat"), ListedObject(name="dog")])
        >>> fields = chain_fields([pool, pool.apply(SubjectRemove(target="cat"))])
        >>> fields["formatted_instructions"], fields["available_objects"]
        (('Remove [cat]',), (('dog',),))
    """
    edits, after = pools[-1].edits, pools[1:]
    return {
        "task_types": tuple(edit.task for edit in edits),
        "formatted_instructions": tuple(edit.formatted() for edit in edits),
        "unchanged_objects": tuple(pool.unchanged for pool in after),
        "turn_unchanged_objects": tuple(_left_alone(*pair) for pair in pairwise(pools)),
        "all_objects": tuple(pool.names for pool in after),
        "available_objects": tuple(pool.available for pool in after),
        "background_consistency": tuple(pool.same_background for pool in after),
    }


def _left_alone(before: Pool, after: Pool) -> tuple[str, ...]:
    touched = after.edits[-1].touched
    return tuple(x for x in after.available if x in before.available and x not in touched)


def _among(name: str, names: Sequence[str]) -> bool:
    return name.casefold() in (other.casefold() for other in names)
