"""The folder of an evaluation: settings, scores, and the report in all formats."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ValidationError
from rich.console import Console

from mteditflow._files import naming, write_atomically
from mteditflow._pipes import reader_may_leave
from mteditflow.chains import Chain, read_chains, write_chains
from mteditflow.chains.record import first_error
from mteditflow.evaluation import Evaluation, Provenance, Report
from mteditflow.evaluation.gallery import Series, gallery
from mteditflow.evaluation.tables import (
    as_csv,
    denominators,
    judges,
    lost_in_short,
    markdown,
    rich_tables,
)

from .images import ByRow, MadeImages

SETTINGS, EVALUATION, CHAINS = "settings.json", "evaluation.json", "chains.jsonl"
REPORT = "report.json"


class Settings(BaseModel):
    """Inputs of an evaluation, stored in its folder.

    Attributes:
        images: folder of the images, absolute or relative to this one.
        chains: sha256 of the file of chains.
        resolution: side of the square for references, pixels; None: no change.
        provenance: origin of scores and images; None in a folder of an older version.
    """

    images: str
    chains: str
    resolution: int | None = None
    provenance: Provenance | None = None

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Read the settings of a folder.

        Raises:
            ValueError: the file is invalid.
            OSError: the file does not exist.
        """
        try:
            return cls.model_validate_json((folder / SETTINGS).read_bytes())
        except ValidationError as error:
            raise ValueError(f"{folder / SETTINGS}: {first_error(error)}") from error

    def agreed(self, folder: Path) -> Settings:
        """Return these settings, completed by those of a folder, if it has any.

        Raises:
            ValueError: a setting differs from that of the folder.
        """
        fix = "choose another --output"
        if not (folder / SETTINGS).exists():
            if (folder / REPORT).exists() and not (folder / EVALUATION).exists():
                raise ValueError(f"{folder} holds the report of a comparison: {fix}")
            if (folder / EVALUATION).exists():
                raise ValueError(
                    f"{folder} holds {EVALUATION} without {SETTINGS}, so an evaluation by an "
                    f"unknown judge: {fix}"
                )
            return self
        old = Settings.read(folder)
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
        """Write the settings to a folder."""
        path = folder / SETTINGS
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path):
            write_atomically(path, self.encoded)

    @property
    def encoded(self) -> bytes:
        """Content of the file."""
        return self.model_dump_json(indent=1).encode()


class Finished:
    """An evaluation read from its folder.

    Raises:
        ValueError: a file is invalid.
        OSError: a file does not exist.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / SETTINGS).is_file():
            got = "none" if not folder.exists() else f"one without {SETTINGS}"
            raise ValueError(
                "expected the folder of an evaluation, as mteditflow evaluate run writes it, got "
                f"{got}: {folder}"
            )
        self.folder, settings = folder, Settings.read(folder)
        self.evaluation = Evaluation.read(folder / EVALUATION)
        self.chains = read_chains(folder / CHAINS, allow_outside=True).chains
        self.report = _report(folder / REPORT)
        images = folder / settings.images  # an absolute path replaces the folder
        self.images = MadeImages(images, settings.resolution)

    def series(self, chains: Sequence[Chain]) -> Series:
        """Return the gallery's series of some chains."""
        evaluation = self.evaluation.only([chain.id for chain in chains])
        return Series(self.report.title, evaluation, ByRow(self.images, chains))


def _report(path: Path) -> Report:
    """Read a report.

    Raises:
        ValueError: the file is invalid.
        OSError: the file does not exist.
    """
    try:
        return Report.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: {first_error(error)}") from error


@contextmanager
def naming_folders(before: Path, after: Path) -> Iterator[None]:
    """Prefix an error about two evaluations, before and after, with their folders."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{before} (before) and {after} (after): {error}") from error


def report_files(
    report: Report,
    drawn: Sequence[Report],
    series: Sequence[Series],
    chains: Sequence[Chain],
    rows: Sequence[int],
) -> dict[str, bytes]:
    """Return the report as JSON, CSV, Markdown, charts and gallery, by file name.

    Survival is left out if a report was written by a version without it.
    """
    from mteditflow.evaluation import draw_report, draw_survival
    from mteditflow.evaluation.figures import chart_files

    page = gallery(series, chains, rows, title=report.title)  # first: raises if an image is gone
    charts, pictures = chart_files(draw_report(*drawn), "report"), ["report.png"]
    if all(each.has_survival for each in drawn):
        charts |= chart_files(draw_survival(*drawn), "survival")
        pictures.append("survival.png")
    return {
        **charts,
        "gallery.html": page.encode(),
        "report.csv": as_csv(report).encode(),
        "report.md": markdown(report, pictures=pictures).encode(),
        REPORT: report.model_dump_json(indent=1).encode(),
    }


def score_files(
    folder: Path, settings: Settings, evaluation: Evaluation, chains: Sequence[Chain]
) -> dict[str, bytes]:
    """Return settings, scores and scored chains, by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{uuid.uuid4().hex}.partial"  # in folder, since image paths are relative
    try:
        with naming(folder / CHAINS):
            write_chains(chains, scratch)
            text = scratch.read_bytes()
    finally:
        scratch.unlink(missing_ok=True)
    return {SETTINGS: settings.encoded, EVALUATION: evaluation.encoded, CHAINS: text}


def show(report: Report, folder: Path) -> None:
    """Print the tables, what they leave out, and the path of the report."""
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
