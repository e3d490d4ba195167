"""Request bodies: bounded reading, and decoding to images and pairs in threads."""

from __future__ import annotations

import base64
from collections.abc import Callable

import anyio
import anyio.to_thread
from fastapi import HTTPException, Request
from PIL import Image
from pydantic import ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mteditflow.rewards.consistency.pairs import Pair
from mteditflow.rewards.consistency.wire import ConsistencyRequest, Limits, to_send
from mteditflow.rewards.images import decode_image
from mteditflow.rewards.server.files import TooManyPixels, check_file

DISCARDED = 2**27  # maximum bytes that are read and dropped after an early answer
DISCARDING = 10.0  # s, longest time for that
THREADS = 2  # bodies that are decoded at once
SHOWN = 5  # errors of one body that a message lists


async def read_body(request: Request, *, limit: int, timeout: float) -> bytes:
    """Read a body of at most ``limit`` bytes within ``timeout`` seconds.

    Raises:
        HTTPException: 413 if the body is larger, 408 if it takes longer.
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
    """ASGI middleware that delays an early answer until the request has been received.

    A server that answers and closes while the client still sends resets the connection, and the
    client may never receive the reason of the refusal. The rest of the body is discarded, within
    limits.

    Args:
        app: application that answers.
        closing: function that returns whether the server shuts down and must not wait.
    """

    def __init__(self, app: ASGIApp, closing: Callable[[], bool]) -> None:
        self._app, self._closing = app, closing

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
                    while not (ended or self._closing()) and size < DISCARDED:
                        size += len((await receive_and_watch()).get("body", b""))
            await send(message)

        await self._app(scope, receive_and_watch, read_and_send)


class Reader:
    """Decoder of bodies in worker threads, two at a time.

    Args:
        limits: limits of the images.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._threads = anyio.CapacityLimiter(THREADS)

    def check_type(self, request: Request) -> None:
        """Raise ``HTTPException``, 415, unless the body is plain JSON."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        encoding = request.headers.get("content-encoding", "identity").lower()
        if media_type != "application/json" or encoding != "identity":
            raise HTTPException(415, "expected application/json that is not compressed")

    async def read(self, body: bytes) -> tuple[list[Image.Image], list[Pair]]:
        """Decode a body.

        Raises:
            HTTPException: 422 if the body is not a request or an image is refused; 413 if an image
                or all images together are too large. The message has place and reason, and nothing
                of the body.
        """
        return await anyio.to_thread.run_sync(self._read, body, limiter=self._threads)

    def _read(self, body: bytes) -> tuple[list[Image.Image], list[Pair]]:
        try:
            request = ConsistencyRequest.model_validate_json(body)
        except ValidationError as error:
            raise HTTPException(422, _explain(error)) from error
        left, images = self._limits.max_total_pixels, []
        for i, text in enumerate(request.images):
            image, pixels = self._image(f"images[{i}]", text, left)
            images.append(image)
            left -= pixels
        return images, list(request.pairs)

    def _image(self, name: str, text: str, left: int) -> tuple[Image.Image, int]:
        """Return an image of at most ``left`` pixels, and its number of pixels as sent."""
        limits = self._limits
        try:
            data = _base64(text)
            # Before Pillow: sizes by the header, and only formats that are lossless and whole.
            check_file(data, max_pixels=min(limits.max_pixels, left))
            image = decode_image(data, max_pixels=limits.max_pixels)
            return to_send(name, image), image.width * image.height
        except TooManyPixels as error:
            total = "" if left >= limits.max_pixels else f" left of {limits.max_total_pixels}"
            raise HTTPException(413, f"{name}: {error}{total}") from error
        except ValueError as error:
            raise HTTPException(422, f"{name}: {error}") from error


def _base64(text: str) -> bytes:
    if text.startswith("data:"):
        raise ValueError("expected base64 alone, got a data URL")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"expected base64, got something else: {error}") from error


def _explain(error: ValidationError) -> str:
    """List the errors of a body, without its content."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    shown = [
        f"{_place(e['type'], e['loc'])}: {e['msg'].removeprefix('Value error, ')}"
        for e in errors[:SHOWN]
    ]
    more = [f"and {len(errors) - SHOWN} more"] if len(errors) > SHOWN else []
    return "; ".join(shown + more)


def _place(kind: str, location: tuple[int | str, ...]) -> str:
    # The name of an unknown key is the sender's text, which a message must not repeat.
    known = location[:-1] if kind == "extra_forbidden" else location
    return ".".join(map(str, known)) or "body"
