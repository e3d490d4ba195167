"""Build the sdist and the wheel, check them, and use the wheel as a stranger does.

python -m release.dist [v0.2.0]

With a tag, its version must be that of the package. The checkers and the installed wheel have
environments of their own below ``build/dist``; the commands run in an empty folder outside of the
repository. Only versions that constraints.txt pins are installed.
"""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mteditflow import __version__
from mteditflow.cli import COMMANDS

from .steps import ROOT, Steps, fresh_environment, megabytes, pip

DIST, BUILD = ROOT / "dist", ROOT / "build" / "dist"
CHECKERS = ("twine==7.0.0", "check-wheel-contents==0.6.3")
TINY = {
    "training.rounds": 1,
    "training.batch": 8,
    "data.groups": 2,
    "data.group-size": 4,
    "data.held-out": "None",
    "sampling.batch": 8,
    "evaluation.every": 1,
}


def main() -> None:
    """Do all steps, and print them as a table."""
    tag = sys.argv[1] if len(sys.argv) > 1 else f"v{__version__}"
    if tag != f"v{__version__}":
        sys.stderr.write(f"error: tag: expected v{__version__}, as of the package, got {tag}\n")
        sys.exit(2)
    steps = Steps()
    shutil.rmtree(DIST, ignore_errors=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, ROOT]
    if steps.run("sdist, and the wheel built from it", command, using="build") is None:
        steps.end()
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    list_contents(sdist, wheel)
    checkers = fresh_environment(BUILD / "checkers")
    if steps.run("install the checkers", pip(checkers, *CHECKERS)) is not None:
        twine = [checkers, "-m", "twine", "check", "--strict", sdist, wheel]
        steps.run("metadata and README", twine, using=CHECKERS[0])
        contents = [checkers.parent / "check-wheel-contents", wheel]
        steps.run("contents of the wheel", contents, using=CHECKERS[1])
    use_the_wheel(steps, wheel)
    steps.end()


def list_contents(sdist: Path, wheel: Path) -> None:
    """Print the files and kB of each folder in both."""
    with tarfile.open(sdist) as archive:
        members = [(x.name.partition("/")[2], x.size) for x in archive if x.isfile()]
    show_folders(sdist, members)
    with zipfile.ZipFile(wheel) as archive:
        show_folders(wheel, [(x.filename, x.file_size) for x in archive.infolist()])


def show_folders(file: Path, members: Iterable[tuple[str, int]]) -> None:
    """Print how many files and kB lie in each folder of an archive, two levels deep."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, size in members:
        folder = "/".join(name.split("/")[:-1][:2]) or "."
        counts[folder] += 1
        sizes[folder] += size
    print(f"\n{file.name}: {counts.total()} files, {file.stat().st_size / 1e3:.0f} kB packed")
    for folder in sorted(counts):
        print(f"  {folder:<40} {counts[folder]:>4} files {sizes[folder] / 1e3:>8.0f} kB")


def use_the_wheel(steps: Steps, wheel: Path) -> None:
    """Install the wheel with the trainer's extra into an empty environment, and train with it."""
    python = fresh_environment(BUILD / "installed")
    empty = megabytes(python.parents[1])
    constraints = ("--constraint", ROOT / "constraints.txt")
    if steps.run("install the core", pip(python, wheel, *constraints)) is None:
        return
    core = megabytes(python.parents[1]) - empty
    if steps.run("install [train]", pip(python, f"{wheel}[train]", *constraints)) is None:
        return
    whole, site = (
        megabytes(python.parents[1]) - empty,
        next(python.parents[1].glob("lib/*/site-packages")),
    )
    alone = sum(megabytes(site / name) for name in ("torch", "nvidia", "triton"))
    steps.note("size of the core", f"{core - alone} MB without torch", f"{core} MB")
    steps.note("size with [train]", f"{whole - alone} MB without torch", f"{whole} MB")
    with tempfile.TemporaryDirectory() as name:
        folder, command = Path(name), [python.parent / "mteditflow"]
        where = steps.run(
            "imported from the wheel",
            [python, "-c", "import mteditflow; print(mteditflow.__file__)"],
            folder=folder,
        )
        if where is not None and not Path(where.strip()).is_relative_to(site):
            steps.note("imported from the wheel", where.strip(), "FAILED (elsewhere)")
        steps.run(
            "python -m mteditflow --help", [python, "-m", "mteditflow", "--help"], folder=folder
        )
        said = steps.run("mteditflow --version", [*command, "--version"], folder=folder)
        if said is not None and not re.fullmatch(rf"mteditflow {re.escape(__version__)}\n", said):
            steps.note("mteditflow --version", said.strip(), f"FAILED (not {__version__})")
        for word in COMMANDS:
            if word != "check":  # of the extra testing
                steps.run(f"mteditflow {word} --help", [*command, word, "--help"], folder=folder)
        steps.run(
            "mteditflow train shapes-nft --help",
            [*command, "train", "shapes-nft", "--help"],
            folder=folder,
        )
        train_tiny(steps, python, folder)


def train_tiny(steps: Steps, python: Path, folder: Path) -> None:
    """Train one round by the installed trainer, and one by an edited copy of it."""
    world = [python, "-m", "mteditflow_examples.shapes.files", "runs/shapes"]
    steps.run("write the shapes world", world, folder=folder)
    words = ["shapes-nft", *(str(w) for k, v in TINY.items() for w in (f"--{k}", v))]
    command = python.parent / "mteditflow"
    for name, program in {
        "installed": [command, "train"],
        "copied": [python, "x/train.py"],
    }.items():
        if name == "copied":
            steps.run("mteditflow init trainer x", [command, "init", "trainer", "x"], folder=folder)
        run = folder / "runs" / name
        steps.run(
            f"one round of the {name} trainer",
            [*program, *words, "--output.folder", run],
            folder=folder,
        )
        if not (run / "checkpoints").is_dir():
            steps.note(f"checkpoint of the {name} trainer", "", "FAILED (none)")


if __name__ == "__main__":
    main()
