"""The native record of a chain: one reference image and N instructions to apply in order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator
from pydantic.json_schema import SkipJsonSchema

from mteditflow._checks import check_choice

SHOWN = 80  # characters of a value that a message quotes
# Type of a pydantic error to the words of a message; other types keep pydantic's words.
EXPECTED = {
    "bool_type": "true or false",
    "extra_forbidden": "no such field",
    "string_pattern_mismatch": "text that is not empty",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "text that is not empty",
    "string_type": "text",
    "string_unicode": "valid Unicode text",
    "too_long": "at most {max_length} entries",
    "too_short": "at least one entry",
    "tuple_type": "a list",
}


class ChainError(ValueError):
    """Invalid chain record, unreadable chain file, or chain that a format cannot hold."""


def shorten(value: object, most: int = SHOWN) -> str:
    """Return the repr of a value, cut after ``most`` characters."""
    shown = repr(value)
    return shown if len(shown) <= most else shown[:most] + " ..."


def first_error(error: ValidationError) -> str:
    """Return the message of the first error: its place, the expectation and the value.

    Args:
        error: validation error of any pydantic model.

    Example:
        >>> from mteditflow.chains import Chain
        >>> try:
        ...     Chain(id="7", image="7.png", instructions=["Remove the cat", 3])
        ... except ValidationError as error:
        ...     first_error(error)
        'instructions[1]: expected text, got 3'
    """
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return f"expected JSON, got {shorten(first['input'])} ({first['ctx']['error']})"
    place = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in first["loc"])[1:]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "missing":
        return f"{place}: expected this field, got none"
    known = EXPECTED.get(first["type"], "").format(**first.get("ctx", {}))
    expected = known or first["msg"].removeprefix("Input should be ")
    named = f"{place}: " if place else ""  # the whole value is wrong, no field of it
    return f"{named}expected {expected}, got {shorten(first['input'])}"


#: A type of edit, by its name in EdiVal-Bench, or "no_change" for a turn that asks for no edit.
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
    "no_change",
]
#: Every ``TaskType``.
TASK_TYPES: tuple[str, ...] = get_args(TaskType)
#: The ``TaskType`` of a turn that asks for no change: any difference after it is damage.
NO_CHANGE: TaskType = "no_change"

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
Names = tuple[Text, ...]

#: Reserved names in ``references``: the reference image, and the image of the turn before.
WORDS = ORIGINAL, LAST = "original", "last"
#: Default inputs of turns after the first: the last image, or the reference image and the last.
History = Literal["last", "original"]
#: Every ``History``.
HISTORIES: tuple[str, ...] = get_args(History)

PER_TURN = (
    "references",
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

    Unknown keys are kept in ``model_extra`` and written again in their order.

    Source: EdiVal-Bench (arXiv 2509.13399) for the fields, MT-EditFlow (arXiv 2606.01985).

    Example:
        >>> chain = Chain(id="7", image="7.png", instructions=("Remove the cat", "Add a dog"))
        >>> chain.turns
        2
        >>> print(chain.to_json())
        {"id": "7", "image": "7.png", "instructions": ["Remove the cat", "Add a dog"]}
        >>> Chain.from_record(chain.to_record()) == chain
        True
    """

    model_config = ConfigDict(
        frozen=True,
        extra="allow",
        title="mteditflow chain",
        use_attribute_docstrings=True,
        json_schema_extra={
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "description": "One reference image and N instructions. Lists over turns have N "
            "entries. Unknown keys are kept; the key 'root' is reserved.",
        },
    )

    id: Text
    """Identifier of the chain, unique in a file."""
    image: Text | None
    """Path of the reference image, relative to the file of chains, or its URL; null if there is
    none, as in text to image."""
    instructions: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Text of the edit at each turn."""
    references: tuple[Annotated[Names, Field(min_length=1)], ...] | None = None
    """Input images of the editor at each turn, in order: 'last' for the image of the turn before
    (at turn 1 the reference image), 'original' for the reference image, or the path of a further
    image. Such a path is relative as image is, and has a suffix or a '/'."""
    task_types: tuple[TaskType, ...] | None = None
    """Edit type of each turn: one of nine, or 'no_change'."""
    formatted_instructions: tuple[Text, ...] | None = None
    """Instruction of each turn in the fixed template of its edit type."""
    unchanged_objects: tuple[Names, ...] | None = None
    """Objects of the reference image that no turn so far has edited and that are still present."""
    turn_unchanged_objects: tuple[Names, ...] | None = None
    """Objects before this turn that the turn leaves unchanged."""
    all_objects: tuple[Names, ...] | None = None
    """Every object name used up to this turn."""
    available_objects: tuple[Names, ...] | None = None
    """Object pool after this turn."""
    background_consistency: tuple[StrictBool, ...] | None = None
    """Whether the background must still be that of the reference: false from the first background
    change on."""
    root: Annotated[SkipJsonSchema[Path], Field(exclude=True)] = Path()
    """Folder that ``image`` is relative to; not part of the record."""

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

    @model_validator(mode="after")
    def _known_references(self) -> Chain:
        if self.references is not None and self.image is None:
            raise ValueError("references: expected none in a chain without a reference image")
        for turn, names in enumerate(self.references or ()):
            for place, name in enumerate(names):
                if name not in WORDS and not is_path(name):
                    raise ValueError(
                        f"references[{turn}][{place}]: expected 'original', 'last' or the path of "
                        f"an image, got {shorten(name)}"
                    )
            # At turn 1 'last' is the reference image too, so the two words would repeat it.
            same = [ORIGINAL if turn == 0 and name == LAST else name for name in names]
            if twice := [name for name in dict.fromkeys(same) if same.count(name) > 1]:
                raise ValueError(
                    f"references[{turn}]: expected each image once"
                    + " ('last' of turn 1 is the original)" * (twice[0] == ORIGINAL and turn == 0)
                    + f", got {shorten(list(names))}"
                )
        return self

    @property
    def turns(self) -> int:
        """Number of instructions, N."""
        return len(self.instructions)

    def first_turns(self, turns: int) -> Chain:
        """Return the chain cut after a number of turns.

        Raises:
            ValueError: the chain has fewer turns, or ``turns`` is below 1.
        """
        if not 1 <= turns <= self.turns:
            raise ValueError(f"turns: expected one of 1..{self.turns}, got {turns}")
        cut = {name: values[:turns] for name in PER_TURN if (values := getattr(self, name))}
        return self.model_copy(update={"instructions": self.instructions[:turns], **cut})

    def seen(self, history: History = "last") -> tuple[Names, ...]:
        """Return the editor's input images at each turn: ``references``, else a default.

        Args:
            history: default for turns after the first in a chain without ``references``: "last" is
                the last image alone, "original" is the original and the last.

        Returns:
            Names of the inputs of each turn, [N][number of inputs].

        Raises:
            ValueError: ``history`` is none of these.

        Example:
            >>> chain = Chain(id="7", image="7.png", instructions=("Remove the cat", "Add a dog"))
            >>> chain.seen("original")
            (('last',), ('original', 'last'))
        """
        check_choice("history", history, HISTORIES)
        if self.references is not None:
            return self.references
        later: Names = (LAST,) if history == "last" else (ORIGINAL, LAST)
        return ((LAST,), *[later] * (self.turns - 1))

    @property
    def further_images(self) -> tuple[str, ...]:
        """Paths or URLs of images in ``references`` other than "original" and "last", each once."""
        names = (name for turn in self.references or () for name in turn)
        return tuple(dict.fromkeys(name for name in names if name not in WORDS))

    @property
    def reference(self) -> str:
        """Path or URL of the reference image.

        Raises:
            ChainError: the chain has none.
        """
        if self.image is None:
            raise ChainError(f"chain {self.id!r}: expected a reference image, got none")
        return self.image

    @property
    def image_path(self) -> Path:
        """Path of the reference image, joined to ``root``; meaningless for a URL.

        Raises:
            ChainError: the chain has none.
        """
        return self.root / self.reference

    @property
    def image_is_remote(self) -> bool:
        """Whether the reference image is a URL, which must be downloaded before use."""
        return self.image is not None and is_remote(self.image)

    @classmethod
    def from_record(cls, record: Mapping[str, Any], root: Path = Path()) -> Chain:
        """Build a chain from a parsed line.

        Args:
            record: keys and values of a parsed JSON object.
            root: folder that ``image`` is relative to.

        Raises:
            ChainError: a field is invalid; one line names the field, the expectation and the value.
        """
        if "root" in record:
            raise ChainError("root: expected no key of this reserved name")
        try:
            return cls.model_validate({**record, "root": root})
        except ValidationError as error:
            raise ChainError(first_error(error)) from error

    def to_record(self) -> dict[str, Any]:
        """Return the fields that are set, in their order, then unknown keys.

        ``image`` is present even if ``None``, ``root`` never.
        """
        fields = {name: getattr(self, name) for name in type(self).model_fields if name != "root"}
        known = {k: value for k, value in fields.items() if value is not None or k == "image"}
        return known | (self.model_extra or {})

    def to_json(self) -> str:
        """Return the record as one line of JSON, without the line break.

        Raises:
            ChainError: an unknown key has a value that JSON cannot represent.
        """
        return one_line(self.to_record())


def is_remote(name: str) -> bool:
    """Whether the name of an image is a URL."""
    return "://" in name


def is_path(name: str) -> bool:
    """Whether an entry of ``references`` is a path, by a suffix or a "/"."""
    return "/" in name or bool(PurePosixPath(name).suffix)


def one_line(record: object) -> str:
    """Return a record, or a list of them, as one line of JSON.

    Raises:
        ChainError: a value is none of JSON's, NaN and infinity included.
    """
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChainError(f"expected values that JSON can hold: {error}") from error
