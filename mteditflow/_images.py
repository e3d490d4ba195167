"""Image files of others: of a list of formats, bounded before they are decoded, upright RGB."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

from PIL import Image, ImageOps

#: Formats of image files that are read. PIL knows more, of which EPS starts another program.
FILE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
#: Endings of the files that a folder of images is searched for.
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
#: Width times height that is decoded at most; the consistency server has the same limit.
MAX_PIXELS = 2**24
ANIMATED = ("GIF", "PNG", "WEBP")  # further pictures of a JPEG or TIFF are previews, as a rule
SIXTEEN_BITS = ("I", "F")  # also I;16 and others: converting them to RGB clips silently
# Exceptions of PIL on broken files, and on files that are far too large (or warnings made errors).
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
    """Return width and height of an image file, from its header alone.

    Raises:
        ValueError: it has more than ``MAX_PIXELS``, or is animated.
        Exception: one of ``UNREADABLE`` or ``BOMBS`` where it is no image of ``FILE_FORMATS``.
    """
    with _open(path) as image:
        return image.width, image.height


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as a person sees it: RGB, turned as its EXIF orientation says.

    Transparency is dropped; the colors below it show.

    Raises:
        ValueError: it has more than ``MAX_PIXELS`` or more than 8 bits a channel, or is animated.
        Exception: one of ``UNREADABLE`` or ``BOMBS`` where it is no image of ``FILE_FORMATS``, or
            is broken.

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
    """Return the images in and under a folder, in an order that no file system changes.

    Raises:
        ValueError: there is none.
        OSError: the folder cannot be read.
    """
    next(folder.iterdir(), None)  # raises where it is no folder; ``rglob`` finds nothing there
    found = (x for x in folder.rglob("*") if x.suffix.lower() in SUFFIXES and x.is_file())
    images = sorted(found, key=lambda x: x.relative_to(folder).as_posix())
    if not images:
        raise ValueError(f"folder: expected {', '.join(SUFFIXES)} files in {folder}, got none")
    return images
