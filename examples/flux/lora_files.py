"""Files of LoRAs: checks before a model is loaded, and where a run keeps its own."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open

from mteditflow._files import require_no_device

from .config import ConfigError

LORA = "pytorch_lora_weights.safetensors"  # diffusers' file name in a folder or Hub repository
# The first of a LoRA's two factors, under the names of diffusers, kohya and older diffusers.
FACTOR_A = re.compile(r"\.(lora_A|lora_down|lora\.down)\.weight$")


def check_lora(field: str, path: Path, rank: int | None) -> None:
    """Raise unless a path is a LoRA of the given rank; None: of any rank.

    Raises:
        ConfigError: the file is missing, is no LoRA, or has another rank.
    """
    try:
        require_no_device(path)  # opening a pipe would wait for a writer
        with safe_open(path / LORA if path.is_dir() else path, framework="pt") as file:
            names = [name for name in file.keys() if FACTOR_A.search(name)]  # noqa: SIM118
            ranks = {file.get_slice(name).get_shape()[0] for name in names}
    except Exception as error:  # safetensors raises several types for invalid files
        wanted = f"{field}: expected a folder with {LORA}, or such a file"
        raise ConfigError(f"{wanted}, got {path}: {where_lora_is(path) or error}") from error
    if not ranks:
        raise ConfigError(f"{field}: expected a LoRA, got none in {path}")
    if rank is not None and ranks != {rank}:
        raise ConfigError(
            f"{field}: expected a LoRA of rank {rank}, as model.lora_rank, got {sorted(ranks)}"
        )


def find_lora(path: Path) -> Path:
    """Return the file of a LoRA that diffusers would load from a file or a folder.

    Raises:
        ValueError: the folder has no file named ``LORA`` and not exactly one .safetensors, or the
            file is no safetensors, or has no weights of a LoRA.
    """
    if path.is_dir():
        files = [path / LORA] if (path / LORA).is_file() else sorted(path.glob("*.safetensors"))
        if where := where_lora_is(path):
            raise ValueError(f"got {path}: {where}")
        if len(files) != 1:
            raise ValueError(f"got {path}, with {len(files)} .safetensors files")
        path = files[0]
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except Exception as error:  # safetensors raises several types for invalid files
        raise ValueError(f"got {path}: {error}") from error
    if not any("lora" in name for name in names):
        raise ValueError(f"got {path}, which has no weights of a LoRA")
    return path


def where_lora_is(path: Path) -> str:
    """Return text on where the LoRA of a run or a checkpoint is; empty for other paths."""
    with suppress(OSError):  # a path that cannot be looked up is neither
        rounds = sorted((path / "checkpoints").glob("round-*"))
        if rounds:
            return f"this is a run, and the LoRA of its newest checkpoint is {rounds[-1] / 'lora'}"
        if (path / "manifest.json").is_file():
            return f"this is a checkpoint, and its LoRA is {path / 'lora'}"
    return ""
