"""A judge's answer is read exactly or refused with the reason; nothing is invented."""

import itertools
import json
import random
import re
import string
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mteditflow.rewards import AnswerError, Fault
from mteditflow.rewards.judge.answers import parse_json, parse_text
from tests.loops import some

LABELS = {
    "likert": {"1": 1, "2": 2, "3": 3, "4": 4, "5": 5},
    "binary": {"no": 0, "yes": 1},
}
PARSE = {"json": parse_json, "text": parse_text}
KINDS = list(itertools.product(("json", "text"), LABELS, (False, True), (1, 3)))
kinds = st.sampled_from(KINDS)
# Anything at all, lone surrogates too, as a JSON escape can hold them.
words = st.text(st.characters(exclude_categories=()), min_size=1).filter(str.strip)


def parse(text, kind):
    answer_format, scale, thinking, turns = kind
    return PARSE[answer_format](text, turns=turns, scale=scale, thinking=thinking)


def write(scores, analyses, kind, **style):
    """The right answer with these scores."""
    answer_format, scale, thinking, _ = kind
    if answer_format == "json" and thinking:
        pairs = zip(analyses, scores, strict=True)
        return json.dumps({"turns": [{"analysis": a, "score": s} for a, s in pairs]}, **style)
    if answer_format == "json":
        return json.dumps({"scores": scores}, **style)
    label = {score: label for label, score in LABELS[scale].items()}
    lines = [f"Turn {n}: {label[score]}" for n, score in enumerate(scores, start=1)]
    before = [f"Analysis {n}: {a}" for n, a in enumerate(analyses, start=1)] if thinking else []
    return "\n".join([*before, *lines])


@st.composite
def answers(draw, answer_format):
    kind = draw(kinds.filter(lambda kind: kind[0] == answer_format))
    _, scale, _, turns = kind
    some = st.lists(st.sampled_from(list(LABELS[scale].values())), min_size=turns, max_size=turns)
    return kind, draw(some), draw(st.lists(words, min_size=turns, max_size=turns))


@given(answers("json"), st.sampled_from([None, 0, 2]), st.booleans(), st.sampled_from(" \n\r\t"))
def test_any_scores_survive_in_json_whatever_the_analysis_says(answer, indent, ascii_only, space):
    kind, scores, analyses = answer
    text = write(scores, analyses, kind, indent=indent, ensure_ascii=ascii_only)
    assert parse(space + text + space, kind) == tuple(scores)


@given(answers("text"), st.sampled_from(["\n", "\r\n", "\n\n", " \n\t"]))
@example(
    (("text", "likert", True, 1), [4], ["Turn 1 asks for a cat, and turn 1's cat is there"]), "\n"
)
def test_any_scores_survive_in_text_unless_the_analysis_states_others(answer, line_break):
    kind, scores, analyses = answer
    text = write(scores, analyses, kind).replace("\n", line_break) + line_break
    lines = [line for analysis in analyses for line in analysis.splitlines()[1:]]
    if not any("turn" in line.lower() for line in lines):
        assert parse(text, kind) == tuple(scores)


def refused(text, *, answer_format, thinking=False, scale="likert", turns=2):
    with pytest.raises(AnswerError) as error:
        parse(text, (answer_format, scale, thinking, turns))
    return error.value


