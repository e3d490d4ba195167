"""Scenes of the world of pictures, and rule-based edits.

A scene has a background, up to four everyday things, each in its own place, and sometimes a word on
a sign. No kind of thing occurs twice, so "the red house" is never ambiguous, even if an earlier
turn made it. All nine usual types of edit exist, and an instruction that asks for no change.

A hash of its content assigns every scene to one of two splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

Split = Literal["train", "held_out"]

KINDS = {  # singular: plural
    "house": "houses",
    "tree": "trees",
    "car": "cars",
    "ball": "balls",
    "mushroom": "mushrooms",
    "flower": "flowers",
    "balloon": "balloons",
    "rocket": "rockets",
}
COLORS = ("red", "orange", "yellow", "green", "blue", "purple")
MATERIALS = ("plain", "striped", "dotted")
COUNTS = ("one", "two")
PLACES = ("back left", "back right", "front left", "front right")
BACKGROUNDS = ("meadow", "beach", "desert", "snow", "night")
TEXTS = ("HOME", "PLAY", "OPEN", "SALE", "LOVE", "STOP", "ZOO", "FUN")
NO_CHANGE = "Keep everything as it is"
VERBS = ("Add", "Remove", "Replace", "Move", "Change", "Make", "Paint")
SMALL = ("a", "an", "the", "at", "with", "to", "of", "number", "background", "text")
SIDES = ("back", "front", "left", "right")
WORDS = tuple(
    dict.fromkeys(
        (
            *VERBS,
            *SMALL,
            *NO_CHANGE.split(),
            *KINDS,
            *KINDS.values(),
            *COLORS,
            *MATERIALS,
            *COUNTS,
            *SIDES,
            *BACKGROUNDS,
            *TEXTS,
        )
    )
)
HELD_OUT_SHARE = 0.25
SPLITS: tuple[Split, ...] = ("train", "held_out")


@dataclass(frozen=True)
class Thing:
    """One or two equal things in one place."""

    kind: str
    color: str
    material: str
    count: str
    place: str

    @property
    def name(self) -> str:
        """Color and kind, such as "red house"; the plural if there are two."""
        return f"{self.color} {self.kind if self.count == 'one' else KINDS[self.kind]}"


@dataclass(frozen=True)
class Scene:
    """Background, word on the sign ("" for none), and things in the order of PLACES."""

    background: str
    text: str
    things: tuple[Thing, ...]

    def find(self, kind: str) -> Thing | None:
        """Return the thing of a kind, or None."""
        return next((thing for thing in self.things if thing.kind == kind), None)

    @property
    def free_places(self) -> tuple[str, ...]:
        """Empty places."""
        taken = {thing.place for thing in self.things}
        return tuple(place for place in PLACES if place not in taken)

    @cached_property
    def split(self) -> Split:
        """Split of this scene."""
        first = hashlib.sha256(repr(self).encode()).digest()[0]
        return "held_out" if first < 256 * HELD_OUT_SHARE else "train"

    def to_record(self) -> dict[str, Any]:
        """Return the scene as JSON values."""
        return {
            "background": self.background,
            "text": self.text,
            "things": [list(vars(thing).values()) for thing in self.things],
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Scene:
        """Return the scene of JSON values from ``to_record``.

        Raises:
            ValueError: the record describes no scene of this world.
        """
        try:
            things = tuple(Thing(*values) for values in record["things"])
            scene = cls(record["background"], record["text"], things)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"scene: expected background, text and things, got {record}"
            ) from error
        for thing in things:
            known = ((thing.kind, KINDS), (thing.color, COLORS), (thing.material, MATERIALS))
            if any(x not in y for x, y in (*known, (thing.count, COUNTS), (thing.place, PLACES))):
                raise ValueError(f"scene: expected a thing of this world, got {thing}")
        if scene.background not in BACKGROUNDS or scene.text not in ("", *TEXTS):
            raise ValueError(f"scene: expected a background and a text of this world, got {record}")
        return scene


@dataclass(frozen=True)
class Edit:
    """One instruction and its correct result.

    Attributes:
        task_type: type of edit, one of ``mteditflow.chains.TASK_TYPES``.
        instruction: text of at most eight words, all from WORDS.
        kinds: kinds of the edited things, before and after.
        result: scene after a perfect edit.
    """

    task_type: str
    instruction: str
    kinds: tuple[str, ...]
    result: Scene


def possible_edits(scene: Scene) -> Iterator[Edit]:
    """Yield every valid edit of a scene that changes its picture.

    A removal leaves at least one thing. An added or replacing thing is of a kind that the scene
    lacks.
    """
    absent = [kind for kind in KINDS if scene.find(kind) is None]
    for value in BACKGROUNDS:
        if value != scene.background:
            after = replace(scene, background=value)
            yield Edit("background_change", f"Change the background to {value}", (), after)
    for value in TEXTS:
        if value != scene.text:
            after = replace(scene, text=value)
            yield Edit("text_change", f"Change the text to {value}", (), after)
    for place in scene.free_places:
        for kind in absent:
            for color in COLORS:
                new = Thing(kind, color, "plain", "one", place)
                article = "an" if color[0] in "aeiou" else "a"
                instruction = f"Add {article} {new.name} at {place}"
                yield Edit("subject_add", instruction, (kind,), _with(scene, new))
    for thing in scene.things:
        yield from _edits_of(scene, thing, absent)


def _edits_of(scene: Scene, thing: Thing, absent: list[str]) -> Iterator[Edit]:
    """Yield the valid edits of one thing; ``absent`` are the kinds that the scene lacks."""
    kind, name = thing.kind, thing.name
    if len(scene.things) > 1:
        yield Edit("subject_remove", f"Remove the {name}", (kind,), _with(scene, old=thing))
    for value in absent:
        after = _with(scene, replace(thing, kind=value), old=thing)
        shown = value if thing.count == "one" else KINDS[value]
        instruction = f"Replace the {name} with {'a ' if thing.count == 'one' else ''}{shown}"
        yield Edit("subject_replace", instruction, (kind, value), after)
    for value in scene.free_places:
        after = _with(scene, replace(thing, place=value), old=thing)
        yield Edit("position_change", f"Move the {name} to {value}", (kind,), after)
    for value in COUNTS:
        if value != thing.count:
            after = _with(scene, replace(thing, count=value), old=thing)
            instruction = f"Change the number of {thing.color} {KINDS[kind]} to {value}"
            yield Edit("count_change", instruction, (kind,), after)
    for value in COLORS:
        if value != thing.color:
            after = _with(scene, replace(thing, color=value), old=thing)
            yield Edit("color_alter", f"Paint the {name} {value}", (kind,), after)
    for value in MATERIALS:
        if value != thing.material:
            after = _with(scene, replace(thing, material=value), old=thing)
            yield Edit("material_alter", f"Make the {name} {value}", (kind,), after)


def no_change(scene: Scene) -> Edit:
    """Return the edit that asks for no change."""
    return Edit("no_change", NO_CHANGE, (), scene)


def _with(scene: Scene, new: Thing | None = None, *, old: Thing | None = None) -> Scene:
    """Return the scene with ``old`` removed and ``new`` added, in the order of PLACES."""
    things = [thing for thing in scene.things if thing != old] + ([] if new is None else [new])
    return replace(scene, things=tuple(sorted(things, key=lambda x: PLACES.index(x.place))))
