"""Chains whose every turn asks for no change: any difference in their images is wear."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mteditflow._checks import check_count
from mteditflow.chains.record import NO_CHANGE, Chain

#: Default instructions, assigned to the turns in a cycle.
INSTRUCTIONS = (
    "Keep the image exactly as it is.",
    "Do not change anything in the picture.",
    "Leave every object and the background unchanged.",
    "Return the same image without any edit.",
)


def no_change_chains(
    images: Sequence[str],
    *,
    turns: int,
    instructions: Sequence[str] = INSTRUCTIONS,
    root: Path = Path(),
) -> list[Chain]:
    """Return one chain for each image, whose every turn asks for no change.

    Each turn has the task type ``NO_CHANGE``. A perfect editor returns its input; the distance of
    its images from the original is its wear (``mteditflow.wear``).

    Args:
        images: paths of reference images, relative to ``root``, which also serve as ids.
        turns: number of turns, N.
        instructions: texts that ask for no change, at least one, assigned to turns in a cycle.
        root: folder that the paths are relative to.

    Raises:
        ValueError: there is no instruction, or ``turns`` is below 1.

    Example:
        >>> (chain,) = no_change_chains(["7.png"], turns=2, instructions=["Change nothing."])
        >>> print(chain.to_json())  # doctest: +NORMALIZE_WHITESPACE
        {"id": "7.png", "image": "7.png", "instructions": ["Change nothing.", "Change nothing."],
         "task_types": ["no_change", "no_change"], "background_consistency": [true, true]}
    """
    check_count("turns", turns)
    if not instructions:
        raise ValueError("instructions: expected at least one, got none")
    words = tuple(instructions[n % len(instructions)] for n in range(turns))
    return [
        Chain(
            id=image,
            image=image,
            instructions=words,
            task_types=(NO_CHANGE,) * turns,
            background_consistency=(True,) * turns,
            root=root,
        )
        for image in images
    ]
