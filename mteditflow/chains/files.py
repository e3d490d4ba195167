"""Files of chains: reading in any format with a reason for every bad line, atomic writing."""

from __future__ import annotations

import codecs
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from mteditflow._checks import check_choice
from mteditflow._files import replacing, require_no_device
from mteditflow._images import BOMBS, UNREADABLE, check_image
from mteditflow.chains.formats import FORMATS, Format, Row
from mteditflow.chains.formats.base import Record
from mteditflow.chains.formats.stored import is_stored, stored_columns, stored_rows
from mteditflow.chains.recognition import UnknownFormatError, format_of_content, format_of_keys
from mteditflow.chains.record import WORDS, Chain, ChainError, is_path, is_remote, shorten

PATH_SHOWN = 400  # characters of a path that a message quotes


@dataclass(frozen=True)
class Skipped:
    """A line without a valid chain.

    Attributes:
        file: path of the file.
        line: number of the line, from 1; the first one of a record that spans several.
        reason: message with the field, the expectation and the value.
    """

    file: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Reading:
    """Contents of a file.

    Attributes:
        chains: valid chains in the order of the file.
        skipped: lines without a valid chain, in the order of the file.
    """

    chains: tuple[Chain, ...]
    skipped: tuple[Skipped, ...]


def read_chains(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002
    strict: bool = True,
    images: str | os.PathLike[str] | None = None,
    check_images: bool = False,
    allow_outside: bool = False,
) -> Reading:
    """Read all chains of a file.

    Args:
        path: a UTF-8 file (a byte-order mark, CRLF and blank lines are accepted), or a folder
            saved by ``datasets``, which needs the extra ``mteditflow[arrow]``.
        format: a key of ``FORMATS``; ``None`` recognizes the format from the content.
        strict: whether to stop at the first bad line; else bad lines are skipped and listed, each
            at the cost of its own chain only.
        images: base folder of relative image paths; ``None`` is the folder of the file.
        check_images: whether a chain is bad if its image is missing or its header is not that of a
            still image of up to 2^24 pixels. Reads the header of each image.
        allow_outside: whether image paths may leave the base folder, by ".." or as absolute paths;
            else such a chain is bad. Links within the folder may lead anywhere.

    Returns:
        The chains, and the skipped lines (none if strict).

    Raises:
        ChainError: strict, and a line is bad, an id repeats or the file is empty; or the format
            cannot be recognized. The message names file, line and reason.
        OSError: the file cannot be opened.
        ValueError: ``format`` is no key of ``FORMATS``.

    Example:
        >>> import tempfile
        >>> from mteditflow.chains import write_chains
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     chain = Chain(id="7", image="7.png", instructions=("Remove it",), root=folder)
        ...     path = Path(folder, "chains.jsonl")
        ...     _ = write_chains([chain], path)
        ...     _ = path.write_text(path.read_text() + '{"id": 8}')
        ...     reading = read_chains(path, strict=False)
        >>> [chain.id for chain in reading.chains], reading.skipped[0].line
        (['7'], 2)
        >>> reading.skipped[0].reason
        'id: expected text, got 8'
    """
    chains: list[Chain] = []
    skipped: list[Skipped] = []
    for found in iter_chains(
        path,
        format=format,
        images=images,
        check_images=check_images,
        allow_outside=allow_outside,
    ):
        if isinstance(found, Chain):
            chains.append(found)
        elif strict:
            raise ChainError(str(found))
        else:
            skipped.append(found)
    return Reading(tuple(chains), tuple(skipped))


