"""Random numbers that depend on what they are for, and on nothing that happened before."""

from __future__ import annotations

import hashlib
import json

import torch


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose stream is a function of its key alone.

    A trainer that draws all that is random from keys such as ``(seed, "noise", round, trajectory)``
    has no random state to save: a round done again, on another number of ranks or in other batches,
    draws the same numbers.

    Args:
        *key: integers and strings; two keys that differ anywhere give independent streams.
        device: of the generator.

    Raises:
        ValueError: there is no key.
        TypeError: a part is neither an integer nor a string.

    Example:
        >>> first, again = (keyed_generator(0, "noise", 3, 17) for _ in range(2))
        >>> bool(torch.rand(1, generator=first) == torch.rand(1, generator=again))
        True
    """
    if not key:
        raise ValueError("key: expected at least one integer or string, got none")
    for part in key:
        if type(part) not in (int, str):
            raise TypeError(f"key: expected integers and strings, got {type(part).__name__}")
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "big") >> 1  # torch takes 63 bits on every device
    return torch.Generator(device).manual_seed(seed)
