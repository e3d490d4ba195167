"""The folder of an evaluation: what it was made of, its scores, and the report in every form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mteditflow._files import write_atomically
from mteditflow.chains import Chain, read_chains, write_chains
from mteditflow.evaluation import Evaluation, Report, draw_report
from mteditflow.evaluation.gallery import Series, gallery
from mteditflow.evaluation.tables import (
    as_csv,
    denominators,
    lost_in_short,
    markdown,
    rich_tables,
)
from mteditflow.training.pictures import write_picture

from .images import ByRow, MadeImages

SETTINGS, EVALUATION, CHAINS = "settings.json", "evaluation.json", "chains.jsonl"


class Finished:
    """An evaluation read back from its folder.

    Raises:
        ValueError: a file holds something else.
        OSError: a file is not there.
    """

    def __init__(self, folder: Path) -> None:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        self.evaluation = Evaluation.read(folder / EVALUATION)
        self.chains = read_chains(folder / CHAINS).chains
        self.report = Report.model_validate_json((folder / "report.json").read_bytes())
        images = folder / settings["images"]  # absolute, if they were made elsewhere
        self.images = MadeImages(images, settings["resolution"])

    def series(self, chains: Sequence[Chain]) -> Series:
        """What a gallery shows of some chains."""
        evaluation = self.evaluation.only([chain.id for chain in chains])
        return Series(self.report.title, evaluation, ByRow(self.images, chains))


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write what the images are made of; a folder that holds others is refused.

    Raises:
        ValueError: a setting is another than that of the folder.
    """
    path = folder / SETTINGS
    if not path.exists():
        write_atomically(path, json.dumps(settings, indent=1).encode())
        return
    old = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if old.get(name) != value:
            raise ValueError(
                f"{folder} holds images of {name} = {old.get(name)!r}, got {value!r}: "
                "choose another --output"
            )


def write_all(
    folder: Path,
    report: Report,
    drawn: Sequence[Report],
    series: Sequence[Series],
    chains: Sequence[Chain],
    rows: Sequence[int],
) -> None:
    """Write the report as JSON, CSV, Markdown, picture and gallery."""
    write_picture(draw_report(*drawn), folder / "report.png")
    page = gallery(series, chains, rows, title=report.title)
    files = {
        "gallery.html": page.encode(),
        "report.csv": as_csv(report).encode(),
        "report.md": markdown(report, pictures=["report.png"]).encode(),
        "report.json": report.model_dump_json(indent=1).encode(),
    }
    for name, data in files.items():
        write_atomically(folder / name, data)


def write_scores(folder: Path, evaluation: Evaluation, chains: Sequence[Chain]) -> None:
    """Write the scores and the chains that they are of."""
    write_chains(chains, folder / CHAINS)
    evaluation.write(folder / EVALUATION)


def show(report: Report, folder: Path) -> None:
    """Print the tables, what they leave out, and where all of it is."""
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    for table in rich_tables(report):
        console.print(table)
    for line in [*lost_in_short(report), *report.notes]:
        console.print(line, markup=False)
    console.print(f"{denominators(report)}.", markup=False)
    console.print(f"All of it is in {folder}; look at gallery.html.", markup=False, soft_wrap=True)
