"""The nine edit types: their slots, and the fixed form of their instruction, written and read.

An edit is checked on its own here: its slots are there and differ where they must. Whether it makes
sense in an image is for ``mteditflow.planner.pool``.
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
COUNT_MAX = 20  # nobody counts more things in an image


def _slot(text: str) -> str:
    """One line without the brackets that mark a slot in a formatted instruction."""
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
    """The edit makes no sense in this pool."""


class Edit(BaseModel):
    """One edit: a subclass for each type, with its slots as fields.

    Attributes:
        task: the edit type.
        patterns: the forms of the instruction that are read; the first one whose slots are all
            there is written.

    Source: EdiVal-Bench (arXiv 2509.13399) for the types and their forms.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    task: ClassVar[TaskType]
    patterns: ClassVar[tuple[str, ...]]

    @property
    def touched(self) -> tuple[str, ...]:
        """Names of the objects that the edit changes."""
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
    """A new object, beside another one or anywhere."""

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
    """An object goes."""

    task = "subject_remove"
    patterns = ("Remove [{target}]",)
    target: Name


class SubjectReplace(Edit):
    """Another object in the place of one."""

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
    """An object moves to another place beside a reference."""

    task = "position_change"
    patterns = ("Change the position of [{target}] to [{position}] of [{reference}]",)
    target: Name
    position: Position
    reference: Name

    @property
    def touched(self) -> tuple[str, ...]:
        """Both objects: the place of one beside the other is new."""
        return self.target, self.reference

    @model_validator(mode="after")
    def _two_objects(self) -> PositionChange:
        if self.target == self.reference:
            raise ValueError(f"expected another reference than the target, got {self.target!r}")
        return self


class CountChange(Edit):
    """More or fewer of an object."""

    task = "count_change"
    patterns = ("Change the count of [{target}] to [{count}]",)
    target: Name
    count: Count


class ColorAlter(Edit):
    """An object in another color."""

    task = "color_alter"
    patterns = ("Change the color of [{target}] to [{color}]",)
    target: Name
    color: Slot


class MaterialAlter(Edit):
    """An object of another material."""

    task = "material_alter"
    patterns = ("Change the material of [{target}] to [{material}]",)
    target: Name
    material: Slot


class TextChange(Edit):
    """Another text on an object, or a new one on the image."""

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
    """Another background behind the objects that are kept."""

    task = "background_change"
    patterns = (
        "Change the background to [{background}], while keeping the {kept} unchanged",
        "Change the background to [{background}], remain the {kept} unchanged",
        "Change the background to [{background}]",
    )
    background: Slot
    kept: tuple[Name, ...] = ()


#: The class of edit of each task type, in the order of their definition above.
EDITS: Mapping[TaskType, type[Edit]] = {edit.task: edit for edit in Edit.__subclasses__()}


def _slots_of(pattern: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", pattern)


def parse_formatted(text: str) -> Edit:
    """Read a formatted instruction: the inverse of ``Edit.formatted``.

    Case, outer quotes, a full stop at the end, and brackets around a position do not matter.

    Args:
        text: such as "Change the count of [cup] to [3]".

    Returns:
        The edit, of the class of its type.

    Raises:
        ValueError: the text has none of the forms, or a slot is not what it must be.

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
    """Return a text as one line, without quotes that stand around the whole of it."""
    line = " ".join(text.split())
    for quotes in ('""', "''", "\u201c\u201d", "\u2018\u2019"):
        inner = line[1:-1]
        if line[:1] + line[-1:] == quotes and not set(quotes) & set(inner):
            return inner.strip()
    return line


def _names(listed: str) -> tuple[str, ...]:
    """Names in brackets, or between commas and "and" where there are none."""
    bracketed = re.findall(r"\[([^\[\]]+)\]", listed)
    return tuple(bracketed or re.split(r"\s*,\s*(?:and\s+)?|\s+and\s+", listed))


def _regex(pattern: str) -> re.Pattern[str]:
    """Turn a pattern into what matches it: the text between slots is literal."""
    special = {
        "position": r"\[?(?P<position>left|right|above|below)\]?",
        "kept": r"(?P<kept>\S.*?)",
    }
    parts = re.split(r"\[?\{(\w+)\}\]?", pattern)
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = (special.get(x, rf"\[(?P<{x}>[^\[\]]+)\]") for x in parts[1::2])
    return re.compile("".join(parts), re.IGNORECASE)


_FORMS = [(kind, _regex(pattern)) for kind in EDITS.values() for pattern in kind.patterns]
