"""One HTTP client for every event loop, which bounds what it reads."""

import gzip
import threading
from itertools import repeat

import anyio
import pytest

from mteditflow.rewards import AnswerError, Fault
from mteditflow.rewards.transport.connections import open_client
from tests.rewards.scripted_server import ScriptedServer, plain


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
