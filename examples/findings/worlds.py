"""Embedded worlds in which studies train and evaluate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from mteditflow_examples.pictures import files as pictures
from mteditflow_examples.pictures import scoring
from mteditflow_examples.pictures.drawing import SIZE
from mteditflow_examples.shapes import files as shapes
from mteditflow_examples.shapes.editor import Family
from mteditflow_examples.shapes.held_out import edit_held_out, evaluate_held_out
from PIL.Image import Image

from mteditflow.chains import Chain
from mteditflow.evaluation import Evaluation


class Write(Protocol):
    """Function that writes an editor, training chains and held-out chains to a folder."""

    def __call__(self, folder: Path, *, seed: int, counts: tuple[int, int], turns: int) -> None:
        """Write all files; ``counts`` are the numbers of training and held-out chains."""


@dataclass(frozen=True)
class World:
    """An embedded world.

    Attributes:
        name: first part of the names of its presets.
        title: name on a page.
        write: function that writes its files.
        last: file that is written last, so that its existence means that all are complete.
        evaluate: edits held-out chains and scores them exactly, like ``evaluate_held_out``.
        edit: edits held-out chains, like ``edit_held_out``.
    """

    name: str
    title: str
    write: Write
    last: str
    evaluate: Callable[..., Evaluation]
    edit: Callable[..., tuple[list[Chain], list[list[Image]]]]


def _write_shapes(
    folder: Path,
    *,
    seed: int,
    counts: tuple[int, int],
    turns: int,
    linked: float = shapes.LINKED,
) -> None:
    shapes.write_world(folder, Family.kontext, seed=seed, counts=counts, turns=turns, linked=linked)


def _write_pictures(
    folder: Path, *, seed: int, counts: tuple[int, int], turns: int, editor: str = "careless"
) -> None:
    groups = (*counts, counts[1] // 4 or 1)
    pictures.write_world(
        folder, editor=editor, seed=seed, counts=groups, turns=turns, longest=turns
    )


SHAPES = World(
    "shapes",
    "the shapes world",
    _write_shapes,
    "held_out.jsonl",
    evaluate_held_out,
    edit_held_out,
)
SHAPES_APART = replace(
    SHAPES,
    title="the shapes world, turns that have nothing to do with each other",
    write=partial(_write_shapes, linked=0.0),
)
PICTURES = World(
    "pictures",
    "the world of pictures",
    _write_pictures,
    "no_change.jsonl",
    partial(evaluate_held_out, size=SIZE, scorer=scoring.ExactRewards),
    partial(edit_held_out, size=SIZE),
)
COMPETENT = replace(
    PICTURES,
    title="the world of pictures, from the competent editor",
    write=partial(_write_pictures, editor="competent"),
)
