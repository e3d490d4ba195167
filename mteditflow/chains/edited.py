"""Images that an editor made of chains: one layout of files, written and read everywhere.

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

NAME_MAX = 200  # bytes of a folder's name; the system has room for 255


class EditedImages:
    """Folder of edited images by chain and turn.

    Args:
        folder: where they lie, or will.

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
        """Where the image of a turn, from 1 on, lies, or will."""
        name = _folder_name(chain.id)
        edival = self.folder / f"{name}_input_raw_turn_{turn}.png"
        own, lme = (self.folder / name / f"turn{sign}{turn}.png" for sign in ("_", ""))
        return next((path for path in (edival, own, lme) if path.exists()), own)

    def complete(self, chain: Chain) -> bool:
        """Whether there is a file for every turn of a chain."""
        return all(self.path(chain, n + 1).is_file() for n in range(chain.turns))

    def write(self, chain: Chain, images: Sequence[Image.Image]) -> None:
        """Write the image of each turn as PNG; each is there whole or not at all.

        Raises:
            ValueError: they are not one per turn.
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
        """Read [turn 1, ..., turn N] as RGB, upright.

        Raises:
            ChainError: one is missing or broken; the message names turn and path.
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
    """Return one name of a folder for any id; a hash ends one that would be too long."""
    quoted = quote(name, safe=" ").replace(".", "%2E")
    if len(quoted) <= NAME_MAX:
        return quoted
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f"{quoted[: NAME_MAX - len(digest) - 1]}~{digest}"