@pytest.mark.parametrize(
    ("text", "fault", "came"),
    [
        ("", Fault.format, "got an empty answer"),
        (" \n", Fault.format, "got an empty answer"),
        ("<!DOCTYPE html><html></html>", Fault.malformed, "DOCTYPE"),
        ("\n<html lang='en'>", Fault.malformed, "html"),
        ("I'm sorry, but I can't help with that.", Fault.refusal, "I'm sorry"),
        ("I\u2019m really sorry, no.", Fault.refusal, "sorry"),
        ("As an AI, I will not.", Fault.refusal, "As an AI"),
        ("很抱歉, 我无法", Fault.refusal, "抱歉"),
        ("The scores are 4 and 2.", Fault.request_ignored, "The scores"),
        ("Turn 1: 4\nTurn 2: 2", Fault.request_ignored, "Turn 1"),
        ('Sure: {"scores": [4, 2]}', Fault.request_ignored, "Sure"),
        ('{"scores": [4, 2]} Done.', Fault.request_ignored, "Done"),
        ('I\'m sorry: {"scores": [4, 2]}', Fault.request_ignored, "sorry"),
        ('{"scores": [4, ', Fault.format, "[4,'"),
        ('{"scores": [4, 2]}{"scores": [5, 5]}', Fault.format, "expected one answer"),
        ('{"scores": [4, 2]} {"scores": [4, 2]} 4', Fault.format, "a list"),
        ('{"scores": [4, 2], "Scores": [4, 3]}', Fault.format, "under 'Scores'"),
        ('{"scores": [4, 2], "final": [4, 3]}', Fault.format, "under 'final'"),
        ('{"scores": [4, 2], "note": [1, 1]}', Fault.format, "under 'note'"),
        ('{"scores": [4, 2], "turns": [{"score": 4}, {"score": 5}]}', Fault.format, "'turns'"),
        ('{"scores": [4, 2], "note": 1, "note": 2}', Fault.format, "each key once"),
        ("[4]", Fault.wrong_count, "got 1 in"),
        ("[[4, 2]]", Fault.wrong_count, "got 1 in"),
        ('```\n{"scores": [4, 2]}\n```\n```\n{"scores": [4, 2]}\n```', Fault.request_ignored, "`"),
        ('a</think>b</think>{"scores": [4, 2]}', Fault.request_ignored, "a</think>"),
        ('{"scores": [4, 2]}</think>', Fault.reasoning, "expected an answer after the reasoning"),
        ("<think>Well, 4 and 2", Fault.reasoning, "got only '<think>Well"),
        ("Well.</think> \n<|im_end|>", Fault.reasoning, "reasoning_tokens"),
        ('{"scores": [4.5, 2]}', Fault.not_a_number, "got 4.5"),
        ('{"scores": ["4.5", 2]}', Fault.not_a_number, "got '4.5'"),
        ('{"scores": ["4/5", 2]}', Fault.not_a_number, "got '4/5'"),
        ('{"scores": ["four", 2]}', Fault.not_a_number, "got 'four'"),
        ('{"scores": ["04", 2]}', Fault.not_a_number, "got '04'"),
        ('{"scores": [4.00000000000000000000000001, 2]}', Fault.not_a_number, "got 4.0000"),
        ('{"scores": [1e99999999999999999999, 2]}', Fault.not_a_number, "got NaN"),
        ('{"scores": [1e999, 2]}', Fault.out_of_range, "got 1E+999"),
        ('{"scores": ["6", 2]}', Fault.out_of_range, "got '6'"),
        ('{"scores": [6.0, 2]}', Fault.out_of_range, "got 6.0"),
        ("{'scores': [4, 2]}", Fault.format, "scores"),
        ('{"scores": [4, 2],}', Fault.format, "],}"),
        ('{"scores": [4, 2], "scores": [5, 5]}', Fault.format, "got 'scores, scores'"),
        ('{"Scores": [4, 2]}', Fault.format, "Scores"),
        ("4", Fault.format, "got '4'"),
        ("null", Fault.format, "null"),
        ('{"scores": "42"}', Fault.format, "a list"),
        ('{"scores": {"1": 4, "2": 2}}', Fault.format, "a list"),
        ('{"scores": [4]}', Fault.wrong_count, "expected 2 scores, got 1 in"),
        ('{"scores": [4, 2, 2]}', Fault.wrong_count, "got 3 in"),
        ('{"scores": []}', Fault.wrong_count, "got 0 in"),
        ('{"scores": [4, 6]}', Fault.out_of_range, "turn 2: expected 1 or 2 or 3 or 4 or 5, got 6"),
        ('{"scores": [0, 2]}', Fault.out_of_range, "turn 1"),
        ('{"scores": [-4, 2]}', Fault.out_of_range, "got -4"),
        ('{"scores": [' + "9" * 10_000 + ", 2]}", Fault.out_of_range, "got 999"),
        ('{"scores": [NaN, 2]}', Fault.not_a_number, "got nan"),
        ('{"scores": [4, Infinity]}', Fault.not_a_number, "got inf"),
        ('{"scores": [true, 2]}', Fault.not_a_number, "got True"),
        ('{"scores": [null, 2]}', Fault.not_a_number, "got None"),
        ('{"scores": [[4], 2]}', Fault.not_a_number, "got list"),
        ('{"scores": [٤, 2]}', Fault.format, "٤"),
        ('{"scores": ["٤", 2]}', Fault.not_a_number, "got '٤'"),
        ("[" * 100_000, Fault.format, "expected JSON of the form that was asked for, got '[[["),
        ('{"scores": ' * 100_000, Fault.format, "scores"),
    ],
)  # fmt: skip
def test_json_that_does_not_state_the_scores(text, fault, came):
    error = refused(text, answer_format="json")
    assert error.fault is fault
    assert came in error.detail
    assert error.detail.startswith(("expected ", "turn "))
    assert len(error.detail) < 400


