"""Suggestions for misspelled words of a command line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def perhaps(word: str, known: Iterable[str]) -> str:
    """Return "; perhaps X" for a misspelled word; "" if no known word is similar.

    Example:
        >>> perhaps("judgd", ["train", "judge"])
        '; perhaps judge'
        >>> perhaps("zebra", ["train", "judge"])
        ''
    """
    near = get_close_matches(word, list(known), n=1, cutoff=0.75)
    return f"; perhaps {near[0]}" if near else ""
