"""Rotation: whom to ask next, when one is out, and how it comes back. On a clock of its own."""

import math
import re
from contextlib import suppress
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mteditflow.rewards import Fault
from mteditflow.rewards.transport import endpoints
from mteditflow.rewards.transport.endpoints import LONGEST_REST, Rotation, check_url
from mteditflow.rewards.transport.http_client import AttemptError
from tests.loops import some

A, B, C = "http://a/v1", "http://b/v1", "http://c:8000/v1"
REFUSED = AttemptError(Fault.connection, "refused")


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(endpoints, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def rotation(*urls, **options):
    return Rotation(urls, **{"faults_to_rest": 2, "cool_down": 10.0, "max_cool_down": 35} | options)


def ask(rotation, outcome=None, among=None):
    """One attempt from begin to end at the endpoint that is next; its URL."""
    endpoint = rotation.pick(among or rotation.urls)
    if endpoint is None:
        return None
    with suppress(AttemptError), rotation.use(endpoint):
        if outcome is not None:
            raise outcome
    return endpoint.url


def state(rotation):
    return [endpoint.state for endpoint in rotation.endpoints]


def test_idle_endpoints_take_turns():
    turns = rotation(A, B, C)
    assert [ask(turns) for _ in range(7)] == [A, B, C, A, B, C, A]


def test_the_least_busy_is_next():
    turns = rotation(A, B)
    first = turns.pick([A])
    with turns.use(first), turns.use(first):
        assert [ask(turns), ask(turns)] == [B, B]
        second = turns.pick(turns.urls)
        with turns.use(second), turns.use(second), turns.use(second):
            assert turns.pick(turns.urls) is first
    assert first.in_flight == second.in_flight == 0


def test_only_among_those_that_are_candidates_and_avoiding_some():
    turns = rotation(A, B, C)
    assert [ask(turns, among=[C]) for _ in range(2)] == [C, C]
    assert turns.pick([A, B], avoid=[A]).url == B
    assert turns.pick([A], avoid=[A]).url == A
    assert turns.pick([]) is None
    assert turns.returns_in([]) == math.inf


@pytest.mark.parametrize("fault", [Fault.timeout, Fault.connection, Fault.server_error])
def test_faults_in_a_row_take_an_endpoint_out(clock, fault):
    turns = rotation(A)
    ask(turns, AttemptError(fault, ""))
    assert state(turns) == ["up"]
    ask(turns, AttemptError(fault, ""))
    assert state(turns) == ["out"]
    assert turns.pick([A]) is None
    assert turns.returns_in([A]) == 10


@pytest.mark.parametrize(
    "outcome", [None, *(AttemptError(f, "") for f in Fault if f not in endpoints.ENDPOINT_FAULTS)]
)
def test_any_answer_between_them_breaks_the_row(clock, outcome):
    turns = rotation(A)
    for _ in range(5):
        ask(turns, REFUSED)
        ask(turns, outcome)
    assert state(turns) == ["up"]


def test_one_probe_at_a_time_and_cool_downs_that_double(clock):
    turns = rotation(A)
    ask(turns, REFUSED)
    ask(turns, REFUSED)
    for cool_down in (10, 20, 35, 35):
        assert turns.returns_in([A]) == cool_down
        clock.now += cool_down - 0.01
        assert turns.pick([A]) is None
        clock.now += 0.01
        with suppress(AttemptError), turns.use(turns.pick([A])):
            assert turns.pick([A]) is None
            assert turns.returns_in([A]) == math.inf
            raise REFUSED
    clock.now += 35
    assert ask(turns) == A
    assert state(turns) == ["up"]
    assert ask(turns, REFUSED) == A  # a full row is needed again, and the first cool-down
    assert ask(turns, REFUSED) == A
    assert turns.returns_in([A]) == 10


def test_what_was_on_its_way_when_it_died_does_not_lengthen_the_rest(clock):
    turns = rotation(A)
    endpoint = turns.pick([A])
    with suppress(AttemptError), turns.use(endpoint):
        ask(turns, REFUSED)
        ask(turns, REFUSED)
        clock.now += 1
        raise REFUSED
    assert turns.returns_in([A]) == 9
    assert endpoint.cool_down == 20


def test_a_late_answer_brings_it_back_at_once(clock):
    turns = rotation(A)
    with turns.use(turns.pick([A])):
        ask(turns, REFUSED)
        ask(turns, REFUSED)
        assert state(turns) == ["out"]
    assert state(turns) == ["up"]
    assert turns.pick([A])


def test_one_that_asks_to_wait_rests_and_does_not_count_as_dead(clock):
    turns = rotation(A, B)
    for fault in (Fault.rate_limited, Fault.server_error):
        for _ in range(3):
            turns.pick([A])
            ask(turns, AttemptError(fault, "", retry_after=4.0), among=[A])
            assert state(turns) == ["resting", "up"]
            assert turns.returns_in([A]) == 4
            assert ask(turns) == B
            clock.now += 4
            assert state(turns) == ["up", "up"]


def test_an_answer_does_not_shorten_a_rest_that_was_asked_for(clock):
    turns = rotation(A)
    with turns.use(turns.pick([A])):
        ask(turns, AttemptError(Fault.rate_limited, "", retry_after=4.0))
    assert turns.returns_in([A]) == 4
    with suppress(AttemptError), turns.use(turns.endpoints[0]):
        raise AttemptError(Fault.rate_limited, "", retry_after=1.0)
    assert turns.returns_in([A]) == 4


def test_a_probe_that_is_asked_to_wait_has_found_life(clock):
    turns = rotation(A)
    ask(turns, REFUSED)
    ask(turns, REFUSED)
    clock.now += 10
    ask(turns, AttemptError(Fault.server_error, "", retry_after=2.0))
    assert state(turns) == ["resting"]
    assert turns.returns_in([A]) == 2


def test_no_rest_is_longer_than_an_hour(clock):
    turns = rotation(A)
    ask(turns, AttemptError(Fault.rate_limited, "", retry_after=1e12))
    assert turns.returns_in([A]) == LONGEST_REST


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_bug_or_an_interrupt_says_nothing_about_the_endpoint(clock, error):
    turns = rotation(A)
    ask(turns, REFUSED)
    ask(turns, REFUSED)
    clock.now += 10
    with pytest.raises(error), turns.use(turns.pick([A])):
        raise error
    endpoint = turns.endpoints[0]
    assert (endpoint.in_flight, endpoint.probing, endpoint.is_out) == (0, False, True)
    assert (endpoint.answered, endpoint.failed) == (0, 2)
    assert ask(turns) == A


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "end", "wait"]),
        st.sampled_from(
            [
                None,
                REFUSED,
                REFUSED,
                AttemptError(Fault.rate_limited, "", retry_after=30.0),
                AttemptError(Fault.format, ""),
            ]
        ),
    ),
    min_size=1,
    max_size=60,
)


