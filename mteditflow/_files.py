"""Atomic writes of files: of bytes, and of tensors as safetensors."""

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

# Exceptions of safetensors for damaged headers, such as sizes that overflow an integer.
_DAMAGED = (
    SafetensorError, RuntimeError, ValueError, AttributeError, KeyError, TypeError, OverflowError,
)  # fmt: skip

_BLOCK = 2**16  # bytes that are read at once in the search for the last line


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a scratch path whose file replaces ``path`` when the block ends without an error.

    At any moment, also after a kill, ``path`` is the old file or the complete new one.

    Raises:
        OSError: the file cannot be written; the message names ``path``.
    """
    with replacing_all(path) as [scratch]:
        yield scratch


def require_folder(name: str, folder: Path) -> None:
    """Raise unless a path is a folder, or can be created as one.

    Args:
        name: name of the option with the path.
        folder: the path, which need not exist.

    Raises:
        ValueError: the path, or the nearest existing one above it, is a file; or no folder can have
            such a path.
    """
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ValueError(f"{name}: expected a folder, got {folder}: {error.strerror}") from error
    # A link that leads nowhere exists as a link only, and no folder can be made in its place.
    there = next(x for x in (folder, *folder.absolute().parents) if os.path.lexists(x))
    if not there.is_dir():
        raise ValueError(f"{name}: expected a folder, got the file {there}")


def require_no_device(path: Path) -> None:
    """Raise if a path is a device or a pipe: reading may never end, and writes may be lost.

    Raises:
        OSError: the path is one.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "expected a file, got a device or a pipe", str(path))


def destination(path: Path) -> Path:
    """Return the file to which a path leads through symbolic links, so that links stay links.

    Raises:
        OSError: the path is a folder, a device, a pipe, or a loop of links.
    """
    require_no_device(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    target = Path(os.path.realpath(path))
    if target.is_symlink():  # ``realpath`` stops at a link only where links form a loop
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def require_other_files(name: str, *paths: Path) -> None:
    """Raise unless these paths lead to different files, with links followed.

    Args:
        name: name of the arguments with the paths.
        *paths: paths of files, which need not exist.

    Raises:
        ValueError: two paths lead to one file.
    """
    places = [os.path.realpath(path) for path in paths]
    for i, path in enumerate(paths):
        if places[i] in places[:i]:
            raise ValueError(f"{name}: expected different files, got {path} twice")


@contextmanager
def replacing_all(*paths: Path) -> Iterator[list[Path]]:
    """Yield a scratch path for each file; on exit all replace their files, after an error none.

    Links are followed. Only a kill between the renames can leave some files new and others old.

    Raises:
        OSError: a file cannot be written; the message names it, not its scratch path.
    """
    targets = [destination(path) for path in paths]
    scratch = [target.with_name(f".{uuid.uuid4().hex}.partial") for target in targets]
    made: list[Path] = []
    try:
        for path, own in zip(paths, scratch, strict=True):
            # Created now, so that a folder without permission fails before any work is done.
            with naming(path):
                own.open("xb").close()
            made.append(own)
        with _naming_scratch(paths, scratch):
            yield scratch
        # All content is on the disk before the first rename: a crash must not leave an empty file.
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
    """Rewrite an ``OSError`` of the block to name ``path`` instead of a scratch path.

    Raises:
        OSError: the same error, for ``path``.
    """
    try:
        yield
    except OSError as error:
        raise _named(error, path) from error


@contextmanager
def _naming_scratch(paths: Sequence[Path], scratch: Sequence[Path]) -> Iterator[None]:
    """Rewrite an ``OSError`` of a scratch path to name its file.

    An error without a path, such as of a write to an open file, is that of the only file, if there
    is one file.
    """
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
    """Write files into a folder by relative path: all of them, or none; folders are created.

    Raises:
        OSError: a file cannot be written; existing files are as they were.
    """
    paths = [folder / name for name in files]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_all(*paths) as scratch:
        for path, own, data in zip(paths, scratch, files.values(), strict=True):
            with naming(path):
                own.write_bytes(data)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically; its folder is created if missing.

    Raises:
        OSError: the file cannot be written; an existing one is as it was.
    """
    write_all_atomically(path.parent, {path.name: data})


_appending = threading.Lock()


def append_line(path: Path, line: bytes, *, sync: bool) -> None:
    """Append a complete line or nothing: a part that a full disk accepted is cut off again.

    Args:
        path: path of the file, created if missing; only one process may write it.
        line: the line, with its line break.
        sync: whether to wait until the line is on the disk.

    Raises:
        OSError: the line cannot be written; the file is as it was.
    """
    with _appending, path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            left = memoryview(line)
            while left:  # on a disk that fills up, one write is partial and the next one fails
                left = left[file.write(left) :]
            if sync:
                os.fsync(file.fileno())
        except BaseException:
            file.truncate(size)
            raise


def cut_half_line(path: Path) -> None:
    """Cut off an incomplete last line, as a kill leaves it; the file is created if missing.

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
        TypeError: the format does not support a dtype or layout.
        OSError: the file cannot be written; an existing one is as it was.
    """
    whole: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, x in tensors.items():
        stored = _stored(name, x)
        if stored.data_ptr() in memory:  # safetensors refuses two names for one memory
            stored = stored.clone()
        memory.add(stored.data_ptr())
        whole[name] = stored
    with replacing(Path(path)) as scratch:
        try:
            save_file(whole, scratch, dict(metadata) if metadata else None)
        except SafetensorError as error:  # safetensors wraps errors of the operating system
            raise OSError(f"{path}: cannot be written, {error}") from error


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors and the metadata of a safetensors file, on the CPU.

    Raises:
        ValueError: the file is damaged, or no safetensors file.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb"):  # raises OSError, which safetensors would wrap
        pass
    try:
        with safe_open(path, framework="pt") as file:
            # Copies, since safetensors maps the file: reading a mapping whose file shrank crashes.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except _DAMAGED as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged: {error}") from error


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata of a safetensors file, without its tensors.

    Raises:
        ValueError: it is no safetensors file, or its size does not match its header.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb"):  # raises OSError, which safetensors would wrap
        pass
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except _DAMAGED as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged: {error}") from error


def sort_metadata(path: Path) -> None:
    """Sort the metadata in the header of a safetensors file, in place.

    safetensors writes several entries in an order that changes from call to call, so that equal
    content would have different bytes.

    Raises:
        ValueError: it is no safetensors file with metadata.
        OSError: the file cannot be read or written.
    """
    with path.open("r+b") as file:
        # Format: 8 bytes with the header's length, the header as JSON padded with spaces, tensors.
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
    """Return a tensor as safetensors can write it: dense, contiguous, on the CPU, unshared.

    Raises:
        TypeError: the tensor is sparse or quantized.
    """
    if x.is_sparse or x.is_quantized:
        raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}, dtype {x.dtype}")
    # safetensors writes the memory as it is: resolve lazy conjugation and negation first.
    x = x.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
