"""Programs that draw nothing: pictures that no test looks at take a third of a short run."""

import io

import pytest
from matplotlib.figure import Figure
from PIL import Image

from mteditflow import evaluation
from mteditflow.evaluation import figures
from mteditflow.training import pictures

FIGURES = {
    pictures: ("draw_before_after", "draw_curves", "draw_drift", "draw_strips"),
    evaluation: ("draw_report",),
}


def undraw(patch: pytest.MonkeyPatch) -> None:
    """Let programs draw empty figures, and write a single pixel where their pictures go."""
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, format="PNG")
    for module, names in FIGURES.items():
        for name in names:
            patch.setattr(module, name, lambda *_, **__: Figure())
    patch.setattr(figures, "_rendered", lambda *_: pixel.getvalue())


def undraw_for_good() -> None:
    """Let a process that is for nothing else draw nothing."""
    undraw(pytest.MonkeyPatch())


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs in this process draw nothing."""
    undraw(monkeypatch)
