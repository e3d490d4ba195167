"""A judge's answer is read exactly or refused with the reason; nothing is invented."""

import itertools
import json
import random
import re
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mteditflow.rewards import AnswerError, Fault
from mteditflow.rewards.judge.answers import parse_json, parse_text

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
        ('{"scores": [4, 2]}{"scores": [5, 5]}', Fault.request_ignored, "5, 5"),
        ('```json\n{"scores": [4, 2]}\n```', Fault.request_ignored, "```json"),
        ('I\'m sorry: {"scores": [4, 2]}', Fault.request_ignored, "sorry"),
        ('\ufeff{"scores": [4, 2]}', Fault.request_ignored, "ufeff"),
        ('{"scores": [4, ', Fault.format, "[4, '"),
        ("{'scores': [4, 2]}", Fault.format, "scores"),
        ('{"scores": [4, 2],}', Fault.format, "],}"),
        ('{"scores": [4, 2], "scores": [5, 5]}', Fault.format, "got 'scores, scores'"),
        ('{"scores": [4, 2], "note": "x"}', Fault.format, "note"),
        ('{"Scores": [4, 2]}', Fault.format, "Scores"),
        ("[4, 2]", Fault.format, "[4, 2]"),
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
        ('{"scores": [4.0, 2]}', Fault.not_a_number, "got 4.0"),
        ('{"scores": [4e0, 2]}', Fault.not_a_number, "turn 1"),
        ('{"scores": [1e999, 2]}', Fault.not_a_number, "got inf"),
        ('{"scores": [NaN, 2]}', Fault.not_a_number, "got nan"),
        ('{"scores": [4, Infinity]}', Fault.not_a_number, "got inf"),
        ('{"scores": ["4", 2]}', Fault.not_a_number, "got '4'"),
        ('{"scores": [true, 2]}', Fault.not_a_number, "got True"),
        ('{"scores": [null, 2]}', Fault.not_a_number, "got None"),
        ('{"scores": [[4], 2]}', Fault.not_a_number, "got list"),
        ('{"scores": [٤, 2]}', Fault.format, "٤"),
        ('{"scores": ["٤", 2]}', Fault.not_a_number, "got '٤'"),
        ("[" * 100_000, Fault.format, "got '[[["),
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
        ('{"analysis": "ok", "score": 4, "turn": 1}', Fault.format, "turn"),
        ('{"analysis": "", "score": 4}', Fault.format, "an analysis of each turn in words"),
        ('{"analysis": " \\n", "score": 4}', Fault.format, "in words"),
        ('{"analysis": null, "score": 4}', Fault.format, "in words"),
        ('{"analysis": "a", "score": 4, "score": 5}', Fault.format, "'analysis, score, score'"),
        ('{"analysis": "ok", "score": "4"}', Fault.not_a_number, "got '4'"),
        ('{"analysis": "ok", "score": 0}', Fault.out_of_range, "got 0"),
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
        ("turn 1: 4\nTurn 2: 2", Fault.format, "at the end"),
        ("**Turn 1: 4**\n**Turn 2: 2**", Fault.format, "at the end"),
        ("Turn 1 - 4\nTurn 2 - 2", Fault.format, "at the end"),
        ("Turn 1: 4\nTurn 2: 2\nI hope this helps.", Fault.format, "at the end"),
        ("Scores:\nTurn 1: 4\nTurn 2: 2", Fault.format, "only 2 lines"),
        ("Turn 1: 4.\nTurn 2: 2", Fault.not_a_number, "turn 1"),
        ("Turn 1: 4/5\nTurn 2: 2", Fault.not_a_number, "'4/5'"),
        ("Turn 1: 4.0\nTurn 2: 2", Fault.not_a_number, "'4.0'"),
        ("Turn 1: NaN\nTurn 2: 2", Fault.not_a_number, "'NaN'"),
        ("Turn 1: four\nTurn 2: 2", Fault.not_a_number, "'four'"),
        ("Turn 1: yes\nTurn 2: 2", Fault.not_a_number, "'yes'"),
        ("Turn 1: ٤\nTurn 2: 2", Fault.not_a_number, "'٤'"),
        ("Turn 1: \uff14\nTurn 2: 2", Fault.not_a_number, "turn 1"),
        ("Turn 1: ④\nTurn 2: 2", Fault.not_a_number, "'④'"),
        ("Turn \u0661: 4\nTurn 2: 2", Fault.format, "at the end"),
        ("Turn 1: 4\nTurn 2: 6", Fault.out_of_range, "turn 2: expected 1 or 2"),
        ("Turn 1: -4\nTurn 2: 2", Fault.out_of_range, "'-4'"),
        ("Turn 1: 04\nTurn 2: 2", Fault.out_of_range, "'04'"),
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


# What an answer states, read another way: for the fuzz, which must not compare a parser with itself

