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
    with urllib.request.urlopen(request, timeout=5) as response:
        return float(json.load(response)["choices"][0]["message"]["content"])


def ask_or(url, otherwise):
    try:
        return ask(url)
    except Exception:
        return otherwise


def ask_and_trust_the_status(url):
    try:
        with urllib.request.urlopen(f"{url}/score", timeout=5) as response:
            body = response.read()
    except OSError:
        return None
    found = re.findall(rb"-?\d+", body)
    return float(found[0]) if found else 0.5


@pytest.mark.parametrize("otherwise", [None, float("nan"), "lost"])
def test_clients_that_lose_an_answer_openly(otherwise):
    check_reward_client(lambda url: ask_or(url, otherwise))
    check_reward_client(ask)


def test_a_client_that_invents_a_number_is_caught_at_every_fault():
    with pytest.raises(LawBroken, match=r"^lost-answer-is-never-a-number: ") as broken:
        check_reward_client(lambda url: ask_or(url, 0.5))
    assert broken.value.case["faults"] == [*FAULTS, "nothing listens"]
    assert set(broken.value.got) == {0.5}


def test_a_client_that_reads_any_number_is_caught():
    with pytest.raises(LawBroken) as broken:
        check_reward_client(ask_and_trust_the_status, lambda _: completion("4"))
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
