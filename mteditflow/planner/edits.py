"""The nine edit types: their slots, and the fixed form of their instruction, both ways.

Here an edit is checked on its own: whether its slots exist and differ where they must. Whether it
is possible in an image is checked in ``mteditflow.planner.pool``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from mteditflow.chains import TaskType
from mteditflow.chains.record import first_error

Position = Literal["left", "right", "above", "below"]
LENGTH_MAX = 80  # characters of a slot
COUNT_MAX = 20  # a person would not count more objects in an image


def _slot(text: str) -> str:
    """Return a slot as one line; refuse the brackets that mark slots in an instruction."""
    if re.search(r"[\[\]\x00-\x1f\x7f]", text):
        raise ValueError(f"expected one line without square brackets, got {text!r}")
    return " ".join(text.split())


def _name(text: str) -> str:
    if not any(character.isalnum() for character in text):
        raise ValueError(f"expected a name with a letter or digit, got {text!r}")
    return text


_ONE_LINE = StringConstraints(strip_whitespace=True, min_length=1, max_length=LENGTH_MAX)
Slot = Annotated[str, _ONE_LINE, AfterValidator(_slot)]
Name = Annotated[Slot, AfterValidator(_name)]
Count = Annotated[int, Field(ge=1, le=COUNT_MAX)]


class EditError(ValueError):
    """An edit is impossible in a pool."""


class Edit(BaseModel):
    """Base class of edits, with a subclass per edit type whose fields are its slots.

    Attributes:
        task: the edit type.
        patterns: forms of the instruction. All are parsed; the first one whose slots are all given
            is written.

    Source: EdiVal-Bench (arXiv 2509.13399) for the types and their forms.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    task: ClassVar[TaskType]
    patterns: ClassVar[tuple[str, ...]]

    @property
    def touched(self) -> tuple[str, ...]:
        """Return the names of the objects that the edit changes."""
        target: str | None = getattr(self, "target", None)
        return () if target is None else (target,)

    def formatted(self) -> str:
        """Return the instruction in the fixed form of its type.

        Example:
            >>> SubjectAdd(name="lamp", position="left", reference="red sofa").formatted()
            'Add [lamp] on the [left] of [red sofa]'
        """
        slots = {slot: value for slot, value in self if value not in (None, ())}
        if "kept" in slots:
            slots["kept"] = ", ".join(f"[{name}]" for name in slots["kept"])
        pattern = next(p for p in self.patterns if set(_slots_of(p)) <= set(slots))
        return pattern.format(**slots)


class SubjectAdd(Edit):
    """Add an object, beside another one or anywhere."""

    task = "subject_add"
    patterns = ("Add [{name}] on the [{position}] of [{reference}]", "Add [{name}]")
    name: Name
    position: Position | None = None
    reference: Name | None = None

    @model_validator(mode="after")
    def _both_or_neither(self) -> SubjectAdd:
        if (self.position is None) != (self.reference is None):
            raise ValueError("expected both position and reference, or neither")
        return self


class SubjectRemove(Edit):
    """Remove an object."""

    task = "subject_remove"
    patterns = ("Remove [{target}]",)
    target: Name


class SubjectReplace(Edit):
    """Replace an object by another one."""

    task = "subject_replace"
    patterns = ("Replace [{target}] with [{name}]",)
    target: Name
    name: Name

    @model_validator(mode="after")
    def _another_object(self) -> SubjectReplace:
        if self.target.casefold() == self.name.casefold():
            raise ValueError(f"expected another object than the target, got {self.name!r}")
        return self


class PositionChange(Edit):
    """Move an object to another place beside a reference."""

    task = "position_change"
    patterns = ("Change the position of [{target}] to [{position}] of [{reference}]",)
    target: Name
    position: Position
    reference: Name

    @property
    def touched(self) -> tuple[str, ...]:
        """Return both objects, since the position of one relative to the other is new."""
        return self.target, self.reference

    @model_validator(mode="after")
    def _two_objects(self) -> PositionChange:
        if self.target == self.reference:
            raise ValueError(f"expected another reference than the target, got {self.target!r}")
        return self


class CountChange(Edit):
    """Change the count of an object."""

    task = "count_change"
    patterns = ("Change the count of [{target}] to [{count}]",)
    target: Name
    count: Count


