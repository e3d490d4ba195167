"""Encoding of images as lossless PNG, so that a reward is computed from the exact edited pixels."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from mteditflow._images import BOMBS, SIXTEEN_BITS, UNREADABLE

FORMATS = ("PNG", "WEBP")


def to_rgb(name: str, image: Image.Image) -> Image.Image:
    """Load an image and convert it to 8-bit RGB; transparency is dropped, not blended.

    Args:
        name: name of the image in error messages.
        image: image of any 8-bit mode; an RGB image is returned itself.

    Raises:
        TypeError: it is not a PIL image.
        ValueError: it is empty, has more than 8 bits to a channel, or its file cannot be read.

    Example:
        >>> to_rgb("image", Image.new("L", (2, 1), 7)).getpixel((1, 0))
        (7, 7, 7)
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"{name}: expected a PIL image, got {type(image).__name__}")
    if 0 in image.size:
        raise ValueError(f"{name}: expected at least one pixel, got {image.width} x {image.height}")
    if image.mode.startswith(SIXTEEN_BITS):
        raise ValueError(f"{name}: expected 8 bits a channel, got mode {image.mode}")
    try:
        image.load()
    except UNREADABLE as error:
        raise ValueError(f"{name}: expected a readable image, got {error}") from error
    return image if image.mode == "RGB" else image.convert("RGB")


def pixel_change(before: Image.Image, after: Image.Image) -> float:
    """Return the mean absolute difference of two images' pixels, in [0, 255].

    At a turn whose instruction asks for no change, the difference of its input and its result is
    the editor's own wear, measured without a judge.

    Args:
        before: 8-bit image.
        after: 8-bit image of the same size.

    Raises:
        TypeError: an argument is not a PIL image.
        ValueError: the sizes differ, or ``to_rgb`` refuses an image.

    Source: the measure of MT-OPSD's depth curriculum (arXiv 2609.35611).

    Example:
        >>> gray = Image.new("RGB", (2, 1), (10, 10, 10))
        >>> pixel_change(gray, Image.new("RGB", (2, 1), (10, 13, 10)))
        1.0
    """
    first, second = to_rgb("before", before), to_rgb("after", after)
    if first.size != second.size:
        raise ValueError(f"after: expected the size of before, {first.size}, got {second.size}")
    pixels = (np.asarray(x, dtype=np.int16) for x in (first, second))  # uint8 would wrap around
    return float(np.abs(np.subtract(*pixels)).mean())


def png_bytes(image: Image.Image) -> bytes:
    """Encode the pixels of an 8-bit image as PNG: RGB, no metadata, equal bytes for equal pixels.

    Raises:
        TypeError: it is not a PIL image.
        ValueError: as in ``to_rgb``.

    Example:
        >>> image = Image.new("RGB", (8, 8), (200, 30, 30))
        >>> decode_image(png_bytes(image), max_pixels=64).getpixel((7, 7))
        (200, 30, 30)
    """
    rgb = to_rgb("image", image)
    file = io.BytesIO()
    # A copy of the pixels alone: no profile, text or date of the image. Low compression for speed.
    Image.frombytes("RGB", rgb.size, rgb.tobytes()).save(file, "PNG", compress_level=1)
    return file.getvalue()


def png_base64(image: Image.Image) -> str:
    """Encode an image as base64 of its PNG; raises what ``png_bytes`` does."""
    return base64.b64encode(png_bytes(image)).decode("ascii")


def png_data_url(image: Image.Image) -> str:
    """Encode an image as a ``data:`` URL of its PNG; raises what ``png_bytes`` does.

    Example:
        >>> png_data_url(Image.new("RGB", (1, 1)))[:34]
        'data:image/png;base64,iVBORw0KGgoA'
    """
    return f"data:image/png;base64,{png_base64(image)}"


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode one still PNG or WebP image from an untrusted sender.

    Args:
        data: content of the file.
        max_pixels: limit of width times height; checked before pixels are decoded.

    Returns:
        The image in RGB, loaded.

    Raises:
        ValueError: it is not such an image, is incomplete, animated or too large.

    Example:
        >>> decode_image(b"GIF89a", max_pixels=64)
        Traceback (most recent call last):
        ValueError: image: expected PNG or WebP, got 6 bytes of something else
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except BOMBS as error:
        raise ValueError(f"image: expected at most {max_pixels} pixels, got more") from error
    except UNREADABLE as error:
        raise ValueError(
            f"image: expected PNG or WebP, got {len(data)} bytes of something else"
        ) from error
    if image.width * image.height > max_pixels:
        raise ValueError(
            f"image: expected at most {max_pixels} pixels, got {image.width} x {image.height}"
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise ValueError(f"image: expected one still image, got {frames} frames")
    return to_rgb("image", image)
