"""The objects of an image, and how an edit changes one of them."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict

from mteditflow.planner.edits import (
    BackgroundChange,
    ColorAlter,
    Count,
    CountChange,
    Edit,
    EditError,
    MaterialAlter,
    Name,
    Slot,
    SubjectRemove,
    SubjectReplace,
    TextChange,
)


class ListedObject(BaseModel):
    """An object as a model lists it; ``None`` where an attribute is not known.

    Attributes:
        name: what it is called, told apart from every other object of the image.
        color: its colour, as one or two words.
        material: what it is made of.
        text: what is written on it.
        count: how many of it there are, 1..20.
        foreground: whether it is a thing in front rather than a part of the background.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: Name
    color: Slot | None = None
    material: Slot | None = None
    text: Slot | None = None
    count: Count | None = None
    foreground: bool = True


class SceneObject(ListedObject):
    """An object of the pool.

    Attributes:
        original: whether it comes from the reference image; one that replaces an original does.
        edited: whether an edit has changed it.
    """

    original: bool = True
    edited: bool = False


def changed(x: SceneObject, edit: Edit) -> SceneObject | None:
    """Return the object after the edit, ``None`` if it is gone."""
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
    """Put a word into a name: in the place of the old one, or before the name."""
    if _has_word(x.name, new):
        raise EditError(f"{x.name}: its name already says {new!r}")
    if old and _has_word(x.name, old):
        return {"name": re.sub(_word(old), lambda _: new, x.name, count=1, flags=re.IGNORECASE)}
    return {"name": f"{new} {x.name}"}


def _word(text: str) -> str:
    return rf"(?<!\w){re.escape(text)}(?!\w)"


def _has_word(text: str, word: str) -> bool:
    return re.search(_word(word), text, re.IGNORECASE) is not None
