"""Image drift that rewards do not measure: statistics, and an alarm when they leave their band.

A policy can raise a reward at the expense of properties that no reward measures: blanked
backgrounds, lost edges, garish colors, the same image for any noise. These statistics are cheap,
need no model, and are never trained on. The distance to the reference outside the edits is
``mteditflow.wear``. Needs torch only.
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