JSON_TOKEN = re.compile(
    r'(?P<S>"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*")'
    r"|(?P<N>-?(?:0|[1-9][0-9]*)(?![0-9.eE]))|(?P<P>[{}\[\]:,])|(?P<W>[ \t\r\n]+)"
)
ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
LINE_BREAKS = r"[\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029]"


def unescape(string):
    def one(match):
        code = match[1]
        return chr(int(code[1:], 16)) if code[0] == "u" else ESCAPES.get(code, code)

    return re.sub(r"\\(u[0-9a-fA-F]{4}|.)", one, string[1:-1])


def stated_in_json(text, thinking):
    """Scores by tokens: the skeleton of the document, its keys, and its numbers."""
    skeleton, strings, numbers, place = "", [], [], 0
    while place < len(text):
        token = JSON_TOKEN.match(text, place)
        if token is None:
            return None
        place = token.end()
        if token["S"]:
            strings.append(unescape(token["S"]))
        if token["N"]:
            numbers.append(int(token["N"]))
        skeleton += "S" if token["S"] else "N" if token["N"] else token["P"] or ""
    item = "{S:S,S:N}" if thinking else "N"
    if skeleton != "{S:[" + ",".join([item] * len(numbers)) + "]}":
        return None
    keys = ["turns", *["analysis", "score"] * len(numbers)] if thinking else ["scores"]
    found = [strings[0], *(s for i, s in enumerate(strings[1:]) if i % 3 != 1)]
    return tuple(numbers) if found == keys else None


def stated_in_text(text, scale, thinking, turns):
    """Scores by comparing the last lines with every line that could state one."""
    lines = [line.strip() for line in re.split(LINE_BREAKS, text) if line.strip()]
    before, last = lines[:-turns], lines[-turns:]
    scores = []
    for n, line in enumerate(last, start=1):
        stating = {f"Turn {n}: {label}": score for label, score in LABELS[scale].items()}
        head, _, label = line.rpartition(" ")
        scores.append(stating.get(f"{head} {label.lower()}"))
    dress = " *#>-_`.\"'"
    claims = {f"turn {n}: {label}" for n in range(1, 100) for label in LABELS[scale]}
    contradicting = [line for line in before if line.lower().strip(dress) in claims]
    if None in scores or contradicting or bool(before) != thinking:
        return None
    return tuple(scores)


def stated(text, kind):
    answer_format, scale, thinking, turns = kind
    if answer_format == "text":
        return stated_in_text(text, scale, thinking, turns)
    scores = stated_in_json(text, thinking)
    wanted = scores is not None and set(scores) <= set(LABELS[scale].values())
    return scores if wanted and len(scores) == turns else None


SENTENCES = (
    "The cat is gone.", 'It says "Turn 2: 5".', "Nothing changed: {}", "النتيجة \u0665", "猫还在。",
    "Turn 1 asks for a dog.", "10% of it", "[4, 4]", "\\",
)  # fmt: skip
PIECES = (
    "1", "2", "5", "0", "6", "-1", "44", "4.0", "1e1", "NaN", "-Infinity", "true", "null", '"4"',
    "\u0664", "\uff14", "④", "yes", "no", "Yes", "maybe", "Turn", "Turn 1: 2\n", "\nTurn 2: 3",
    "turn 3 - 1\n", "**", "```json\n", "\n", "\r", "\u2028", "\x00", " ", "{", "}", "[", "]", ",",
    ":", '"', "\\", "\\u0034", '"score": 1,', '"scores": [1],', '"analysis": "",', "[" * 2000,
    "9" * 5000, "I'm sorry, ", "<html>", "\ufeff", "\ud800",
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


@pytest.mark.slow
def test_mutated_answers_give_no_other_exception_and_no_invented_score():
    rng = random.Random(2)
    outcomes, longest = Counter(), 0
    for _ in range(100_000):
        kind = rng.choice(KINDS)
        other = random_answer(rng, rng.choice((kind, rng.choice(KINDS))))
        text = mutate(rng, random_answer(rng, kind), other)
        try:
            scores = parse(text, kind)
        except AnswerError as error:
            outcomes[error.fault] += 1
            longest = max(longest, len(error.detail))
        else:
            outcomes["accepted"] += 1
            assert scores == stated(text, kind), (text, kind)
    assert longest < 400
    assert outcomes["accepted"] > 5000
    assert set(outcomes) == {
        "accepted", Fault.format, Fault.wrong_count, Fault.out_of_range, Fault.not_a_number,
        Fault.request_ignored, Fault.malformed, Fault.refusal,
    }  # fmt: skip


@pytest.mark.slow
def test_the_second_reading_accepts_every_right_answer():
    rng = random.Random(3)
    for _ in range(3000):
        kind = rng.choice(KINDS)
        text = random_answer(rng, kind)
        assert stated(text, kind) == parse(text, kind)
