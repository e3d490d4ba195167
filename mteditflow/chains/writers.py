"""Writing of chains: a format that cannot hold a chain refuses it with the reason."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from mteditflow._checks import check_choice
from mteditflow.chains.errors import ChainError
from mteditflow.chains.formats import FORMATS, Format
from mteditflow.chains.record import Chain


@dataclass(frozen=True)
class Refused:
    """A chain that a format cannot hold.

    Attributes:
        id: of the chain.
        reason: the field, what was expected, what came.
    """

    id: str
    reason: str

    def __str__(self) -> str:
        return f"chain {self.id!r}: {self.reason}"


@dataclass(frozen=True)
class Writing:
    """What was written.

    Attributes:
        count: number of chains in the file.
        refused: chains that are not.
    """

    count: int
    refused: tuple[Refused, ...]


def write_chains(
    chains: Iterable[Chain],
    path: str | os.PathLike[str],
    *,
    format: str = "native",  # noqa: A002
    strict: bool = True,
) -> Writing:
    """Write chains to a file, which appears whole or not at all.

    Paths of images are rewritten, so that they are relative to the new file and lead where they
    led; absolute ones and addresses stay as they are. ``FORMATS[format].loses`` tells what of a
    chain the format leaves out.

    Args:
        chains: one by one; they need not fit into memory.
        path: the file; an old one is replaced.
        format: a key of ``FORMATS``.
        strict: stop at a chain that the format cannot hold; else leave it out and list it.

    Returns:
        How many were written, and the chains that were refused (none where strict).

    Raises:
        ChainError: strict, and the format cannot hold a chain or an id stands twice.
        OSError: the file cannot be written.
        ValueError: there is no such format.

    Example:
        >>> import tempfile
        >>> chain = Chain(id="7", image="7.png", instructions=("Remove the cat", "Add a dog"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writing = write_chains(
        ...         [chain], Path(folder, "x.jsonl"), format="flow-grpo", strict=False
        ...     )
        >>> print(writing.refused[0])
        chain '7': expected a chain of one turn, got 2 turns
    """
    check_choice("format", format, list(FORMATS))
    known, file = FORMATS[format], Path(path)
    ids: set[str] = set()
    refused: list[Refused] = []
    with _replacing(file) as stream:
        stream.write(known.head)
        for chain in chains:
            text = _encode(_moved(chain, file.parent), known, ids)
            if isinstance(text, str):
                stream.write(known.between * bool(ids) + text)
                ids.add(chain.id)
            elif strict:
                raise ChainError(f"{format} cannot hold {text}")
            else:
                refused.append(text)
        stream.write(known.tail)
    return Writing(len(ids), tuple(refused))


def _encode(chain: Chain, known: Format, ids: Collection[str]) -> str | Refused:
    if chain.id in ids:
        return Refused(chain.id, "id: expected a new one, got it again")
    try:
        return known.encode(chain)
    except ChainError as error:
        return Refused(chain.id, str(error))


def _moved(chain: Chain, folder: Path) -> Chain:
    """Let the image's path be relative to another folder."""
    fixed = chain.image_is_remote or Path(chain.image).is_absolute()
    if fixed or os.path.abspath(chain.root) == os.path.abspath(folder):
        return chain
    image = Path(os.path.relpath(chain.image_path, folder)).as_posix()
    return chain.model_copy(update={"image": image, "root": folder})


@contextmanager
def _replacing(file: Path) -> Iterator[TextIO]:
    """Open a file that takes its name at the end, if no exception came before."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        # What is no Unicode text, half a surrogate pair, stays an escape in JSON.
        with part.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
            yield stream
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
