"""The folder of an evaluation: what it was made of, its scores, and the report in every form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError
from rich.console import Console

from mteditflow._files import write_atomically
from mteditflow._pipes import reader_may_leave
from mteditflow.chains import Chain, read_chains, write_chains
from mteditflow.chains.record import first_error
from mteditflow.evaluation import Evaluation, Provenance, Report, draw_report
from mteditflow.evaluation.gallery import Series, gallery
from mteditflow.evaluation.tables import (
    as_csv,
    denominators,
    judges,
    lost_in_short,
    markdown,
    rich_tables,
)
from mteditflow.training.pictures import write_chart

from .images import ByRow, MadeImages

SETTINGS, EVALUATION, CHAINS = "settings.json", "evaluation.json", "chains.jsonl"


class Settings(BaseModel):
    """What the folder of an evaluation is of.

    Attributes:
        images: folder of the images, relative to this one or absolute.
        chains: sha256 of the file of chains.
        resolution: side of the square that references are fitted into; None leaves them.
        provenance: who judges and who makes the images; None in a folder of an older version.
    """

    images: str
    chains: str
    resolution: int | None = None
    provenance: Provenance | None = None

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Read those of a folder.

        Raises:
            ValueError: the file holds something else.
            OSError: there is none.
        """
        try:
            return cls.model_validate_json((folder / SETTINGS).read_bytes())
        except ValidationError as error:
            raise ValueError(f"{folder / SETTINGS}: {first_error(error)}") from error

    def agreed(self, folder: Path) -> Settings:
        """Return these settings with what those of a folder know besides, if it has any.

        Raises:
            ValueError: one is another than that of the folder.
        """
        if not (folder / SETTINGS).exists():
            return self
        old = Settings.read(folder)
        fix = "choose another --output"
        for name in ("images", "chains", "resolution"):
            if getattr(old, name) != (value := getattr(self, name)):
                before = f"{name} = {getattr(old, name)!r}"
                raise ValueError(f"{folder} holds an evaluation of {before}, got {value!r}: {fix}")
        if old.provenance is None or self.provenance is None:
            raise ValueError(f"{folder} holds an evaluation by an unknown judge: {fix}")
        try:
            provenance = old.provenance.agreed(self.provenance)
        except ValueError as error:
            raise ValueError(f"{folder} holds an evaluation of {error}: {fix}") from error
        return self.model_copy(update={"provenance": provenance})

    def write(self, folder: Path) -> None:
        """Write them."""
        write_atomically(folder / SETTINGS, self.model_dump_json(indent=1).encode())


class Finished:
    """An evaluation read back from its folder.

    Raises:
        ValueError: a file holds something else.
        OSError: a file is not there.
    """

    def __init__(self, folder: Path) -> None:
        settings = Settings.read(folder)
        self.evaluation = Evaluation.read(folder / EVALUATION)
        self.chains = read_chains(folder / CHAINS, allow_outside=True).chains
        self.report = _report(folder / "report.json")
        images = folder / settings.images  # absolute, if they were made elsewhere
        self.images = MadeImages(images, settings.resolution)

    def series(self, chains: Sequence[Chain]) -> Series:
        """What a gallery shows of some chains."""
        evaluation = self.evaluation.only([chain.id for chain in chains])
        return Series(self.report.title, evaluation, ByRow(self.images, chains))


def _report(path: Path) -> Report:
    """Read a report.

    Raises:
        ValueError: the file holds something else.
        OSError: there is none.
    """
    try:
        return Report.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: {first_error(error)}") from error


def write_all(
    folder: Path,
    report: Report,
    drawn: Sequence[Report],
    series: Sequence[Series],
    chains: Sequence[Chain],
    rows: Sequence[int],
) -> None:
    """Write the report as JSON, CSV, Markdown, chart and gallery."""
    page = gallery(series, chains, rows, title=report.title)  # may miss an image: first
    write_chart(draw_report(*drawn), folder / "report.png")
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
    with reader_may_leave():
        for table in rich_tables(report):
            console.print(table)
        for line in [*lost_in_short(report), *report.notes, *judges(report)]:
            console.print(line, markup=False)
        console.print(f"{denominators(report)}.", markup=False)
        console.print(
            f"All of it is in {folder}; look at gallery.html.", markup=False, soft_wrap=True
        )
