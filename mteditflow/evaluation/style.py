"""The fonts and colours of all pictures."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import matplotlib as mpl
from matplotlib import font_manager

INK, SOFT, FAINT = "#1f2933", "#6b7684", "#c9d0d8"
GOOD, AMBER, BAD, BLUE, PURPLE = "#1a7f4b", "#d97706", "#c0392b", "#2457d6", "#7c3aed"
DPI = 140
# For instructions in other scripts, where a font is there.
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans")


@contextmanager
def house_style() -> Iterator[None]:
    """Fonts and colours of all pictures; a letter that no font has is a box, without a warning."""
    with mpl.rc_context(_style()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


@lru_cache
def _style() -> dict[str, Any]:
    there = {font.name for font in font_manager.fontManager.ttflist}
    return {
        "font.family": [name for name in FONTS if name in there],
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": SOFT,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "text.parse_math": False,
        "xtick.color": INK,
        "ytick.color": INK,
    }
