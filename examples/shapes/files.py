"""Write the shapes world to disk as a model and chains that any trainer can read.

    python -m mteditflow_examples.shapes.files runs/world --family kontext --seed 0

``model/`` is a pipeline in diffusers format, ``train.jsonl`` and ``held_out.jsonl`` are records of
the library, and ``images/`` has their reference pictures.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL.Image import Image
from safetensors import SafetensorError
from transformers.utils import logging

from mteditflow._command import program
from mteditflow._exits import refusing
from mteditflow._files import require_folder
from mteditflow.chains import Chain as Record
from mteditflow.chains import write_chains

from .editor import Family, enlarge, load_editor
from .served import record_of
from .vision import to_pil
from .world import Chain, Split, draw, make_chains

LINKED = 1.0  # turns edit what earlier turns edited, where possible
COUNTS = (480, 512)  # training chains, held-out chains
SPLITS: tuple[Split, ...] = ("train", "held_out")


def write_world(
    output: Path,
    family: Family,
    *,
    seed: int,
    counts: Sequence[int],
    turns: int,
    linked: float = LINKED,
) -> list[str]:
    """Write the trained editor and chains of both splits; equal arguments write equal files.

    Each file and the folder ``model`` are written atomically, and a file of chains after the
    pictures in it. Existing files of these names are replaced; all others stay.

    Args:
        output: Output folder, created if missing.
        family: Editor to write; klein's pictures are enlarged from 12 to 96 pixels a side.
        seed: Seed of the chains.
        counts: Number of training chains, and of held-out chains.
        turns: Instructions in each chain.
        linked: Probability that a turn edits what earlier turns edited.

    Returns:
        One line of text per file or folder written.
    """
    output.mkdir(parents=True, exist_ok=True)
    said = [f"{write_model(load_editor(family.value), output / 'model')}: the tiny {family.value}"]
    for split, count in zip(SPLITS, counts, strict=True):
        chains = make_chains(count, turns=turns, seed=seed, split=split, linked=linked)
        records = write_pictures(_drawn(chains, klein=family is Family.klein), output)
        file = output / f"{split}.jsonl"
        write_chains(records, file)
        said.append(f"{file}: {count} chains of {turns} turns, pictures in {output / 'images'}")
    return said


def write_model(pipeline: Any, folder: Path) -> Path:
    """Write a pipeline to a folder atomically, in place of an existing one.

    Raises:
        OSError: The folder cannot be written.
    """
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        try:
            pipeline.save_pretrained(part)
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"{folder}: {error}") from error
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def write_pictures(drawn: Iterable[tuple[Record, Image]], root: Path) -> list[Record]:
    """Write reference pictures to the paths in their records, relative to ``root``.

    Returns:
        The records, with ``root`` set.
    """
    records = []
    (root / "images").mkdir(exist_ok=True)
    part = root / "images" / f".{os.getpid()}.part"
    for relative, picture in drawn:
        record = relative.model_copy(update={"root": root})
        picture.save(part, format="PNG")
        part.replace(record.image_path)
        records.append(record)
    return records


def _drawn(chains: Iterable[Chain], *, klein: bool) -> Iterator[tuple[Record, Image]]:
    for chain in chains:
        picture = draw(chain.initial)
        yield record_of(chain), to_pil(enlarge(picture) if klein else picture)


def main(
    output: Annotated[Path, typer.Argument(help="Folder to write to.")],
    family: Annotated[Family, typer.Option(help="Tiny editor to write.")] = Family.kontext,
    seed: Annotated[int, typer.Option(help="Seed of the chains.")] = 0,
    train_chains: Annotated[int, typer.Option(min=1, help="Chains to train on.")] = COUNTS[0],
    held_out: Annotated[int, typer.Option(min=1, help="Chains to evaluate on.")] = COUNTS[1],
    turns: Annotated[int, typer.Option(min=1, help="Instructions in each chain.")] = 3,
) -> None:
    """Write a tiny trained editor, chains and their reference pictures."""
    with refusing():
        require_folder("output", output)
    logging.disable_progress_bar()  # transformers has one per component
    counts = (train_chains, held_out)
    print(*write_world(output, family, seed=seed, counts=counts, turns=turns), sep="\n")


app = program(main)

if __name__ == "__main__":
    app()
