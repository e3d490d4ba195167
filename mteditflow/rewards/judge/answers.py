"""Parser of a judge's answers: exactly one score per turn, or the fault.

An answer with exactly one reading is accepted, whatever surrounds it; one with two is refused.

| what a model adds | how it is read |
|---|---|
| reasoning up to one ``</think>`` | what follows it is the answer |
| one code fence around the whole, end tokens after it, a byte-order mark | left out |
| 4.0 or "4" in JSON, 4.0 in text | the whole number |
| other keys in a JSON object | ignored, unless they state other scores |
| the JSON object several times | read once, if all state the same scores |
| the list alone, without the object around it | the list |
| bullets, emphasis, another case, a full-width colon in ``Turn 1: 4`` | left out |

Refused are 4.5, 4/5, booleans, words around the answer, a wrong count, and all contradictions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import Any, NoReturn, TypeVar

from mteditflow.rewards.faults import AnswerError, Fault
from mteditflow.rewards.reasoning import THINK, THINK_END, reasoning_alone

T = TypeVar("T")
SHOWN = 200  # characters of an answer in an error's detail
# Written form of each score in text; JSON contains the number.
SCALES: Mapping[str, Mapping[str, int]] = {
    "likert": {str(score): score for score in range(1, 6)},
    "binary": {"yes": 1, "no": 0},
}
STATEMENT = re.compile(
    r"(?:[-*+\u2022>]\s+)?[*_`]*turn\s*([1-9][0-9]{0,3})[\s*_`]*[:\uff1a]"
    r"[\s*_`]*([^\s*_`]+)[\s*_`]*",
    re.IGNORECASE,
)
# Any line that seems to state a score, in any decoration: **turn 1** - 4. Such a line must match
# STATEMENT too, so that a score in an unknown form is refused and not overlooked.
LIKE_A_STATEMENT = re.compile(r"[\W_]*turn[\W_]*\d+[\s_]*(?:[^\w\s,'\u2019]|\s\d|$)", re.IGNORECASE)
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")  # of JSON
WHITE = re.compile(r"[ \t\n\r]*")
# Keys that were not requested and may contradict the scores.
RIVAL = re.compile(r"score|rating|grade|final|answer|verdict", re.IGNORECASE)
FENCE = re.compile(r"```[A-Za-z0-9_+-]*[ \t]*\r?\n(.*)\r?\n[ \t]*```", re.DOTALL)
INNER_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
BYTE_ORDER_MARK = "\ufeff"
END_TOKENS = (
    "<|im_end|>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>",
    "<end_of_turn>", "<eos>",
)  # fmt: skip
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
            ``{"turns": [{"analysis": "...", "score": 4}, ...]}``; the module's table lists other
            accepted forms.
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
    read = partial(_scores, text=text, turns=turns, scale=scale, thinking=thinking)
    return read_json(text, read)


def parse_text(text: str, *, turns: int, scale: str, thinking: bool) -> tuple[int, ...]:
    r"""Parse an answer in the text format.

    Args:
        text: the whole answer. It ends with one line per turn, in order, each as ``Turn 1: 4`` or
            decorated as in the module's table; blank lines are ignored. With thinking an analysis
            without such lines precedes them, otherwise nothing.
        turns: expected number of scores.
        scale: "likert", the digits 1..5, or "binary", the words yes and no.
        thinking: whether an analysis comes first.

    Returns:
        One score per turn.

    Raises:
        AnswerError: the answer is anything else.

    Example:
        >>> parse_text("Turn 1: yes\n**Turn 2: no**", turns=2, scale="binary", thinking=False)
        (1, 0)
    """
    text = unwrap(after_reasoning(text))
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


def read_json(text: str, read: Callable[[object], T]) -> T:
    r"""Parse an answer that is a JSON document, or repetitions of one.

    Args:
        text: the answer; the module's table lists the accepted surroundings.
        read: parser of one document, which raises ``AnswerError``.

    Returns:
        The result of ``read``, equal for all documents.

    Raises:
        AnswerError: the answer is not JSON alone, has a key twice, or has two readings.

    Example:
        >>> read_json('```json\n{"a": 1}\n```', lambda value: value["a"])
        1
    """
    first, *others = [read(value) for value in _documents(text)]
    if any(reading != first for reading in others):
        refuse(Fault.format, "one answer, or the same one again", text)
    return first


def after_reasoning(text: str) -> str:
    """Return the answer after a model's reasoning, or the whole text if there is no reasoning.

    A text with two ends of reasoning is ambiguous and returned whole.

    Raises:
        AnswerError: ``Fault.reasoning``: nothing follows the reasoning, or it does not end.

    Example:
        >>> after_reasoning("<think>Maybe 5. No.</think>4")
        '4'
    """
    _, end, answer = text.partition(THINK_END)
    if THINK_END in answer:
        return text
    rest = answer if end else text
    if rest.lstrip().startswith(THINK) or (end and not unwrap(rest)):
        raise reasoning_alone(text)
    return rest


def unwrap(text: str) -> str:
    r"""Remove a code fence, end tokens and a byte-order mark around a whole answer.

    Example:
        >>> unwrap("```\nTurn 1: 4\n```<|im_end|>")
        'Turn 1: 4'
    """
    text = text.strip().removeprefix(BYTE_ORDER_MARK).strip()
    while text.endswith(END_TOKENS):
        token = next(token for token in END_TOKENS if text.endswith(token))
        text = text.removesuffix(token).rstrip()
    fenced = FENCE.fullmatch(text)
    if fenced is None or INNER_FENCE.search(fenced[1]):
        return text
    return fenced[1].strip()


def whole_number(value: object) -> int | Decimal | None:
    """Return a whole number from a JSON number or a string of digits; ``None`` otherwise.

    Example:
        >>> [whole_number(x) for x in (4, Decimal("4.0"), "4", Decimal("4.5"), True, "four")]
        [4, Decimal('4.0'), Decimal('4'), None, None, None]
    """
    number = _number(value)
    if isinstance(number, Decimal) and number != number.to_integral_value():
        return None
    return number


def _documents(text: str) -> list[object]:
    """Parse the JSON documents of an answer, at least one.

    The unchanged text is tried first, since a string in JSON may contain the end of reasoning.
    """
    try:
        return _decode(unwrap(text))
    except AnswerError:
        answer = after_reasoning(text)
        if answer == text:
            raise
    return _decode(unwrap(answer))


def _decode(text: str) -> list[object]:
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_decimal)
    values: list[object] = []
    place = 0
    while not values or place < len(text):
        try:
            value, place = decoder.raw_decode(text, _skip_white(text, place))
        except RecursionError:
            refuse(Fault.format, "JSON of the form that was asked for", text)
        except json.JSONDecodeError:
            begun = text[:1] in ("", "{", "[") and not values
            fault = Fault.format if begun else Fault.request_ignored
            refuse(_kind_of_prose(text, fault), "JSON and nothing else", text)
        values.append(value)
        place = _skip_white(text, place)
    return values


def _skip_white(text: str, place: int) -> int:
    match = WHITE.match(text, place)
    return place if match is None else match.end()


def _integer(digits: str) -> int:
    """Convert at most the first 200 digits: a longer number is out of range anyway.

    Python's int refuses a string of more than 4,300 digits.
    """
    return int(digits[:SHOWN])


def _decimal(digits: str) -> Decimal:
    """Convert exactly, since 4.00000000000000000001 is not 4; NaN if the exponent is too long."""
    try:
        return Decimal(digits)
    except InvalidOperation:
        return Decimal("NaN")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = clip(", ".join(key for key, _ in pairs))
        raise AnswerError(Fault.format, f"expected each key once, got {keys}")
    return value


def _scores(value: object, *, text: str, turns: int, scale: str, thinking: bool) -> tuple[int, ...]:
    """Return the scores of one document, which is the object or only its list."""
    entries, others = _entries(value, "turns" if thinking else "scores", text)
    if len(entries) != turns:
        refuse(Fault.wrong_count, f"{turns} scores", text, count=len(entries))
    if thinking:
        entries = [_score_after_analysis(n, entry, text) for n, entry in enumerate(entries, 1)]
    scores = tuple(_in_scale(n, score, scale) for n, score in enumerate(entries, start=1))
    # Other keys are ignored unless their numbers look like scores; those must not contradict.
    for name, other in others.items():
        numbers = _numbers(other)
        alike = isinstance(other, list) and len(numbers) == len(other) == turns
        if numbers and (alike or RIVAL.search(name) or "turn" in name.lower()):
            _check_same(name, numbers, scores, text)
    return scores


def _entries(value: object, key: str, text: str) -> tuple[list[Any], dict[str, Any]]:
    """Return the list with an entry per turn, and the other keys of the object."""
    others: dict[str, Any] = {}
    if isinstance(value, dict):
        if key not in value:
            refuse(Fault.format, f'an object with the key "{key}"', text)
        others = {name: other for name, other in value.items() if name != key}
        value = value[key]
    if not isinstance(value, list):
        refuse(Fault.format, "a list with one entry per turn", text)
    return value, others


def _score_after_analysis(n: int, entry: object, text: str) -> object:
    asked = ["analysis", "score"]
    if not isinstance(entry, dict) or [key for key in entry if key in asked] != asked:
        refuse(Fault.format, 'for each turn the key "analysis" and then "score"', text)
    analysis = entry["analysis"]
    if not isinstance(analysis, str) or not analysis.strip():
        refuse(Fault.format, "an analysis of each turn in words", text)
    for name in entry.keys() - set(asked):
        numbers = _numbers(entry[name])
        if name.lower() == "turn" and numbers:
            _check_same(name, numbers, (n,), text)
        elif RIVAL.search(name) and numbers:
            _check_same(name, numbers, tuple(_numbers(entry["score"])), text)
    return entry["score"]


def _check_same(
    name: str, numbers: list[int | Decimal], expected: tuple[int | Decimal, ...], text: str
) -> None:
    if tuple(numbers) != expected:
        refuse(Fault.format, f"nothing else than the scores under {clip(name)}", text)


def _numbers(value: object) -> list[int | Decimal]:
    """Return all numbers in a JSON value, in order, without recursion."""
    found, waiting = [], [value]
    while waiting:
        first = waiting.pop()
        number = _number(first)
        if number is not None:
            found.append(number)
        elif isinstance(first, (list, dict)):
            waiting += reversed(first if isinstance(first, list) else list(first.values()))
    return found


def _number(value: object) -> int | Decimal | None:
    """Return a JSON number, or one written as a string; ``None`` otherwise, for booleans too."""
    if isinstance(value, str):
        return _decimal(value.strip()) if NUMBER.fullmatch(value.strip()) else None
    return value if isinstance(value, (int, Decimal)) and not isinstance(value, bool) else None


def _in_scale(n: int, score: object, scale: str) -> int:
    allowed = SCALES[scale].values()
    number = whole_number(score)
    if number is None:
        came = type(score).__name__ if isinstance(score, (list, dict)) else clip(score)
        raise AnswerError(Fault.not_a_number, _one_of(n, allowed, came))
    return _among(allowed, number, _one_of(n, allowed, clip(score)))


def _label_score(n: int, label: str, scale: str) -> int:
    labels = SCALES[scale]
    expected = _one_of(n, labels, clip(label))
    if label.lower() in labels:
        return labels[label.lower()]
    number = whole_number(label)
    if number is None:
        raise AnswerError(Fault.not_a_number, expected)
    return _among([score for name, score in labels.items() if name == str(score)], number, expected)


def _among(allowed: Iterable[int], number: int | Decimal, expected: str) -> int:
    score = next((score for score in allowed if score == number), None)
    if score is None:
        raise AnswerError(Fault.out_of_range, expected)
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
    """Raise an ``AnswerError`` with the expectation and the answer, cut to a bounded length."""
    came = "" if count is None else f"{count} in "
    came += clip(text) if text.strip() else "an empty answer"
    raise AnswerError(fault, f"expected {expected}, got {came}")


def clip(value: object) -> str:
    """Return a quoted string, or a number as written, cut to a bounded length."""
    shown = repr(value[:SHOWN]) if isinstance(value, str) else str(value)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