class ColorAlter(Edit):
    """Change the color of an object."""

    task = "color_alter"
    patterns = ("Change the color of [{target}] to [{color}]",)
    target: Name
    color: Slot


class MaterialAlter(Edit):
    """Change the material of an object."""

    task = "material_alter"
    patterns = ("Change the material of [{target}] to [{material}]",)
    target: Name
    material: Slot


class TextChange(Edit):
    """Replace the text on an object, or add text to the image."""

    task = "text_change"
    patterns = (
        "Replace the text '[{old}]' on [{target}] with '[{new}]'",
        "Add text '[{new}]' on the image",
    )
    new: Slot
    old: Slot | None = None
    target: Name | None = None

    @model_validator(mode="after")
    def _both_or_neither(self) -> TextChange:
        if (self.old is None) != (self.target is None):
            raise ValueError("expected both old and target, or neither")
        if self.old == self.new:
            raise ValueError(f"expected a new text, got the old one, {self.old!r}")
        return self


class BackgroundChange(Edit):
    """Change the background, and keep the objects in ``kept``."""

    task = "background_change"
    patterns = (
        "Change the background to [{background}], while keeping the {kept} unchanged",
        "Change the background to [{background}], remain the {kept} unchanged",
        "Change the background to [{background}]",
    )
    background: Slot
    kept: tuple[Name, ...] = ()


#: Edit class of each task type, in the order of definition above.
EDITS: Mapping[TaskType, type[Edit]] = {edit.task: edit for edit in Edit.__subclasses__()}


def _slots_of(pattern: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", pattern)


def parse_formatted(text: str) -> Edit:
    """Parse a formatted instruction: the inverse of ``Edit.formatted``.

    Case, outer quotes, a final period, and brackets around a position are ignored.

    Args:
        text: a formatted instruction, such as "Change the count of [cup] to [3]".

    Returns:
        The edit, of the class of its type.

    Raises:
        ValueError: the text has none of the forms, or a slot is invalid.

    Source: EdiVal-Bench (arXiv 2509.13399).

    Example:
        >>> parse_formatted("Change the background to [beach], remain the [dog] unchanged")
        BackgroundChange(background='beach', kept=('dog',))
    """
    line = unquoted(text).removesuffix(".")
    for kind, regex in _FORMS:
        if match := regex.fullmatch(line):
            return _build(kind, match.groupdict(), text)
    raise ValueError(f"formatted instruction: expected a form of the nine edit types, got {text!r}")


def _build(kind: type[Edit], slots: dict[str, Any], text: str) -> Edit:
    if "position" in slots:
        slots["position"] = slots["position"].lower()
    if "kept" in slots:
        slots["kept"] = _names(slots["kept"])
    try:
        return kind.model_validate(slots, strict=False)
    except ValidationError as error:
        raise ValueError(f"formatted instruction {text!r}: {first_error(error)}") from error


def unquoted(text: str) -> str:
    """Return a text as one line, without quotes that enclose all of it."""
    line = " ".join(text.split())
    for quotes in ('""', "''", "\u201c\u201d", "\u2018\u2019"):
        inner = line[1:-1]
        # Quotes inside as well would be those of two quoted parts, not of the whole.
        if line[:1] + line[-1:] == quotes and not set(quotes) & set(inner):
            return inner.strip()
    return line


def _names(listed: str) -> tuple[str, ...]:
    """Return the names in brackets; without brackets, the names between commas and "and"."""
    bracketed = re.findall(r"\[([^\[\]]+)\]", listed)
    return tuple(bracketed or re.split(r"\s*,\s*(?:and\s+)?|\s+and\s+", listed))


def _regex(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern; the text between slots is literal."""
    special = {
        "position": r"\[?(?P<position>left|right|above|below)\]?",
        "kept": r"(?P<kept>\S.*?)",
    }
    # With one group, ``split`` alternates between literal text and slot names.
    parts = re.split(r"\[?\{(\w+)\}\]?", pattern)
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = (special.get(x, rf"\[(?P<{x}>[^\[\]]+)\]") for x in parts[1::2])
    return re.compile("".join(parts), re.IGNORECASE)


_FORMS = [(kind, _regex(pattern)) for kind in EDITS.values() for pattern in kind.patterns]
