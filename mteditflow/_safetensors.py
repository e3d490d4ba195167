"""The safetensors file format with torch alone, so that the core needs no further dependency.

A file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, byte range;
and string metadata), and the tensors' bytes. Bytes go between tensor and file without a copy of
the whole, and a write is atomic: a reader sees the old file or the whole new one.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import uuid
from collections.abc import Mapping
from io import BufferedReader, BufferedWriter
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
    """Write tensors and string metadata to a safetensors file, atomically.

    Raises:
        TypeError: the format, as written here, has no name for a dtype.
        OSError: the file cannot be written; one that was there before is as it was.
    """
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

    target = Path(path)
    partial = target.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            for _, x in ordered:
                _write(x, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors and the metadata of a safetensors file.

    Raises:
        ValueError: the file is damaged, or holds a dtype unknown here.
        OSError: the file cannot be read.
    """
    source = Path(path)
    size = source.stat().st_size
    with source.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{source}: not a safetensors file, or cut short")
        try:
            header = json.loads(stream.read(length))
            metadata = _check_header(header, size - 8 - length)
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{source}: damaged safetensors header, {error}") from error
        tensors = {}
        for name, entry in header.items():
            stream.seek(8 + length + entry["data_offsets"][0])
            tensors[name] = _read(stream, f"{source}: {name}", entry)
    return tensors, metadata


def _check_header(header: Any, data_size: int) -> dict[str, str]:
    """Raise ``ValueError`` unless the entries tile the data exactly; take the metadata out."""
    if not isinstance(header, dict):
        raise ValueError(f"expected an object, got {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("expected __metadata__ to hold strings")
    for name, entry in header.items():
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            raise ValueError(f"{name}: expected dtype, shape and data_offsets")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name}: dtype {entry['dtype']!r} is none of {list(_DTYPES)}")
        for key in ("shape", "data_offsets"):
            counts = entry[key]
            if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
                raise ValueError(f"{name}: expected {key} of integers >= 0, got {counts!r}")
        size = math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize
        start, *rest = entry["data_offsets"] or [0]
        if rest != [start + size]:
            raise ValueError(f"{name}: {entry['data_offsets']} does not span {size} bytes")
    ranges = sorted(tuple(entry["data_offsets"]) for entry in header.values())
    edges = [(0, 0), *ranges, (data_size, data_size)]
    if any(before[1] != after[0] for before, after in pairwise(edges)):
        raise ValueError(
            f"tensors do not fill the {data_size} bytes of data without gap or overlap"
        )
    return metadata


def _write(x: Tensor, stream: BufferedWriter) -> None:
    """Append the bytes of a tensor."""
    x = x.detach().cpu().contiguous()
    stream.write((ctypes.c_char * x.nbytes).from_address(x.data_ptr()))


def _read(stream: BufferedReader, name: str, entry: Mapping[str, Any]) -> Tensor:
    """The tensor of an entry, from where the stream is."""
    shape, dtype = entry["shape"], _DTYPES[entry["dtype"]]
    start, end = entry["data_offsets"]
    if start == end:
        return torch.empty(shape, dtype=dtype)
    buffer = bytearray(end - start)
    if stream.readinto(buffer) != end - start:
        raise ValueError(f"{name}: cut short")
    if dtype == torch.bool and max(buffer) > 1:
        raise ValueError(f"{name}: expected bytes 0 and 1 for booleans, got {max(buffer)}")
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape)
