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
    image: Any  # PIL RGB, or the transform's result; None if the chain has no reference image
    group: int  # index of the chain in the data set


class Batch(NamedTuple):
    """Some chains of a data set."""

    chains: tuple[Chain, ...]
    images: Any  # tensors of equal shape stacked, [B, ...]; else a list
    group: Tensor  # int64 [B]: the group id of each trajectory


class ChainDataset(Dataset[Example]):
    """Chains with their reference images.

    Images are converted to RGB and rotated by their EXIF orientation; more than 2^24 pixels are
    refused. Within a batch each chain's image is loaded once: the members of a group share it.

    Args:
        chains: chains of the data set, such as ``read_chains(path).chains``.
        transform: callable applied to each image; ``None`` keeps PIL images.

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
        """Return a chain with its loaded reference image.

        Raises:
            ChainError: the image is missing or broken; the message names chain and path.
            IndexError: there is no such chain.
        """
        chain = self.chains[index]
        image = None if chain.image is None else self._load(chain, chain.image)
        # The range maps a negative index to its position, so that a chain has one group id.
        return Example(chain, image, range(len(self))[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """Load a batch; torch's DataLoader calls this."""
        loaded = {index: self[index] for index in dict.fromkeys(indices)}
        return [loaded[index] for index in indices]

    def seen(self, index: int, history: History = "last") -> list[list[Any]]:
        """Return the editor's input images at each turn of a chain, as ``Editor.edit`` takes them.

        Args:
            index: position of the chain in the data set.
            history: default inputs of later turns, as in ``Chain.seen``.

        Returns:
            One list per turn, [N][number of inputs]: the strings "original" and "last", and loaded
            further images.

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
        Batch of their chains, images and group ids; images are stacked to [B, ...] if all are
        tensors of one shape, else kept as a list.
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
