"""What anybody who can connect may not do to the consistency server."""

import asyncio
import base64
import io
import logging
import resource
import socket
import time
from contextlib import suppress

import httpx2
import pytest
from consistency_world import ServerProcess, color_scorer, color_server, pair, picture, request_of
from fastapi.testclient import TestClient
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol

from mteditflow.rewards.consistency.wire import MAX_IMAGES
from mteditflow.rewards.server import Limits, create_app
from mteditflow.rewards.server.guarding import (
    RESERVE,
    LoopbackHosts,
    RateLimit,
    bounded,
    most_connections,
)

HALF = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
OPEN_FILES = 1024


class Answering(asyncio.Protocol):
    """Answers "whole\n" with "yes", and begins a request with "body"; the parts of uvicorn's."""

    def __init__(self):
        self.cycle, self.loop = None, asyncio.get_running_loop()

    def connection_made(self, transport):
        self.transport = transport

    def connection_lost(self, exc):
        pass

    def data_received(self, data):
        class Cycle:
            response_complete = False
            more_body = data == b"body"

        if data != b"half":
            self.cycle = Cycle
        if data == b"whole":
            self.transport.write(b"yes")
            self.loop.call_soon(setattr, Cycle, "response_complete", True)


async def connections(most, timeout, script):
    """Run a script with a function that opens a connection to a bounded server."""
    kind = bounded(Answering, most, timeout)
    server = await asyncio.get_running_loop().create_server(kind, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()

    opened = []

    async def connect(said=b""):
        reader, writer = await asyncio.open_connection(host, port)
        opened.append(writer)
        writer.write(said)
        await asyncio.sleep(0.02)
        return reader, writer

    try:
        await script(connect)
    finally:
        for writer in opened:
            writer.close()
            with suppress(ConnectionResetError):
                await writer.wait_closed()
        await asyncio.sleep(0.05)  # until the other ends have seen it
        server.close()


async def is_closed(connection):
    try:
        return await asyncio.wait_for(connection[0].read(1), 0.05) == b""
    except ConnectionResetError:
        return True
    except asyncio.TimeoutError:
        return False


def test_half_a_header_is_not_waited_for_longer_than_its_time():
    async def script(connect):
        half, silent, working = await connect(b"half"), await connect(), await connect(b"work")
        assert not await is_closed(half)
        await asyncio.sleep(0.5)
        assert await is_closed(half)
        assert await is_closed(silent)
        assert not await is_closed(working)

    asyncio.run(connections(10, 0.4, script))


def test_a_header_after_an_answer_has_the_same_time():
    async def script(connect):
        reader, writer = await connect(b"whole")
        assert await reader.read(3) == b"yes"
        await asyncio.sleep(0.5)
        assert not await is_closed((reader, writer))  # idle: uvicorn's own time-out
        writer.write(b"half")
        await asyncio.sleep(0.6)
        assert await is_closed((reader, writer))

    asyncio.run(connections(10, 0.4, script))


def test_the_oldest_that_waits_for_its_client_makes_room():
    async def script(connect):
        working, body, half = [await connect(x) for x in (b"work", b"body", b"half")]
        idle = await connect(b"whole")
        newest = await connect(b"whole")
        assert await newest[0].read(3) == b"yes"
        assert [await is_closed(x) for x in (working, body)] == [False, True]
        await connect(b"half")
        assert [await is_closed(x) for x in (working, half)] == [False, True]
        await connect(b"work")
        assert await idle[0].read(3) == b"yes"
        assert await is_closed(idle)
        assert not await is_closed(working)

    asyncio.run(connections(4, 60.0, script))


def test_where_all_are_at_work_the_new_one_goes():
    async def script(connect):
        working = [await connect(b"work") for _ in range(2)]
        assert await is_closed(await connect())
        assert [await is_closed(x) for x in working] == [False, False]

    asyncio.run(connections(2, 60.0, script))


def test_the_class_of_the_server_has_what_is_read_of_it():
    assert issubclass(bounded(H11Protocol, 1), H11Protocol)


@pytest.mark.parametrize(
    ("allowed", "most"),
    [(1024, 1024 - RESERVE), (10**6, 4096), (resource.RLIM_INFINITY, 4096)],
)
def test_connections_leave_files_for_all_else(monkeypatch, allowed, most):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (allowed, allowed))
    assert most_connections() == most


