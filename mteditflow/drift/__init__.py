"""Drift of pictures that rewards do not see: statistics, and an alarm when they leave their band.

A policy can pay for a reward with what no reward looks at: blanked backgrounds, lost edges, garish
colors, one picture for any noise. These numbers are cheap, need no model, and never train. The
distance to the reference outside the edits is ``mteditflow.wear``. Needs torch alone.
"""

from mteditflow.drift.statistics import (
    brightness,
    color_entropy,
    edge_density,
    group_distance,
    high_frequency_share,
    saturation,
    sharpness,
    thumbnails,
)
from mteditflow.drift.watch import Band, DriftAlarm, DriftWatch, Reading

__all__ = [
    "Band",
    "DriftAlarm",
    "DriftWatch",
    "Reading",
    "brightness",
    "color_entropy",
    "edge_density",
    "group_distance",
    "high_frequency_share",
    "saturation",
    "sharpness",
    "thumbnails",
]
