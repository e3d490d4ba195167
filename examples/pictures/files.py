"""Write the world of pictures to disk as a model and chains that any trainer can read.

    python -m mteditflow_examples.pictures.files runs/pictures --seed 0

``model/`` is a pipeline in diffusers format; ``train.jsonl``, ``held_out.jsonl`` and
``no_change.jsonl``, whose turns ask for no change, are records of the library; ``images/`` has
their reference pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from mteditflow_examples.shapes.editor import TEXT_TOKENS
from mteditflow_examples.shapes.files import write_model, write_pictures
from PIL import Image
from transformers.utils import logging

from mteditflow._command import program
from mteditflow._exits import refusing
from mteditflow._files import require_folder
from mteditflow.chains import Chain as Record
from mteditflow.chains import write_chains

from .chains import Chain, make_chains, no_change_chains
from .drawing import draw
from .editor import STEPS, load_editor
from .scoring import record_of

COUNTS = (480, 256, 64)  # training chains, held-out chains, held-out chains without a change


def write_world(
    output: Path, *, editor: str, seed: int, counts: Sequence[int], turns: int, longest: int
) -> list[str]:
    """Write an editor and three files of chains; equal arguments write equal files.

    Args:
        output: output folder, created if missing.
        editor: "careless" or "competent".
        seed: seed of the chains.
        counts: number of training chains, of held-out chains, and of those without a change.
        turns: instructions in each training chain.
        longest: instructions in each held-out chain.

    Returns:
        One line of text per file or folder written.
    """
    output.mkdir(parents=True, exist_ok=True)
    model = write_model(load_editor(editor), output / "model")
    lines = [
        f"{model}: the {editor} editor; call it with max_sequence_length={TEXT_TOKENS} and "
        f"num_inference_steps={STEPS}"
    ]
    groups: dict[str, list[Chain]] = {
        "train": make_chains(counts[0], turns=turns, seed=seed, split="train"),
        "held_out": make_chains(counts[1], turns=longest, seed=seed, split="held_out"),
        "no_change": no_change_chains(counts[2], turns=longest, seed=seed, split="held_out"),
    }
    for name, chains in groups.items():
        file = output / f"{name}.jsonl"
        write_chains(write_pictures(_drawn(chains), output), file)
        count = len(chains[0].edits)
        lines.append(f"{file}: {len(chains)} chains of {count} turns")
    return lines


def _drawn(chains: Iterable[Chain]) -> Iterator[tuple[Record, Image.Image]]:
    for chain in chains:
        yield record_of(chain), Image.fromarray(draw(chain.initial))


def main(
    output: Annotated[Path, typer.Argument(help="Folder to write to.")],
    editor: Annotated[
        Literal["careless", "competent"], typer.Option(help="Editor to write.")
    ] = "careless",
    seed: Annotated[int, typer.Option(help="Seed of the chains.")] = 0,
    train_chains: Annotated[int, typer.Option(min=1, help="Chains to train on.")] = COUNTS[0],
    held_out: Annotated[int, typer.Option(min=1, help="Chains to evaluate on.")] = COUNTS[1],
    no_change: Annotated[
        int, typer.Option(min=1, help="Chains of turns that ask for no change.")
    ] = COUNTS[2],
    turns: Annotated[int, typer.Option(min=1, help="Turns of a training chain.")] = 3,
    longest: Annotated[int, typer.Option(min=1, help="Turns of a held-out chain.")] = 3,
) -> None:
    """Write a tiny trained editor, chains and their reference pictures."""
    with refusing():
        require_folder("output", output)
    logging.disable_progress_bar()  # transformers has one per component
    counts = (train_chains, held_out, no_change)
    lines = write_world(
        output, editor=editor, seed=seed, counts=counts, turns=turns, longest=longest
    )
    print(*lines, sep="\n")


app = program(main)

if __name__ == "__main__":
    app()
