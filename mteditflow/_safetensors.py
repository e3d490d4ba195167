"""The safetensors file format with torch alone, so that the core needs no further dependency.

A file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, byte range;
and string metadata), and the tensors' bytes. Files are memory-mapped, so nothing is held twice,
and a write is atomic: a reader sees the old file or the whole new one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors and string metadata to a safetensors file, atomically."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    # Wide elements first: every tensor then starts at a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    end = 0
    for name, x in ordered:
        if x.dtype not in _NAMES:
            raise TypeError(f"{name}: cannot store {x.dtype}; stored are {list(_NAMES)}")
        start, end = end, end + x.nbytes
        header[name] = {
            "dtype": _NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    head = len(encoded).to_bytes(8, "little") + encoded

    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        file = torch.from_file(str(partial), shared=True, size=len(head) + end, dtype=torch.uint8)
        file[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        for name, x in ordered:
            start, end = (len(head) + offset for offset in header[name]["data_offsets"])
            file[start:end].copy_(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
        del file
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors and the metadata of a safetensors file; ``ValueError`` if it is damaged."""
    source = Path(path)
    size = source.stat().st_size
    with source.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{source}: not a safetensors file, or cut short")
        header = _parse(source, stream.read(length), size - 8 - length)
    metadata: dict[str, str] = header.pop("__metadata__", {})
    data = torch.from_file(str(source), shared=False, size=size, dtype=torch.uint8)[8 + length :]
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        # A copy: the mapping must not outlive a file that somebody replaces.
        tensors[name] = (
            data[start:end].clone().view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        )
    return tensors, metadata


def _parse(source: Path, encoded: bytes, data_size: int) -> dict[str, Any]:
    """Decode a header and verify that its byte ranges tile the data exactly."""
    try:
        header = json.loads(encoded)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ranges = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
        sized = all(
            end - start == math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize
            for entry in entries.values()
            for start, end in [entry["data_offsets"]]
        )
        edges = [(0, 0), *ranges, (data_size, data_size)]
        tiled = all(before[1] == after[0] for before, after in pairwise(edges))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: damaged safetensors header ({error!r})") from error
    if not (sized and tiled):
        raise ValueError(f"{source}: safetensors header and data do not agree")
    return dict(header)