def test_a_limit_of_files_that_leaves_none_is_refused(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (RESERVE, RESERVE))
    with pytest.raises(ValueError, match=f"expected a limit above {RESERVE}, got {RESERVE}; raise"):
        most_connections()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8200", 200),
        ("127.0.0.1:8200", 200),
        ("[::1]:8200", 200),
        ("127.9.9.9", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost@evil.example", 421),
        ("192.168.0.1", 421),
        ("[::1", 421),
        ("", 421),
    ],
)
def test_requests_under_another_name_are_refused(host, status):
    with TestClient(LoopbackHosts(create_app(color_scorer()))) as client:
        answer = client.get("/health", headers={"Host": host})
    assert answer.status_code == status
    if status == 421:
        assert list(answer.json()) == ["detail"]


def test_lines_of_one_place_are_limited_and_counted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    said, log = [], logging.Logger("test")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log.addHandler(handler)
    log.addFilter(RateLimit(lines=3, span=60.0))

    def warn(n):
        log.warning("bad request %d", n)

    for n in range(10):
        warn(n)
        log.warning("another place %d", n)
    assert [x for x in said if x.startswith("bad")] == [
        "bad request 0",
        "bad request 1",
        "bad request 2 (more like it are not logged for 60 s)",
    ]
    assert sum(x.startswith("another") for x in said) == 3
    now[0] = 59.0
    warn(10)
    now[0] = 60.0
    warn(11)
    warn(12)
    assert [x for x in said if x.startswith("bad")][3:] == [
        "bad request 11 (8 more like it were not logged)",
        "bad request 12",
    ]


def test_all_images_of_a_request_are_bounded_by_pixels_together():
    file = io.BytesIO()
    Image.new("1", (1000, 1000)).save(file, "PNG")
    body = request_of([picture(0)], [pair(0, 0)])
    million = base64.b64encode(file.getvalue()).decode()
    limits = Limits(max_pixels=1_500_000, max_total_pixels=2_500_000)
    with TestClient(create_app(color_scorer(), limits=limits)) as client:
        for count, status in ((2, 200), (3, 413)):
            answer = client.post("/v1/consistency", json=body | {"images": [million] * count})
            assert answer.status_code == status
        assert answer.json()["detail"] == (
            "images[2]: expected at most 500000 pixels, got 1000 x 1000 left of 2500000"
        )


def test_as_many_images_of_a_megapixel_as_a_chain_may_have_are_taken():
    assert Limits().max_total_pixels == MAX_IMAGES * 1024 * 1024


@pytest.mark.long
def test_1500_half_requests_do_not_stop_a_server_of_1024_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip(f"needs 2000 open files, the limit is {hard}")
    arguments = color_server()
    arguments[-1] = (
        f"import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({OPEN_FILES},) * 2)\n"
        + arguments[-1]
    )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    flood = []
    try:
        with ServerProcess(arguments) as server:
            slowest = 0.0
            for n in range(1500):
                one = socket.create_connection(("127.0.0.1", server.port), timeout=30)
                one.send(HALF)
                flood.append(one)
                if n % 100 == 99:
                    begun = time.monotonic()
                    answer = httpx2.get(f"{server.url.removesuffix('/v1')}/health", timeout=30)
                    slowest = max(slowest, time.monotonic() - begun)
                    assert answer.status_code == 200
            assert slowest < 10
            body = request_of([picture(0), picture(1)], [pair()])
            answer = httpx2.post(f"{server.url}/consistency", json=body, timeout=30)
            assert answer.status_code == 200
            server.terminate()
            assert server.exit_status() == 0
        assert sum(map(len, server.log)) < 20_000
    finally:
        for one in flood:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
