"""Folders of files that are there whole or not at all, with a manifest that proves it.

The manifest (JSON) is written last: format version, what the caller says of the folder, size and
SHA-256 of every file, and a checksum of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

FORMAT = 1
MANIFEST = "manifest.json"
_Read = TypeVar("_Read")


class DamagedError(ValueError):
    """A folder that is not what its manifest says, or has no manifest."""


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, after all of its files are safe on the disk.

    Raises:
        OSError: something cannot be written.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = _fingerprint(path)
    body = {"format": FORMAT, **about, "files": files}
    with (folder / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump(body | {"checksum": _checksum(body)}, stream, indent=1)
    sync(folder / MANIFEST)
    sync(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder's manifest says, itself verified, the files not.

    Raises:
        DamagedError: there is no manifest, or it is not as written.
        ValueError: it is whole, and of a format of another version of this library.
    """
    try:
        body = json.loads((folder / MANIFEST).read_bytes())
        checksum = body.pop("checksum")
    except FileNotFoundError:
        raise DamagedError(f"{folder}: no {MANIFEST}; not a checkpoint, or half-written") from None
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise DamagedError(f"{folder}: unreadable {MANIFEST}, {error!r}") from error
    if checksum != _checksum(body):
        raise DamagedError(f"{folder}: {MANIFEST} does not match its own checksum")
    if body["format"] != FORMAT:
        raise ValueError(f"{folder}: expected checkpoint format {FORMAT}, got {body['format']!r}")
    return dict(body)


def glance(folder: Path) -> dict[str, Any]:
    """The manifest, where every file is there in full length: as ``read_manifest`` otherwise."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{folder}: {name} is missing")
        if (size := path.stat().st_size) != expected["bytes"]:
            raise DamagedError(f"{folder}: {name} has {size} bytes instead of {expected['bytes']}")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, where every file is there byte for byte: as ``read_manifest`` otherwise."""
    manifest = glance(folder)
    for name, expected in manifest["files"].items():
        if _fingerprint(folder / name) != expected:
            raise DamagedError(f"{folder}: {name} is not what was written, by its SHA-256")
    return manifest


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are safe on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _checksum(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def unless_damaged(read: Callable[[Path], _Read], folder: Path, *, warn: bool) -> _Read | None:
    """Read a folder; None, and a warning if wanted, where it is damaged."""
    try:
        return read(folder)
    except DamagedError as error:
        if warn:
            warnings.warn(f"checkpoint skipped: {error}", stacklevel=2)
        return None