@pytest.mark.parametrize(
    ("entry", "fault", "came"),
    [
        ('{"score": 4}', Fault.format, "analysis"),
        ('{"analysis": "ok"}', Fault.format, "score"),
        ('{"score": 4, "analysis": "ok"}', Fault.format, 'the key "analysis" and then "score"'),
        ('{"analysis": "", "score": 4}', Fault.format, "an analysis of each turn in words"),
        ('{"analysis": " \\n", "score": 4}', Fault.format, "in words"),
        ('{"analysis": null, "score": 4}', Fault.format, "in words"),
        ('{"analysis": "a", "score": 4, "score": 5}', Fault.format, "'analysis, score, score'"),
        ('{"analysis": "ok", "score": 0}', Fault.out_of_range, "got 0"),
        ('{"analysis": "ok", "score": 4, "turn": 2}', Fault.format, "under 'turn'"),
        ('{"analysis": "ok", "score": 4, "final_score": 5}', Fault.format, "'final_score'"),
        ('{"analysis": "ok", "score": 4, "Score": "5"}', Fault.format, "under 'Score'"),
        ("4", Fault.format, "analysis"),
    ],
)  # fmt: skip
def test_each_score_comes_after_its_analysis(entry, fault, came):
    error = refused(f'{{"turns": [{entry}]}}', answer_format="json", thinking=True, turns=1)
    assert error.fault is fault
    assert came in error.detail


@pytest.mark.parametrize(
    ("text", "fault", "came"),
    [
        ("", Fault.format, "got an empty answer"),
        ("<html>", Fault.malformed, "html"),
        ("I can't judge these images.", Fault.refusal, "can't"),
        ("4\n2", Fault.format, "2 lines such as"),
        ('{"scores": [4, 2]}', Fault.format, "2 lines such as"),
        ("Turn 1: 4", Fault.wrong_count, "got 1 in"),
        ("Turn 2: 4", Fault.wrong_count, "got 1 in"),
        ("Turn 1: 4\nTurn 2: 2\nTurn 3: 1", Fault.wrong_count, "got 3 in"),
        ("Turn 1: 4\nTurn 1: 4", Fault.wrong_count, "in order"),
        ("Turn 1: 4\nTurn 1: 2\nTurn 2: 2", Fault.wrong_count, "got 3 in"),
        ("Turn 0: 4\nTurn 1: 2", Fault.format, "at the end"),
        ("Turn 2: 4\nTurn 1: 2", Fault.format, "in order"),
        ("Turn 1: 4 Turn 2: 2", Fault.format, "at the end"),
        ("Turn 1 - 4\nTurn 2 - 2", Fault.format, "at the end"),
        ("Turn 1: 4\nTurn 2: 2\nI hope this helps.", Fault.format, "at the end"),
        ("Scores:\nTurn 1: 4\nTurn 2: 2", Fault.format, "only 2 lines"),
        ("Turn 1: 4.\nTurn 2: 2", Fault.not_a_number, "turn 1"),
        ("Turn 1: 4/5\nTurn 2: 2", Fault.not_a_number, "'4/5'"),
        ("Turn 1: NaN\nTurn 2: 2", Fault.not_a_number, "'NaN'"),
        ("Turn 1: four\nTurn 2: 2", Fault.not_a_number, "'four'"),
        ("Turn 1: yes\nTurn 2: 2", Fault.not_a_number, "'yes'"),
        ("Turn 1: ٤\nTurn 2: 2", Fault.not_a_number, "'٤'"),
        ("Turn 1: \uff14\nTurn 2: 2", Fault.not_a_number, "turn 1"),
        ("Turn 1: ④\nTurn 2: 2", Fault.not_a_number, "'④'"),
        ("Turn \u0661: 4\nTurn 2: 2", Fault.format, "at the end"),
        ("Turn 1: 4\nTurn 2: 6", Fault.out_of_range, "turn 2: expected 1 or 2"),
        ("Turn 1: -4\nTurn 2: 2", Fault.out_of_range, "'-4'"),
        ("Turn 1: 04\nTurn 2: 2", Fault.not_a_number, "'04'"),
        ("Turn 1: 4.5\nTurn 2: 2", Fault.not_a_number, "'4.5'"),
        ("Turn 1: 4.0000000000000000000000001\nTurn 2: 2", Fault.not_a_number, "turn 1"),
        ("Turn 1: 6.0\nTurn 2: 2", Fault.out_of_range, "'6.0'"),
        ("Turn 1: -4.0\nTurn 2: 2", Fault.out_of_range, "'-4.0'"),
        ("Turn 1: 4 or 5\nTurn 2: 2", Fault.format, "at the end"),
        ("Turn 1: 4*5\nTurn 2: 2", Fault.format, "at the end"),
        ("```\nTurn 1: 4\n```\nTurn 2: 2\n```", Fault.format, "only 2 lines"),
        ("Turn 1: 4\nTurn 2: 2</think>", Fault.reasoning, "expected an answer after"),
        ("<think>Turn 1: 4\nTurn 2: 2", Fault.reasoning, "enable_thinking"),
        ("Turn 1: " + "9" * 10_000 + "\nTurn 2: 2", Fault.out_of_range, "'999"),
    ],
)  # fmt: skip
def test_text_that_does_not_state_the_scores(text, fault, came):
    error = refused(text, answer_format="text")
    assert error.fault is fault
    assert came in error.detail
    assert len(error.detail) < 400


