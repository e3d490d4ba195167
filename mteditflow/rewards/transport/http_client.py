"""HTTP client with pooled connections and bounded bodies, and the mapping of exceptions to faults.

Exceptions of ``httpx2`` are faults of an answer; any other exception is a bug of the caller.
"""

from __future__ import annotations

import json
import math
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import cache
from typing import cast

import anyio
import httpx2
import pydantic
from anyio.lowlevel import RunVar

from mteditflow._text import escape_controls
from mteditflow.rewards.faults import AnswerError, Fault

CONNECT_TIMEOUT = 10.0  # s; the deadline of the whole exchange is the dispatcher's
KEEP_ALIVE = 2.0  # s; below the 5 s after which uvicorn, and so vLLM, closes idle connections
MAX_BODY = 2**24  # bytes; an answer has a few thousand
SHOWN = 300  # characters of a server's message in an error's detail
CUT = " ..."  # end of a truncated message
MALFORMED = (
    pydantic.ValidationError,
    json.JSONDecodeError,
    UnicodeDecodeError,
    RecursionError,  # deeply nested JSON
    httpx2.DecodingError,
    httpx2.TooManyRedirects,
)
BROKEN = (httpx2.TransportError, ssl.SSLError, anyio.EndOfStream)
# Retryable statuses; any other 4xx is permanent at this endpoint.
STATUSES = {408: Fault.timeout, 409: Fault.rejected, 425: Fault.rejected, 429: Fault.rate_limited}


def open_client(*, max_body: int = MAX_BODY) -> httpx2.AsyncClient:
    """Return an HTTP client that several event loops may use and that need not be closed.

    Proxies of the environment are not used. Certificates, or those of ``SSL_CERT_FILE`` and
    ``SSL_CERT_DIR``, are read once per process, by the first client that connects.

    Args:
        max_body: maximum bytes of an answer; ``AnswerError`` is raised as soon as more arrive.
            Compressed bodies are refused, since their size is known only after decompression.

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
        pool = self._pools.get(None)
        if pool is None:
            # asyncio.run closes the asynchronous generators of its loop at the end, and this one
            # closes the pool. A reference is kept, since garbage collection would close it early.
            keeper = _keep_open()
            pool = (await keeper.__anext__(), keeper)
            self._pools.set(pool)
        return pool[0]


async def _keep_open() -> AsyncGenerator[httpx2.AsyncHTTPTransport, None]:
    limits = httpx2.Limits(
        max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE
    )
    async with httpx2.AsyncHTTPTransport(verify=_tls(), limits=limits) as transport:
        yield transport


@cache
def _tls() -> ssl.SSLContext:
    """Read the certificates once per process, since it takes longer than a quick answer."""
    return httpx2.create_ssl_context()


class _Bounded(httpx2.AsyncByteStream):
    """Stream that raises ``AnswerError`` when it exceeds its limit, in bytes."""

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


class AttemptError(AnswerError):
    """Failure of one attempt, with whether and when it may be retried.

    Args:
        fault: kind of failure.
        detail: expected and received answer.
        retry_after: wait that the server demands, s; ``None`` if it demands none.
        here_again: whether the same request may be retried at the same endpoint.
    """

    def __init__(
        self,
        fault: Fault,
        detail: str,
        *,
        retry_after: float | None = None,
        here_again: bool = True,
    ) -> None:
        super().__init__(fault, detail)
        self.retry_after, self.here_again = retry_after, here_again


def classify(error: Exception) -> AttemptError | None:
    """Map an exception to a fault.

    Args:
        error: exception of one HTTP exchange or of the parser of its answer.

    Returns:
        The failure, or ``None`` for an exception that is not a fault of an answer.

    Example:
        >>> request = httpx2.Request("POST", "http://127.0.0.1/v1")
        >>> response = httpx2.Response(429, headers={"Retry-After": "7"}, request=request)
        >>> failure = classify(httpx2.HTTPStatusError("", request=request, response=response))
        >>> failure.fault, failure.retry_after
        (<Fault.rate_limited: 'too many requests (429)'>, 7.0)
    """
    if isinstance(error, AttemptError):
        return error
    if isinstance(error, AnswerError):
        return AttemptError(error.fault, error.detail)
    if isinstance(error, httpx2.HTTPStatusError):
        return _status_failure(error.response)
    if isinstance(error, (TimeoutError, httpx2.TimeoutException)):
        return AttemptError(Fault.timeout, _message(error))
    if isinstance(error, MALFORMED):
        return AttemptError(Fault.malformed, _message(error))
    if isinstance(error, BROKEN):
        return AttemptError(Fault.connection, _message(error))
    return None


def shorten(text: str) -> str:
    """Return a server's message as one line of bounded length, with control characters escaped."""
    line = escape_controls(" ".join(text[: 2 * SHOWN].split()))
    return line if len(line) <= SHOWN else line[:SHOWN] + CUT


def retry_after(header: str | None) -> float | None:
    """Parse a Retry-After header, seconds or an HTTP date, as seconds from now.

    Returns:
        Seconds, >= 0; ``None`` if the header is missing or malformed.

    Source: RFC 9110, section 10.2.3.

    Example:
        >>> retry_after("2.5"), retry_after("Thu, 01 Jan 1970 00:00:00 GMT"), retry_after("soon")
        (2.5, 0.0, None)
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except (ValueError, OverflowError):
            return None
        zone = date.tzinfo or timezone.utc
        return max(0.0, (date.replace(tzinfo=zone) - datetime.now(timezone.utc)).total_seconds())
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _status_failure(response: httpx2.Response) -> AttemptError:
    status = response.status_code
    said = [
        f"{name}: {shorten(response.headers[name])}"
        for name in ("Retry-After", "Location")
        if name in response.headers
    ]
    told = f" ({', '.join(said)})" if said else ""
    return AttemptError(
        _fault(status),
        f"HTTP {status}{told}: {shorten(response.text)}",
        retry_after=retry_after(response.headers.get("retry-after")),
        here_again=status >= 500 or status in STATUSES,
    )


def _fault(status: int) -> Fault:
    """Return the fault of a status; redirects are not followed, since they could drop the body."""
    if status >= 500:
        return Fault.server_error
    return Fault.redirected if status < 400 else STATUSES.get(status, Fault.rejected)


def _message(error: BaseException) -> str:
    return shorten(f"{type(error).__name__}: {error}").rstrip(":")
