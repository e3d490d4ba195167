"""Attempts at endpoints: how many at once, how often, until when; and what is left of failures."""

import asyncio
import math
import re
import threading
import time
from collections import Counter
from itertools import repeat

import anyio
import httpx2
import pytest

from mteditflow.rewards import AnswerError, Dispatcher, Fault, Lost
from mteditflow.rewards.transport import dispatch
from mteditflow.rewards.transport.http_client import SHOWN, open_client
from mteditflow.testing.endpoint import ScriptedServer, closed_port, error, reset, silent
from tests.loops import some

A, B, C = "http://a/v1", "http://b/v1", "http://c/v1"
REQUEST = httpx2.Request("POST", A)


def dispatcher(*urls, **options):
    quick = {"back_off": 0.01, "max_back_off": 0.02, "cool_down": 0.05, "max_cool_down": 0.1}
    return Dispatcher(urls or (A,), **quick | {"timeout": 5.0, "patience": 20.0} | options)


def http_error(status, text="", **headers):
    response = httpx2.Response(status, text=text, headers=headers, request=REQUEST)
    return httpx2.HTTPStatusError("", request=REQUEST, response=response)


def playing(*outcomes):
    """An attempt that raises or returns one outcome after the other, and whom it asked."""
    asked, left = [], iter(outcomes)

    async def attempt(endpoint):
        asked.append(endpoint)
        outcome = next(left)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return attempt, asked


def run(dispatcher, *outcomes):
    attempt, asked = playing(*outcomes)
    return anyio.run(dispatcher.run, attempt), asked


async def run_all(dispatcher, attempts):
    """All at once; results in the order of the attempts."""
    results = [None] * len(attempts)

    async def one(i, attempt):
        results[i] = await dispatcher.run(attempt)

    async with anyio.create_task_group() as group:
        for i, attempt in enumerate(attempts):
            group.start_soon(one, i, attempt)
    return results


# how often


def test_an_answer_is_returned_whatever_it_is():
    for answer in (5, None, "", [], 0.0):
        assert run(dispatcher(), answer) == (answer, [A])


def test_a_fault_is_tried_again_and_the_last_one_is_the_reason():
    faults = [AnswerError(Fault.format, f"try {i}") for i in range(4)]
    assert run(dispatcher(), *faults[:3], 5)[0] == 5
    lost, asked = run(dispatcher(), *faults)
    assert lost == Lost(Fault.format, f"{A}: try 3", attempts=4)
    assert asked == [A] * 4
    assert run(dispatcher(attempts=1), faults[0])[0] == Lost(Fault.format, f"{A}: try 0", 1)


def test_a_rejected_request_is_not_tried_again_at_the_same_endpoint():
    no = http_error(404, '{"error": {"message": "no such model"}}')
    lost, asked = run(dispatcher(), no)
    assert lost.fault is Fault.rejected
    assert lost.detail == f'{A}: HTTP 404: {{"error": {{"message": "no such model"}}}}'
    assert (lost.attempts, asked) == (1, [A])
    assert run(dispatcher(A, B), no, 5) == (5, [A, B])
    lost, asked = run(dispatcher(A, B, C), no, no, http_error(422, "too long"))
    assert lost == Lost(Fault.rejected, f"{C}: HTTP 422: too long", attempts=3)
    assert asked == [A, B, C]


@pytest.mark.parametrize("status", [408, 409, 425, 429])
def test_four_statuses_mean_not_now(status):
    assert run(dispatcher(), http_error(status), 5) == (5, [A, A])


def test_another_endpoint_is_asked_before_the_one_that_failed():
    bad = AnswerError(Fault.malformed, "")
    assert run(dispatcher(A, B, C), bad, bad, bad, 5) == (5, [A, B, C, A])


def test_also_if_it_is_the_busier_one():
    shared = dispatcher(A, B)
    bad = AnswerError(Fault.malformed, "")
    attempt, asked = playing(bad, bad, 5)

    async def main():
        done = anyio.Event()

        async def hold(endpoint):
            await done.wait()

        async with anyio.create_task_group() as tasks:
            for _ in range(3):  # two at A, one at B
                tasks.start_soon(shared.run, hold)
            while shared.statistics.attempts < 3:
                await anyio.sleep(0)
            answer = await shared.run(attempt)
            done.set()
        return answer

    assert anyio.run(main) == 5
    assert asked == [B, A, B]


