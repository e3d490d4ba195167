"""GEdit-Bench: single edits of eleven groups in two languages, four scores from 0 to 10 each.

SC of an item is the lower of two scores of the edit, PQ the lower of two scores of the edited image
alone, and O = sqrt(SC PQ). Each is averaged within its group, then over the groups. The judge's
prompts are this library's own, so numbers are not comparable with those of the benchmark's authors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from mteditflow._checks import check_choice
from mteditflow.chains.files import why_outside
from mteditflow.chains.formats.base import numbered_lines, parse_object
from mteditflow.chains.record import ChainError, first_error
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

GroupName = Literal[
    "background_change",
    "color_alter",
    "material_alter",
    "motion_change",
    "ps_human",
    "style_change",
    "subject-add",
    "subject-remove",
    "subject-replace",
    "text_change",
    "tone_transfer",
]
Language = Literal["en", "cn"]
GROUPS: tuple[str, ...] = get_args(GroupName)
LANGUAGES: tuple[str, ...] = get_args(Language)
Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
CONSISTENCY = Rubric(
    {
        "success": "how much of what the instruction asks for was done; 0 if nothing was",
        "restraint": "how little was changed beyond that; 0 if it is another scene",
    },
    low=0,
    high=10,
)
QUALITY = Rubric(
    {
        "naturalness": "how natural the image looks: light, shadow, distance, proportions",
        "cleanness": "how free it is of faults: distortion, blur, seams, faces or limbs gone wrong",
    },
    low=0,
    high=10,
    compares=False,
)


class _Row(BaseModel):
    """A line of the manifest."""

    model_config = ConfigDict(extra="ignore", strict=True)

    key: Text
    task_type: GroupName
    instruction: Text
    image: Text
    language: Annotated[
        Language, Field(validation_alias=AliasChoices("instruction_language", "language"))
    ]


def gedit_items(
    manifest: str | os.PathLike[str],
    edited: str | os.PathLike[str],
    *,
    language: str,
    allow_outside: bool = False,
) -> ItemReading:
    """Read one language of GEdit-Bench: a manifest in JSON Lines, with its images in files.

    The benchmark is published as a table with embedded images. Export each row as one line with the
    keys ``key``, ``task_type`` (one of ``GROUPS``), ``instruction``, ``image`` (path of the source
    image, relative to the manifest) and ``instruction_language`` ("en" or "cn"; the key
    ``language`` is accepted too). Other keys are ignored.

    Args:
        manifest: path of the manifest.
        edited: folder of the edited images in the benchmark's layout,
            ``fullset/<task_type>/<language>/<key>.png``. As in the benchmark, an edited image is
            judged at the size of its source.
        language: language of the rows to read, "en" or "cn".
        allow_outside: whether image paths may leave the folder of the manifest.

    Returns:
        The items, and every bad line with its reason, repeated keys included.

    Raises:
        ValueError: ``language`` is neither "en" nor "cn".
        OSError: the file cannot be read.
    """
    check_choice("language", language, LANGUAGES)
    file = Path(manifest)
    items: dict[str, Item] = {}
    skipped = []
    with file.open("rb") as stream:
        for number, raw in numbered_lines(stream):
            row = _parse(raw, file.parent, Path(edited), allow_outside)
            if isinstance(row, str):
                skipped.append(f"{file}:{number}: {row}")
            # Only within one language: the same key in the other one is another item.
            elif row.language == language and row.key in items:
                skipped.append(f"{file}:{number}: key: expected a new one, got {row.key!r} again")
            elif row.language == language:
                items[row.key] = _item(row, file.parent, Path(edited))
    return ItemReading(tuple(items.values()), tuple(skipped))


def _item(row: _Row, folder: Path, edited: Path) -> Item:
    source, made = folder / row.image, edited / _edited_name(row)
    return Item(row.key, row.task_type, row.instruction, source, made, at_source_size=True)


def _edited_name(row: _Row) -> str:
    return f"fullset/{row.task_type}/{row.language}/{row.key}.png"


def _parse(raw: bytes, folder: Path, edited: Path, allow_outside: bool) -> _Row | str:
    """Return the row of a line, or a message of what is wrong, such as an image outside."""
    try:
        row = _Row.model_validate(parse_object(raw))
        if allow_outside:
            return row
        image, key = why_outside(row.image, folder), why_outside(_edited_name(row), edited)
        return f"image: {image}" if image else f"key: {key}" if key else row
    except ValidationError as error:
        return first_error(error)
    except ChainError as error:
        return str(error)


async def score_gedit(
    client: ChatClient, items: Sequence[Item], *, progress: bool = False
) -> ItemScores:
    """Ask a judge for the four scores of each item of one language; see ``score_items``."""
    return await score_items(client, items, lambda _: (CONSISTENCY, QUALITY), progress=progress)


def report_gedit(found: ItemScores) -> BenchmarkReport:
    """Average SC, PQ and O in each group, then over the groups; see ``summarize``.

    Source: Step1X-Edit (arXiv 2504.17761), after VIEScore (arXiv 2312.14867).
    """
    return summarize("GEdit-Bench", found, _metrics, GROUPS)


def _metrics(scores: Scores) -> dict[str, float]:
    success, restraint, naturalness, cleanness = scores
    consistency, quality = min(success, restraint), min(naturalness, cleanness)
    return {"SC": consistency, "PQ": quality, "O": (consistency * quality) ** 0.5}
