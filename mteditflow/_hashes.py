"""Hashes of files and folders, to recognize equal content."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

WHOLE = 2**28  # largest file that is hashed whole, in bytes; of larger ones both ends are hashed
END = 2**24  # bytes of an end, and of a read
DIGITS = 16  # hexadecimal digits of a hash


def content_hash(path: str | os.PathLike[str]) -> str | None:
    """Return a hash of a file, or of all files in a folder with their relative paths.

    Of a file above 256 MiB only its size and both ends are hashed, since hashing large weights
    would take minutes.

    Returns:
        16 hexadecimal digits; ``None`` if there is no such file or folder, as for a hub id.

    Raises:
        OSError: a file cannot be read.

    Example:
        >>> content_hash("black-forest-labs/FLUX.1-Kontext-dev") is None
        True
    """
    root = Path(path)
    if not root.exists():
        return None
    files = sorted(x for x in root.rglob("*") if x.is_file()) if root.is_dir() else [root]
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(root).as_posix() if root.is_dir() else ""
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        _update(digest, file)
    return digest.hexdigest()[:DIGITS]


def _update(digest: Any, file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size > WHOLE:
            digest.update(stream.read(END))
            stream.seek(size - END)
        while chunk := stream.read(END):
            digest.update(chunk)
