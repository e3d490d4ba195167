"""Checks of untrusted image files before their pixels are decoded.

Only lossless files are accepted: PNG of up to 8 bits a channel, and lossless WebP. With a lossy
file, content consistency would measure the codec too.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from struct import Struct
from typing import Any

PNG = b"\x89PNG\r\n\x1a\n"
# First bytes of other formats, for the message.
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
CHUNK = Struct(">I4s")  # of a PNG: length and name; the body and its CRC follow
CRC = Struct(">I")
IHDR = Struct(">IIBBBBB")  # width, height, depth, color type, compression, filter, interlacing
PALETTE = 3  # color type of a PNG with a palette
CHANNELS = {0: 1, 2: 3, PALETTE: 1, 4: 2, 6: 4}  # by color type
DEPTHS = {0: (1, 2, 4, 8), 2: (8,), PALETTE: (1, 2, 4, 8), 4: (8,), 6: (8,)}  # up to 8 bits
# Adam7 passes of an interlaced PNG: first column and row, and the steps to the next ones.
ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
RIFF = Struct("<4sI")  # name and length of a WebP chunk
VP8L = Struct("<BI")  # signature byte, then 14 bits of width - 1 and 14 of height - 1


class TooManyPixels(ValueError):  # noqa: N818
    """Image with more pixels than allowed."""


def check_file(data: bytes, *, max_pixels: int) -> None:
    """Check that a file is one whole, still, lossless image of bounded size.

    Args:
        data: content of the file.
        max_pixels: limit of width times height.

    Raises:
        TooManyPixels: the header declares more.
        ValueError: the file has another format, is lossy, animated, truncated or damaged, or has
            16 bits a channel.

    Example:
        >>> check_file(b"GIF89a", max_pixels=64)
        Traceback (most recent call last):
        ValueError: expected PNG or lossless WebP, got GIF
    """
    if data.startswith(PNG):
        _check_png(data, max_pixels)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        _check_size(*_webp_size(data), max_pixels)
    else:
        kind = next((name for magic, name in OTHERS.items() if data.startswith(magic)), None)
        came = kind or (f"{len(data)} bytes of something else" if data else "nothing")
        raise ValueError(f"expected PNG or lossless WebP, got {came}")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooManyPixels(f"expected at most {max_pixels} pixels, got {width} x {height}")
    if width == 0 or height == 0:
        raise ValueError(f"expected at least one pixel, got {width} x {height}")


def _check_png(data: bytes, max_pixels: int) -> None:
    chunks = list(_png_chunks(memoryview(data)))
    name, header = chunks[0]
    if name != b"IHDR" or len(header) != IHDR.size:
        raise ValueError("expected a PNG that begins with its header, got another chunk")
    width, height, depth, color, _, _, interlaced = IHDR.unpack(header)
    _check_size(width, height, max_pixels)
    if depth > 8:
        raise ValueError(f"expected at most 8 bits a channel, got {depth}")
    if depth not in DEPTHS.get(color, ()):
        raise ValueError(f"expected a PNG, got one of color type {color} and {depth} bits")
    names = {name for name, _ in chunks}
    if b"acTL" in names:
        raise ValueError("expected one still image, got an animated PNG")
    if color == PALETTE and b"PLTE" not in names:
        raise ValueError("expected a whole PNG, got one without its palette")
    pixels = b"".join(body for name, body in chunks if name == b"IDAT")
    _check_pixels(pixels, _png_bytes(width, height, depth * CHANNELS[color], bool(interlaced)))


def _png_bytes(width: int, height: int, bits: int, interlaced: bool) -> int:
    """Return the number of decompressed bytes of all rows, each with its filter byte."""
    total = 0
    for left, top, right, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def _check_pixels(data: bytes, size: int) -> None:
    """Check the number of decompressed bytes, since decoders would fill in missing pixels.

    At most ``size`` + 1 bytes are decompressed, so that a bomb costs no memory.
    """
    stream = zlib.decompressobj()
    try:
        length = len(stream.decompress(data, size + 1))
    except zlib.error as error:
        raise ValueError(f"expected a whole PNG, got damaged pixels: {error}") from error
    if length != size or not stream.eof:
        came = "more" if length > size else f"{length}"
        raise ValueError(f"expected a whole PNG of {size} bytes of pixels, got {came}")


def _png_chunks(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield names and bodies of the chunks, each verified by its CRC."""
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
        raise ValueError("expected lossless WebP, got lossy WebP, which alters the edited pixels")
    if b"VP8L" not in chunks:
        raise ValueError("expected lossless WebP, got one without an image")
    _, sides = _read(VP8L, chunks[b"VP8L"], 0, "WebP")
    return (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1


def _webp_chunks(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield names and bodies of the chunks, which must fill the file exactly."""
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
