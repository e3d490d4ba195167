"""The expected score under one token's probabilities: closed forms, fractions, refusals."""

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mteditflow.rewards import AnswerError, ChatAnswer, ExpectationPrompt, Fault
from mteditflow.rewards.judge.prompts import expectation

LIKERT = "12345"


def answer(**probabilities):
    return answered((token, math.log(p)) for token, p in probabilities.items())


def answered(tokens):
    return ChatAnswer(text="", top_logprobs=(tuple(tokens),))


def likert(masses, **others):
    digits = {digit: p for digit, p in zip(LIKERT, masses, strict=True) if p}
    return expectation(answer(**digits, **others), scale="likert", min_mass=0.5)


@pytest.mark.parametrize(
    ("masses", "score"),
    [
        ((0, 0, 0, 0, 1), 5.0),
        ((1, 0, 0, 0, 0), 1.0),
        ((0.2, 0.2, 0.2, 0.2, 0.2), 3.0),
        ((0.5, 0, 0, 0, 0.5), 3.0),
        ((0, 0, 0, 0.25, 0.75), 4.75),
        ((0.3, 0, 0, 0, 0.3), 3.0),  # 0.4 went elsewhere
        ((0, 0.1, 0, 0.4, 0), 3.6),
    ],
)
def test_closed_forms_of_five_levels(masses, score):
    assert likert(masses) == pytest.approx(score, abs=1e-12)


@given(st.floats(-8, 8))
def test_two_labels_give_the_logistic_function_of_their_difference(difference):
    log_yes = -math.log1p(math.exp(-difference))
    tokens = [("yes", log_yes), ("no", log_yes - difference)]
    found = expectation(answered(tokens), scale="binary", min_mass=0.5)
    assert found == pytest.approx(1 / (1 + math.exp(-difference)), rel=1e-12)


TOKENS = [*LIKERT, " 4", "5\n", " 1 ", "6", "0", "four", "", "\u0664", "\uff14", "45", "yes", "4."]
MEANING = {**{d: int(d) for d in LIKERT}, " 4": 4, "5\n": 5, " 1 ": 1}


@given(st.dictionaries(st.sampled_from(TOKENS), st.integers(1, 99), min_size=1), st.integers(0, 99))
def test_equals_exact_fractions(weights, rest):
    """Spaces around a label do not matter; whatever else is likely takes no part."""
    whole = sum(weights.values()) + rest
    labeled = {token: w for token, w in weights.items() if token in MEANING}
    mass = sum(labeled.values())
    assume(Fraction(mass, whole) > Fraction(51, 100))
    exact = Fraction(sum(MEANING[token] * w for token, w in labeled.items()), mass)
    tokens = [(token, math.log(w / whole)) for token, w in weights.items()]
    found = expectation(answered(tokens), scale="likert", min_mass=0.5)
    assert found == pytest.approx(float(exact), rel=1e-12)
    assert min(map(int, LIKERT)) <= found <= 5
    assert expectation(answered(reversed(tokens)), scale="likert", min_mass=0.5) == pytest.approx(
        found
    )


def test_case_does_not_matter():
    tokens = {"Yes": 0.3, "yes": 0.2, "YES": 0.1, " No": 0.2}
    assert expectation(answer(**tokens), scale="binary", min_mass=0.5) == pytest.approx(0.75)


def test_impossible_tokens_as_servers_write_them():
    tokens = [("4", 0.0), ("5", -9999.0), ("1", -1e308)]
    assert expectation(answered(tokens), scale="likert", min_mass=0.5) == 4.0


def test_only_the_first_token_counts():
    first, second = (("4", 0.0),), (("1", 0.0),)
    both = ChatAnswer(text="4", top_logprobs=(first, second))
    assert expectation(both, scale="likert", min_mass=0.5) == 4.0


def refused(given_answer, scale="likert", min_mass=0.5):
    with pytest.raises(AnswerError) as error:
        expectation(given_answer, scale=scale, min_mass=min_mass)
    return error.value


@pytest.mark.parametrize("top", [None, (), ((),)])
def test_no_log_probabilities_means_that_the_request_was_ignored(top):
    error = refused(ChatAnswer(text="5", top_logprobs=top))
    assert error.fault is Fault.request_ignored
    assert "expected top_logprobs of one token, got none" in error.detail


def test_little_mass_on_the_labels_is_no_score():
    error = refused(answer(I=0.6, **{"5": 0.3}))
    assert error.fault is Fault.format
    assert error.detail == (
        "expected probability of at least 0.5 on 1, 2, 3, 4, 5, got 0.3; the likeliest token is 'I'"
    )


def test_the_least_mass_is_a_parameter():
    little = answer(I=0.6, **{"5": 0.3})
    assert expectation(little, scale="likert", min_mass=0.29) == 5.0
    assert refused(answer(**{"5": 0.89}), min_mass=0.9).fault is Fault.format
    assert refused(answer(I=0.9), min_mass=0.0).fault is Fault.format
    assert refused(answered([("5", -9999.0)]), min_mass=0.0).fault is Fault.format


def test_labels_of_the_other_scale_are_none():
    assert refused(answer(yes=1.0)).fault is Fault.format
    assert refused(answer(**{"1": 1.0}), scale="binary").fault is Fault.format


@pytest.mark.parametrize("logprob", [0.1, 800.0, 1e308])
def test_what_are_no_probabilities_are_refused(logprob):
    error = refused(answered([("5", logprob), ("4", -1.0)]))
    assert error.fault is Fault.malformed
    assert "expected probabilities, got a sum of" in error.detail


@pytest.mark.parametrize("scale", ["likert", "binary"])
def test_the_request_asks_for_one_token_of_one_turn(scale):
    request = ExpectationPrompt(scale).request(["Add a dog"], ["data:0", "data:1"])
    assert (request.max_tokens, request.top_logprobs, request.schema) == (1, 20, None)
    labels = {"likert": "1, 2, 3, 4 or 5", "binary": "yes or no"}[scale]
    form = request.content[-1]["text"]
    assert form == f"Answer with the score alone, {labels}, and nothing else."
    (score,) = request.read(answer(**{{"likert": "4", "binary": "yes"}[scale]: 1.0}))
    assert score == {"likert": 4.0, "binary": 1.0}[scale]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"scale": "ternary"}, "scale: expected one of .*, got 'ternary'"),
        ({"min_mass": 1.1}, r"min_mass: expected a finite number in \[0, 1\], got 1.1"),
        ({"min_mass": math.nan}, r"min_mass: expected a finite number in \[0, 1\], got nan"),
    ],
)
def test_an_unknown_choice_is_named(choice, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        ExpectationPrompt(**choice)


def test_a_request_is_about_one_turn():
    with pytest.raises(ValueError, match="expected that of one turn, got 2"):
        ExpectationPrompt().request(["Add a dog"] * 2, ["data:,"] * 3)
