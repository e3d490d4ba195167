"""A server on raw sockets that plays a script: good answers, and every way to go wrong.

`ScriptedServer(answer, script)` serves HTTP/1.1 on a free port of the loopback, from a thread of
its own. `answer` maps a request's JSON to the JSON of the right answer; `script` gives one
behaviour per request, in the order in which they come, and after its end all are good. Behaviours
are coroutine functions of an `Exchange`; what they do on the wire is theirs alone.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, MutableSequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from anyio.from_thread import start_blocking_portal

Answer = Callable[[Any], Any]
HUGE = 2**24 + 1  # bytes


@dataclass(frozen=True)
class Request:
    """What a client sent."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body) if self.body else None


@dataclass(frozen=True)
class Exchange:
    """One request and the means to answer it."""

    request: Request
    right: Callable[[], Any]
    writer: asyncio.StreamWriter

    async def reply(
        self, body: Any, *, status: int = 200, length: int | None = None, **headers: str
    ) -> None:
        """Send a body (bytes, or a value to write as JSON); `length` may lie about its size."""
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


Behaviour = Callable[[Exchange], Awaitable[None]]


async def good(exchange: Exchange) -> None:
    await exchange.reply(exchange.right())


def late(seconds: float) -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        await asyncio.sleep(seconds)
        await good(exchange)

    return behave


def changed(change: Callable[[Any], Any]) -> Behaviour:
    """The right answer, changed: what `change` makes of its JSON."""

    async def behave(exchange: Exchange) -> None:
        await exchange.reply(change(exchange.right()))

    return behave


def plain(body: Any, *, status: int = 200, **headers: str) -> Behaviour:
    """A fixed answer."""

    async def behave(exchange: Exchange) -> None:
        await exchange.reply(body, status=status, **headers)

    return behave


async def silent(exchange: Exchange) -> None:
    await asyncio.Event().wait()


async def drip(exchange: Exchange) -> None:
    """A byte of the right answer now and then: no pause is long, and it takes for ever."""
    await exchange.reply(b"", Content_Length="1000000")
    while True:
        exchange.writer.write(b" ")
        await exchange.writer.drain()
        await asyncio.sleep(0.02)


async def reset(exchange: Exchange) -> None:
    raw = exchange.writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    exchange.writer.transport.abort()


async def truncated(exchange: Exchange) -> None:
    body = json.dumps(exchange.right()).encode()
    await exchange.reply(body[: len(body) // 2], length=len(body))


async def broken_json(exchange: Exchange) -> None:
    await exchange.reply(json.dumps(exchange.right()).encode()[:-2])


async def huge(exchange: Exchange) -> None:
    await exchange.reply(json.dumps(exchange.right()).encode() + b" " * HUGE)


def error(status: int, message: str = "scripted", **headers: str) -> Behaviour:
    return plain({"error": {"message": message}}, status=status, **headers)


HTML = plain(b"<html><body>It works!</body></html>", Content_Type="text/html")
EMPTY = plain(b"")
BAD_UNICODE = plain(b'{"choices": "\xff\xfe\xed\xa0\x80"}')
JSON_LIST = plain([1, 2, 3])
NO_CHOICES = plain({"id": "scripted", "choices": None})
ERROR_IN_200 = plain({"error": {"message": "out of memory", "code": 500}})


def completion(text: str | None, *, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion as OpenAI-compatible servers send it."""
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
    """A port of the loopback on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class ScriptedServer:
    """Serves while its `with` block lasts.

    Attributes:
        answer: request JSON to the JSON of the right answer.
        script: behaviours, one per request; use `itertools.repeat` for one that lasts.
        port: 0 for any that is free.
        requests: what came, in order.
        connections: how many were opened.
        most_at_once: most requests that were being answered at one moment.
    """

    answer: Answer
    script: Iterable[Behaviour] = ()
    port: int = 0
    requests: MutableSequence[Request] = field(default_factory=list)
    connections: int = 0
    most_at_once: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ScriptedServer:
        self._behaviours = iter(self.script)
        self._at_once, self._tasks = 0, set[asyncio.Task[None]]()
        self._stack = ExitStack()
        self._portal = self._stack.enter_context(start_blocking_portal())
        self._portal.call(self._start)
        self._stack.callback(self._portal.call, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    async def _start(self) -> None:
        self._server = await asyncio.start_server(
            self._connection, "127.0.0.1", self.port, backlog=1024
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
                while not writer.is_closing():
                    await self._serve(await _read(reader), writer)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, request: Request, writer: asyncio.StreamWriter) -> None:
        self.requests.append(request)
        behave = next(self._behaviours, good)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await behave(Exchange(request, lambda: self.answer(request.json), writer))
        finally:
            self._at_once -= 1


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {
        name.strip().lower(): value.strip() for name, value in (x.split(":", 1) for x in lines)
    }
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(method, path, headers, body)
