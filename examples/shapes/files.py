"""Write the shapes world to disk, as a user holds a model and chains; then any trainer can read it.

    python -m mteditflow_examples.shapes.files runs/world --family kontext --seed 0

``model/`` is a pipeline in diffusers format, ``train.jsonl`` and ``held_out.jsonl`` are records of
the library, and ``images/`` holds their reference pictures.
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

LINKED = 1.0  # turns go on with what earlier turns have edited, where they can
COUNTS = (480, 512)  # chains for training, and held out
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

    Each file and the folder ``model`` appear whole or not at all, and a list of chains after the
    pictures that it names. What was there under these names is replaced, anything else is left.

    Args:
        output: The folder, made if need be.
        family: Which editor; klein's pictures are enlarged, exactly, from 12 to 96 pixels a side.
        seed: Of the chains.
        counts: Chains for training, and held out.
        turns: Instructions in each chain.
        linked: Probability that a turn goes on with what earlier turns have edited.

    Returns:
        A line for each thing that was written.
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
    """Write a pipeline to a folder, which appears whole or not at all."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        try:
            pipeline.save_pretrained(part)
        except SafetensorError as error:  # such as of a full disk
            raise OSError(f"{folder}: {error}") from error
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def write_pictures(drawn: Iterable[tuple[Record, Image]], root: Path) -> list[Record]:
    """Write reference pictures where their records, relative to ``root``, have them."""
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
    family: Annotated[Family, typer.Option(help="Which tiny editor.")] = Family.kontext,
    seed: Annotated[int, typer.Option(help="Of the chains.")] = 0,
    train_chains: Annotated[int, typer.Option(min=1, help="Chains to train on.")] = COUNTS[0],
    held_out: Annotated[int, typer.Option(min=1, help="Chains to evaluate on.")] = COUNTS[1],
    turns: Annotated[int, typer.Option(min=1, help="Instructions in each chain.")] = 3,
) -> None:
    """Write a tiny trained editor, chains and their reference pictures."""
    with refusing():
        require_folder("output", output)
    logging.disable_progress_bar()  # of transformers, one for each of its parts
    counts = (train_chains, held_out)
    print(*write_world(output, family, seed=seed, counts=counts, turns=turns), sep="\n")


app = program(main)

if __name__ == "__main__":
    app()