def iter_chains(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002
    images: str | os.PathLike[str] | None = None,
    check_images: bool = False,
    allow_outside: bool = False,
) -> Iterator[Chain | Skipped]:
    """Read a file chain by chain; formats with one chain per line hold one line in memory.

    Args:
        path: as in ``read_chains``.
        format: as in ``read_chains``.
        images: as in ``read_chains``.
        check_images: as in ``read_chains``.
        allow_outside: as in ``read_chains``.

    Yields:
        Each chain, and each line without a valid one, in the order of the file.

    Raises:
        ChainError: the format cannot be recognized.
        OSError: the file cannot be opened.
        ValueError: ``format`` is no key of ``FORMATS``.
    """
    file = Path(path)
    if format is not None:
        check_choice("format", format, list(FORMATS))
    known = recognize(file) if format is None else FORMATS[format]
    root = file.parent if images is None else Path(images)
    builder = _ChainBuilder(root, known.suffixes, check_images, allow_outside)
    lines: dict[str, int] = {}
    line = 0
    for line, record in _rows(file, known):
        found = builder.chain(record)
        # Of two chains with one id the first is kept.
        if isinstance(found, Chain) and found.id in lines:
            again = f"got {found.id!r} again, as on line {lines[found.id]}"
            found = ChainError(f"id: expected a new one, {again}")
        elif isinstance(found, Chain):
            lines[found.id] = line
        yield found if isinstance(found, Chain) else Skipped(file, line, str(found))
    if not line:
        yield Skipped(file, 1, "expected at least one chain, got an empty file")


def _rows(file: Path, known: Format) -> Iterator[Row]:
    if not is_stored(file):
        with _open(file) as stream:
            yield from known.read(stream)
    elif known.decode is not None:
        yield from stored_rows(known, file)
    else:
        raise ChainError(f"{file}: expected a file of format {known.name}, got a folder of rows")


def recognize(path: str | os.PathLike[str]) -> Format:
    """Recognize the format of a file by its content.

    Raises:
        ChainError: no format matches; the message lists the formats, the keys that were found and
            the nearest format.
        OSError: the file cannot be opened.
    """
    file = Path(path)
    try:
        if is_stored(file):
            return format_of_keys(stored_columns(file))
        with _open(file) as stream:
            return format_of_content(stream)
    except UnknownFormatError as error:
        raise ChainError(f"{file}: {error}") from error


def _open(file: Path) -> BinaryIO:
    """Open a file and skip its byte-order mark."""
    require_no_device(file)
    stream = file.open("rb")
    if stream.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        stream.seek(0)
    return stream


@dataclass(frozen=True)
class _ChainBuilder:
    """Construction of chains from records, with checks of their image paths."""

    root: Path
    suffixes: tuple[str, ...]
    check_images: bool
    allow_outside: bool

    def chain(self, record: Record | ChainError) -> Chain | ChainError:
        """Return the chain of a record, or the error."""
        if isinstance(record, ChainError):
            return record
        try:
            chain = Chain.from_record(record, self.root)
        except ChainError as error:
            return error
        if chain.image is None:
            return chain
        # The path is judged as written, before a suffix is tried or any file is opened.
        fault = self._place_fault(chain.image)
        if fault is None and not chain.image_is_remote:
            chain = self._with_suffix(chain) if self.suffixes else chain
            fault = image_fault(chain.image_path) if self.check_images else None
        if fault is not None:
            return ChainError(f"image: {fault}")
        for name in chain.further_images:
            fault = self._place_fault(name)
            if fault is None and self.check_images:
                fault = image_fault(self.root / name)
            if fault is not None:
                return ChainError(f"references: {fault}")
        return chain

    def _place_fault(self, name: str) -> str | None:
        """Return why the path of an image is refused, ``None`` if it is accepted."""
        if is_remote(name):  # a URL is accepted unless the image files are checked
            return f"expected a file, got the address {shorten(name)}" * self.check_images or None
        return None if self.allow_outside else why_outside(name, self.root)

    def _with_suffix(self, chain: Chain) -> Chain:
        """Return the chain with the image that exists among names with the format's suffixes."""
        if _is_file(chain.image_path):
            return chain
        image = Path(chain.reference)
        others = [image.with_suffix(suffix).as_posix() for suffix in self.suffixes]
        there = next((x for x in others if _is_file(self.root / x)), chain.image)
        return chain.model_copy(update={"image": there})


def is_outside(path: Path, folder: Path) -> bool:
    """Whether a path leaves a folder, by ".." or as an absolute path; links are not followed."""
    root = os.path.abspath(folder)  # not realpath: a link in the folder may lead anywhere
    return os.path.commonpath((root, os.path.abspath(path))) != root


