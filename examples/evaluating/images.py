"""Images of edited chains, in a folder that all ranks share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps
from tqdm import tqdm

from mteditflow.chains import Chain, ChainDataset, ChainError, EditedImages, History

from .editors import Edits
from .options import few

if TYPE_CHECKING:
    from accelerate import PartialState


class MadeImages:
    """Images of chains in the layout of ``EditedImages``, with their cropped references.

    Args:
        folder: folder of the images, existing or not.
        resolution: side of the square that references are cropped and scaled to, pixels; None: no
            change.
    """

    def __init__(self, folder: Path, resolution: int | None) -> None:
        self.folder, self.resolution = folder, resolution
        self.edited = EditedImages(folder)

    def load(self, chain: Chain) -> list[Image.Image]:
        """Read [reference, turn 1, ..., turn N].

        Raises:
            ChainError: an image is missing or broken; the message has its path.
        """
        return [self.reference(chain), *self.edited.load(chain)]

    def require_any(self, chains: Sequence[Chain]) -> None:
        """Raise unless the images of at least one chain can be read.

        Raises:
            ValueError: no chain has readable images; the message has the reasons.
        """
        faults: dict[str, str] = {}
        for chain in chains:
            fault = self._fault(chain)
            if fault is None:
                return
            faults[chain.id] = fault
        raise no_images(faults)

    def _fault(self, chain: Chain) -> str | None:
        """Return the reason why the images of a chain cannot be read; None if they can."""
        try:
            self.load(chain)
        except ChainError as error:
            return str(error)
        return None

    def reference(self, chain: Chain) -> Image.Image:
        """Read the reference, cropped and scaled as the editor's input.

        Raises:
            ChainError: the image is missing or broken, or the chain has none.
        """
        _ = chain.reference  # raises if the chain has none
        image: Image.Image = ChainDataset([chain], transform=self._fit)[0].image
        return image

    def _fit(self, image: Image.Image) -> Image.Image:
        if self.resolution is None:
            return image
        size = (self.resolution, self.resolution)
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)

    def missing(self, chains: Sequence[Chain], state: PartialState) -> list[Chain]:
        """Return this rank's chains that lack an image and have a readable reference."""
        own = chains[state.process_index :: state.num_processes]
        return [x for x in own if not self.edited.complete(x) and self._has_reference(x)]

    def _has_reference(self, chain: Chain) -> bool:
        try:
            self.reference(chain)
        except ChainError:  # reported later, when images are read for scoring
            return False
        return True

    def make(
        self,
        edits: Edits | None,
        missing: Sequence[Chain],
        state: PartialState,
        batch: int,
        history: History = "last",
    ) -> None:
        """Make this rank's missing images; return when all ranks have finished.

        Images are written atomically; a chain that lacks any of its images is edited again.
        """
        with tqdm(total=len(missing), desc="editing", unit="chain", disable=None) as bar:
            for start in range(0, len(missing), batch):
                chains = missing[start : start + batch]
                given = ChainDataset(chains, transform=self._fit)
                seen = [given.seen(row, history) for row in range(len(chains))]
                images = edits([self.reference(chain) for chain in chains], chains, seen)
                for chain, own in zip(chains, images, strict=True):
                    self.edited.write(chain, own)
                bar.update(len(chains))
        state.wait_for_everyone()


def no_images(faults: Mapping[str, str]) -> ValueError:
    """Return the error for the case that no chain has its images, given the reasons by id."""
    return ValueError(f"expected at least one chain with its images, got none. {few(faults)}")


class ByRow(Mapping[int, list[Image.Image]]):
    """Images [reference, turn 1, ..., turn N] of chains by row, loaded on access."""

    def __init__(self, images: MadeImages, chains: Sequence[Chain]) -> None:
        self._images, self._chains = images, chains

    def __getitem__(self, row: int) -> list[Image.Image]:
        return self._images.load(self._chains[row])

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return len(self._chains)
