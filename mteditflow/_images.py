"""Untrusted image files: restricted formats, a size limit before decoding, and upright RGB."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

from PIL import Image, ImageOps

#: Image formats that are read. PIL supports more; for EPS it starts another program.
FILE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
#: Suffixes of image files in a folder of images.
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
#: Largest width times height that is decoded; the consistency server has the same limit.
MAX_PIXELS = 2**24
ANIMATED = ("GIF", "PNG", "WEBP")  # further images in a JPEG or TIFF are usually previews
SIXTEEN_BITS = ("I", "F")  # prefixes of modes, such as I;16, whose conversion to RGB clips silently
# Exceptions of PIL for broken files; BOMBS: for files far too large, or the warning as an error.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def check_image(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return width and height of an image file in pixels, from its header alone.

    Raises:
        ValueError: it has more than ``MAX_PIXELS``, or is animated.
        Exception: one of ``UNREADABLE`` or ``BOMBS`` if it is no image of ``FILE_FORMATS``.
    """
    with _open(path) as image:
        return image.width, image.height


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as RGB, rotated according to its EXIF orientation.

    The alpha channel is dropped, and colors are not blended with a background.

    Raises:
        ValueError: it has more than ``MAX_PIXELS`` or more than 8 bits per channel, or is animated.
        Exception: one of ``UNREADABLE`` or ``BOMBS`` if it is broken, or no image of
            ``FILE_FORMATS``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("L", (4, 2)).save(f"{folder}/7.png")
        ...     image = read_image(f"{folder}/7.png")
        >>> image.mode, image.size
        ('RGB', (4, 2))
    """
    with _open(path) as image:
        if image.mode.startswith(SIXTEEN_BITS):
            raise ValueError(f"expected 8 bits a channel, got mode {image.mode}")
        upright = ImageOps.exif_transpose(image)
        # Palettes with transparency need RGBA in between, or PIL warns.
        return (upright.convert("RGBA") if upright.mode == "P" else upright).convert("RGB")


def _open(path: str | os.PathLike[str]) -> Image.Image:
    image = Image.open(path, formats=FILE_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(
            f"expected at most {MAX_PIXELS} pixels, got {image.width} x {image.height}; make the "
            "image smaller"
        )
    if image.format in ANIMATED and (frames := getattr(image, "n_frames", 1)) > 1:
        image.close()
        raise ValueError(f"expected one still image, got {frames} frames; save the one to edit")
    return image


def folder_images(folder: Path) -> list[Path]:
    """Return the images in and below a folder, sorted by path on every file system.

    Raises:
        ValueError: there is no image.
        OSError: the folder cannot be read.
    """
    next(folder.iterdir(), None)  # raises if it is no folder, where ``rglob`` would yield nothing
    found = (x for x in folder.rglob("*") if x.suffix.lower() in SUFFIXES and x.is_file())
    images = sorted(found, key=lambda x: x.relative_to(folder).as_posix())
    if not images:
        raise ValueError(f"folder: expected {', '.join(SUFFIXES)} files in {folder}, got none")
    return images
