"""Export the LoRA of a run for diffusers or ComfyUI, with a model card.

python examples/export.py runs/kontext-nft --format comfyui --output release/edits.safetensors
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mteditflow._command import OneLineCommand
from mteditflow._exits import refusing
from mteditflow._files import write_all_atomically

if TYPE_CHECKING:
    from mteditflow.training import Checkpoint

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
CARD, STRIP = "README.md", "chains.png"
MANIFEST = "manifest.json"  # in the folder of every checkpoint
LORA = Path("lora", "pytorch_lora_weights.safetensors")  # in a checkpoint


@app.command(cls=OneLineCommand)
def main(
    source: Annotated[
        Path, typer.Argument(help="Folder of a run (its newest checkpoint), or of a checkpoint.")
    ],
    output: Annotated[
        Path, typer.Option(help="File to write, .safetensors; README.md goes next to it.")
    ],
    form: Annotated[
        Literal["diffusers", "comfyui"], typer.Option("--format", help="Names of the weights.")
    ] = "diffusers",
) -> None:
    """Write the evaluated policy of a checkpoint as a LoRA, and a model card."""
    from mteditflow_examples.flux.card import Exported, model_card

    with refusing():
        _check_output(output)
        exported = Exported(_checkpoint(source), output, form)
        lora = exported.found.path / LORA
        data = lora.read_bytes() if form == "diffusers" else _comfyui(exported.config, lora)
        files = {output.name: data}
        if (picture := exported.strip()) is not None:
            files[STRIP] = picture.read_bytes()
        files[CARD] = model_card(exported, STRIP if picture else None).encode()
        write_all_atomically(output.parent, files)
    print(f"Written to {output.parent}, round {exported.found.round}: {', '.join(files)}")


def _check_output(output: Path) -> None:
    """Raise unless the files can be written without overwriting unrelated ones.

    Raises:
        ValueError: the suffix is another, the folder is inside a checkpoint, or it has files of
            these names that no export wrote.
    """
    from mteditflow_examples.flux.card import MARK

    if output.suffix != ".safetensors":
        raise ValueError(f"--output: expected a .safetensors file, got {output}")
    folder = output.resolve().parent
    inside = next((x for x in (folder, *folder.parents) if (x / MANIFEST).is_file()), None)
    if inside is not None:
        raise ValueError(f"--output: expected a file outside of checkpoints, got one in {inside}")
    card = output.parent / CARD
    ours = card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace")
    for path in () if ours else (card, output, output.parent / STRIP):
        if path.exists():
            raise ValueError(
                f"--output: expected a folder of an earlier export, or one without files of these "
                f"names, got {path} of others"
            )


def _checkpoint(source: Path) -> Checkpoint:
    """Return a checkpoint by its folder, or the newest intact one of a run.

    Raises:
        ValueError: there is no checkpoint with a LoRA.
        OSError: the checkpoint cannot be read.
    """
    from mteditflow.training import Checkpoints

    inside = source / "checkpoints"
    of_run = inside.is_dir()
    if not of_run and not (source / MANIFEST).is_file():
        there = [x.parent.name for x in sorted(source.parent.glob(f"round-*/{MANIFEST}"))]
        beside = f"; there are {', '.join(there)} beside it" if there else ""
        raise ValueError(
            f"source: expected the folder of a training run, which has checkpoints, or of one "
            f"checkpoint, got {source}{'' if source.exists() else ', which does not exist'}{beside}"
        )
    checkpoints = Checkpoints(inside if of_run else source.parent)
    found = checkpoints.find("auto" if of_run else source)
    if found is None or not (found.path / LORA).is_file():
        raise ValueError(f"source: expected a run or a checkpoint with a LoRA, got {source}")
    return found


def _comfyui(config: dict[str, dict[str, str]], lora: Path) -> bytes:
    """Return a LoRA file's weights as safetensors bytes under ComfyUI's names.

    Raises:
        ValueError: the family, or one of its layers, has no exact ComfyUI equivalent.
    """
    import diffusers
    from safetensors.torch import save

    from mteditflow.pipelines import comfyui_lora, read_lora

    index = diffusers.DiffusionPipeline.load_config(config["model"]["path"])
    weights = read_lora(getattr(diffusers, index["_class_name"]), lora)
    named = comfyui_lora(weights, index["transformer"][1])
    return save({name: x.contiguous() for name, x in named.items()}, {"format": "pt"})


if __name__ == "__main__":
    app()