def why_outside(name: str, folder: Path) -> str | None:
    """Return the message that a name leaves the folder it is relative to, ``None`` if it stays."""
    if not is_outside(folder / name, folder):
        return None
    return (
        f"expected a path within {shorten(str(folder), PATH_SHOWN)}, got {shorten(name)}; "
        "--allow-outside (allow_outside=True) accepts it"
    )


def image_fault(path: Path) -> str | None:
    """Return what is wrong with an image file, from its header alone; ``None`` if nothing is."""
    shown = shorten(str(path), PATH_SHOWN)
    if not _is_file(path):
        return f"expected a file, got {shown}"
    try:
        check_image(path)
    except (*UNREADABLE, *BOMBS) as error:
        return f"expected a readable image, got {shown} ({type(error).__name__}: {error})"
    return None


def _is_file(path: Path) -> bool:
    """Whether a file exists; False for a name that the system refuses (too long, a NUL in it)."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


@dataclass(frozen=True)
class Refused:
    """A chain that a format cannot hold.

    Attributes:
        id: id of the chain.
        reason: message with the field, the expectation and the value.
    """

    id: str
    reason: str

    def __str__(self) -> str:
        return f"chain {self.id!r}: {self.reason}"


@dataclass(frozen=True)
class Writing:
    """Result of writing a file.

    Attributes:
        count: number of chains in the file.
        refused: chains that were left out.
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
    """Write chains to a file atomically.

    Relative image paths are rewritten relative to the new file; absolute paths and URLs are kept.
    ``FORMATS[format].loses`` lists the data that the format leaves out.

    Args:
        chains: chains to write; an iterator need not fit into memory.
        path: file to write; an existing one is replaced.
        format: a key of ``FORMATS``.
        strict: whether to stop at a chain that the format cannot hold; else it is left out and
            listed.

    Returns:
        Number of written chains, and the refused ones (none if strict). If no chain is left, no
        file is written and an existing one stays.

    Raises:
        ChainError: strict, and the format cannot hold a chain or an id repeats.
        OSError: the file cannot be written.
        ValueError: ``format`` is no key of ``FORMATS``.

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
    ids: set[str] = set()  # of the written chains; empty before the first, hence no separator
    refused: list[Refused] = []
    with suppress(_NothingToWriteError), _replacing(file) as stream:
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
        if not ids:
            raise _NothingToWriteError
        stream.write(known.tail)
    return Writing(len(ids), tuple(refused))


class _NothingToWriteError(Exception):
    """No chain is left: aborts the write, so that no empty file replaces an existing one."""


def _encode(chain: Chain, known: Format, ids: Collection[str]) -> str | Refused:
    if chain.id in ids:
        return Refused(chain.id, "id: expected a new one, got it again")
    if chain.image is None and known is not FORMATS["native"]:
        return Refused(chain.id, "image: expected a reference image, got none")
    try:
        return known.encode(chain)
    except ChainError as error:
        return Refused(chain.id, str(error))


def _moved(chain: Chain, folder: Path) -> Chain:
    """Return the chain with its relative image paths rewritten for another folder."""
    names = [*([] if chain.image is None else [chain.image]), *chain.further_images]
    moving = [name for name in names if not (is_remote(name) or Path(name).is_absolute())]
    if not moving or os.path.abspath(chain.root) == os.path.abspath(folder):
        return chain
    to = {name: Path(os.path.relpath(chain.root / name, folder)).as_posix() for name in moving}
    update: Record = {"root": folder}
    if chain.image is not None:
        update["image"] = to.get(chain.image, chain.image)
    if chain.references is not None:
        update["references"] = tuple(
            tuple(_as_path(to[name]) if name in to and name not in WORDS else name for name in turn)
            for turn in chain.references
        )
    return chain.model_copy(update=update)


def _as_path(name: str) -> str:
    """Return a path that ``references`` cannot confuse with the words "original" and "last"."""
    return name if is_path(name) else f"./{name}"


@contextmanager
def _replacing(file: Path) -> Iterator[TextIO]:
    """Open a temporary text file that is renamed to ``file`` if no exception is raised."""
    # A lone surrogate cannot be encoded as UTF-8; backslashreplace turns it into a JSON escape.
    with (
        replacing(file) as part,
        part.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream,
    ):
        yield stream