@pytest.mark.parametrize(
    "before",
    ["Turn 1: 5", "**Turn 1:** 5", "turn 1 = 5", "Turn 1 5", "- Turn 2: it failed", "Turn 3: 1"],
)
def test_an_analysis_may_not_look_like_a_score(before):
    error = refused(
        f"Fine.\n{before}\nFine.\nTurn 1: 4\nTurn 2: 2", answer_format="text", thinking=True
    )
    assert error.fault is Fault.format
    assert "none like them before" in error.detail


def test_thinking_wants_an_analysis():
    error = refused("Turn 1: 4\nTurn 2: 2", answer_format="text", thinking=True)
    assert error.fault is Fault.format
    assert "expected an analysis and then 2 lines" in error.detail


def test_yes_and_no_in_any_case():
    assert parse_text("Turn 1: Yes\nTurn 2: NO", turns=2, scale="binary", thinking=False) == (1, 0)
    error = refused("Turn 1: 1\nTurn 2: 0", answer_format="text", scale="binary")
    assert error.fault is Fault.out_of_range


def test_a_refusal_within_an_answer_is_no_refusal():
    text = "I cannot see the cat any more.\nTurn 1: 5"
    assert parse_text(text, turns=1, scale="likert", thinking=True) == (5,)


FOUR_TWO = '{"scores": [4, 2]}'


@pytest.mark.parametrize(
    "text",
    [
        f"The cat is gone, so 5? No: 4.</think>\n{FOUR_TWO}",
        f'<think>\n{{"scores": [5, 5]}}\n</think>{FOUR_TWO}',
        f"```json\n{FOUR_TWO}\n```",
        f"```\r\n{FOUR_TWO}\r\n```",
        f"<think>hm</think>\n\n```json\n{FOUR_TWO}\n```\n<|im_end|>",
        f"{FOUR_TWO}<|im_end|>",
        f"{FOUR_TWO}</s>",
        f"{FOUR_TWO}<|im_end|>\n<|endoftext|>\n",
        f"\ufeff{FOUR_TWO}",
        '{"scores": [4.0, 2]}',
        '{"scores": [4e0, 20e-1]}',
        '{"scores": ["4", " 2.0 "]}',
        f"{FOUR_TWO}\n{FOUR_TWO}",
        f'{FOUR_TWO}{{"scores": ["4", 2.0]}}',
        "[4, 2]",
        "[4, 2] [4, 2]",
        '{"scores": [4, 2], "note": "x", "confidence": 0.5, "ok": true, "nothing": null}',
        '{"note": {"a": [9]}, "scores": [4, 2], "final_scores": [4, 2]}',
        '{"scores": [4, 2], "reason for the score": "it is red", "images": [1, 2, 3]}',
    ],
)
def test_json_with_one_reading_is_read(text):
    assert parse(text, ("json", "likert", False, 2)) == (4, 2)
    assert stated(text, ("json", "likert", False, 2)) == (4, 2)


