"""Legibility of requested text as a reward, for turns that ask for text only.

Needs the extra ``mteditflow[ocr]``, or a reader of your own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mteditflow.chains import Chain
from mteditflow.evaluation.scorers import require_method
from mteditflow.evaluation.turn_scorer import EditedTurn, Marks, TurnScorer
from mteditflow.planner import edits, parse_formatted
from mteditflow.rewards import Scale

if TYPE_CHECKING:
    from mteditflow.evaluation.benchmarks.edival_checks import TextReader

TEXT_CHANGE = "text_change"  # task type
QUOTED = re.compile("(?<!\\w)(?:'(.+?)'|\"(.+?)\"|\u201c(.+?)\u201d|\u2018(.+?)\u2019)(?!\\w)")


class TextScorer(TurnScorer):
    """Share of the requested text that is legible after a turn that asks for text.

    Only turns of the type ``text_change`` are scored. The text comes from the formatted instruction
    of the record, else from the last quoted words of the instruction. All other turns are
    unmeasured and give no training signal. The score is ``read_share`` without case, spaces and
    punctuation. The whole image is read, wherever the text should be.

    Args:
        reader: reader of text; None is ``RapidOcr``.

    Raises:
        ImportError: no reader is given, and rapidocr is not installed (``mteditflow[ocr]``).
        TypeError: the reader cannot be called.

    Example:
        >>> import anyio
        >>> from PIL import Image
        >>> words = {"instructions": ("Add the text 'OPEN'", "Make the cat red")}
        >>> words |= {"task_types": ("text_change", "color_alter")}
        >>> chain, images = Chain(id="7", image="7.png", **words), [Image.new("RGB", (8, 8))] * 3
        >>> anyio.run(TextScorer(lambda image: "0pen!").score, [chain], [images])["following"].score
        tensor([[0.7500,    nan]])
    """

    terms = ("following",)
    scale = Scale(0, 1, success=1)

    def __init__(self, reader: TextReader | None = None) -> None:
        super().__init__()
        if reader is None:
            from mteditflow.evaluation.ocr import RapidOcr

            reader = RapidOcr()
        require_method(reader, "__call__", "mteditflow.evaluation.RapidOcr")
        self.reader = reader

    def score_turns(self, turns: Sequence[EditedTurn]) -> list[Marks]:
        """See ``TurnScorer``."""
        return [{"following": self._score(turn)} for turn in turns]

    def _score(self, turn: EditedTurn) -> float:
        wanted = _letters(wanted_text(turn.chain, turn.turn) or "")
        return read_share(wanted, _letters(self.reader(turn.after))) if wanted else math.nan


def wanted_text(chain: Chain, turn: int) -> str | None:
    """Return the text that a turn asks for; None if it asks for none, or does not quote it."""
    types, formatted = chain.task_types, chain.formatted_instructions
    if types is not None and types[turn] != TEXT_CHANGE:
        return None
    for said in ([] if formatted is None else [formatted[turn]]) + [chain.instructions[turn]]:
        try:
            edit = parse_formatted(said)
        except ValueError:
            continue
        return edit.new if isinstance(edit, edits.TextChange) else None
    if types is None:  # without an edit type, quoted words need not be text to write
        return None
    quoted = [next(x for x in words if x) for words in QUOTED.findall(chain.instructions[turn])]
    return quoted[-1] if quoted else None


def read_share(wanted: str, text: str) -> float:
    """Return the share of a requested text that the best matching substring of another has.

    1 minus the edit distance (insert, delete, replace) to that substring over the length of the
    requested text.

    Args:
        wanted: requested text, at least one character.
        text: text to search, of any length.

    Returns:
        Number in [0, 1]; 1 if ``text`` contains ``wanted``.

    Source: approximate matching by dynamic programming (Sellers, 1980).

    Example:
        >>> read_share("open", "weareopentoday"), read_share("open", "opn"), read_share("open", "")
        (1.0, 0.75, 0.0)
    """
    # cost[j]: least edits of the letters so far to a substring that ends at j. The first row is 0,
    # not j as in Levenshtein's distance, since the substring may begin anywhere.
    cost = [0] * (len(text) + 1)
    for i, letter in enumerate(wanted, start=1):
        row = [i]
        for j, other in enumerate(text, start=1):
            row.append(min(cost[j - 1] + (letter != other), cost[j] + 1, row[j - 1] + 1))
        cost = row
    return 1 - min(cost) / len(wanted)


def _letters(text: str) -> str:
    """Return the letters and digits of a text, case folded."""
    return "".join(x for x in text.casefold() if x.isalnum())
