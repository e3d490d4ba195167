"""HTTP connections of one client: pooled per event loop, and no body without a bound."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import cast

import httpx2
from anyio.lowlevel import RunVar

from mteditflow.rewards.faults import AnswerError, Fault

CONNECT_TIMEOUT = 10.0  # s; the deadline of the whole exchange is the dispatcher's
KEEP_ALIVE = 2.0  # s; uvicorn, so vLLM too, closes idle connections after 5
MAX_BODY = 2**24  # bytes; an answer has a few thousand


def open_client(*, max_body: int = MAX_BODY) -> httpx2.AsyncClient:
    """Make an HTTP client that any event loop may use, one after another, and nobody must close.

    Proxies that the environment names are not used.

    Args:
        max_body: most bytes of an answer; ``AnswerError`` is raised as soon as more arrive.
            Compressed bodies, whose size is not known before they are unpacked, are refused.

    Example:
        >>> import anyio
        >>> client = open_client()
        >>> async def refused() -> str:
        ...     try:
        ...         await client.get("http://127.0.0.1:9/health")
        ...     except httpx2.ConnectError:
        ...         return "no connection"
        >>> anyio.run(refused), anyio.run(refused)
        ('no connection', 'no connection')
    """
    return httpx2.AsyncClient(
        transport=_PerLoop(max_body),
        timeout=httpx2.Timeout(None, connect=CONNECT_TIMEOUT),
        headers={"Accept-Encoding": "identity"},
    )


class _PerLoop(httpx2.AsyncBaseTransport):
    """A connection pool for each event loop, closed when its loop ends."""

    def __init__(self, max_body: int) -> None:
        self._max_body = max_body
        self._pools: RunVar[tuple[httpx2.AsyncHTTPTransport, object]] = RunVar("mteditflow pools")

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await (await self._pool()).handle_async_request(request)
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise AnswerError(Fault.malformed, "expected a body that is not compressed")
        stream = cast(httpx2.AsyncByteStream, response.stream)
        response.stream = _Bounded(stream, self._max_body)
        return response

    async def _pool(self) -> httpx2.AsyncHTTPTransport:
        found = self._pools.get(None)
        if found is None:
            # An event loop, when it ends, closes the asynchronous generators begun in it.
            keeper = _keep_open()
            found = (await keeper.__anext__(), keeper)
            self._pools.set(found)
        return found[0]


async def _keep_open() -> AsyncGenerator[httpx2.AsyncHTTPTransport, None]:
    limits = httpx2.Limits(
        max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE
    )
    async with httpx2.AsyncHTTPTransport(limits=limits) as transport:
        yield transport


class _Bounded(httpx2.AsyncByteStream):
    """A stream that ends in an error once it is longer than it may be."""

    def __init__(self, stream: httpx2.AsyncByteStream, limit: int) -> None:
        self._stream, self._limit = stream, limit

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > self._limit:
                raise AnswerError(Fault.malformed, f"expected at most {self._limit} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
