"""Files that are there whole or not at all: bytes, and tensors as safetensors."""

from __future__ import annotations

import errno
import json
import os
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# What the library raises for damaged headers, among them sizes that overflow an integer.
_DAMAGED = (
    SafetensorError, RuntimeError, ValueError, AttributeError, KeyError, TypeError, OverflowError,
)  # fmt: skip

_BLOCK = 2**16  # bytes read at once in search of the last line


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a scratch path whose file replaces ``path`` when the block ends without an error.

    A reader, or a kill at any moment, meets the old file or the whole new one.
    """
    with replacing_all(path) as [scratch]:
        yield scratch


def require_folder(name: str, folder: Path) -> None:
    """Raise unless a folder is there, or can be made where folders end.

    Args:
        name: of the option that gives it.
        folder: which need not be there.

    Raises:
        ValueError: a file is in its place, or in that of a folder above it.
    """
    there = next(x for x in (folder, *folder.absolute().parents) if x.exists())
    if not there.is_dir():
        raise ValueError(f"{name}: expected a folder, got the file {there}")


def require_no_device(path: Path) -> None:
    """Raise where a device or a pipe is in the place of a file: it may never end, or be lost.

    Raises:
        OSError: of ``path``.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "expected a file, got a device or a pipe", str(path))


def destination(path: Path) -> Path:
    """Return the file that is written under a path: where its links lead; they stay links.

    Raises:
        OSError: a folder, a device, a pipe or a ring of links is in its place.
    """
    require_no_device(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def require_other_files(name: str, *paths: Path) -> None:
    """Raise unless all these paths, once links are followed, are of different files.

    Args:
        name: of the arguments that give them.
        *paths: files, which need not be there.

    Raises:
        ValueError: two are one file.
    """
    places = [os.path.realpath(path) for path in paths]
    for i, path in enumerate(paths):
        if places[i] in places[:i]:
            raise ValueError(f"{name}: expected different files, got {path} twice")


@contextmanager
def replacing_all(*paths: Path) -> Iterator[list[Path]]:
    """Yield a scratch path for each file; all take their names once all are written, or none.

    Links are followed. Only a kill between the renames can leave some of them new and others old.

    Raises:
        OSError: one cannot be written; the message names the file, not its scratch path.
    """
    targets = [destination(path) for path in paths]
    scratch = [target.with_name(f".{uuid.uuid4().hex}.partial") for target in targets]
    made: list[Path] = []
    try:
        for path, own in zip(paths, scratch, strict=True):
            with naming(path):
                own.open("xb").close()
            made.append(own)
        with _naming_scratch(paths, scratch):
            yield scratch
        for path, own in zip(paths, scratch, strict=True):
            with naming(path), own.open("rb+") as file:
                os.fsync(file.fileno())
        for target, own in zip(targets, scratch, strict=True):
            own.replace(target)
    finally:
        for own in made:
            own.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system name a file, whatever scratch path it came of.

    Raises:
        OSError: as inside the block, of ``path``.
    """
    try:
        yield
    except OSError as error:
        raise _named(error, path) from error


@contextmanager
def _naming_scratch(paths: Sequence[Path], scratch: Sequence[Path]) -> Iterator[None]:
    """As ``naming``, for errors of scratch paths, and for those of no path if there is one file."""
    try:
        yield
    except OSError as error:
        names: dict[str | None, Path] = dict(zip(map(str, scratch), paths, strict=True))
        if len(paths) == 1 and error.errno is not None:
            names[None] = paths[0]
        if (path := names.get(error.filename)) is None:
            raise
        raise _named(error, path) from error


def _named(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, error.strerror or str(error), str(path))


def write_all_atomically(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files of a folder by name: all of them, or none; the folder is made if missing.

    Raises:
        OSError: one cannot be written; those that were there before are as they were.
    """
    paths = [folder / name for name in files]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_all(*paths) as scratch:
        for path, own, data in zip(paths, scratch, files.values(), strict=True):
            with naming(path):
                own.write_bytes(data)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically; its folder is made if missing."""
    write_all_atomically(path.parent, {path.name: data})


_appending = threading.Lock()


def append_line(path: Path, line: bytes, *, sync: bool) -> None:
    """Append a whole line, or nothing: what a full disk took of it is cut off again.

    Args:
        path: made if it is not there; one process writes it.
        line: with its line break.
        sync: whether to wait until it lies on the disk.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    with _appending, path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            left = memoryview(line)
            while left:  # a disk that fills up takes a part, and fails at the next try
                left = left[file.write(left) :]
            if sync:
                os.fsync(file.fileno())
        except BaseException:
            file.truncate(size)
            raise


def cut_half_line(path: Path) -> None:
    """Cut off the half line that a kill has left at the end; the file is made if missing.

    Raises:
        OSError: the file cannot be read or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        size = end = file.tell()
        while end > 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            if (place := file.read(end - start).rfind(b"\n")) >= 0:
                end = start + place + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors and string metadata to a safetensors file, atomically.

    Raises:
        TypeError: the format has no name for a dtype or layout.
        OSError: the file cannot be written; one that was there before is as it was.
    """
    whole: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, x in tensors.items():
        stored = _stored(name, x)
        if stored.data_ptr() in memory:  # the library refuses two names of one memory
            stored = stored.clone()
        memory.add(stored.data_ptr())
        whole[name] = stored
    with replacing(Path(path)) as scratch:
        try:
            save_file(whole, scratch, dict(metadata) if metadata else None)
        except SafetensorError as error:  # the library wraps what the system said
            raise OSError(f"{path}: cannot be written, {error}") from error


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors and the metadata of a safetensors file, on the CPU.

    Raises:
        ValueError: the file is damaged, or is none.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb"):  # an error of the system as itself
        pass
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: the library maps the file, and a mapping of a file that shrinks kills.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except _DAMAGED as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged: {error}") from error


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata of a safetensors file, and no tensor.

    Raises:
        ValueError: the file is none, or is shorter or longer than its header says.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb"):  # an error of the system as itself
        pass
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except _DAMAGED as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged: {error}") from error


def sort_metadata(path: Path) -> None:
    """Sort the metadata in the header of a safetensors file, in place.

    The library writes several entries in an order that changes from call to call, so that equal
    content has other bytes.

    Raises:
        ValueError: the file is none.
        OSError: it cannot be read or written.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        raw = file.read(size)
        try:
            header = json.loads(raw)
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a safetensors file with metadata") from error
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > size:
            raise ValueError(f"{path}: expected a header of {size} bytes, got {len(text)} sorted")
        file.seek(8)
        file.write(text.ljust(size))


def _stored(name: str, x: Tensor) -> Tensor:
    """A tensor as safetensors writes it right: dense, of its own memory, without lazy bits."""
    if x.is_sparse or x.is_quantized:
        raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}, dtype {x.dtype}")
    x = x.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