def test_pauses_are_drawn_from_a_window_that_doubles(monkeypatch):
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    monkeypatch.setattr("mteditflow.rewards.transport.dispatch.anyio.sleep", sleep)
    patient = dispatcher(attempts=7, back_off=1.0, max_back_off=8.0)
    for _ in range(40):
        run(patient, *repeat(AnswerError(Fault.format, ""), 7))
    columns = [pauses[i::6] for i in range(6)]
    for column, window in zip(columns, (1, 2, 4, 8, 8, 8), strict=True):
        assert 0 <= min(column) < window / 4  # a chance of 1e-5 to fail, each
        assert window * 3 / 4 < max(column) <= window


# until when


def test_the_deadline_is_around_the_whole_attempt():
    async def drip(endpoint):
        while True:
            await anyio.sleep(0.01)

    lost = anyio.run(dispatcher(timeout=0.1, attempts=2).run, drip)
    assert lost == Lost(Fault.timeout, f"{A}: no answer within 0.1 s", attempts=2)


def test_waiting_for_a_slot_is_not_part_of_the_deadline():
    async def slow(endpoint):
        await anyio.sleep(0.1)
        return 5

    serial = dispatcher(concurrency=1, timeout=0.7)
    assert anyio.run(run_all, serial, [slow] * 8) == [5] * 8
    assert serial.statistics.attempts == 8


def test_a_wish_to_wait_is_granted():
    start = time.monotonic()
    busy = http_error(429, **{"Retry-After": "0.3"})
    assert run(dispatcher(), busy, 5) == (5, [A, A])
    assert time.monotonic() - start >= 0.3


def test_meanwhile_another_endpoint_is_asked():
    far = http_error(429, **{"Retry-After": "3600"})
    assert run(dispatcher(A, B), far, AnswerError(Fault.format, ""), 5) == (5, [A, B, B])


def test_a_wish_to_wait_beyond_patience_loses_the_answer_at_once_and_says_so():
    start = time.monotonic()
    lost, asked = run(dispatcher(patience=9.0), http_error(429, "quota", **{"Retry-After": "3600"}))
    assert time.monotonic() - start < 5
    detail = f"{A}: HTTP 429 (Retry-After: 3600): quota; no endpoint comes back within 9 s"
    assert lost == Lost(Fault.rate_limited, detail, attempts=1)
    assert asked == [A]


def test_with_every_endpoint_out_a_request_waits_for_the_first_one_back():
    down = httpx2.ConnectError("refused")
    results, asked = run(dispatcher(faults_to_rest=1, attempts=6), *[down] * 5, 5)
    assert results == 5
    assert asked == [A] * 6


def test_without_patience_it_does_not():
    down = httpx2.ConnectError("refused")
    impatient = dispatcher(faults_to_rest=1, patience=0.0, cool_down=30.0, max_cool_down=30.0)
    lost, _ = run(impatient, down)
    detail = f"{A}: ConnectError: refused; no endpoint comes back within 0 s"
    assert lost == Lost(Fault.connection, detail, attempts=1)
    lost, asked = run(impatient, 5)
    assert lost == Lost(Fault.unavailable, "no endpoint comes back within 0 s", attempts=0)
    assert asked == []


def out_after_one_fault(probe, **options):
    """A dispatcher whose endpoint fails once; what comes next, the probe, does `probe`."""
    one = dispatcher(faults_to_rest=1, attempts=2, **options)

    async def attempt(endpoint):
        if one.statistics.attempts == 1:
            raise httpx2.ConnectError("refused")
        return await probe()

    return one, attempt


def test_patience_ends_while_a_probe_hangs():
    one, attempt = out_after_one_fault(anyio.sleep_forever, patience=0.3, timeout=60.0)

    async def main():
        lost = []

        async def request(tasks):
            lost.append(await one.run(attempt))
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(request, tasks)
            tasks.start_soon(request, tasks)
        return lost

    start = time.monotonic()
    (lost,) = anyio.run(main)
    assert time.monotonic() - start < 30
    assert lost.fault in (Fault.connection, Fault.unavailable)
    assert lost.detail.endswith("no endpoint comes back within 0.3 s")


