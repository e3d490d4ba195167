"""Image files that anyone may have sent: what can be known of one before its pixels are decoded.

Only what keeps every pixel is let through: PNG of up to 8 bits a channel, and lossless WebP. A
lossy file differs from what was made, and content consistency would measure the codec too.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from struct import Struct
from typing import Any

PNG = b"\x89PNG\r\n\x1a\n"
# How files of other formats begin, for the message.
OTHERS = {
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"<?xml": "XML",
}
CHUNK = Struct(">I4s")  # of a PNG: length and name, then the body and its CRC
CRC = Struct(">I")
IHDR = Struct(">IIBBBBB")
RIFF = Struct("<4sI")  # name and length of a WebP chunk
VP8L = Struct("<BI")


class TooManyPixels(ValueError):  # noqa: N818
    """The image is larger than it may be."""


def check_file(data: bytes, *, max_pixels: int) -> None:
    """Raise unless this is one whole, still, lossless image of bounded size.

    Args:
        data: the file.
        max_pixels: most that width times height may be.

    Raises:
        TooManyPixels: the header announces more.
        ValueError: it is of another format, lossy, animated, truncated, damaged or has 16 bits a
            channel.

    Example:
        >>> check_file(b"GIF89a", max_pixels=64)
        Traceback (most recent call last):
        ValueError: expected PNG or lossless WebP, got GIF
    """
    if data.startswith(PNG):
        width, height = _png_size(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        width, height = _webp_size(data)
    else:
        kind = next((name for magic, name in OTHERS.items() if data.startswith(magic)), None)
        came = kind or (f"{len(data)} bytes of something else" if data else "nothing")
        raise ValueError(f"expected PNG or lossless WebP, got {came}")
    if width * height > max_pixels:
        raise TooManyPixels(f"expected at most {max_pixels} pixels, got {width} x {height}")
    if width == 0 or height == 0:
        raise ValueError(f"expected at least one pixel, got {width} x {height}")


def _png_size(data: bytes) -> tuple[int, int]:
    chunks = _png_chunks(memoryview(data))
    name, header = next(chunks)
    if name != b"IHDR" or len(header) != IHDR.size:
        raise ValueError("expected a PNG that begins with its header, got another chunk")
    width, height, depth = IHDR.unpack(header)[:3]
    if depth > 8:
        raise ValueError(f"expected at most 8 bits a channel, got {depth}")
    if any(name == b"acTL" for name, _ in chunks):
        raise ValueError("expected one still image, got an animated PNG")
    return width, height


def _png_chunks(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Names and bodies of the chunks, each held against its CRC."""
    at, name = len(PNG), b""
    while name != b"IEND":
        length, name = _read(CHUNK, data, at, "PNG")
        end = at + CHUNK.size + length
        (crc,) = _read(CRC, data, end, "PNG")
        if zlib.crc32(data[at + 4 : end]) != crc:
            raise ValueError("expected a whole PNG, got a chunk with a wrong CRC")
        yield name, data[at + CHUNK.size : end]
        at = end + CRC.size
    _check_end(at, data, "PNG")


def _webp_size(data: bytes) -> tuple[int, int]:
    chunks = dict(_webp_chunks(memoryview(data)))
    if not chunks.keys().isdisjoint((b"ANIM", b"ANMF")):
        raise ValueError("expected one still image, got an animated WebP")
    if b"VP8 " in chunks:
        raise ValueError("expected lossless WebP, got lossy WebP: it is not what was made")
    if b"VP8L" not in chunks:
        raise ValueError("expected lossless WebP, got one without an image")
    _, sides = _read(VP8L, chunks[b"VP8L"], 0, "WebP")
    return (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1


def _webp_chunks(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Names and bodies of the chunks, which fill the file exactly."""
    _, length = _read(RIFF, data, 0, "WebP")
    _check_end(RIFF.size + length, data, "WebP")
    at = RIFF.size + 4
    while at < len(data):
        name, length = _read(RIFF, data, at, "WebP")
        end = at + RIFF.size + length
        yield name, data[at + RIFF.size : end]
        at = end + length % 2  # padded to an even length
    _check_end(at, data, "WebP")


def _read(struct: Struct, data: memoryview, at: int, kind: str) -> tuple[Any, ...]:
    if at + struct.size > len(data):
        raise ValueError(f"expected a whole {kind}, got a truncated one")
    return struct.unpack_from(data, at)


def _check_end(end: int, data: memoryview, kind: str) -> None:
    if end != len(data):
        what = "a truncated one" if end > len(data) else "one with bytes after its end"
        raise ValueError(f"expected a whole {kind}, got {what}")