@pytest.mark.parametrize(
    "text",
    [
        '{"turns": [{"analysis": "a </think> sign", "score": 4}]}',
        '{"turns": [{"turn": 1, "analysis": "a", "score": 4}]}',
        '{"turns": [{"turn": "1", "analysis": "a", "score": "4", "confidence": 9}]}',
        '{"turns": [{"analysis": "a", "score": 4, "score_reason": "red", "final_score": 4.0}]}',
        '[{"analysis": "```", "score": 4.0}]',
        '{"turns": [{"analysis": "a", "score": 4}]} {"turns": [{"analysis": "b", "score": 4}]}',
    ],
)
def test_analyzed_json_with_one_reading_is_read(text):
    assert parse(text, ("json", "likert", True, 1)) == (4,)
    assert stated(text, ("json", "likert", True, 1)) == (4,)


@pytest.mark.parametrize(
    "text",
    [
        "**Turn 1: 4**\n**Turn 2: 2**",
        "**Turn 1:** 4\n*Turn 2*: 2",
        "Turn 1: **4**\nTurn 2: `2`",
        "turn 1:4\nTURN 2 : 2",
        "- Turn 1: 4\n- Turn 2: 2",
        "* **Turn 1: 4**\n> Turn 2: 2",
        "Turn 1\uff1a4\nTurn 2\uff1a 2",
        "Turn 1: 4.0\nTurn 2: 2.000",
        "Turn 1: 4\nTurn 2: 2<|im_end|>",
        "Turn 1: 4\nTurn 2: 2</s>\n",
        "```\nTurn 1: 4\nTurn 2: 2\n```",
        "<think>Turn 1: 5\nTurn 2: 5</think>\nTurn 1: 4\nTurn 2: 2",
    ],
)
def test_text_with_one_reading_is_read(text):
    for kind, before in ((False, ""), (True, "It did.\n")):
        if before and text.startswith(("```", "<think>")):
            continue
        assert parse(before + text, ("text", "likert", kind, 2)) == (4, 2)
        assert stated(before + text, ("text", "likert", kind, 2)) == (4, 2)


# What an answer states, read another way: for the fuzz, which must not compare a parser with itself

ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "/": "/"}
LINE_BREAKS = r"[\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029]"
ENDS = (
    "<|im_end|>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>",
    "<end_of_turn>", "<eos>",
)  # fmt: skip


class UnreadableError(Exception):
    """There is no reading, or more than one."""


def need(condition):
    if not condition:
        raise UnreadableError


class Scan:
    """A JSON reader by hand: strings as ("s", text), numbers as ("n", fraction), pairs kept."""

    def __init__(self, text):
        self.text, self.place = text, 0

    def blank(self):
        while self.text[self.place : self.place + 1] in tuple(" \t\r\n"):
            self.place += 1

    def take(self, piece):
        found = self.text.startswith(piece, self.place)
        self.place += len(piece) * found
        return found

    def documents(self):
        found = []
        self.blank()
        while not found or self.place < len(self.text):
            found.append(self.value(0))
            self.blank()
        return found

    def value(self, depth):
        need(depth < 150)
        self.blank()
        for word in ("true", "false", "null", "NaN", "Infinity", "-Infinity"):
            if self.take(word):
                return ("w", word)
        if self.take("["):
            return ("l", self.items("]", lambda: self.value(depth + 1)))
        if self.take("{"):
            pairs = self.items("}", lambda: self.pair(depth + 1))
            need(len({key for key, _ in pairs}) == len(pairs))
            return ("o", pairs)
        if self.take('"'):
            return ("s", self.string())
        return ("n", self.number())

    def pair(self, depth):
        self.blank()
        need(self.take('"'))
        key = self.string()
        self.blank()
        need(self.take(":"))
        return key, self.value(depth)

    def items(self, end, one):
        found = []
        self.blank()
        if self.take(end):
            return found
        while True:
            found.append(one())
            self.blank()
            if self.take(end):
                return found
            need(self.take(","))

    def string(self):
        written = ""
        while not self.take('"'):
            need(self.place < len(self.text))
            letter = self.text[self.place]
            need(letter >= " ")
            self.place += 1
            if letter == "\\":
                code = self.text[self.place : self.place + 1]
                self.place += 1
                if code == "u":
                    digits = self.text[self.place : self.place + 4]
                    need(len(digits) == 4 and set(digits) <= set("0123456789abcdefABCDEF"))
                    self.place += 4
                    letter = chr(int(digits, 16))
                else:
                    need(code in ESCAPES and code)
                    letter = ESCAPES[code]
            written += letter
        return written

    def number(self):
        start = self.place
        while self.text[self.place : self.place + 1] in tuple("0123456789+-.eE"):
            self.place += 1
            if not exact(self.text[start : self.place]) and exact(
                self.text[start : self.place - 1]
            ):
                rest = self.text[start : self.place + 24]
                if not any(exact(rest[:n]) for n in range(self.place - start + 1, len(rest) + 1)):
                    self.place -= 1
                    break
        number = exact(self.text[start : self.place])
        need(number)
        return number