def test_those_that_wait_are_told_that_the_probe_succeeded(monkeypatch):
    monkeypatch.setattr(dispatch, "POLL", math.inf)
    one, attempt = out_after_one_fault(lambda: anyio.sleep(0.1), patience=60.0)
    start = time.monotonic()
    assert anyio.run(run_all, one, [attempt] * 3) == [None] * 3
    assert time.monotonic() - start < 30


# how many at once


def test_concurrency_is_reached_and_never_exceeded():
    at_once, most, tries = 0, 0, Counter()

    def attempt_of(i):
        async def attempt(endpoint):
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            await anyio.sleep(0.005)
            at_once -= 1
            tries[i] += 1
            if i % 3 == 0 and tries[i] == 1:
                raise AnswerError(Fault.format, "")
            return i

        return attempt

    results = anyio.run(run_all, dispatcher(A, B, concurrency=7), list(map(attempt_of, range(60))))
    assert results == list(range(60))
    assert most == 7


def test_a_request_in_its_pause_leaves_its_slot_to_others():
    order = []

    async def fails_once(endpoint):
        order.append("first")
        if len(order) == 1:
            raise AnswerError(Fault.format, "")

    async def works(endpoint):
        order.append("second")

    serial = dispatcher(concurrency=1, back_off=2.0, max_back_off=2.0)
    serial._wait = lambda state: 0.3  # the draw may be 0
    anyio.run(run_all, serial, [fails_once, works])
    assert order == ["first", "second", "first"]


# what is not a fault


@pytest.mark.parametrize("bug", [ValueError("bug"), KeyError("bug"), OSError("disk full")])
def test_a_bug_leaves_run_at_once(bug):
    attempt, asked = playing(bug)
    broken = dispatcher()
    with pytest.raises(type(bug)) as caught:
        anyio.run(broken.run, attempt)
    assert caught.value is bug
    assert asked == [A]
    assert broken.statistics.lost == broken.statistics.answered == 0


def test_an_interrupt_leaves_run():
    attempt, _ = playing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(dispatcher().run(attempt))


@pytest.mark.parametrize("where", ["attempt", "pause", "slot", "rest"])
def test_cancellation_comes_through_from_wherever_a_request_is(where):
    options = {
        "attempt": {},
        "pause": {"back_off": 60.0, "max_back_off": 60.0},
        "slot": {"concurrency": 1},
        "rest": {"faults_to_rest": 1, "cool_down": 60.0, "max_cool_down": 60.0, "patience": 99.0},
    }
    stuck = dispatcher(**options[where])
    stuck._wait = lambda state: 60.0 if where == "pause" else 0.0

    async def attempt(endpoint):
        if where in ("pause", "rest"):
            raise httpx2.ConnectError("refused")
        await anyio.sleep_forever()

    async def main():
        with anyio.move_on_after(0.1):
            await run_all(stuck, [attempt, attempt])
            pytest.fail("expected a cancellation")
        with anyio.fail_after(10):  # and the slots are free again
            return await run_all(dispatcher() if where == "rest" else stuck, [playing(5)[0]] * 1)

    assert anyio.run(main) == [5]
    assert all(endpoint.in_flight == 0 for endpoint in some(stuck._rotation.endpoints))


# several event loops


def test_one_event_loop_after_the_other():
    one = dispatcher(concurrency=1)
    for _ in range(3):
        assert anyio.run(run_all, one, [playing(i)[0] for i in range(5)]) == list(range(5))


def test_event_loops_side_by_side():
    one, results = dispatcher(concurrency=2), {}

    async def attempt(endpoint):
        await anyio.sleep(0.01)
        return 5

    def thread(name):
        results[name] = anyio.run(run_all, one, [attempt] * 20)

    threads = [threading.Thread(target=thread, args=(name,)) for name in "ab"]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert results == {"a": [5] * 20, "b": [5] * 20}
    assert one.statistics.answered == 40


# what is said


def test_statistics_count():
    one = dispatcher(A, B, attempts=2)
    bad, down = AnswerError(Fault.format, ""), httpx2.ConnectError("refused")
    for outcomes in ([5], [bad, 5], [bad, bad], [down, 5]):
        run(one, *outcomes)
    found = one.statistics
    assert (found.answered, found.lost, found.attempts) == (3, 1, 7)
    assert found.faults == {Fault.format.value: 3, Fault.connection.value: 1}
    assert found.endpoints == {A: "up", B: "up"}


