"""Parser of a judge's answers: exactly one score per turn as written, or the fault.

Nothing is repaired or guessed. JSON must be the whole answer; text must be the requested lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from mteditflow.rewards.faults import AnswerError, Fault

SHOWN = 200  # characters of an answer in a detail
# Written form of each score in text; JSON contains the number.
SCALES: Mapping[str, Mapping[str, int]] = {
    "likert": {str(score): score for score in range(1, 6)},
    "binary": {"yes": 1, "no": 0},
}
STATEMENT = re.compile(r"Turn ([1-9][0-9]{0,3}): (\S+)")
# Any line that states a score of a turn, in any decoration: **turn 1** - 4
LIKE_A_STATEMENT = re.compile(r"[\W_]*turn[\W_]*\d+\s*(?:[^\w\s,'\u2019]|\s\d|$)", re.IGNORECASE)
INTEGER = re.compile(r"-?[0-9]+")
HTML = re.compile(r"<(?:!doctype|html|head|body)\b", re.IGNORECASE)
REFUSAL = re.compile(
    r"i(?:'m| am) (?:\w+ )?(?:sorry|unable|not able)\b|sorry\b|i apologi[sz]e\b|unfortunately,? i\b"
    r"|as an ai\b|i (?:cannot|can not|can't|won't|will not|must decline)\b|(?:很|非常)?抱歉|对不起",
    re.IGNORECASE,
)


def parse_json(text: str, *, turns: int, scale: str, thinking: bool) -> tuple[int, ...]:
    """Parse an answer to a request for structured output.

    Args:
        text: the whole answer: ``{"scores": [4, 2]}``, or with thinking
            ``{"turns": [{"analysis": "...", "score": 4}, ...]}``.
        turns: expected number of scores.
        scale: "likert", integers 1..5, or "binary", 0 or 1.
        thinking: whether an analysis precedes each score.

    Returns:
        One score per turn.

    Raises:
        AnswerError: the answer is anything else; ``Fault.request_ignored`` if it is not JSON alone,
            which a server that enforces the schema cannot send.

    Example:
        >>> parse_json('{"scores": [4, 2]}', turns=2, scale="likert", thinking=False)
        (4, 2)
        >>> parse_json('{"scores": [1, 2]}', turns=2, scale="binary", thinking=False)
        Traceback (most recent call last):
        mteditflow.rewards.faults.AnswerError: score out of range: turn 2: expected 1 or 0, got 2
    """
    entries = _only_value(load_json(text), "turns" if thinking else "scores", text)
    if not isinstance(entries, list):
        refuse(Fault.format, "a list with one entry per turn", text)
    if len(entries) != turns:
        refuse(Fault.wrong_count, f"{turns} scores", text, count=len(entries))
    if thinking:
        entries = [_score_after_analysis(entry, text) for entry in entries]
    return tuple(_in_scale(n, score, scale) for n, score in enumerate(entries, start=1))


def parse_text(text: str, *, turns: int, scale: str, thinking: bool) -> tuple[int, ...]:
    r"""Parse an answer in the text format.

    Args:
        text: the whole answer. It ends with one line per turn, in order, each as ``Turn 1: 4``;
            blank lines do not count. With thinking an analysis without such lines precedes them,
            otherwise nothing.
        turns: expected number of scores.
        scale: "likert", the digits 1..5, or "binary", the words yes and no.
        thinking: whether an analysis comes first.

    Returns:
        One score per turn.

    Raises:
        AnswerError: the answer is anything else.

    Example:
        >>> parse_text("Turn 1: yes\nTurn 2: no", turns=2, scale="binary", thinking=False)
        (1, 0)
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    form = f"{turns} lines such as 'Turn 1: {next(iter(SCALES[scale]))}'"
    first = next((i for i, line in enumerate(lines) if LIKE_A_STATEMENT.match(line)), None)
    if first is None:
        refuse(_kind_of_prose(text, Fault.format), form, text)
    if (first > 0) != thinking:
        refuse(Fault.format, f"{'an analysis and then' if thinking else 'only'} {form}", text)
    stated = [match for line in lines[first:] if (match := STATEMENT.fullmatch(line))]
    if len(stated) < len(lines) - first:
        refuse(Fault.format, f"{form} at the end and none like them before", text)
    numbers, order = [int(match[1]) for match in stated], list(range(1, turns + 1))
    if numbers != order:
        fault = Fault.format if sorted(numbers) == order else Fault.wrong_count
        refuse(fault, f"{form}, in order", text, count=len(numbers))
    return tuple(_label_score(n, match[2], scale) for n, match in enumerate(stated, start=1))


