"""Splits of chains without shared images, and a check of the overlap of two lists."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mteditflow._checks import check_choice, check_count
from mteditflow.chains.record import Chain, is_remote

BY = ("image", "chain")
SHOWN = 3  # shared chains or images that a message names
CHUNK = 2**20  # bytes read at once when hashing


@dataclass(frozen=True)
class Split:
    """Two parts of a list of chains, each in the order of the list.

    Attributes:
        train: chains to train on.
        held_out: chains to evaluate on.
    """

    train: tuple[Chain, ...]
    held_out: tuple[Chain, ...]


def split_chains(
    chains: Sequence[Chain], *, held_out: int, by: str = "image", seed: int = 0
) -> Split:
    """Split chains into training and held-out ones.

    By image, all chains with the same reference image (equal bytes, under any name) go to one side,
    and so do chains that share a further image of ``references``. The choice of held-out images
    depends only on the seed and each image's content, not on the order of the chains. Additional
    chains therefore move no image to the other side, unless ``held_out`` grows or a new chain links
    images that were unrelated before.

    Args:
        chains: chains to split.
        held_out: minimum number of held-out chains, >= 1; by image there may be more, since the
            chains of one image stay together.
        by: "image", or "chain" if the sides may share images.
        seed: seed of the choice.

    Returns:
        The two sides.

    Raises:
        ValueError: ``by`` is unknown, ``held_out`` is below 1, or nothing is left to train on.
        OSError: an image cannot be read.

    Example:
        >>> chains = [Chain(id=str(i), image=f"https://x/{i // 2}.png", instructions=("Add a dog",))
        ...     for i in range(6)]
        >>> split = split_chains(chains, held_out=2, seed=1)
        >>> len(split.held_out), shared(split.train, split.held_out).any
        (2, False)
    """
    check_choice("by", by, BY)
    check_count("held_out", held_out)
    groups = _groups(chains) if by == "image" else {chain.id: [chain] for chain in chains}
    chosen: set[str] = set()
    # Order by a hash, not a shuffle: a group's place does not depend on which others there are.
    for key in sorted(groups, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest()):
        if len(chosen) >= held_out:
            break
        chosen.update(chain.id for chain in groups[key])
    split = Split(
        tuple(chain for chain in chains if chain.id not in chosen),
        tuple(chain for chain in chains if chain.id in chosen),
    )
    if not split.train or len(split.held_out) < held_out:
        kind = "images" if by == "image" else "chains"
        raise ValueError(
            f"held_out: expected fewer chains, so that some are left to train on, got {held_out} "
            f"of {len(chains)} with {len(groups)} different {kind}"
        )
    return split


@dataclass(frozen=True)
class Shared:
    """Ids and images that two lists of chains share.

    Attributes:
        ids: ids of chains in both lists.
        images: images in both lists (equal bytes, under any name; further images included), each
            as the pair of ids of a chain with it in the first list and one in the second.
    """

    ids: tuple[str, ...]
    images: tuple[tuple[str, str], ...]

    @property
    def any(self) -> bool:
        """Whether the lists share an id or an image."""
        return bool(self.ids or self.images)

    def __str__(self) -> str:
        pairs = [f"{one} = {other}" for one, other in self.images]
        return " and ".join(
            f"{len(found)} {kind}{'s' * (len(found) > 1)} "
            f"({', '.join(found[:SHOWN])}{', ...' * (len(found) > SHOWN)})"
            for kind, found in (("chain id", self.ids), ("reference image", pairs))
            if found
        )


def shared(train: Sequence[Chain], held_out: Sequence[Chain]) -> Shared:
    """Return the chains, by id, and the images, by content, that both lists have.

    Raises:
        OSError: an image cannot be read.

    Example:
        >>> one = [Chain(id="7", image="https://x/1.png", instructions=("Add a dog",))]
        >>> other = [Chain(id="8", image="https://x/1.png", instructions=("Remove a cat",))]
        >>> print(shared(one, other))
        1 reference image (7 = 8)
    """
    known = {chain.id for chain in train}
    owner = {name: chain.id for chain, name in _named(train)}
    images = [(owner[name], chain.id) for chain, name in _named(held_out) if name in owner]
    return Shared(tuple(x.id for x in held_out if x.id in known), tuple(dict.fromkeys(images)))


def _groups(chains: Sequence[Chain]) -> dict[str, list[Chain]]:
    """Group chains that are linked by common images, under the least content hash of a group."""
    images: defaultdict[str, list[str]] = defaultdict(list)
    for chain, name in _named(chains):
        images[chain.id].append(name)
    key = {name: name for names in images.values() for name in names}

    # Union-find over images with path halving. The root is the least hash, so that neither the
    # order of the chains nor that of the images changes the name of a group.
    def least(name: str) -> str:
        while key[name] != name:
            key[name] = name = key[key[name]]
        return name

    for names in images.values():
        roots = [least(name) for name in names]
        key |= dict.fromkeys(roots, min(roots))
    groups: defaultdict[str, list[Chain]] = defaultdict(list)
    for chain in chains:
        groups[least(images[chain.id][0])].append(chain)
    return groups


def _named(chains: Sequence[Chain]) -> Iterator[tuple[Chain, str]]:
    """Yield each chain with the content hash of each of its images, or the URL of a remote one.

    A chain is yielded once for its reference image, first, and once for each further image.
    """
    hashes: dict[Path, str] = {}
    for chain in chains:
        if chain.image is None:  # text to image: equal instructions count as one image
            yield chain, "\n".join(chain.instructions)
            continue
        for name in (chain.image, *chain.further_images):
            if is_remote(name):
                yield chain, name
                continue
            path = Path(os.path.realpath(chain.root / name))
            if path not in hashes:
                hashes[path] = _hash(path)
            yield chain, hashes[path]


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
