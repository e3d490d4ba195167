"""Weights files of the world of pictures: float16 on disk, float32 in use, each with a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights"


def save_weights(model: nn.Module, path: Path, card: dict[str, Any]) -> None:
    """Write weights as float16 safetensors, and their card as JSON.

    Args:
        model: module whose ``state_dict`` is written.
        path: file to write, ending in ``.safetensors``; the card is written next to it.
        card: command, seed, versions, measurements and, under "build", the arguments that build
            the module.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.to(torch.float16).contiguous() for name, x in model.state_dict().items()}
    save_file(tensors, path)
    path.with_suffix(".json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights as float32, and their card."""
    tensors = {name: x.float() for name, x in load_file(path).items()}
    return tensors, json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
