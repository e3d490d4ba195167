"""Hashes of files and folders, by which the same content is known again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

WHOLE = 2**28  # bytes of a file that are read whole; of a larger one both ends
END = 2**24  # bytes of an end
DIGITS = 16  # of a hash in hexadecimal


def content_hash(path: str | os.PathLike[str]) -> str | None:
    """Return a hash of a file, or of all files in a folder by their names.

    Of a file above 256 MiB its size and both ends are hashed, so that large weights take no
    minutes.

    Returns:
        Hexadecimal; ``None`` if there is no such file or folder, as for a hub id.

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