def exact(written):
    """The fraction of a JSON number as ("n", ...), in a tuple so that zero is true; or None."""
    sign = written.startswith("-")
    mantissa, _, exponent = written[sign:].lower().partition("e")
    whole, dot, part = mantissa.partition(".")
    digits = set("0123456789")
    if not whole or set(whole) - digits or (whole[0] == "0" and len(whole) > 1):
        return None
    if dot and (not part or set(part) - digits):
        return None
    if "e" in written.lower():
        unsigned = exponent[1:] if exponent[:1] in ("+", "-") else exponent
        if not unsigned or set(unsigned) - digits:
            return None
        if len(unsigned) > 4:
            return (Fraction(-7, 3),)  # of no scale, and no whole number
    power = int(exponent or "0")
    value = Fraction(int((whole + part)[:4000])) * Fraction(10) ** (power - len(part))
    return (-value if sign else value,)


def bare(text):
    """A text without mark, end tokens, and one fence around it."""
    text = text.strip()
    text = (text[1:] if text[:1] == "\ufeff" else text).strip()
    while any(text.endswith(end) for end in ENDS):
        text = max((text[: -len(end)] for end in ENDS if text.endswith(end)), key=len).rstrip()
    first, _, rest = text.partition("\n")
    inner, found, last = rest.rpartition("\n")
    if not found or not first.startswith("```") or last.strip(" \t") != "```":
        return text
    info = first[3:].removesuffix("\r").rstrip(" \t")
    plain = set(info) <= set(string.ascii_letters + string.digits + "_+-")
    if not plain or any(line.lstrip(" \t").startswith("```") for line in inner.split("\n")):
        return text
    return inner.strip()


def thought_out(text):
    """A text after the one end of its reasoning."""
    if text.count("</think>") == 1:
        text = text[text.index("</think>") + 8 :]
        need(bare(text))
    need("</think>" in text or not text.lstrip().startswith("<think>"))
    return text


def numbers_in(value):
    kind, content = value
    if kind == "n":
        return [content[0]]
    if kind == "s":
        number = exact(content.strip())
        return [number[0]] if number else []
    if kind == "l":
        return [n for one in content for n in numbers_in(one)]
    return [n for _, one in content for n in numbers_in(one)] if kind == "o" else []


def stated_in_document(value, kind):
    _, scale, thinking, turns = kind
    beside = []
    if value[0] == "o":
        wanted = "turns" if thinking else "scores"
        beside = [(key, one) for key, one in value[1] if key != wanted]
        value = next((one for key, one in value[1] if key == wanted), ("w", "none"))
    need(value[0] == "l" and len(value[1]) == turns)
    scores = []
    for n, entry in enumerate(value[1], start=1):
        if thinking:
            need(entry[0] == "o")
            keys = [key for key, _ in entry[1]]
            need([key for key in keys if key in ("analysis", "score")] == ["analysis", "score"])
            fields = dict(entry[1])
            need(fields["analysis"][0] == "s" and fields["analysis"][1].strip())
            for key, other in entry[1]:
                stands = numbers_in(other)
                if key not in ("analysis", "score") and stands:
                    need(key.lower() != "turn" or stands == [n])
                    named = any(word in key.lower() for word in RIVALS)
                    need(not named or stands == numbers_in(fields["score"]))
            entry = fields["score"]
        need(entry[0] in "ns" and len(numbers_in(entry)) == 1)
        [score] = numbers_in(entry)
        need(score in LABELS[scale].values())
        scores.append(int(score))
    for key, other in beside:
        stands = numbers_in(other)
        alike = other[0] == "l" and len(other[1]) == len(stands) == turns
        if stands and (alike or any(word in key.lower() for word in (*RIVALS, "turn"))):
            need(stands == scores)
    return tuple(scores)


RIVALS = ("score", "rating", "grade", "final", "answer", "verdict")


def stated_in_json(text, kind):
    """Scores of every document, which must agree; of the whole, else of what follows reasoning."""
    try:
        documents = Scan(bare(text)).documents()
    except UnreadableError:
        documents = Scan(bare(thought_out(text))).documents()
    readings = {stated_in_document(value, kind) for value in documents}
    need(len(readings) == 1)
    return readings.pop()


