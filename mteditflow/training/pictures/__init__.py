"""Figures of a run: strips of chains, before and after, distributions, curves, drift.

Each ``draw_`` function returns a matplotlib ``Figure``. ``write_picture`` writes it to a file,
``write_chart`` writes PNG and SVG, and ``log_pictures`` logs it to accelerate's trackers.
"""

from mteditflow.evaluation.figures import log_pictures, write_chart, write_picture
from mteditflow.training.pictures.before_after import draw_before_after
from mteditflow.training.pictures.curves import draw_curves
from mteditflow.training.pictures.drift import draw_drift
from mteditflow.training.pictures.histograms import draw_histograms
from mteditflow.training.pictures.strips import Strip, draw_strips

__all__ = [
    "Strip",
    "draw_before_after",
    "draw_curves",
    "draw_drift",
    "draw_histograms",
    "draw_strips",
    "log_pictures",
    "write_chart",
    "write_picture",
]
