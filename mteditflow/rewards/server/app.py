"""ASGI application of the server: routes, authorization, OpenAPI documentation."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import ClientDisconnect

from mteditflow.rewards.consistency.scorer import ConsistencyScorer
from mteditflow.rewards.consistency.wire import (
    ConsistencyAnswer,
    ConsistencyRequest,
    ErrorAnswer,
    Health,
    Info,
    Limits,
)
from mteditflow.rewards.server.bodies import Reader, ReadToEnd, read_body
from mteditflow.rewards.server.service import Service

R = TypeVar("R")

SCHEMAS = "#/components/schemas/"
CLIENT_GONE = 499  # status in the log only, by nginx's convention: the client has disconnected
ERRORS = {
    401: "No token, or a wrong one.",
    408: "The body took too long to arrive.",
    413: "The body, an image or all images together are larger than this server takes.",
    415: "The body is not JSON.",
    422: "Not a valid request, an image not PNG or lossless WebP, or a name the models refuse.",
    500: "The models failed on this chain.",
    503: "Loading, stopping or busy; Retry-After gives the wait in seconds.",
}
DEFAULT_LIMITS = Limits()
BEARER = HTTPBearer(auto_error=False)


def create_app(
    scorer: ConsistencyScorer | Callable[[], ConsistencyScorer],
    *,
    limits: Limits = DEFAULT_LIMITS,
    token: str | None = None,
) -> FastAPI:
    """Create the ASGI application that serves content consistency.

    Args:
        scorer: the scorer, or a function that loads it while the application already answers 503.
        limits: limits of requests and batches.
        token: bearer token that requests must carry, except those for health and documentation;
            ``None`` admits all requests.

    Returns:
        The application. ``state.service`` is the ``Service`` behind its routes, and
        ``state.secured`` is True if a token is required.

    Raises:
        ValueError: the token is not printable ASCII without spaces.

    Example:
        >>> from fastapi.testclient import TestClient
        >>> scorer = ConsistencyScorer(lambda images, names: [])
        >>> with TestClient(create_app(scorer)) as client:
        ...     client.post("/v1/consistency", json={"images": [], "pairs": []}).status_code
        422
    """
    service = Service(scorer, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = _Documented(
        title="mteditflow content consistency",
        summary="Similarity of the parts of edited images that no instruction touched.",
        version=version("mteditflow"),
        lifespan=lifespan,
    )
    app.state.service, app.state.secured = service, token is not None
    app.add_middleware(ReadToEnd, closing=lambda: service.closing)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.include_router(_health(service))
    app.include_router(_scoring(service, limits), prefix="/v1", dependencies=_guards(token))
    return app


class _Documented(FastAPI):
    """FastAPI with the schema of the request, whose body the route reads itself for its limits."""

    def openapi(self) -> dict[str, Any]:
        schema = super().openapi()
        request = ConsistencyRequest.model_json_schema(ref_template=f"{SCHEMAS}{{model}}")
        definitions = request.pop("$defs", {})
        schema["components"]["schemas"] |= {**definitions, ConsistencyRequest.__name__: request}
        return schema


def _health(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health", responses={503: {"description": "Not ready.", "model": Health}})
    async def health(response: Response) -> Health:
        """Return whether chains can be scored now: 200 if so, otherwise 503."""
        response.status_code = 200 if service.state == "ready" else 503
        return Health(status=service.state)

    return router


def _scoring(service: Service, limits: Limits) -> APIRouter:
    router = APIRouter()
    reader = Reader(limits)

    @router.get("/info", responses=_errors(401, 503))
    async def info() -> Info:
        """Return models, settings, versions and limits of the server."""
        return service.info

    @router.post(
        "/consistency", responses=_errors(*ERRORS), openapi_extra={"requestBody": _body_schema()}
    )
    async def consistency(request: Request) -> ConsistencyAnswer:
        """Score pairs of images of one chain.

        Each pair has the indices of two images and the names of the objects that must look the same
        in both. The answer has one entry per pair, in order; a term that was not requested or could
        not be measured is null. Images are compared at 512 x 512; transparency is dropped, not
        blended.
        """
        with service.admit():
            reader.check_type(request)
            body = await read_body(request, limit=limits.max_body, timeout=limits.read_timeout)
            images, pairs = await reader.read(body)
            del body  # up to max_body bytes that are not needed while the chain waits
            scores = await _unless_gone(request, service.score(images, pairs))
            return ConsistencyAnswer(pairs=tuple(scores), scorer=service.info.scorer)

    return router


def _body_schema() -> dict[str, Any]:
    schema = {"$ref": f"{SCHEMAS}{ConsistencyRequest.__name__}"}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"description": ERRORS[code], "model": ErrorAnswer} for code in statuses}


def _guards(token: str | None) -> list[Any]:
    """Return the dependencies that refuse requests without the token."""
    if token is None:
        return []
    if not (token.isascii() and token.isprintable() and token) or " " in token:
        raise ValueError("token: expected printable ASCII without spaces, got something else")
    expected = token.encode()

    def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
        came = given.credentials.encode() if given else b""
        # In constant time, so that the time of an answer reveals no prefix of the token.
        if not secrets.compare_digest(came, expected):
            challenge = {"WWW-Authenticate": "Bearer"}
            raise HTTPException(401, "expected this server's bearer token", challenge)

    return [Depends(check)]


async def _unless_gone(request: Request, work: Coroutine[Any, Any, R]) -> R:
    """Wait for the work; cancel it as soon as the client disconnects."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answer_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)
