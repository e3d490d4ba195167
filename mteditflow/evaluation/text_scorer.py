"""Text that can be read, as a reward: for turns that ask for text, and for no others.

Needs the extra ``mteditflow[ocr]``, or a reader of your own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mteditflow.chains import Chain
from mteditflow.evaluation.scorers import EditedTurn, Marks, TurnScorer, require_method
from mteditflow.planner import edits, parse_formatted
from mteditflow.rewards import Scale

if TYPE_CHECKING:
    from mteditflow.evaluation.benchmarks.edival_checks import TextReader

TEXT_CHANGE = "text_change"  # task type
QUOTED = re.compile("(?<!\\w)(?:'(.+?)'|\"(.+?)\"|\u201c(.+?)\u201d|\u2018(.+?)\u2019)(?!\\w)")


class TextScorer(TurnScorer):
    """Share of the wanted text that can be read after a turn that asks for text.

    Turns of the type ``text_change`` alone, by the formatted instruction of the record, or else by
    the last words in quotes of the instruction; all other turns are unmeasured and train nothing.
    The score is 1 minus the edits between the wanted text and the nearest stretch of what is read,
    over the length of the wanted text; case, spaces and punctuation do not count. It reads the
    whole image, wherever on it the text is wanted.

    Args:
        reader: reads text; None is ``RapidOcr``.

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
    """Return the text that a turn asks for; None where it asks for none, or does not quote it."""
    types, formatted = chain.task_types, chain.formatted_instructions
    if types is not None and types[turn] != TEXT_CHANGE:
        return None
    for said in ([] if formatted is None else [formatted[turn]]) + [chain.instructions[turn]]:
        try:
            edit = parse_formatted(said)
        except ValueError:
            continue
        return edit.new if isinstance(edit, edits.TextChange) else None
    if types is None:  # words in quotes may be anything
        return None
    quoted = [next(x for x in words if x) for words in QUOTED.findall(chain.instructions[turn])]
    return quoted[-1] if quoted else None


def read_share(wanted: str, text: str) -> float:
    """Return the share of a wanted text that the nearest stretch of another has.

    1 minus the number of letters to insert, delete or replace, over the length of what is wanted.

    Args:
        wanted: at least one character.
        text: of any length.

    Returns:
        In [0, 1]: 1 where the text holds what is wanted.

    Source: approximate matching by dynamic programming (Sellers, 1980).

    Example:
        >>> read_share("open", "weareopentoday"), read_share("open", "opn"), read_share("open", "")
        (1.0, 0.75, 0.0)
    """
    cost = [0] * (len(text) + 1)  # of no character of wanted, wherever the stretch begins
    for i, letter in enumerate(wanted, start=1):
        row = [i]
        for j, other in enumerate(text, start=1):
            row.append(min(cost[j - 1] + (letter != other), cost[j] + 1, row[j - 1] + 1))
        cost = row
    return 1 - min(cost) / len(wanted)


def _letters(text: str) -> str:
    """Letters and digits, without case."""
    return "".join(x for x in text.casefold() if x.isalnum())
