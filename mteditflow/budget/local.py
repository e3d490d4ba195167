"""Models by hub id or local folder, of which only configuration files are read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mteditflow.budget.models import MODELS, PIPELINES, Model, Part


def find_model(source: str | os.PathLike[str]) -> Model:
    """Return a known model by its hub id, or the model in a folder.

    Args:
        source: hub id of a known model, or a folder of a pipeline in diffusers format.

    Raises:
        ValueError: the source is neither, or the pipeline's class is not in ``PIPELINES``.
        OSError: a file in the folder cannot be read.

    Example:
        >>> find_model("black-forest-labs/FLUX.1-Kontext-dev").name
        'kontext'
    """
    word = os.fspath(source)
    for model in MODELS.values():
        if word.lower() in map(str.lower, model.hubs):
            return model
    folder = Path(source)
    if not (folder / "model_index.json").is_file():
        known = ", ".join(hub for model in MODELS.values() for hub in model.hubs)
        raise ValueError(
            f"model: expected a folder with model_index.json or one of {known}, got {word}"
        )
    return _read(folder)


def _read(folder: Path) -> Model:
    index = _json(folder / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        known = ", ".join(PIPELINES)
        raise ValueError(f"model: expected a pipeline among {known} in {folder}, got {pipeline}")
    for name in ("transformer", "vae"):
        if not _is_part(index.get(name)):
            raise ValueError(
                f"{folder / 'model_index.json'}: expected an entry for {name}, got none"
            )
    kind, transformer = _part(folder / "transformer", index["transformer"])
    if kind != PIPELINES[pipeline].transformer:
        raise ValueError(f"model: expected a {PIPELINES[pipeline].transformer}, got {kind}")
    vae = Part(*_part(folder / "vae", index["vae"]))
    encoders = tuple(
        Part(*_part(folder / name, entry))
        for name, entry in index.items()
        if name.startswith("text_encoder") and _is_part(entry)
    )
    return Model(
        name=str(folder),
        pipeline=pipeline,
        config=transformer,
        vae=vae,
        encoders=encoders,
        distilled=bool(index.get("is_distilled", False)),
        token=2 * pixels_of_latent(vae.config),
    )


def _is_part(entry: Any) -> bool:
    """Return whether an entry of the index has a library and a class, rather than two nulls."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(x, str) for x in entry)


def _part(folder: Path, entry: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the class of a component and its configuration."""
    values = _json(folder / "config.json")
    return entry[1], {name: x for name, x in values.items() if not name.startswith("_")}


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def pixels_of_latent(config: Any) -> int:
    """Return the side, in pixels, of the square that one latent of an autoencoder covers.

    Args:
        config: the autoencoder's configuration, a mapping.

    Example:
        >>> pixels_of_latent({"block_out_channels": (128, 256, 512, 512)})
        8
    """
    # One halving per entry for video autoencoders, one between two levels of image autoencoders.
    if "z_dim" in config:
        return int(2 ** len(config.get("temperal_downsample", (0,) * 3)))
    return int(2 ** (len(config.get("block_out_channels", (0,) * 4)) - 1))
