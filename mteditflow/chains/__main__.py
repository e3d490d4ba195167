"""The command line of chains: ``python -m mteditflow.chains``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Column, Table

from mteditflow._command import OneLineGroup
from mteditflow._exits import naming_argument, refuse, refusing
from mteditflow._files import naming, replacing_all, require_other_files
from mteditflow._images import folder_images
from mteditflow._text import escape_controls
from mteditflow.chains import (
    FORMATS,
    Chain,
    ChainError,
    iter_chains,
    no_change_chains,
    read_chains,
    recognize,
    split_chains,
    write_chains,
)
from mteditflow.chains.files import image_fault, is_outside
from mteditflow.chains.no_change import INSTRUCTIONS
from mteditflow.chains.record import is_remote

SHOWN = 20  # bad lines that are printed; further ones are only counted

app = typer.Typer(
    cls=OneLineGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Check, split and convert files of chains, and write chains that ask for no change.",
)
out = Console(soft_wrap=True, markup=False, highlight=False)
err = Console(soft_wrap=True, markup=False, highlight=False, stderr=True)

NAMES = ", ".join(FORMATS)
CSV = ("edival",)  # formats kept as .csv; all others are .json or .jsonl
File = Annotated[Path, typer.Argument(help="File of chains.")]
Images = Annotated[
    Path | None,
    typer.Option(help="Base folder of relative image paths. Default: the folder of the file."),
]

Outside = Annotated[
    bool,
    typer.Option(
        "--allow-outside", help="Accept image paths that leave that folder (.. or absolute)."
    ),
]


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="File to read.")],
    target: Annotated[Path, typer.Argument(help="File to write; an existing one is replaced.")],
    from_: Annotated[
        str | None,
        typer.Option("--from", help=f"Format to read: {NAMES}. Default: found from the content."),
    ] = None,
    to: Annotated[str, typer.Option(help=f"Format to write: {NAMES}.")] = "native",
    images: Images = None,
    allow_outside: Outside = False,
    lenient: Annotated[
        bool,
        typer.Option("--lenient", help="Leave out and list bad lines and chains; do not stop."),
    ] = False,
) -> None:
    """Convert a file of chains from one format to another.

    Stop at the first bad line or at the first chain that the target format cannot hold, and write
    no file. With --lenient both are left out, listed and counted.
    """
    left_out: list[str] = []
    outside: set[str] = set()

    def chains() -> Iterator[Chain]:
        with naming_argument("SOURCE", ChainError):
            yield from usable()

    def usable() -> Iterator[Chain]:
        for found in iter_chains(source, format=from_, images=images, allow_outside=allow_outside):
            if isinstance(found, Chain):
                names = [*([] if found.image is None else [found.image]), *found.further_images]
                files = [found.root / name for name in names if not is_remote(name)]
                if any(is_outside(file, target.parent) for file in files):
                    outside.add(found.id)
                yield found
            elif lenient:
                left_out.append(str(found))
            else:
                raise ChainError(str(found))

    with refusing():
        require_other_files("source, target", source, target)
        writing = write_chains(chains(), target, format=to, strict=not lenient)
    left_out += map(str, writing.refused)
    outside -= {refused.id for refused in writing.refused}
    _print_left_out(left_out)
    if not writing.count:
        refuse(f"{source}: expected chains that {to} can hold, got none; nothing is written")
    _say(f"{writing.count} chains written to {target} ({to}), {len(left_out)} left out")
    if FORMATS[to].loses != "nothing":
        _say(f"{to} leaves out: {FORMATS[to].loses}")
    if outside:
        _say(
            f"images of {len(outside)} chains lie outside {target.parent}: to read them, give "
            "--allow-outside"
        )


@app.command()
def check(
    file: File,
    format: Annotated[  # noqa: A002
        str | None,
        typer.Option(help=f"Format of the file: {NAMES}. Default: found from the content."),
    ] = None,
    images: Images = None,
    check_images: Annotated[
        bool, typer.Option(help="Check that each image exists and has a readable header.")
    ] = True,
    allow_outside: Outside = False,
) -> None:
    """Read a file of chains and list its bad lines; exit with code 1 if there are any."""
    turns: Counter[int] = Counter()
    bad: list[str] = []
    with refusing(), naming_argument("FILE", ChainError):
        name = format or recognize(file).name
        for found in iter_chains(
            file,
            format=name,
            images=images,
            check_images=check_images,
            allow_outside=allow_outside,
        ):
            if isinstance(found, Chain):
                turns[found.turns] += 1
            else:
                bad.append(str(found))
    _print_left_out(bad)
    spread = ", ".join(f"{count} of {n} turns" for n, count in sorted(turns.items()))
    _say(f"{file} ({name}): {turns.total()} chains ({spread or 'none'}), {len(bad)} bad")
    raise typer.Exit(bool(bad))


@app.command()
def split(
    source: Annotated[Path, typer.Argument(help="File to read.")],
    train: Annotated[Path, typer.Argument(help="File to write: chains to train on.")],
    held_out: Annotated[Path, typer.Argument(help="File to write: chains to evaluate on.")],
    count: Annotated[int, typer.Option(min=1, help="Minimum number of held-out chains.")] = 64,
    by: Annotated[
        Literal["image", "chain"],
        typer.Option(help="image: both sides share no reference image; chain: they may share one."),
    ] = "image",
    seed: Annotated[int, typer.Option(help="Seed of the choice.")] = 0,
    images: Images = None,
    allow_outside: Outside = False,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite files that exist.")] = False,
) -> None:
    """Split a file of chains into a training file and a held-out file of the same format.

    With --by image, all chains of one picture stay on one side, whatever the picture's file name.
    Both files are written, or neither.
    """
    with refusing():
        require_other_files("source, train, held_out", source, train, held_out)
        if missing := [x.parent for x in (train, held_out) if not x.parent.is_dir()]:
            raise ValueError(f"train, held_out: expected folders that exist, got {missing[0]}")
        if there := [str(x) for x in (train, held_out) if x.exists() and not replace]:
            raise ValueError(
                f"train, held_out: expected new files, got {' and '.join(there)}; --replace "
                "overwrites both"
            )
        with naming_argument("SOURCE", ChainError):
            name = recognize(source).name
        for path in (train, held_out):
            _check_suffix(path, name)
        with naming_argument("SOURCE", ChainError):
            chains = read_chains(
                source,
                format=name,
                images=images,
                check_images=by == "image",
                allow_outside=allow_outside,
            ).chains
        parts = split_chains(chains, held_out=count, by=by, seed=seed)
        # Neither file takes its name before both are complete.
        with replacing_all(train, held_out) as scratch:
            for side, path, own in zip(
                (parts.train, parts.held_out), (train, held_out), scratch, strict=True
            ):
                with naming(path):
                    write_chains(side, own, format=name)
    _say(
        f"{len(parts.train)} chains written to {train}, {len(parts.held_out)} to {held_out} "
        f"({name}, by {by}, seed {seed})"
    )


def _check_suffix(path: Path, name: str) -> None:
    """Raise ValueError if a file name has the suffix of CSV for JSON content, or the reverse."""
    if path.suffix in (".csv", ".json", ".jsonl") and (path.suffix == ".csv") != (name in CSV):
        raise ValueError(
            f"train, held_out: expected names of the kind of {name}, the format of the source, got "
            f"{path}; convert changes the format"
        )


@app.command()
def no_change(
    images: Annotated[Path, typer.Argument(help="Folder of images, searched recursively.")],
    target: Annotated[Path, typer.Argument(help="File to write; an existing one is replaced.")],
    turns: Annotated[int, typer.Option(min=1, help="Turns of every chain.")] = 20,
    instruction: Annotated[
        list[str] | None,
        typer.Option(help="Instruction that asks for no change; several alternate. Default: four."),
    ] = None,
) -> None:
    """Write one chain for each image that asks for no change at every turn, to measure wear.

    `mteditflow evaluate` reports how far an editor's images drift from the original in such chains.
    """
    with refusing():
        if not images.is_dir():
            raise ValueError(f"images: expected a folder, got {images}")
        files = folder_images(images)
        if fault := next(filter(None, map(image_fault, files)), None):
            raise ValueError(f"images: {fault}")
        names = [file.relative_to(images).as_posix() for file in files]
        words = instruction or INSTRUCTIONS
        if blank := [text for text in words if not text.strip()]:
            raise ValueError(f"instruction: expected text that is not empty, got {blank[0]!r}")
        chains = no_change_chains(names, turns=turns, instructions=words, root=images)
        write_chains(chains, target)
    _say(f"{len(chains)} chains of {turns} turns written to {target} (native)")
    if is_outside(images, target.parent):
        _say(f"the images lie outside {target.parent}: to read them, give --allow-outside")


@app.command()
def formats() -> None:
    """List the formats, the data that each leaves out, and the chains that it refuses."""
    headers = ("what it is", "leaves out", "refuses chains with")
    names = Column("format", no_wrap=True)
    table = Table(names, *(Column(header, overflow="fold") for header in headers))
    for known in FORMATS.values():
        table.add_row(known.name, known.about, known.loses, known.refuses)
    out.print(table)


def _say(line: str) -> None:
    out.print(escape_controls(line))  # a file name may hold terminal control sequences


def _print_left_out(reasons: list[str]) -> None:
    for reason in reasons[:SHOWN]:
        err.print(escape_controls(reason))
    if len(reasons) > SHOWN:
        err.print(f"... and {len(reasons) - SHOWN} more")


if __name__ == "__main__":
    app(prog_name="python -m mteditflow.chains")
