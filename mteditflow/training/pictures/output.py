"""Figures to files and to trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from mteditflow._files import write_atomically
from mteditflow.evaluation.style import DPI, house_style


def write_picture(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically; its folder is made."""
    write_atomically(path, _png(figure))


def log_pictures(trackers: Sequence[Any], figures: Mapping[str, Figure], *, step: int) -> None:
    """Give figures to those trackers of accelerate that take images.

    Args:
        trackers: ``Accelerator.trackers``.
        figures: by name, such as "strips".
        step: the round.
    """
    takers = [tracker for tracker in trackers if hasattr(tracker, "log_images")]
    images = {
        name: Image.open(BytesIO(_png(figure))).convert("RGB")
        for name, figure in figures.items()
        if takers
    }
    for tracker in takers:
        if tracker.name == "tensorboard":  # takes a batch of arrays, others a list of images
            arrays = {name: np.asarray(image)[None] for name, image in images.items()}
            tracker.log_images(arrays, step=step, dataformats="NHWC")
        else:
            tracker.log_images({name: [image] for name, image in images.items()}, step=step)


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    with house_style():
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