def stripped_statement(line):
    """A line such as "turn 1:4" without what dresses it, or None."""
    line = line.replace("\uff1a", ":")
    if line[:1] in tuple("-*+\u2022>") and line[1:2].isspace():
        line = line[1:].lstrip()
    head, colon, label = line.partition(":")
    head, label = peeled(head, start=False), peeled(label)
    head = head.lstrip("*_`")
    word, number = head[:4].lower(), head[4:].lstrip()
    told = colon and word == "turn" and number.isascii() and number.isdigit() and len(number) < 5
    if not told or number[0] == "0" or not label or set(label) & set("*_`") or label.split()[1:]:
        return None
    return int(number), label


def peeled(text, *, start=True):
    """A text without emphasis and blanks at its ends, or at its end alone."""
    while text and (text[-1].isspace() or text[-1] in "*_`"):
        text = text[:-1]
    while start and text and (text[0].isspace() or text[0] in "*_`"):
        text = text[1:]
    return text


def stated_in_text(text, kind):
    """Scores by comparing the last lines with every line that could state one."""
    _, scale, thinking, turns = kind
    text = bare(thought_out(text))
    lines = [line.strip() for line in re.split(LINE_BREAKS, text) if line.strip()]
    before, last = lines[:-turns], lines[-turns:]
    need(bool(before) == thinking and len(last) == turns)
    scores = []
    for n, line in enumerate(last, start=1):
        statement = stripped_statement(line)
        need(statement and statement[0] == n)
        label = statement[1].lower()
        number = exact(label)
        names = LABELS[scale]
        if number and number[0].denominator == 1 and abs(number[0]) < 100:
            label = str(int(number[0]))
        need(label in names)
        scores.append(names[label])
    need(not any(may_state(line) for line in before))
    return tuple(scores)


def may_state(line):
    """Whether a line names a turn and then breaks off, or gives a digit."""
    start = next((i for i, x in enumerate(line) if x.isalnum()), len(line))
    if line[start : start + 4].lower() != "turn":
        return False
    place = start + 4
    while place < len(line) and not line[place].isalnum():
        place += 1
    end = place
    while end < len(line) and line[end].isdecimal():
        end += 1
    if end == place:
        return False
    return any(breaks_off(line[stop:]) for stop in range(place + 1, end + 1))


def breaks_off(rest):
    end = 0
    while end < len(rest) and (rest[end].isspace() or rest[end] == "_"):
        end += 1
    after = rest[end:]
    if not after:
        return True
    if end and rest[end - 1].isspace() and after[0].isdecimal():
        return True
    return not (after[0].isalnum() or after[0] in ",'\u2019")


def stated(text, kind):
    try:
        return stated_in_text(text, kind) if kind[0] == "text" else stated_in_json(text, kind)
    except UnreadableError:
        return None


SENTENCES = (
    "The cat is gone.", 'It says "Turn 2: 5".', "Nothing changed: {}", "النتيجة \u0665", "猫还在。",
    "Turn 1 asks for a dog.", "10% of it", "[4, 4]", "\\",
)  # fmt: skip
PIECES = (
    "1", "2", "5", "0", "6", "-1", "44", "4.0", "1e1", "NaN", "-Infinity", "true", "null", '"4"',
    "\u0664", "\uff14", "④", "yes", "no", "Yes", "maybe", "Turn", "Turn 1: 2\n", "\nTurn 2: 3",
    "turn 3 - 1\n", "**", "```json\n", "\n", "\r", "\u2028", "\x00", " ", "{", "}", "[", "]", ",",
    ":", '"', "\\", "\\u0034", '"score": 1,', '"scores": [1],', '"analysis": "",', "[" * 2000,
    "</think>", "<think>", "<|im_end|>", "</s>", "\n```", "```\n", "4.5", "4/5", '"2.0"', "3e0",
    "\uff1a", "- ", "> ", "`", '"note": 1,', '"final": [2, 2, 2],', '"turn": 1,', '{"scores": [4]}',
    '"score_reason": "4",', "9" * 5000, "I'm sorry, ", "<html>", "\ufeff", "\ud800",
)  # fmt: skip
TOKENS = re.compile(r"\w+|\s+|[^\w\s]")


def random_answer(rng, kind):
    _, scale, _, turns = kind
    scores = [rng.choice(list(LABELS[scale].values())) for _ in range(turns)]
    return write(scores, [rng.choice(SENTENCES) for _ in range(turns)], kind, ensure_ascii=False)


