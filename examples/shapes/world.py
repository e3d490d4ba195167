"""The shapes world: procedural images, rule-based edits, and chains of valid edits.

A picture has 12 x 12 pixels: a background and, in the four 6 x 6 cells of a grid, things of four
shapes, six colors and three materials. No shape and no color occurs twice in a picture, so that
"the red circle" is never ambiguous; its count may be two, and then both look alike and are edited
together.

Eight of the nine usual types of edit exist; there is no text to change. A hash of its content
assigns every picture to one of two splits, and all pictures of a chain are in one split. So
held-out chains share no picture, and no chain, with training data.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import torch

Split = Literal["train", "held_out"]

IMAGE_SIZE = 12
CELL = IMAGE_SIZE // 2
SHAPES = ("circle", "square", "triangle", "diamond")
COLORS = ("red", "green", "blue", "yellow", "magenta", "cyan")
MATERIALS = ("solid", "hollow", "striped")
BACKGROUNDS = ("white", "gray", "black")
CELLS = ("top left", "top right", "bottom left", "bottom right")
COUNTS = ("one", "two")
TASK_TYPES = (
    "subject_add",
    "subject_remove",
    "subject_replace",
    "position_change",
    "count_change",
    "color_alter",
    "material_alter",
    "background_change",
)
VERBS = ("Change", "Remove", "Add", "Replace", "Move")
NOUNS = ("the", "color", "material", "count", "background")
SMALL = ("of", "to", "a", "at", "with")
WORDS = (
    *VERBS,
    *NOUNS,
    *SMALL,
    *SHAPES,
    *COLORS,
    *BACKGROUNDS,
    *MATERIALS,
    *COUNTS,
    "top",
    "bottom",
    "left",
    "right",
)

PALETTE = torch.tensor(
    [
        (0.90, 0.16, 0.18),  # red
        (0.12, 0.66, 0.30),  # green
        (0.12, 0.34, 0.92),  # blue
        (1.00, 0.82, 0.10),  # yellow
        (0.85, 0.25, 0.80),  # magenta
        (0.10, 0.80, 0.85),  # cyan
        (0.97, 0.97, 0.97),  # white
        (0.55, 0.55, 0.55),  # gray
        (0.10, 0.10, 0.10),  # black
    ]
)
_INDEX = {name: i for i, name in enumerate((*COLORS, *BACKGROUNDS))}
_DRAWINGS = {
    "circle": (".###.", "#####", "#####", "#####", ".###."),
    "square": ("#####", "#####", "#####", "#####", "#####"),
    "triangle": ("..#..", ".###.", ".###.", "#####", "#####"),
    "diamond": ("..#..", ".###.", "#####", ".###.", "..#.."),
}


@dataclass(frozen=True)
class Thing:
    """Content of one cell, or of two cells with equal content: shape, color and material."""

    shape: str
    color: str
    material: str
    cells: tuple[int, ...]


@dataclass(frozen=True)
class State:
    """A picture before it is drawn: the background and the things, ordered as in SHAPES."""

    background: str
    things: tuple[Thing, ...]

    def find(self, shape: str) -> Thing | None:
        """Return the thing of that shape, or None."""
        return next((thing for thing in self.things if thing.shape == shape), None)

    @property
    def free_cells(self) -> tuple[int, ...]:
        """Empty cells in reading order."""
        taken = {cell for thing in self.things for cell in thing.cells}
        return tuple(cell for cell in range(len(CELLS)) if cell not in taken)

    @property
    def split(self) -> Split:
        """Split of this picture; one picture in four is held out."""
        # One byte of the hash: 64 of its 256 values are a quarter.
        return "held_out" if hashlib.sha256(repr(self).encode()).digest()[0] < 64 else "train"


@dataclass(frozen=True)
class Edit:
    """One instruction: task type, edited shape, and new value.

    Attributes:
        task_type: One of TASK_TYPES.
        color: The thing's color; empty for a background change.
        shape: The thing's shape; empty for a background change.
        value: The new shape, cell, count, color, material or background; empty for a removal.
    """

    task_type: str
    color: str
    shape: str
    value: str = ""

    @property
    def instruction(self) -> str:
        """Instruction text; at most eight words, all from WORDS."""
        name = f"{self.color} {self.shape}"
        return {
            "subject_add": f"Add a {name} at {self.value}",
            "subject_remove": f"Remove the {name}",
            "subject_replace": f"Replace the {name} with a {self.value}",
            "position_change": f"Move the {name} to {self.value}",
            "count_change": f"Change the count of {name} to {self.value}",
            "color_alter": f"Change the color of {name} to {self.value}",
            "material_alter": f"Change the material of {name} to {self.value}",
            "background_change": f"Change the background to {self.value}",
        }[self.task_type]

    def apply(self, state: State) -> State:
        """Return the state after a perfect edit of ``state``.

        Raises:
            ValueError: If the edit is not possible in ``state``.
        """
        if self not in possible_edits(state):
            raise ValueError(f"edit: expected one possible in {state}, got {self.instruction!r}")
        if self.task_type == "background_change":
            return replace(state, background=self.value)
        others = [thing for thing in state.things if thing.shape != self.shape]
        if self.task_type == "subject_remove":
            return _state(state.background, others)
        if self.task_type == "subject_add":
            new = Thing(self.shape, self.color, "solid", (CELLS.index(self.value),))
            return _state(state.background, [*others, new])
        old = state.find(self.shape)
        if self.task_type == "subject_replace":
            new = replace(old, shape=self.value)
        elif self.task_type == "position_change":
            new = replace(old, cells=(CELLS.index(self.value),))
        elif self.task_type == "color_alter":
            new = replace(old, color=self.value)
        elif self.task_type == "material_alter":
            new = replace(old, material=self.value)
        elif self.value == "two":  # the copy goes to the first free cell in reading order
            new = replace(old, cells=tuple(sorted((*old.cells, state.free_cells[0]))))
        else:  # the first one in reading order stays
            new = replace(old, cells=old.cells[:1])
        return _state(state.background, [*others, new])


@lru_cache(maxsize=4096)
def possible_edits(state: State) -> frozenset[Edit]:
    """Return every valid edit of ``state`` that changes its picture.

    A removal must leave at least one thing; new shapes and colors must be absent; moving needs a
    free cell and a count of one.
    """
    shapes = [shape for shape in SHAPES if state.find(shape) is None]
    colors = [color for color in COLORS if color not in {thing.color for thing in state.things}]
    free = [CELLS[cell] for cell in state.free_cells]
    edits = [
        Edit("background_change", "", "", value)
        for value in BACKGROUNDS
        if value != state.background
    ]
    edits += [
        Edit("subject_add", color, shape, cell)
        for color in colors
        for shape in shapes
        for cell in free
    ]
    for thing in state.things:
        options = {
            "subject_remove": [""] if len(state.things) > 1 else [],
            "subject_replace": shapes,
            "position_change": free if len(thing.cells) == 1 else [],
            "count_change": ["one"] if len(thing.cells) == 2 else ["two"] if free else [],
            "color_alter": colors,
            "material_alter": [value for value in MATERIALS if value != thing.material],
        }
        edits += [
            Edit(task_type, thing.color, thing.shape, value)
            for task_type, values in options.items()
            for value in values
        ]
    return frozenset(edits)


@dataclass(frozen=True)
class Chain:
    """An initial picture and edits, each valid after those before it."""

    initial: State
    edits: tuple[Edit, ...]

    @cached_property
    def states(self) -> tuple[State, ...]:
        """True states, N + 1: the initial one, then one after each turn."""
        states = [self.initial]
        for edit in self.edits:
            states.append(edit.apply(states[-1]))
        return tuple(states)

    @property
    def instructions(self) -> list[str]:
        """Instructions, N."""
        return [edit.instruction for edit in self.edits]

    @property
    def task_types(self) -> list[str]:
        """Task types, N, by the names that editing benchmarks use."""
        return [edit.task_type for edit in self.edits]


def random_state(rng: random.Random) -> State:
    """Draw a random picture of two or three things; one of them may be doubled."""
    shapes = rng.sample(SHAPES, rng.choice((2, 3)))
    cells = rng.sample(range(len(CELLS)), len(CELLS))
    things = []
    for i, (shape, color) in enumerate(zip(shapes, rng.sample(COLORS, len(shapes)), strict=True)):
        own = [cells.pop()]
        if i == 0 and rng.random() < 0.25:
            own.append(cells.pop())
        material = rng.choice(("solid", "solid", "hollow", "striped"))
        things.append(Thing(shape, color, material, tuple(sorted(own))))
    return _state(rng.choice(BACKGROUNDS), things)


def random_chain(rng: random.Random, turns: int, split: Split, *, linked: float = 0.0) -> Chain:
    """Draw a chain of ``turns`` edits whose pictures all belong to ``split``.

    Task types do not repeat while that is possible. One thing of the initial picture, the
    witness, is never edited, so every chain has something to keep.

    Args:
        rng: Source of randomness.
        turns: Number of instructions N, at least 1.
        split: ``"train"`` or ``"held_out"``.
        linked: Probability that a turn edits a thing that an earlier turn edited, if its task type
            allows; 0 leaves that to chance.

    Returns:
        The chain; equal generators give equal chains.

    Raises:
        ValueError: If ``turns`` is below 1.
    """
    if turns < 1:
        raise ValueError(f"turns: expected at least 1, got {turns}")
    while True:
        state = initial = random_state(rng)
        witness = rng.choice(initial.things).shape
        edits: list[Edit] = []
        edited: set[str] = set()
        while state.split == split and len(edits) < turns:
            used = {edit.task_type for edit in edits[-len(TASK_TYPES) + 1 :]}  # the last seven
            touched = edited if linked and rng.random() < linked else set()
            edit = _random_edit(rng, state, witness, used, touched, split)
            if edit is None:
                break
            edits.append(edit)
            state = edit.apply(state)
            edited = {thing.shape for thing in state.things if thing not in initial.things}
        if len(edits) == turns:
            return Chain(initial, tuple(edits))


def make_chains(
    count: int, *, turns: int, seed: int, split: Split, linked: float = 0.0
) -> list[Chain]:
    """Draw ``count`` different chains; equal arguments give equal chains.

    Args:
        count: Number of chains.
        turns: Number of instructions N in each.
        seed: Any integer.
        split: ``"train"`` or ``"held_out"``.
        linked: See :func:`random_chain`.

    Returns:
        The chains.
    """
    rng = random.Random(f"{split} {turns} {seed}")
    chains: dict[Chain, None] = {}
    while len(chains) < count:
        chains[random_chain(rng, turns, split, linked=linked)] = None
    return list(chains)


def corrupt(rng: random.Random, state: State, edit: Edit) -> State:
    """Return a careless editor's result for ``state``, within the training split.

    With equal probabilities: the instruction is ignored, another edit of the same type replaces
    it, or a second edit is made in addition. Without a possible other edit it is ignored, too.
    """
    kind = rng.choice(("ignored", "other", "collateral"))
    wanted = edit.apply(state)
    base, avoid = (wanted, None) if kind == "collateral" else (state, edit)
    options = [
        other
        for other in sorted(possible_edits(base), key=repr)
        if other != avoid
        and (kind == "collateral" or other.task_type == edit.task_type)
        and other.apply(base).split == "train"
    ]
    if kind == "ignored" or not options:
        return state
    return rng.choice(options).apply(base)


def draw_index(state: State) -> np.ndarray:
    """Render a picture as palette indices, int8 ``[H, W]``."""
    picture = np.full((IMAGE_SIZE, IMAGE_SIZE), _INDEX[state.background], dtype=np.int8)
    for thing in state.things:
        picture[thing_mask(thing)] = _INDEX[thing.color]
    return picture


def draw(state: State) -> torch.Tensor:
    """Render a picture as colors in [0, 1], float32 ``[3, H, W]``."""
    return paint(torch.from_numpy(draw_index(state)))


def paint(index: torch.Tensor) -> torch.Tensor:
    """Turn palette indices ``[..., H, W]`` into colors ``[..., 3, H, W]``."""
    return PALETTE[index.long()].movedim(-1, -3)


@lru_cache(maxsize=1024)
def thing_mask(thing: Thing) -> np.ndarray:
    """Return the pixels that a thing covers, bool ``[H, W]``."""
    stencil = np.array([[pixel == "#" for pixel in row] for row in _DRAWINGS[thing.shape]])
    if thing.material == "striped":
        stencil[1::2] = False
    elif thing.material == "hollow":
        inner = np.pad(stencil, 1)
        stencil &= ~(inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:])
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    for cell in thing.cells:
        top, left = CELL * (cell // 2), CELL * (cell % 2)
        mask[top : top + len(stencil), left : left + len(stencil)] = stencil
    mask.flags.writeable = False  # the cache hands the same array to every caller
    return mask


def _state(background: str, things: list[Thing]) -> State:
    return State(background, tuple(sorted(things, key=lambda thing: SHAPES.index(thing.shape))))


def _random_edit(
    rng: random.Random,
    state: State,
    witness: str,
    used: set[str],
    touched: set[str],
    split: Split,
) -> Edit | None:
    """Draw an edit whose result is in ``split``; None if there is none.

    Unused task types come first, and within a type edits of touched shapes.
    """
    by_type: dict[str, list[Edit]] = {}
    # Sorted, since the order of a set of strings changes with Python's hash seed.
    for edit in sorted(possible_edits(state), key=repr):
        if edit.shape != witness:
            by_type.setdefault(edit.task_type, []).append(edit)
    for task_type in _shuffled(rng, by_type.keys() - used) + _shuffled(rng, by_type.keys() & used):
        options = _shuffled(rng, by_type[task_type])
        for edit in sorted(options, key=lambda edit: edit.shape not in touched):
            if edit.apply(state).split == split:
                return edit
    return None


def _shuffled(rng: random.Random, items: object) -> list:
    items = sorted(items, key=repr)
    rng.shuffle(items)
    return items