def load_json(text: str) -> object:
    """Parse JSON that is the whole text and has no duplicate keys."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError:
        refuse(Fault.format, "JSON of the form that was asked for", text)
    except json.JSONDecodeError as error:
        broken = text.lstrip()[:1] in ("", "{") and error.msg != "Extra data"
        fault = Fault.format if broken else Fault.request_ignored
        refuse(_kind_of_prose(text, fault), "JSON and nothing else", text)


def _integer(digits: str) -> int:
    """Convert only the first digits, which are out of range just as a longer number is."""
    return int(digits[:SHOWN])


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = clip(", ".join(key for key, _ in pairs))
        raise AnswerError(Fault.format, f"expected each key once, got {keys}")
    return value


def _only_value(value: object, key: str, text: str) -> object:
    if not isinstance(value, dict) or set(value) != {key}:
        refuse(Fault.format, f'an object with the key "{key}" alone', text)
    return value[key]


def _score_after_analysis(entry: object, text: str) -> object:
    if not isinstance(entry, dict) or list(entry) != ["analysis", "score"]:
        refuse(Fault.format, 'for each turn the key "analysis" and then "score"', text)
    analysis = entry["analysis"]
    if not isinstance(analysis, str) or not analysis.strip():
        refuse(Fault.format, "an analysis of each turn in words", text)
    return entry["score"]


def _in_scale(n: int, score: object, scale: str) -> int:
    allowed = SCALES[scale].values()
    if isinstance(score, bool) or not isinstance(score, int):
        came = type(score).__name__ if isinstance(score, (list, dict)) else clip(score)
        raise AnswerError(Fault.not_a_number, _one_of(n, allowed, came))
    if score not in allowed:
        raise AnswerError(Fault.out_of_range, _one_of(n, allowed, clip(score)))
    return score


def _label_score(n: int, label: str, scale: str) -> int:
    score = SCALES[scale].get(label.lower())
    if score is None:
        fault = Fault.out_of_range if INTEGER.fullmatch(label) else Fault.not_a_number
        raise AnswerError(fault, _one_of(n, SCALES[scale], clip(label)))
    return score


def _one_of(n: int, allowed: Iterable[object], came: str) -> str:
    return f"turn {n}: expected {' or '.join(map(str, allowed))}, got {came}"


def _kind_of_prose(text: str, fault: Fault) -> Fault:
    """Return the fault of a text: a web page, a refusal, or else the given one."""
    start = text.lstrip().replace("\u2019", "'")
    if HTML.match(start):
        return Fault.malformed
    return Fault.refusal if REFUSAL.match(start) and "{" not in start else fault


def refuse(fault: Fault, expected: str, text: str, *, count: int | None = None) -> NoReturn:
    """Raise an ``AnswerError`` that gives what was expected and what came."""
    came = "" if count is None else f"{count} in "
    came += clip(text) if text.strip() else "an empty answer"
    raise AnswerError(fault, f"expected {expected}, got {came}")


def clip(value: object) -> str:
    """Return the repr of a string or number, of bounded length."""
    shown = repr(value[:SHOWN] if isinstance(value, str) else value)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
