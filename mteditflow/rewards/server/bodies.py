"""Bodies of requests: read within bounds, and read to their end before an early answer is sent."""

from __future__ import annotations

import anyio
from fastapi import HTTPException, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

DISCARDED = 2**27  # most bytes read after an answer is known
DISCARDING = 10.0  # longest that this may take, s


async def read_body(request: Request, *, limit: int, timeout: float) -> bytes:
    """Read a body of at most ``limit`` bytes within ``timeout`` seconds, whatever it announces.

    Raises:
        HTTPException: 413 or 408.
    """
    too_large = HTTPException(413, f"body: expected at most {limit} bytes, got more")
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    body = bytearray()
    with anyio.move_on_after(timeout):
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
        return bytes(body)
    raise HTTPException(408, f"body: expected all of it within {timeout:g} s")


class ReadToEnd:
    """ASGI middleware: an answer before the request's end waits for that end.

    A server that answers and closes while the client still sends resets the connection, and the
    client may never see why it was refused. What is read here is thrown away, and bounded.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        ended = scope["type"] != "http"

        async def receive_and_watch() -> Message:
            nonlocal ended
            message = await receive()
            ended = ended or not message.get("more_body", False)
            return message

        async def read_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                size = 0
                with anyio.move_on_after(DISCARDING):
                    while not ended and size < DISCARDED:
                        size += len((await receive_and_watch()).get("body", b""))
            await send(message)

        await self._app(scope, receive_and_watch, read_and_send)
