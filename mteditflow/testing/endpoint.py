"""An HTTP endpoint with the failures of real ones, for tests of clients.

``ScriptedServer(answer, script)`` serves HTTP/1.1 on a free port of the loopback, on raw sockets,
in its own thread. ``answer`` maps a request's JSON to the JSON of the right response. ``script``
gives one behavior per request, in order; after its end all responses are right.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableSequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

Answer = Callable[[Any], Any]
HANG = 3.0  # seconds without an answer; a shorter timeout of the client is met
WORDS = "I cannot judge this"
HUGE = 2**24 + 1  # bytes, one more than the limit of mteditflow's own clients


@dataclass(frozen=True)
class Request:
    """A received request.

    Attributes:
        method: HTTP method, such as "POST".
        path: path and query.
        headers: header fields by lower-case name.
        body: bytes after the headers.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON; ``None`` if it is empty."""
        return json.loads(self.body) if self.body else None


@dataclass(frozen=True)
class Exchange:
    """A request and the means to respond.

    Attributes:
        request: the request.
        right: returns the right response's JSON.
        writer: the connection.
    """

    request: Request
    right: Callable[[], Any]
    writer: asyncio.StreamWriter

    async def reply(
        self, body: Any, *, status: int = 200, length: int | None = None, **headers: Any
    ) -> None:
        """Send a body.

        Args:
            body: bytes, or a value to write as JSON.
            status: HTTP status.
            length: a wrong Content-Length; the connection is closed after the body.
            **headers: header fields, with underscores for hyphens.
        """
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {
            "Content-Type": "application/json",
            "Content-Length": str(len(data) if length is None else length),
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        lines = [f"HTTP/1.1 {status} Scripted", *(f"{k}: {v}" for k, v in fields.items()), "", ""]
        self.writer.write("\r\n".join(lines).encode() + data)
        await self.writer.drain()
        if length is not None:
            self.writer.close()


Behavior = Callable[[Exchange], Awaitable[None]]


async def good(exchange: Exchange) -> None:
    """Send the right response."""
    await exchange.reply(exchange.right())


def late(seconds: float) -> Behavior:
    """Return a behavior that sends the right response after a wait in seconds."""

    async def behave(exchange: Exchange) -> None:
        await asyncio.sleep(seconds)
        await good(exchange)

    return behave


def changed(change: Callable[[Any], Any]) -> Behavior:
    """Return a behavior that applies ``change`` to the right JSON and sends it."""

    async def behave(exchange: Exchange) -> None:
        await exchange.reply(change(exchange.right()))

    return behave


def plain(body: Any, *, status: int = 200, **headers: Any) -> Behavior:
    """Return a behavior that sends a fixed body."""

    async def behave(exchange: Exchange) -> None:
        await exchange.reply(body, status=status, **headers)

    return behave


async def silent(_: Exchange) -> None:
    """Accept the request and never respond."""
    await asyncio.Event().wait()


async def drip(exchange: Exchange) -> None:
    """Send single bytes forever, with pauses too short for a read timeout."""
    await exchange.reply(b"", Content_Length="1000000")
    while True:
        exchange.writer.write(b" ")
        await exchange.writer.drain()
        await asyncio.sleep(0.02)


async def reset(exchange: Exchange) -> None:
    """Reset the connection."""
    # Linger of 0 seconds: closing sends RST instead of FIN.
    raw = exchange.writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    exchange.writer.transport.abort()


async def truncated(exchange: Exchange) -> None:
    """Close the connection in the middle of the body."""
    body = json.dumps(exchange.right()).encode()
    await exchange.reply(body[: len(body) // 2], length=len(body))


async def broken_json(exchange: Exchange) -> None:
    """Send JSON whose last two bytes are missing, with a matching Content-Length."""
    await exchange.reply(json.dumps(exchange.right()).encode()[:-2])


async def huge(exchange: Exchange) -> None:
    """Send the right JSON, then 16 MB of blanks."""
    await exchange.reply(json.dumps(exchange.right()).encode() + b" " * HUGE)


async def hanging(exchange: Exchange) -> None:
    """Close the connection after ``HANG`` seconds without a response."""
    await asyncio.sleep(HANG)
    exchange.writer.close()


async def in_words(exchange: Exchange) -> None:
    """Send the right JSON with words in place of the content, or of every number."""
    right = exchange.right()
    chat = isinstance(right, dict) and "choices" in right
    await exchange.reply(_content(right) if chat else _numbers(right))


def _content(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: WORDS if k == "content" else _content(x) for k, x in value.items()}
    return [_content(x) for x in value] if isinstance(value, list) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _numbers(x) for k, x in value.items()}
    if isinstance(value, list):
        return [_numbers(x) for x in value]
    return WORDS if isinstance(value, (int, float)) else value


def error(status: int, message: str = "scripted", **headers: str) -> Behavior:
    """Return a behavior that sends an error status with a JSON body."""
    return plain({"error": {"message": message}}, status=status, **headers)


HTML = plain(b"<html><body>It works!</body></html>", Content_Type="text/html")
EMPTY = plain(b"")
BAD_UNICODE = plain(b'{"choices": "\xff\xfe\xed\xa0\x80"}')
JSON_LIST = plain([1, 2, 3])
NO_CHOICES = plain({"id": "scripted", "choices": None})
ERROR_IN_200 = plain({"error": {"message": "out of memory", "code": 500}})

#: Failures of JSON over HTTP by name; each loses a response, one of them after ``HANG`` seconds.
FAULTS: Mapping[str, Behavior] = {
    "connection reset": reset,
    "body truncated": truncated,
    "JSON truncated": broken_json,
    "empty body": EMPTY,
    "HTML with status 200": HTML,
    "bytes that are not UTF-8": BAD_UNICODE,
    "a list in place of an object": JSON_LIST,
    "an error object with status 200": ERROR_IN_200,
    "no choices": NO_CHOICES,
    "status 400": error(400),
    "status 401": error(401),
    "status 404": error(404),
    "status 429": error(429, Retry_After="0"),
    "status 500": error(500),
    "status 503": error(503),
    "an answer in words": in_words,
    "no answer in time": hanging,
}


def completion(text: str | None, *, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    """Return a chat completion in the format of OpenAI-compatible servers."""
    return {
        "id": "scripted",
        "object": "chat.completion",
        "created": 0,
        "model": "scripted",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, **message},
                "finish_reason": finish_reason,
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


def closed_port() -> int:
    """Return a port of the loopback on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class ScriptedServer:
    """HTTP server that runs inside its ``with`` block.

    Attributes:
        answer: function from a request's JSON to the JSON of the right response.
        script: behaviors, one per request; ``itertools.repeat(behavior)`` applies one to all.
        models: JSON of ``GET /v1/models``, which uses no behavior of the script and is not recorded
            in ``requests``; ``None``: status 404.
        port: port; 0: any free one, set when the block begins.
        requests: received requests, in order.
        connections: number of opened connections.
        most_at_once: largest number of requests in progress at the same time.
    """

    answer: Answer
    script: Iterable[Behavior] = ()
    models: Any = None
    port: int = 0
    requests: MutableSequence[Request] = field(default_factory=list)
    connections: int = 0
    most_at_once: int = 0

    @property
    def url(self) -> str:
        """Base URL, with /v1."""
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ScriptedServer:
        self._behaviors = iter(self.script)
        self._at_once, self._tasks = 0, set[asyncio.Task[None]]()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _start(self) -> None:
        self._server = await asyncio.start_server(
            self._connection,
            "127.0.0.1",
            self.port,
            backlog=1024,  # clients may open hundreds of connections at once
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while not writer.is_closing():  # keep-alive: several requests per connection
                    await self._serve(await _request(reader), writer)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, request: Request, writer: asyncio.StreamWriter) -> None:
        if request.method == "GET" and request.path in ("/v1/models", "/version"):
            known = self.models if request.path == "/v1/models" else None
            status = 404 if known is None else 200
            await Exchange(request, lambda: known, writer).reply(known, status=status)
            return
        self.requests.append(request)
        behave = next(self._behaviors, good)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await behave(Exchange(request, lambda: self.answer(request.json), writer))
        finally:
            self._at_once -= 1


async def _request(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {
        name.strip().lower(): value.strip() for name, value in (x.split(":", 1) for x in lines)
    }
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(method, path, headers, body)
