"""The demo: write the world of pictures, then train its tiny FLUX editor.

python examples/demo.py --objective grpo --seed 1
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mteditflow._command import OneLineCommand
from mteditflow._exits import refusing
from mteditflow._files import require_folder

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(cls=OneLineCommand)
def main(
    objective: Annotated[
        Literal["nft", "grpo"], typer.Option(help="DiffusionNFT or Flow-GRPO.")
    ] = "nft",
    seed: Annotated[int, typer.Option(min=0, help="Seed of chains, adapters and noise.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run; default: runs/demo-OBJECTIVE-SEED.")
    ] = None,
) -> None:
    """Train a tiny FLUX.1-Kontext to make three edits in a row: eight minutes on two cores."""
    from mteditflow_examples.flux.command_line import parse_or_exit
    from mteditflow_examples.flux.start import main as run_to_the_end
    from mteditflow_examples.pictures.files import main as write_world
    from mteditflow_examples.train_flux import train

    world = Path("runs", f"pictures-{seed}")
    given = {
        "model.path": world / "model",
        "data.chains": world / "train.jsonl",
        "data.held-out": world / "held_out.jsonl",
        "training.seed": seed,
        "output.folder": output or Path("runs", f"demo-{objective}-{seed}"),
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    config = parse_or_exit([f"pictures-{objective}", *words])
    folder = config.output.folder
    with refusing():
        require_folder("output.folder", folder)
        require_folder("runs", world)
        write_world(world, seed=seed)
    run_to_the_end(train, config)
    point_to_pictures(folder)


def point_to_pictures(folder: Path) -> None:
    """Print the paths of a run's pictures; a run stopped by a signal has none.

    Args:
        folder: folder of the run.
    """
    pictures = {
        "chains.png": "held-out chains before and after training",
        "curves.png": "rewards and held-out scores over the rounds",
    }
    for name, shown in pictures.items():
        if (folder / name).exists():
            print(f"Open {folder / name}: {shown}")


if __name__ == "__main__":
    app()
