"""Copy the trainer's files into a folder, to run and edit them there.

mteditflow init trainer my_trainer && cd my_trainer && python train.py --help
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from mteditflow._command import OneLineCommand, OneLineGroup
from mteditflow._exits import refusing

app = typer.Typer(
    cls=OneLineGroup, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
)

SOURCE = Path(__file__).parent
SCRIPTS = {"train_flux.py": "train.py", "self_distillation.py": "distill.py"}
PACKAGE = ("flux", "trainer")
# Longest first, since some names contain others.
RENAMED = (
    (f"mteditflow_examples.{PACKAGE[0]}", PACKAGE[1]),
    (f"examples/{PACKAGE[0]}/", f"{PACKAGE[1]}/"),
    (f"``{PACKAGE[0]}/", f"``{PACKAGE[1]}/"),
    *((f"examples/{old}", new) for old, new in SCRIPTS.items()),
    *SCRIPTS.items(),
)

README = """\
# Trainer

Copied from mteditflow {version} by `mteditflow init trainer`. The files are yours: the commands
below run the files in this folder, not those of the package `mteditflow_examples.flux`. Run them in
this folder.

```bash
python train.py --help                          # presets, objectives, sections
python train.py kontext-nft --help objective    # fields of a section
accelerate launch --config_file trainer/launch/ddp.yaml \\
    train.py kontext-nft --data.chains train.jsonl
```

To see it run on a CPU, train a tiny editor for two rounds:

```bash
python -m mteditflow_examples.shapes.files runs/shapes
python train.py shapes-nft --training.rounds 2
```

| to change | edit |
|---|---|
| the steps of a round | `train.py`; `distill.py` is the loop without rewards |
| hyperparameters | `trainer/presets/`, or your own file: `python train.py mine.toml` |
| devices and nodes | `trainer/launch/` |
| an option, its default, its checks | `trainer/config.py`, `trainer/soundness.py` |
| rewards and advantages | `trainer/scorers.py`, `trainer/scoring.py`, `trainer/advantages.py` |
| sampling of chains | `trainer/sampling.py` |
| updates | `trainer/updating.py`, `trainer/optimizer.py` |
| log, pictures, evaluation | `trainer/reporting.py`, `trainer/held_out.py` |

`mteditflow export` and `mteditflow evaluate` work on runs of this trainer, as long as
`trainer/config.py` keeps its original fields.

These files use private modules of mteditflow (`mteditflow._exits` and others), so pin
`mteditflow=={version}`. After an upgrade, compare with a fresh copy:
`mteditflow init trainer fresh && diff -r . fresh`.
"""


@app.callback()
def main() -> None:
    """Copy files of mteditflow for editing."""


@app.command(cls=OneLineCommand)
def trainer(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.")],
) -> None:
    """Copy the trainer with its presets and launch files; the copy is what train.py there runs."""
    with refusing():
        names = copy_trainer(folder)
    print(f"Written to {folder}: {', '.join(names)}. Start with {folder / 'README.md'}")


def copy_trainer(folder: Path) -> list[str]:
    """Write the trainer's files to a folder: all of them, or none.

    Args:
        folder: new or empty folder; missing parents are created.

    Returns:
        Sorted names of the files and folders written.

    Raises:
        ValueError: the folder is a file, or not empty.
        OSError: a file cannot be written; the folder is then unchanged.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     copy_trainer(Path(folder, "mine"))
        ['README.md', 'distill.py', 'train.py', 'trainer']
    """
    import mteditflow
    from mteditflow._files import require_folder, write_all_atomically

    require_folder("DIR", folder)
    if folder.is_dir() and (inside := sorted(x.name for x in folder.iterdir())):
        raise ValueError(f"DIR: expected a new or empty folder, got {folder} with {inside[0]}")
    texts = {name: _renamed(path.read_text("utf-8")) for name, path in _sources()}
    texts["README.md"] = README.format(version=mteditflow.__version__)
    there = [x for x in (folder, *folder.absolute().parents) if x.exists()]
    try:
        write_all_atomically(folder, {name: text.encode() for name, text in texts.items()})
        for name in (name for name, text in texts.items() if text.startswith("#!")):
            (folder / name).chmod(0o755)
    except BaseException:
        _remove_empty(folder, there)
        raise
    return sorted({name.partition("/")[0] for name in texts})


def _sources() -> Iterator[tuple[str, Path]]:
    """Yield name in the copy and source path of every file to copy."""
    for old, new in SCRIPTS.items():
        yield new, SOURCE / old
    package = SOURCE / PACKAGE[0]
    for path in sorted(package.rglob("*")):
        if path.is_file() and path.suffix in (".py", ".sh", ".toml", ".yaml"):
            yield f"{PACKAGE[1]}/{path.relative_to(package).as_posix()}", path


def _renamed(text: str) -> str:
    """Return a file's text with modules and files renamed as in the copy."""
    for old, new in RENAMED:
        text = text.replace(old, new)
    return text


def _remove_empty(folder: Path, there: list[Path]) -> None:
    """Remove empty folders that a failed copy created."""
    below = [x for x in folder.rglob("*") if x.is_dir()] if folder.is_dir() else []
    for path in (*sorted(below, reverse=True), folder, *folder.absolute().parents):
        if path in there:
            break
        with suppress(OSError):  # another program put a file into it, or it does not exist
            path.rmdir()


if __name__ == "__main__":
    app()