def mutate_bytes(rng, text):
    data = bytearray(text.encode(errors="surrogatepass"))
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((0, 1, 1, 2, 9)))
    new = bytes(
        rng.choice((rng.randrange(256), rng.randrange(32, 127)))
        for _ in range(rng.choice((0, 1, 1, 3)))
    )
    data[start:end] = rng.choice((new, data[start:end] * 2, data[start:end][::-1]))
    return data.decode(errors="replace")


def mutate_tokens(rng, text):
    tokens = TOKENS.findall(text) or [""]
    start = rng.randrange(len(tokens))
    end = start + rng.choice((0, 1, 1, 2, 5))
    new = [rng.choice(PIECES)]
    tokens[start:end] = rng.choice((new, [], tokens[start:end] * 2, rng.sample(tokens, 1)))
    return "".join(tokens)


def mutate(rng, text, other):
    for _ in range(rng.choice((1, 1, 2, 4))):
        choice = rng.random()
        if choice < 0.45:
            text = mutate_bytes(rng, text)
        elif choice < 0.85:
            text = mutate_tokens(rng, text)
        elif choice < 0.9:
            text = text[: rng.randrange(len(text) + 1)]
        elif choice < 0.95:
            text = rng.choice((text + other, text + "\n" + other, other + text))
        else:
            cut = rng.randrange(len(text) + 1)
            text = text[:cut] + other[min(cut, len(other)) :]
    return text


DRESSES = (
    lambda rng, text: f"{rng.choice(SENTENCES)}</think>\n{text}",
    lambda rng, text: f"<think>{text}</think>{text}",
    lambda rng, text: f"```{rng.choice(('', 'json', 'text'))}\n{text}\n```",
    lambda rng, text: text + rng.choice(ENDS),
    lambda rng, text: f"\ufeff{text}",
    lambda rng, text: f"{text}\n{text}",
    lambda rng, text: text.replace("Turn", rng.choice(("turn", "- Turn", "**Turn", "* TURN"))),
    lambda rng, text: text.replace(": ", rng.choice(("\uff1a", ":", " : ", ":** "))),
    lambda rng, text: re.sub(r"(\d)([\]},\n]|$)", rng.choice((r"\1.0\2", r'"\1"\2')), text),
    lambda rng, text: text.replace(
        "{", rng.choice(('{"note": 5,', '{"turn": 1,', '{"id": [2],')), 1
    ),
    lambda rng, text: re.sub(r'^\{"(?:scores|turns)": (.*)\}$', r"\1", text),
)


def random_text(rng, kind):
    """A right answer, often dressed, and then often changed."""
    text = random_answer(rng, kind)
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        text = rng.choice(DRESSES)(rng, text)
    if rng.random() < 0.25:
        return text
    return mutate(rng, text, random_answer(rng, rng.choice((kind, rng.choice(KINDS)))))


def compare_readings(rng, count):
    """Read so many answers both ways; they agree on every score and on every refusal."""
    outcomes, longest = Counter(), 0
    for _ in some(range(count)):
        kind = rng.choice(KINDS)
        text = random_text(rng, kind)
        try:
            scores = parse(text, kind)
        except AnswerError as error:
            scores = None
            outcomes[error.fault] += 1
            longest = max(longest, len(error.detail))
        else:
            outcomes["accepted"] += 1
        assert scores == stated(text, kind), (text, kind)
    assert longest < 500
    return outcomes


def test_two_readers_agree_on_what_is_read_and_what_is_not():
    assert compare_readings(random.Random(1), 1500)["accepted"] > 200


@pytest.mark.parametrize("count", [5_000, pytest.param(200_000, marks=pytest.mark.long)])
def test_mutated_answers_give_no_other_exception_and_no_invented_score(count):
    outcomes = compare_readings(random.Random(2), count)
    assert outcomes["accepted"] > count / 10
    possible = {
        "accepted", Fault.format, Fault.wrong_count, Fault.out_of_range, Fault.not_a_number,
        Fault.request_ignored, Fault.malformed, Fault.refusal, Fault.reasoning,
    }  # fmt: skip
    assert possible - {Fault.malformed} <= set(outcomes) <= possible  # malformed ones are rare


@pytest.mark.slow
def test_the_second_reading_accepts_every_right_answer():
    rng = random.Random(3)
    for _ in range(3000):
        kind = rng.choice(KINDS)
        text = random_answer(rng, kind)
        assert stated(text, kind) == parse(text, kind) is not None
