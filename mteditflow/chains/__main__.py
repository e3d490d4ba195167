"""The command line of chains: ``python -m mteditflow.chains``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from mteditflow._text import escape_controls
from mteditflow.chains import FORMATS, Chain, ChainError, iter_chains, recognise, write_chains

SHOWN = 20  # bad lines that are printed one by one

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Check files of chains, and convert them from one format to another.",
)
out = Console(soft_wrap=True, markup=False, highlight=False)
err = Console(soft_wrap=True, markup=False, highlight=False, stderr=True)

NAMES = ", ".join(FORMATS)
File = Annotated[Path, typer.Argument(help="File of chains.")]
Images = Annotated[
    Path | None,
    typer.Option(help="Folder that the images' paths are relative to; else that of the file."),
]


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="File to read.")],
    target: Annotated[Path, typer.Argument(help="File to write; an old one is replaced.")],
    from_: Annotated[
        str | None,
        typer.Option("--from", help=f"Format to read: {NAMES}; else recognized by the content."),
    ] = None,
    to: Annotated[str, typer.Option(help=f"Format to write: {NAMES}.")] = "native",
    images: Images = None,
    lenient: Annotated[
        bool,
        typer.Option("--lenient", help="Leave bad lines and chains out, and list them."),
    ] = False,
) -> None:
    """Convert a file of chains from one format to another.

    Stops at the first bad line, and at the first chain that the target format cannot hold; no file
    is written then. With --lenient both are left out, listed and counted.
    """
    left_out: list[str] = []

    def chains() -> Iterator[Chain]:
        for found in iter_chains(source, format=from_, images=images):
            if isinstance(found, Chain):
                yield found
            elif lenient:
                left_out.append(str(found))
            else:
                raise ChainError(str(found))

    with _one_line_errors():
        writing = write_chains(chains(), target, format=to, strict=not lenient)
    left_out += map(str, writing.refused)
    _print_left_out(left_out)
    out.print(f"{writing.count} chains written to {target} ({to}), {len(left_out)} left out")
    if FORMATS[to].loses != "nothing":
        out.print(f"{to} leaves out: {FORMATS[to].loses}")


@app.command()
def check(
    file: File,
    format: Annotated[  # noqa: A002
        str | None,
        typer.Option(help=f"Format of the file: {NAMES}; else recognized by the content."),
    ] = None,
    images: Images = None,
    check_images: Annotated[bool, typer.Option(help="Look whether each image is there.")] = True,
) -> None:
    """Read a file of chains and list its bad lines. The exit code is 1 if there are any."""
    turns: Counter[int] = Counter()
    bad: list[str] = []
    with _one_line_errors():
        name = format or recognise(file).name
        for found in iter_chains(file, format=name, images=images, check_images=check_images):
            if isinstance(found, Chain):
                turns[found.turns] += 1
            else:
                bad.append(str(found))
    _print_left_out(bad)
    spread = ", ".join(f"{count} of {n} turns" for n, count in sorted(turns.items()))
    out.print(f"{file} ({name}): {turns.total()} chains ({spread or 'none'}), {len(bad)} bad")
    raise typer.Exit(bool(bad))


@app.command()
def formats() -> None:
    """List the formats, what each leaves out, and which chains it refuses."""
    headers = ("format", "what it is", "leaves out", "refuses chains with")
    table = Table(*(Column(header, overflow="fold") for header in headers))
    for known in FORMATS.values():
        table.add_row(known.name, known.about, known.loses, known.refuses)
    out.print(table)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Print an error that users can mend, and leave with exit code 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        err.print(f"error: {escape_controls(str(error))}")
        raise typer.Exit(1) from error


def _print_left_out(reasons: list[str]) -> None:
    for reason in reasons[:SHOWN]:
        err.print(escape_controls(reason))
    if len(reasons) > SHOWN:
        err.print(f"... and {len(reasons) - SHOWN} more")


if __name__ == "__main__":
    app(prog_name="python -m mteditflow.chains")
