"""Protection of the application: limits of connections, headers, host names and lines of the log.

Without them, any client that can connect could stop the server: by headers that never end, by a web
page that reaches the loopback under its own name (DNS rebinding), or by a disk full of warnings.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import math
import resource
import time
from collections import Counter
from typing import Any, cast
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

BACKLOG = 128  # connections that the system queues, all of which may be accepted at once
RESERVE = 2 * BACKLOG + 128  # open files for models, logs and connections just being accepted
MOST = 4096  # maximum number of connections, even if the system allows more
HEADER_TIMEOUT = 20.0  # s for the whole header of a request
LINES, SPAN = 20, 60.0  # maximum lines of one kind in the log, and the seconds that they cover


def most_connections() -> int:
    """Return the maximum number of open connections under this process's limit of open files.

    Raises:
        ValueError: the limit leaves no connection.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return MOST
    if allowed <= RESERVE:
        raise ValueError(
            f"open files: expected a limit above {RESERVE}, got {allowed}; raise it by ulimit -n"
        )
    return min(MOST, allowed - RESERVE)


def bounded(kind: type[Any], most: int, timeout: float = HEADER_TIMEOUT) -> type[Any]:
    """Return a connection class with a limit of instances and a deadline for headers.

    At the limit, the oldest connection that waits for its client is closed and the new one is
    served. A flood of incomplete requests thus closes itself, while a complete request is answered.

    Args:
        kind: class of uvicorn's HTTP protocol.
        most: maximum number of connections at once.
        timeout: time for a header, from its first byte or from the connection on, s.
    """
    alive: dict[Any, None] = {}  # an ordered set, the oldest first

    class Bounded(kind):  # type: ignore[misc]
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            alive[self] = None
            self._wait_for_header()
            if len(alive) > most:  # at least the new connection itself waits for its client
                next(x for x in alive if _waits_for_client(x))._close()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if not _is_idle(self):
                self._header_is_here()
            elif self._deadline is None:
                self._wait_for_header()

        def connection_lost(self, exc: Exception | None) -> None:
            alive.pop(self, None)
            self._header_is_here()
            super().connection_lost(exc)

        def _wait_for_header(self) -> None:
            self._deadline = self.loop.call_later(timeout, self._close)

        def _header_is_here(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _close(self) -> None:
            alive.pop(self, None)
            self._header_is_here()
            self.transport.abort()

    return cast("type[Any]", Bounded)


def _is_idle(connection: Any) -> bool:
    """Whether no request of a connection is in progress."""
    return connection.cycle is None or connection.cycle.response_complete


def _waits_for_client(connection: Any) -> bool:
    return _is_idle(connection) or connection.cycle.more_body


class LoopbackHosts:
    """ASGI middleware that answers only requests whose Host header is a name of the loopback.

    By DNS rebinding, a web page can make a browser on this machine send requests to the loopback
    under a name of the page's site. That name is in the header Host.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it with 421."""
        if scope["type"] != "http" or _is_here(dict(scope["headers"]).get(b"host", b"")):
            await self._app(scope, receive, send)
            return
        detail = "Host: expected localhost or a loopback address, got another name"
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 421, "headers": headers})
        body = json.dumps({"detail": detail}).encode()
        await send({"type": "http.response.body", "body": body})


def _is_here(host: bytes) -> bool:
    try:
        name = urlsplit(f"//{host.decode('ascii')}").hostname or ""
        return is_loopback(name)
    except ValueError:
        return False


def is_loopback(name: str) -> bool:
    """Return whether a name or an address is that of the loopback.

    Example:
        >>> [is_loopback(name) for name in ("localhost", "127.0.0.9", "::1", "10.0.0.1", "a.com")]
        [True, True, True, False, False]
    """
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


class RateLimit(logging.Filter):
    """Logging filter that limits lines of one kind per time and logs the number it dropped.

    Lines of one kind come from the same line of code.

    Args:
        lines: maximum number of lines of one kind in a span.
        span: length of a span, s.
    """

    def __init__(self, lines: int = LINES, span: float = SPAN) -> None:
        super().__init__()
        self._lines, self._span = lines, span
        self._since: dict[tuple[str, int], float] = {}
        self._count: Counter[tuple[str, int]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is logged."""
        place, now = (record.pathname, record.lineno), time.monotonic()
        if now - self._since.get(place, -math.inf) >= self._span:
            left_out = self._count.pop(place, 0) - self._lines
            self._since[place] = now
            if left_out > 0:
                record.msg = f"{record.msg} ({left_out} more like it were not logged)"
        self._count[place] += 1
        if self._count[place] == self._lines:
            record.msg = f"{record.msg} (more like it are not logged for {self._span:g} s)"
        return self._count[place] <= self._lines