def test_a_secret_is_in_no_message(caplog):
    secret = "sk-hunter2"
    quiet = dispatcher(secret=secret, faults_to_rest=1, attempts=2)
    lost, _ = run(quiet, *[http_error(500, f"your key {secret} is fine")] * 2)
    assert lost.detail == f"{A}: HTTP 500: your key *** is fine"
    assert "is out for" in caplog.text
    assert secret not in caplog.text


@pytest.mark.parametrize("shown", range(1, 11))
def test_a_secret_is_hidden_where_a_servers_words_are_cut_short(shown):
    secret = "sk-hunter2"
    words = "x" * (SHOWN - shown) + secret + " and more words than are shown"
    lost, _ = run(dispatcher(secret=secret, attempts=1), http_error(500, words))
    assert lost.detail.endswith("xxx*** ...")


@pytest.mark.parametrize("secret", ["", "line\nbreak", "sk-schlüssel"])
def test_a_secret_that_no_header_can_carry(secret):
    with pytest.raises(ValueError, match=r"^secret: expected a key or token of printable ASCII"):
        dispatcher(secret=secret)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("concurrency", 0),
        ("timeout", 0.0),
        ("attempts", 0),
        ("back_off", -1.0),
        ("max_back_off", 0.001),
        ("patience", float("nan")),
    ],
)
def test_numbers_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"^{option}: expected"):
        dispatcher(**{option: value})


# over the wire


def asking(client, number):
    async def attempt(endpoint):
        response = await client.post(f"{endpoint}/double", json={"number": number})
        response.raise_for_status()
        return response.json()["double"]

    return attempt


def double(request):
    return {"double": 2 * request["number"]}


def test_a_server_that_dies_and_comes_back_loses_nothing():
    """200 requests, 16 at a time; the server is killed under way, twice, and started again."""
    port, client = closed_port(), open_client()
    one = dispatcher(f"http://127.0.0.1:{port}/v1", concurrency=16, attempts=20)

    async def main():
        return await run_all(one, [asking(client, i) for i in range(200)])

    results = []
    thread = threading.Thread(target=lambda: results.extend(anyio.run(main)))
    thread.start()
    for _ in range(2):
        with ScriptedServer(double, port=port) as server:
            while len(server.requests) < 40:
                time.sleep(0.001)
        time.sleep(0.2)
    with ScriptedServer(double, port=port):
        thread.join(60)
    assert results == [2 * i for i in range(200)]
    assert one.statistics.faults.keys() == {Fault.connection.value}


def test_one_dead_endpoint_of_two_is_left_alone():
    client = open_client()
    with ScriptedServer(double) as server:
        dead = f"http://127.0.0.1:{closed_port()}/v1"
        one = dispatcher(dead, server.url, cool_down=60.0, max_cool_down=60.0, concurrency=4)
        results = anyio.run(run_all, one, [asking(client, i) for i in range(50)])
    assert results == [2 * i for i in range(50)]
    assert one.statistics.endpoints == {dead: "out", server.url: "up"}
    assert one.statistics.faults.keys() == {Fault.connection.value}
    assert 3 <= one.statistics.faults[Fault.connection.value] <= 6  # what was on its way by then


def test_load_is_shared():
    client = open_client()
    with ScriptedServer(double) as a, ScriptedServer(double) as b:
        one = dispatcher(a.url, b.url, concurrency=8)
        anyio.run(run_all, one, [asking(client, i) for i in range(60)])
        assert min(len(a.requests), len(b.requests)) >= 20
        assert len(a.requests) + len(b.requests) == 60


@pytest.mark.parametrize("behavior", [silent, reset, error(500)])
def test_nothing_hangs_when_every_request_fails(behavior):
    client = open_client()
    with ScriptedServer(double, repeat(behavior)) as server:
        one = dispatcher(server.url, timeout=0.1, attempts=3, patience=0.3)
        results = anyio.run(run_all, one, [asking(client, i) for i in range(20)])
    assert all(
        isinstance(result, Lost) and re.match("http://", result.detail) for result in some(results)
    )
    assert one.statistics.lost == 20