@given(EVENTS)
def test_whatever_happens_counts_hold_and_every_endpoint_comes_back(events):
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(endpoints, "time", SimpleNamespace(monotonic=clock.monotonic))
        turns = rotation(A, B)
        uses = []
        for kind, outcome in some(events):
            if kind == "begin" and (endpoint := turns.pick(turns.urls)):
                probe = endpoint.is_out
                use = turns.use(endpoint)
                use.__enter__()
                uses.append((use, endpoint, probe))
            elif kind == "end" and uses:
                use = uses.pop(0)[0]
                with suppress(AttemptError):
                    use.__exit__(type(outcome) if outcome else None, outcome, None)
            elif kind == "wait":
                clock.now += 7
            for endpoint in some(turns.endpoints):
                mine = [probe for _, used, probe in uses if used is endpoint]
                assert endpoint.in_flight == len(mine)
                assert sum(mine) == endpoint.probing <= 1
                assert endpoint.cool_down <= 35
        for use, *_ in uses:
            use.__exit__(None, None, None)
        clock.now += 35
        assert {ask(turns), ask(turns)} == {A, B}
        assert state(turns) == ["up", "up"]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000/v1",
        "ftp://host/v1",
        "file:///v1",
        "http:///v1",
        "http://host/v1?key=1",
        "http://host/v1#top",
        "http://host:port/v1",
        "http://[::1/v1",
    ],
)
def test_malformed_urls(url):
    message = f"endpoints[1]: expected http(s)://host[:port][/path], got {url!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rotation(A, url)


def test_a_password_in_a_url_is_refused_and_not_shown():
    with pytest.raises(ValueError, match=r"got 'host/v1'$") as caught:
        check_url("endpoint", "http://user:hunter2@host/v1")
    assert "hunter2" not in str(caught.value)


def test_slashes_at_the_end_are_dropped_and_urls_stand_there_once():
    assert check_url("endpoint", "https://host/v1//") == "https://host/v1"
    with pytest.raises(ValueError, match=r"^endpoints: expected each once, got \['http://a/v1', "):
        rotation(A, A + "/")
    for nothing in ((), "http://a/v1"):
        with pytest.raises(ValueError, match=r"^endpoints: expected a sequence of URLs, got "):
            Rotation(nothing)


@pytest.mark.parametrize(
    ("option", "value"), [("faults_to_rest", 0), ("cool_down", 0.0), ("max_cool_down", 9.0)]
)
def test_numbers_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"^{option}: expected"):
        rotation(A, **{option: value})
