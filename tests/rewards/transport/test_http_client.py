"""The HTTP client: one for every event loop, bounded reads, and which exception is which fault."""

import gzip
import json
import ssl
import threading
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from itertools import repeat

import anyio
import httpx2
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mteditflow._text import escape_controls
from mteditflow.rewards import AnswerError, Fault
from mteditflow.rewards.transport import http_client
from mteditflow.rewards.transport.http_client import (
    SHOWN,
    classify,
    open_client,
    retry_after,
    shorten,
)
from mteditflow.testing.endpoint import ScriptedServer, plain

REQUEST = httpx2.Request("POST", "http://127.0.0.1/v1/chat/completions")


def answer(request):
    return {"answer": request}


async def post(client, url, number=0):
    return (await client.post(url, json=number)).json()


def test_event_loops_one_after_the_other_and_side_by_side():
    client = open_client()
    with ScriptedServer(answer) as server:
        for number in range(3):
            assert anyio.run(post, client, server.url, number) == {"answer": number}
        assert server.connections == 3  # the loop that opened one has closed it
        results = {}

        def thread(number):
            results[number] = anyio.run(post, client, server.url, number)

        threads = [threading.Thread(target=thread, args=(number,)) for number in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert results == {number: {"answer": number} for number in range(4)}


def test_certificates_are_read_once_a_process(monkeypatch):
    read, reads = httpx2.create_ssl_context, []

    def counted():
        reads.append(None)
        return read()

    monkeypatch.setattr(httpx2, "create_ssl_context", counted)
    http_client._tls.cache_clear()
    with ScriptedServer(answer) as server:
        for client in (open_client(), open_client()):
            assert anyio.run(post, client, server.url) == {"answer": 0}
    assert len(reads) == 1


def test_requests_of_one_loop_share_connections():
    async def main():
        for number in range(10):
            await post(client, server.url, number)

    client = open_client()
    with ScriptedServer(answer) as server:
        anyio.run(main)
        assert server.connections == 1


@pytest.mark.parametrize("status", [200, 500])
def test_a_body_has_a_bound(status):
    client = open_client(max_body=1000)
    body = b'"' + b"x" * 998 + b'"'
    with ScriptedServer(answer, [plain(body, status=status), plain(body + b" ")]) as server:
        assert anyio.run(post, client, server.url) == "x" * 998
        with pytest.raises(AnswerError, match="expected at most 1000 bytes") as caught:
            anyio.run(post, client, server.url)
    assert caught.value.fault is Fault.malformed


def test_a_compressed_body_is_refused_before_it_is_unpacked():
    bomb = plain(gzip.compress(b" " * 10**7), Content_Encoding="gzip")
    with ScriptedServer(answer, repeat(bomb)) as server:
        with pytest.raises(AnswerError, match="expected a body that is not compressed"):
            anyio.run(post, open_client(), server.url)
        assert server.requests[0].headers["accept-encoding"] == "identity"


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with ScriptedServer(answer) as server:
        assert anyio.run(post, open_client(), server.url, 5) == {"answer": 5}


def status_error(status, text="", **headers):
    response = httpx2.Response(status, text=text, headers=headers, request=REQUEST)
    return httpx2.HTTPStatusError("", request=REQUEST, response=response)


def raised(function):
    with pytest.raises(Exception, match=r".") as caught:
        function()
    return caught.value


class Integer(pydantic.BaseModel):
    value: int


@pytest.mark.parametrize(
    ("error", "fault", "detail"),
    [
        (AnswerError(Fault.wrong_count, "2 of 3"), Fault.wrong_count, "2 of 3"),
        (TimeoutError(), Fault.timeout, "TimeoutError"),
        (httpx2.ConnectTimeout("slow"), Fault.timeout, "ConnectTimeout: slow"),
        (httpx2.ReadTimeout("slow"), Fault.timeout, "ReadTimeout: slow"),
        (httpx2.PoolTimeout("slow"), Fault.timeout, "PoolTimeout: slow"),
        (httpx2.ConnectError("refused"), Fault.connection, "ConnectError: refused"),
        (httpx2.RemoteProtocolError("cut"), Fault.connection, "RemoteProtocolError: cut"),
        (ssl.SSLError("bad record"), Fault.connection, "bad record"),
        (anyio.EndOfStream(), Fault.connection, "EndOfStream"),
        (httpx2.DecodingError("gzip"), Fault.malformed, "gzip"),
        (httpx2.TooManyRedirects("round"), Fault.malformed, "round"),
        (raised(lambda: json.loads("{")), Fault.malformed, "JSONDecodeError"),
        (raised(lambda: json.loads("[" * 100_000)), Fault.malformed, "RecursionError"),
        (raised(lambda: b"\xff".decode()), Fault.malformed, "UnicodeDecodeError"),
        (raised(lambda: Integer(value="x")), Fault.malformed, "ValidationError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_each_exception_has_its_fault(error, fault, detail):
    failure = classify(error)
    assert failure.fault is fault
    assert detail in failure.detail
    assert failure.here_again
    assert failure.retry_after is None


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), KeyError("x"), OSError("disk full"), httpx2.InvalidURL("x"), RuntimeError()],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_fault_of_an_answer_is_not_classified(error):
    assert classify(error) is None


@pytest.mark.parametrize(
    ("status", "fault", "here_again"),
    [
        (302, Fault.redirected, False),
        (400, Fault.rejected, False),
        (401, Fault.rejected, False),
        (404, Fault.rejected, False),
        (408, Fault.timeout, True),
        (409, Fault.rejected, True),
        (413, Fault.rejected, False),
        (422, Fault.rejected, False),
        (425, Fault.rejected, True),
        (429, Fault.rate_limited, True),
        (500, Fault.server_error, True),
        (502, Fault.server_error, True),
        (503, Fault.server_error, True),
        (599, Fault.server_error, True),
    ],
)
def test_each_status_has_its_fault(status, fault, here_again):
    failure = classify(status_error(status, "no such\n  model"))
    assert (failure.fault, failure.here_again) == (fault, here_again)
    assert failure.detail == f"HTTP {status}: no such model"
    assert failure.retry_after is None


@pytest.mark.parametrize("status", [429, 503])
def test_a_wish_to_wait_is_kept_and_said(status):
    failure = classify(status_error(status, "busy", **{"Retry-After": "7"}))
    assert failure.retry_after == 7
    assert failure.detail == f"HTTP {status} (Retry-After: 7): busy"


def test_where_a_redirect_leads_is_said():
    failure = classify(status_error(302, "Found", Location="https://judge.example/v1"))
    assert failure.detail == "HTTP 302 (Location: https://judge.example/v1): Found"


def test_retry_after_as_a_date():
    soon = datetime.now(timezone.utc) + timedelta(seconds=90)
    assert 80 < retry_after(format_datetime(soon, usegmt=True)) <= 90
    assert 80 < retry_after(format_datetime(soon.replace(tzinfo=None))) <= 90  # "-0000"
    past = datetime(1999, 12, 31, 23, 59, 59, tzinfo=timezone.utc)
    assert retry_after(format_datetime(past, usegmt=True)) == 0


@pytest.mark.parametrize(
    "header", [None, "", "soon", "-1", "nan", "inf", "1e999", "Mon, 99 Foo 2020 00:00:00 GMT"]
)
def test_retry_after_that_makes_no_sense(header):
    assert retry_after(header) is None


@given(st.text())
def test_retry_after_is_none_or_a_duration(header):
    seconds = retry_after(header)
    assert seconds is None or 0 <= seconds < float("inf")


@given(st.text())
def test_a_servers_words_become_one_bounded_line(text):
    line = shorten(text)
    assert len(line) <= SHOWN + len(" ...")
    assert line == " ".join(line.split())
    assert escape_controls(line) == line
