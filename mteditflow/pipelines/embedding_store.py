"""Embeddings of instructions on disk: one file each, named by a hash of all that produced it."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from mteditflow._files import load_metadata, load_tensors, save_tensors

Embedding = Tensor | Sequence[Tensor] | None


class EmbeddingStore:
    """Folder of embeddings, shared by any number of processes.

    A file's name is a hash of the instruction and of everything else that determines its embedding,
    so that one folder can serve several models and settings. Files are written atomically with a
    checksum. A file that is damaged, or that was renamed from another instruction's, counts as
    absent when it is read.

    Args:
        folder: created when the first embedding is written.
        made_by: description of everything besides the instruction that determines an embedding.

    Example:
        >>> import tempfile, torch
        >>> store = EmbeddingStore(tempfile.mkdtemp(), "a model")
        >>> store.write("Add a cat", [torch.ones(1, 2), None, [torch.zeros(3)]])
        >>> store.read("Add a cat")
        [tensor([[1., 1.]]), None, [tensor([0., 0., 0.])]]
        >>> store.read("Remove it") is None
        True
    """

    def __init__(self, folder: str | os.PathLike[str], made_by: str) -> None:
        self._folder, self._made_by = Path(folder), made_by

    def has(self, instruction: Hashable) -> bool:
        """Return whether there is a complete file for an instruction, reading its header only.

        ``read`` alone compares the checksum.

        Raises:
            OSError: a file cannot be read.
        """
        try:
            about = json.loads(load_metadata(self._path(instruction))["about"])
            return bool({"checksum", "counts"} <= about.keys())
        except (FileNotFoundError, ValueError, KeyError, AttributeError):
            return False

    def read(self, instruction: Hashable) -> list[Embedding] | None:
        """Return the embeddings of an instruction; None if there are none.

        Raises:
            OSError: a file cannot be read.
        """
        try:
            path = self._path(instruction)
            tensors, metadata = load_tensors(path)
            about = json.loads(metadata["about"])
            if about["checksum"] != _checksum(path, tensors):
                return None
            counts = about["counts"]
            return [_of_count(tensors, i, count) for i, count in enumerate(counts)]
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def write(self, instruction: Hashable, embeddings: Sequence[Embedding]) -> None:
        """Store the embeddings of an instruction.

        Raises:
            OSError: the file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        counts: list[int | None] = []
        for i, embedding in enumerate(embeddings):
            if embedding is None or isinstance(embedding, Tensor):
                counts.append(None if embedding is None else -1)
                parts: Sequence[Tensor] = [] if embedding is None else [embedding]
            else:
                counts.append(len(embedding))
                parts = embedding
            tensors |= {f"{i}.{j}": x for j, x in enumerate(parts)}
        path = self._path(instruction)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"counts": counts, "checksum": _checksum(path, tensors)}
        # One metadata entry: safetensors writes several in an order that changes from call to call.
        save_tensors(path, tensors, {"about": json.dumps(about)})

    def _path(self, instruction: Hashable) -> Path:
        name = blake2b(f"{self._made_by}\n{instruction!r}".encode(), digest_size=16).hexdigest()
        # 256 subfolders, so that none of them holds too many files.
        return self._folder / name[:2] / f"{name[2:]}.safetensors"


def _checksum(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of the file's name, and of all names, dtypes, shapes and values."""
    digest = blake2b(f"{path.parent.name}{path.name}".encode(), digest_size=16)
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _of_count(tensors: dict[str, Tensor], i: int, count: int | None) -> Embedding:
    """Return embedding ``i``: a list of ``count`` tensors, one tensor if it is -1, or None."""
    if count is None:
        return None
    return tensors[f"{i}.0"] if count < 0 else [tensors[f"{i}.{j}"] for j in range(count)]
