"""Chains with their reference images, as a torch data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mteditflow._images import BOMBS, UNREADABLE, read_image
from mteditflow.chains.record import Chain, ChainError, History, is_remote


class Example(NamedTuple):
    """One chain of a data set."""

    chain: Chain
    image: Any  # PIL RGB, or what the transform makes of it; None if the chain has none
    group: int  # index of the chain in the data set


class Batch(NamedTuple):
    """Some chains of a data set."""

    chains: tuple[Chain, ...]
    images: Any  # tensors of equal shape stacked, [B, ...]; else a list
    group: Tensor  # int64 [B]: the group id of each trajectory


class ChainDataset(Dataset[Example]):
    """Chains with their reference images.

    An image is RGB, turned as its EXIF orientation says; over 2^24 pixels are refused. Within a
    batch each chain's image is loaded once: the members of a group share it.

    Args:
        chains: such as ``read_chains(path).chains``.
        transform: applied to each image; ``None`` keeps PIL images.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("L", (4, 2)).save(f"{folder}/7.png")
        ...     chain = Chain(id="7", image="7.png", instructions=("Add a dog",), root=folder)
        ...     example = ChainDataset([chain])[0]
        >>> example.image.mode, example.image.size, example.group
        ('RGB', (4, 2), 0)
    """

    def __init__(
        self, chains: Sequence[Chain], *, transform: Callable[[Image.Image], Any] | None = None
    ) -> None:
        self.chains = chains
        self.transform = transform

    def __len__(self) -> int:
        return len(self.chains)

    def __getitem__(self, index: int) -> Example:
        """Load the image of a chain.

        Raises:
            ChainError: it is missing or broken; the message names chain and path.
            IndexError: there is no such chain.
        """
        chain = self.chains[index]
        image = None if chain.image is None else self._load(chain, chain.image)
        return Example(chain, image, range(len(self))[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Load a batch; torch's DataLoader calls this."""
        loaded = {index: self[index] for index in dict.fromkeys(indices)}
        return [loaded[index] for index in indices]

    def seen(self, index: int, history: History = "last") -> list[list[Any]]:
        """Return what the editor is given at each turn of a chain, as ``Editor.edit`` takes it.

        Args:
            index: of the chain.
            history: as in ``Chain.seen``.

        Returns:
            "original", "last" and loaded further images, [N][number].

        Raises:
            ChainError: a further image is missing or broken; the message names chain and path.
            IndexError: there is no such chain.
            ValueError: there is no such history.
        """
        chain = self.chains[index]
        loaded = {name: self._load(chain, name) for name in chain.further_images}
        return [[loaded.get(name, name) for name in turn] for turn in chain.seen(history)]

    def _load(self, chain: Chain, name: str) -> Any:
        image = _load_image(chain, name)
        return image if self.transform is None else self.transform(image)


def collate_chains(examples: Sequence[Example]) -> Batch:
    """Make a batch of examples: the ``collate_fn`` of a DataLoader over a ``ChainDataset``.

    Args:
        examples: at least one.

    Returns:
        Their chains, images and group ids; images are stacked if all are tensors of one shape.
    """
    chains, images, groups = zip(*examples, strict=True)
    shapes = {image.shape if isinstance(image, Tensor) else None for image in images}
    stacked = torch.stack(images) if len(shapes) == 1 and None not in shapes else list(images)
    return Batch(chains, stacked, torch.tensor(groups, dtype=torch.int64, device="cpu"))


def _load_image(chain: Chain, name: str) -> Image.Image:
    if is_remote(name):
        raise ChainError(f"chain {chain.id!r}: expected an image file, got {name!r}")
    path = chain.root / name
    try:
        return read_image(path)
    except (*UNREADABLE, *BOMBS) as error:
        raise ChainError(
            f"chain {chain.id!r}: expected a readable image, got {str(path)!r} "
            f"({type(error).__name__}: {error})"
        ) from error
