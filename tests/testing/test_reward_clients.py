"""A lost answer is never a number: clients that keep the law, and clients that do not."""

import json
import re
import urllib.request

import pytest

from mteditflow.testing import FAULTS, LawBroken, check_reward_client
from mteditflow.testing.endpoint import completion

pytest_plugins = ["mteditflow.testing.plugin"]


def ask(url):
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps({}).encode())
    with urllib.request.urlopen(request, timeout=1) as response:
        return float(json.load(response)["choices"][0]["message"]["content"])


def ask_or(url, otherwise):
    try:
        return ask(url)
    except Exception:
        return otherwise


def ask_and_trust_the_status(url):
    try:
        with urllib.request.urlopen(f"{url}/score", timeout=1) as response:
            body = response.read()
    except OSError:
        return None
    found = re.findall(rb"-?\d+", body)
    return float(found[0]) if found else 0.5


@pytest.mark.parametrize("otherwise", [None, float("nan"), "lost"])
def test_clients_that_lose_an_answer_openly(otherwise):
    quick = {name: fault for name, fault in FAULTS.items() if name != "no answer in time"}
    check_reward_client(lambda url: ask_or(url, otherwise), faults=quick)


def test_a_client_that_raises_keeps_every_law():
    check_reward_client(ask)
    twice = {"endpoint": "sound"}
    with pytest.raises(LawBroken, match=r"^right-answer-is-the-reward: ") as broken:
        check_reward_client(lambda url: 2 * ask(url))
    assert broken.value.case == twice
    check_reward_client(lambda url: 2 * ask(url), faults={}, reward=8)


def zero_for_words(url):
    with urllib.request.urlopen(f"{url}/chat/completions", timeout=1) as response:
        content = json.load(response)["choices"][0]["message"]["content"]
    return float(content) if content.isdigit() else 0.0


def half_after_a_timeout(url):
    try:
        return ask(url)
    except TimeoutError:
        return 0.5


def mean_of_attempts(url):
    attempts = [ask_or(url, 0.0) for _ in range(3)]
    return sum(attempts) / 3 if any(attempts) else None


@pytest.mark.parametrize(
    ("client", "faults", "case"),
    [
        (zero_for_words, ["an answer in words"], {"faults": ["an answer in words"]}),
        (half_after_a_timeout, ["no answer in time"], {"faults": ["no answer in time"]}),
        (mean_of_attempts, ["status 500"], {"fault": "status 500, once"}),
        (lambda url: 7 * bool(ask(url)), [], {"endpoint": "sound"}),
    ],
)
def test_clients_that_invent_a_score_are_caught(client, faults, case):
    with pytest.raises(LawBroken) as broken:
        check_reward_client(client, faults={name: FAULTS[name] for name in faults})
    assert broken.value.case == case


def test_scores_of_other_endpoints_in_words():
    def from_list(url):
        with urllib.request.urlopen(f"{url}/score", timeout=1) as response:
            score = json.load(response)["scores"][0]
        return score if isinstance(score, float) else 0.0

    faults = {name: FAULTS[name] for name in ["an answer in words"]}
    with pytest.raises(LawBroken, match=r"got      \[0\.0\]"):
        check_reward_client(from_list, lambda _: {"scores": [0.25]}, faults=faults)


@pytest.mark.parametrize(
    ("result", "words"), [([4.0], "a list of float"), ({"score": 4}, "a dict")]
)
def test_a_result_that_is_no_number_is_an_error_of_type(result, words):
    with pytest.raises(TypeError, match=f"^ask: expected a number, .*, got {words}$"):
        check_reward_client(lambda url: result)


def test_a_client_that_invents_a_number_is_caught_at_every_fault():
    with pytest.raises(LawBroken, match=r"^lost-answer-is-never-a-number: ") as broken:
        check_reward_client(lambda url: ask_or(url, 0.5))
    assert broken.value.case["faults"] == [*FAULTS, "nothing listens"]
    assert set(broken.value.got) == {0.5}


def test_a_client_that_reads_any_number_is_caught():
    with pytest.raises(LawBroken) as broken:
        check_reward_client(
            ask_and_trust_the_status,
            lambda _: completion("4"),
            faults={name: FAULTS[name] for name in ["HTML with status 200", "empty body"]},
        )
    assert "HTML with status 200" in broken.value.case["faults"]


def test_a_client_that_cannot_read_a_sound_answer_proves_nothing():
    with pytest.raises(LawBroken, match=r"endpoint = sound\n  expected a number\n  got      "):
        check_reward_client(lambda url: None)


def test_the_fixture_fails_each_time(faulty_endpoint):
    assert ask_or(faulty_endpoint.url, "lost") == "lost"
    assert faulty_endpoint.requests


def test_an_asynchronous_client_is_refused():
    async def answer(url):
        return 4.0

    with pytest.raises(TypeError, match=r"^ask: expected a number, .*, got a coroutine; wrap it"):
        check_reward_client(answer)
