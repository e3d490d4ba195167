"""ImgEdit-Bench: single edits of nine categories, three criteria from 1 to 5 each.

An item's score is the mean of its three criteria; Overall is the unweighted mean of the categories.
As in the benchmark, the prompt says that the first number bounds the others, so that an editor
gains nothing by leaving the image unchanged; the bound is not enforced on the answer.
The judge's prompts are this library's own, so numbers are not comparable with those of the
benchmark's authors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from mteditflow.chains import read_chains
from mteditflow.chains.files import why_outside
from mteditflow.chains.formats.imgedit import category_of
from mteditflow.evaluation.benchmarks.averages import BenchmarkReport, summarize
from mteditflow.evaluation.benchmarks.items import (
    Item,
    ItemReading,
    ItemScores,
    Rubric,
    Scores,
    score_items,
)
from mteditflow.rewards import ChatClient

ALIASES: Mapping[str, str] = {"alter": "adjust", "hybrid": "compose"}
KEPT = "whether everything that the instruction does not speak of is as it was"
CLEAN = "whether the change looks real: edges, light, shadow, scale, no traces of the editing"
CRITERIA: Mapping[str, Mapping[str, str]] = {
    "add": {
        "following": "whether the new thing is there, as often and where the instruction says",
        "integration": "whether it fits into the scene: size, perspective, light, what it covers",
        "preservation": KEPT,
    },
    "remove": {
        "following": "whether just the thing named is gone, wholly, with its shadow and reflection",
        "filling": "whether what is now in its place continues the surroundings without a trace",
        "preservation": KEPT,
    },
    "replace": {
        "following": "whether the old thing is gone and the new one stands in its place",
        "integration": "whether the new thing fits: size, pose, perspective, light",
        "preservation": KEPT,
    },
    "adjust": {
        "following": "whether the property named has changed, to just what was asked for",
        "realism": CLEAN,
        "preservation": "whether the thing is still the same one, and all else is as it was",
    },
    "background": {
        "following": "whether the background is the one asked for",
        "integration": "whether foreground and background belong together: edges, light, depth",
        "preservation": "whether everything in the foreground is as it was",
    },
    "style": {
        "following": "whether the whole image is in the style asked for",
        "quality": "whether the style is carried through evenly and looks made with skill",
        "preservation": "whether the content is the same: things, their places and their shapes",
    },
    "extract": {
        "following": "whether just the thing named is shown, cut out of all that was around it",
        "boundary": "whether its outline is complete and clean",
        "preservation": "whether the thing itself is as it was: shape, color, detail",
    },
    "action": {
        "following": "whether the person or animal does what the instruction says",
        "realism": "whether body and movement are possible and look natural",
        "preservation": "whether it is the same person or animal, and all else is as it was",
    },
    "compose": {
        "following": "whether every one of the changes asked for was made",
        "realism": CLEAN,
        "preservation": KEPT,
    },
}
CATEGORIES = tuple(CRITERIA)
UNKNOWN = "unknown"  # category of every entry of UGE_edit.json
OF_ANY = {
    "following": "whether just what the instruction asks for was done, all of it",
    "realism": CLEAN,
    "preservation": KEPT,
}
BOUND = "; at most the number of following"


def _rubric(criteria: Mapping[str, str]) -> Rubric:
    bounded = {name: what + BOUND * (name != "following") for name, what in criteria.items()}
    return Rubric(bounded, low=1, high=5)


RUBRICS = {category: _rubric(criteria) for category, criteria in CRITERIA.items()}
RUBRIC_OF_ANY = _rubric(OF_ANY)


def imgedit_items(
    file: str | os.PathLike[str],
    edited: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    allow_outside: bool = False,
) -> ItemReading:
    """Read ``basic_edit.json`` or ``UGE_edit.json`` with the edited images of an editor.

    Args:
        file: the JSON file, ``{key: {"id": path, "prompt": text, "edit_type": category}}``. If no
            entry has a category, as in ``UGE_edit.json``, all have the category "unknown".
        edited: folder of the edited images, ``<key>.png``.
        images: base folder of the source images; ``None`` is the folder of the file.
        allow_outside: whether paths of source images may leave their base folder, as in
            ``read_chains``, and keys may leave ``edited``.

    Returns:
        The items, and every bad entry with its reason: a broken entry, a repeated key, a category
        that is none of the nine, or a missing category if other entries have one.

    Raises:
        OSError: the file cannot be opened.

    Example:
        >>> import tempfile
        >>> entry = '{"id": "7.jpg", "prompt": "Make the car red", "edit_type": "alter"}'
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "basic_edit.json")
        ...     _ = file.write_text(f'{{"1": {entry}}}')
        ...     item = imgedit_items(file, "edited").items[0]
        >>> item.group, item.edited.name
        ('adjust', '1.png')
    """
    reading = read_chains(
        file, format="imgedit", strict=False, images=images, allow_outside=allow_outside
    )
    own = [category_of(chain) for chain in reading.chains]
    known = [ALIASES.get(x or "", x) for x in own] if any(own) else [UNKNOWN] * len(own)
    items, skipped = [], [str(each) for each in reading.skipped]
    for chain, category in zip(reading.chains, known, strict=True):
        fault = None if allow_outside else why_outside(f"{chain.id}.png", Path(edited))
        if any(own) and category not in CRITERIA:
            got = "none" if category is None else repr(category)
            fault = f"edit_type: expected one of {list(CATEGORIES)}, got {got}"
        if fault is None and category is not None:
            made = Path(edited, f"{chain.id}.png")
            items.append(Item(chain.id, category, chain.instructions[0], chain.image_path, made))
        else:
            skipped.append(f"{file}: {chain.id}: {fault}")
    return ItemReading(tuple(items), tuple(skipped))


def rubrics_of(items: Sequence[Item]) -> tuple[Rubric, ...]:
    """Return the rubrics that ``score_imgedit`` uses: one per category, or the general one."""
    return (RUBRIC_OF_ANY,) if _of_no_category(items) else tuple(RUBRICS.values())


def _of_no_category(items: Sequence[Item]) -> bool:
    return {item.group for item in items} == {UNKNOWN}


async def score_imgedit(
    client: ChatClient, items: Sequence[Item], *, progress: bool = False
) -> ItemScores:
    """Ask a judge for the three criteria of each item; see ``score_items``."""
    return await score_items(
        client, items, lambda x: [RUBRICS.get(x.group, RUBRIC_OF_ANY)], progress=progress
    )


def report_imgedit(found: ItemScores) -> BenchmarkReport:
    """Average over items within each category, then over categories; see ``summarize``.

    Items of ``UGE_edit.json``, whose category is unknown, are averaged as one group.

    Source: ImgEdit (arXiv 2505.20275).
    """
    groups = (UNKNOWN,) if _of_no_category(found.items) else CATEGORIES
    return summarize("ImgEdit-Bench", found, _metrics, groups)


def _metrics(criteria: Scores) -> dict[str, float]:
    return {"score": fmean(criteria)}
