"""The images that an editor made of chains, in a folder that all ranks see."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from accelerate import PartialState
from PIL import Image, ImageOps
from tqdm import tqdm

from mteditflow._files import write_atomically
from mteditflow.chains import Chain, ChainDataset, ChainError

from .editors import Edits, Model


class MadeImages:
    """Images by chain and turn: ``<id>/turn_<t>.png``, or ``<id>_input_raw_turn_<t>.png``.

    Args:
        folder: where they lie, or will.
        resolution: side that references are cut and scaled to; None leaves them as they are.
    """

    def __init__(self, folder: Path, resolution: int | None) -> None:
        self.folder, self.resolution = folder, resolution

    def path(self, chain: Chain, turn: int) -> Path:
        """Where the image of a turn, from 1 on, lies, or will."""
        name = quote(chain.id, safe=" ").replace(".", "%2E")  # of one folder, whatever the id
        edival = self.folder / f"{name}_input_raw_turn_{turn}.png"
        return edival if edival.exists() else self.folder / name / f"turn_{turn}.png"

    def load(self, chain: Chain) -> list[Image.Image]:
        """Read [reference, turn 1, ..., turn N].

        Raises:
            ChainError: one is missing or broken; the message names it.
        """
        images = [self.reference(chain)]
        for turn in range(1, chain.turns + 1):
            path = self.path(chain, turn)
            try:
                images.append(Image.open(path).convert("RGB"))
            except FileNotFoundError as error:
                raise ChainError(f"turn {turn}: expected the image {path}, got none") from error
            except (OSError, ValueError, SyntaxError) as error:
                raise ChainError(f"turn {turn}: expected an image, got {path}: {error}") from error
        return images

    def reference(self, chain: Chain) -> Image.Image:
        """Read the reference as the editor is given it.

        Raises:
            ChainError: it is missing or broken.
        """
        image: Image.Image = ChainDataset([chain])[0].image
        if self.resolution is None:
            return image
        size = (self.resolution, self.resolution)
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)

    def missing(self, chains: Sequence[Chain]) -> list[Chain]:
        """Chains that lack an image of a turn and have a reference to begin with."""
        return [
            chain
            for chain in chains
            if not all(self.path(chain, n + 1).exists() for n in range(chain.turns))
            and self._has_reference(chain)
        ]

    def _has_reference(self, chain: Chain) -> bool:
        try:
            self.reference(chain)
        except ChainError:  # named where the images are read to be scored
            return False
        return True

    def make(self, model: Model, chains: Sequence[Chain], state: PartialState, batch: int) -> None:
        """Make what is missing, each rank a part of the chains; returns when all have finished.

        An image is there whole or not at all; a chain is made anew unless all of its images are.
        """
        own = self.missing(chains[state.process_index :: state.num_processes])
        edits = model.load(state.device) if own else None
        with tqdm(total=len(own), desc="editing", unit="chain", disable=None) as bar:
            for start in range(0, len(own), batch):
                self._make(edits, own[start : start + batch])
                bar.update(len(own[start : start + batch]))
        state.wait_for_everyone()

    def _make(self, edits: Edits, chains: Sequence[Chain]) -> None:
        made = edits([self.reference(chain) for chain in chains], chains)
        for chain, images in zip(chains, made, strict=True):
            for turn, image in enumerate(images, start=1):
                stream = io.BytesIO()
                image.save(stream, format="PNG")
                write_atomically(self.path(chain, turn), stream.getvalue())


class ByRow(Mapping[int, list[Image.Image]]):
    """Images [reference, turn 1, ..., turn N] of chains by row, read when asked for."""

    def __init__(self, images: MadeImages, chains: Sequence[Chain]) -> None:
        self._images, self._chains = images, chains

    def __getitem__(self, row: int) -> list[Image.Image]:
        return self._images.load(self._chains[row])

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return len(self._chains)
