"""Embeddings of instructions on disk, one file each, known again by what made them."""

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
    """Folder of embeddings, for any number of processes.

    A file's name is a hash of the instruction and of everything else that decides on its embedding,
    so that a folder may serve several models and settings. Files are written whole or not at all,
    with a checksum, which reading compares; one that is damaged, or of another instruction, counts
    as absent then.

    Args:
        folder: made when the first embedding is written.
        made_by: everything besides the instruction that decides on an embedding.

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
        """Return whether there is a whole file for an instruction, from its header alone.

        Only ``read`` compares the checksum.

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
        save_tensors(path, tensors, {"about": json.dumps(about)})  # one entry, so equal bytes

    def _path(self, instruction: Hashable) -> Path:
        name = blake2b(f"{self._made_by}\n{instruction!r}".encode(), digest_size=16).hexdigest()
        return self._folder / name[:2] / f"{name[2:]}.safetensors"


def _checksum(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Hash of the file's name and of all numbers, dtypes and shapes."""
    digest = blake2b(f"{path.parent.name}{path.name}".encode(), digest_size=16)
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _of_count(tensors: dict[str, Tensor], i: int, count: int | None) -> Embedding:
    """An embedding: a list of so many tensors, one tensor at -1, or None."""
    if count is None:
        return None
    return tensors[f"{i}.0"] if count < 0 else [tensors[f"{i}.{j}"] for j in range(count)]
