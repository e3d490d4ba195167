"""Edited images of chains in a folder: one file layout for writing and reading.

The image of turn t of a chain is ``<id>/turn_<t>.png``. Official outputs of EdiVal-Bench,
``<id>_input_raw_turn_<t>.png``, and of LME-Bench, ``<id>/turn<t>.png``, are read too.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from mteditflow._files import write_atomically
from mteditflow._images import BOMBS, UNREADABLE, read_image
from mteditflow.chains.record import Chain, ChainError

NAME_MAX = 200  # bytes of a folder name; file systems allow 255, and EdiVal's files append to it


class EditedImages:
    """Folder of edited images by chain and turn.

    Args:
        folder: its path; it need not exist before the first ``write``.

    Example:
        >>> import tempfile
        >>> chain = Chain(id="a/7", image="7.png", instructions=("Add a dog",))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     edited = EditedImages(folder)
        ...     edited.write(chain, [Image.new("RGB", (8, 8), "red")])
        ...     print(edited.path(chain, 1).relative_to(folder))
        ...     [image.size for image in edited.load(chain)]
        a%2F7/turn_1.png
        [(8, 8)]
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, chain: Chain, turn: int) -> Path:
        """Return the path of a turn's image, turns counted from 1, whether or not it exists."""
        name = _folder_name(chain.id)
        edival = self.folder / f"{name}_input_raw_turn_{turn}.png"
        own, lme = (self.folder / name / f"turn{sign}{turn}.png" for sign in ("_", ""))
        # Official outputs are read under their own names; a new image gets this library's name.
        return next((path for path in (edival, own, lme) if path.exists()), own)

    def complete(self, chain: Chain) -> bool:
        """Whether there is a file for every turn of a chain."""
        return all(self.path(chain, n + 1).is_file() for n in range(chain.turns))

    def write(self, chain: Chain, images: Sequence[Image.Image]) -> None:
        """Write the image of each turn as PNG, each file atomically.

        Raises:
            ValueError: the number of images is not the number of turns.
        """
        if len(images) != chain.turns:
            raise ValueError(
                f"images: expected one for each of {chain.turns} turns of chain {chain.id!r}, "
                f"got {len(images)}"
            )
        for turn, image in enumerate(images, start=1):
            stream = io.BytesIO()
            image.save(stream, format="PNG")
            write_atomically(self.path(chain, turn), stream.getvalue())

    def load(self, chain: Chain) -> list[Image.Image]:
        """Read the images [turn 1, ..., turn N] as RGB, rotated by their EXIF orientation.

        Raises:
            ChainError: an image is missing or broken; the message names turn and path.
        """
        return [self._load(turn, self.path(chain, turn)) for turn in range(1, chain.turns + 1)]

    def _load(self, turn: int, path: Path) -> Image.Image:
        try:
            return read_image(path)
        except FileNotFoundError as error:
            raise ChainError(f"turn {turn}: expected the image {path}, got none") from error
        except (*UNREADABLE, *BOMBS) as error:
            raise ChainError(f"turn {turn}: expected an image, got {path}: {error}") from error


def _folder_name(name: str) -> str:
    """Return the folder name of an id, percent-encoded; a long one is cut and ends in a hash."""
    # quote keeps dots, and the ids "." and ".." would name other folders.
    quoted = quote(name, safe=" ").replace(".", "%2E")
    if len(quoted) <= NAME_MAX:
        return quoted
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f"{quoted[: NAME_MAX - len(digest) - 1]}~{digest}"
