"""Chains of edits in the world of pictures, of any length, in either split.

All scenes of a chain are in one split, so held-out chains share no scene with training data.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from mteditflow.chains import NO_CHANGE as UNCHANGED
from mteditflow.chains import TASK_TYPES

from .scene import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    KINDS,
    MATERIALS,
    PLACES,
    TEXTS,
    Edit,
    Scene,
    Split,
    Thing,
    no_change,
    possible_edits,
)

ASKED = tuple(name for name in TASK_TYPES if name != UNCHANGED)


@dataclass(frozen=True)
class Chain:
    """An initial scene and N edits, each valid in the result of the previous one."""

    initial: Scene
    edits: tuple[Edit, ...]

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """Scenes, N + 1, the initial one first."""
        return (self.initial, *(edit.result for edit in self.edits))

    @property
    def instructions(self) -> tuple[str, ...]:
        """Instructions, N."""
        return tuple(edit.instruction for edit in self.edits)


def random_scene(rng: random.Random) -> Scene:
    """Draw a random scene of two or three things; half of all scenes have a text."""
    count = rng.choice((2, 3))
    places = sorted(rng.sample(PLACES, count), key=PLACES.index)
    things = tuple(
        Thing(
            kind,
            rng.choice(COLORS),
            rng.choice(("plain", *MATERIALS)),  # "plain" twice, so half of all things are plain
            rng.choice(("one", *COUNTS)),  # likewise, two of three things are single
            place,
        )
        for kind, place in zip(rng.sample(list(KINDS), count), places, strict=True)
    )
    return Scene(rng.choice(BACKGROUNDS), rng.choice(("", rng.choice(TEXTS))), things)


def random_edit(
    rng: random.Random,
    scene: Scene,
    *,
    avoid: set[str] = frozenset(),  # type: ignore[assignment]
    witness: str = "",
    prefer: set[str] = frozenset(),  # type: ignore[assignment]
    split: Split | None = None,
) -> Edit | None:
    """Draw a type of edit, then an edit of that type.

    Types first, since some types, such as additions, have many more edits than others.

    Args:
        rng: source of randomness.
        scene: scene to edit.
        avoid: types to draw only if no other is possible.
        witness: kind that must not be edited.
        prefer: kinds to edit if the type allows.
        split: required split of the result; None: any.

    Returns:
        An edit, or None if no edit has a result in that split.
    """
    by_type: dict[str, list[Edit]] = {}
    for edit in possible_edits(scene):
        if witness not in edit.kinds and split in (None, edit.result.split):
            by_type.setdefault(edit.task_type, []).append(edit)
    types = [t for t in ASKED if t in by_type and t not in avoid] or list(by_type)
    if not types:
        return None
    options = by_type[rng.choice(types)]
    preferred = [edit for edit in options if prefer & set(edit.kinds)]
    return rng.choice(preferred or options)


def random_chain(rng: random.Random, turns: int, split: Split, *, linked: float = 1.0) -> Chain:
    """Draw a chain of edits whose scenes all belong to a split.

    Types of edit do not repeat while others are possible. One thing of the initial scene, the
    witness, is never edited, so every chain has something to keep.

    Args:
        rng: source of randomness; equal states give equal chains.
        turns: number of instructions N, at least 1.
        split: "train" or "held_out".
        linked: probability that a turn edits a thing that earlier turns made or changed, if its
            type allows.

    Raises:
        ValueError: ``turns`` is below 1.
    """
    if turns < 1:
        raise ValueError(f"turns: expected at least 1, got {turns}")
    while True:
        scene = initial = random_scene(rng)
        if scene.split != split:
            continue
        witness = rng.choice(scene.things).kind
        edits: list[Edit] = []
        while len(edits) < turns:
            made = {thing.kind for thing in scene.things if thing not in initial.things}
            edit = random_edit(
                rng,
                scene,
                avoid={edit.task_type for edit in edits[1 - len(ASKED) :]},  # the last eight
                witness=witness,
                prefer=made if rng.random() < linked else set(),
                split=split,
            )
            if edit is None:
                break
            edits.append(edit)
            scene = edit.result
        else:
            return Chain(initial, tuple(edits))


def make_chains(
    count: int, *, turns: int, seed: int, split: Split, linked: float = 1.0
) -> list[Chain]:
    """Draw distinct chains; equal arguments give equal chains.

    Args:
        count: number of chains.
        turns: number of instructions N of each.
        seed: any integer.
        split: "train" or "held_out".
        linked: see ``random_chain``.
    """
    rng = random.Random(f"pictures {split} {turns} {seed}")
    chains: dict[Chain, None] = {}
    while len(chains) < count:
        chains[random_chain(rng, turns, split, linked=linked)] = None
    return list(chains)


def no_change_chains(count: int, *, turns: int, seed: int, split: Split) -> list[Chain]:
    """Draw chains in which every turn asks for no change, to measure wear."""
    initials = (chain.initial for chain in make_chains(count, turns=1, seed=seed, split=split))
    return [Chain(scene, (no_change(scene),) * turns) for scene in initials]


def chain_of(initial: Scene, instructions: tuple[str, ...]) -> Chain:
    """Return the chain of an initial scene and instructions.

    Raises:
        ValueError: an instruction is not possible at its turn.
    """
    scene, edits = initial, []
    for instruction in instructions:
        found = (no_change(scene), *possible_edits(scene))
        edit = next((edit for edit in found if edit.instruction == instruction), None)
        if edit is None:
            raise ValueError(f"instructions: expected one possible in {scene}, got {instruction!r}")
        edits.append(edit)
        scene = edit.result
    return Chain(initial, tuple(edits))


def corrupted(rng: random.Random, scene: Scene, edit: Edit) -> Scene:
    """Return a careless editor's result, within the training split.

    With probability 0.4 it ignores the instruction; else it makes another edit of the same type, if
    there is one.
    """
    if rng.random() < 0.4:
        return scene
    others = [
        other.result
        for other in possible_edits(scene)
        if other.task_type == edit.task_type
        and other.result != edit.result
        and other.result.split == "train"
    ]
    return rng.choice(others) if others else scene
