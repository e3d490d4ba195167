"""Identity of servers: the models that they report, requested once for the record of a report."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import anyio
import httpx2

from mteditflow._text import parse_json
from mteditflow.rewards.transport.concurrency import gather
from mteditflow.rewards.transport.http_client import classify, open_client, shorten

PATIENCE = 10.0  # s, deadline of one request to a server
STATED = ("root", "owned_by", "max_model_len")  # fields of a model; "created" changes at a restart


async def judge_identity(
    endpoints: Sequence[str], model: str, *, api_key: str | None = None
) -> str | None:
    """Return the identity of a model and its servers, as OpenAI-compatible servers report it.

    The requests are ``GET /v1/models`` and ``GET /version`` (an endpoint of vLLM).

    Args:
        endpoints: URLs that end in /v1.
        model: name of the model on the servers.
        api_key: key that is sent as a bearer token.

    Returns:
        One line, in which equal reports occur once; ``None`` if no server reports anything.

    Example:
        >>> anyio.run(judge_identity, ["http://127.0.0.1:9/v1"], "qwen3-vl") is None
        True
    """
    return await _identity(endpoints, api_key, partial(_judge, model=model))


async def consistency_identity(endpoints: Sequence[str], *, token: str | None = None) -> str | None:
    """Return the identity that consistency servers report as "scorer" in ``GET /v1/info``.

    Args:
        endpoints: URLs that end in /v1.
        token: bearer token of the servers.

    Returns:
        One line; ``None`` if no server reports anything.

    Example:
        >>> anyio.run(consistency_identity, ["http://127.0.0.1:9/v1"]) is None
        True
    """
    return await _identity(endpoints, token, _consistency)


Ask = Callable[[str], Awaitable[Any]]


async def _identity(
    endpoints: Sequence[str],
    secret: str | None,
    read: Callable[[Ask, str], Awaitable[str | None]],
) -> str | None:
    """Ask all servers at once and join their different reports."""
    http = open_client()
    if secret is not None:
        http.headers["Authorization"] = f"Bearer {secret}"
    ask = partial(_ask, http)
    said = await gather([partial(read, ask, url.rstrip("/")) for url in endpoints])
    return "; ".join(sorted({one for one in said if one})) or None


async def _ask(http: httpx2.AsyncClient, url: str) -> Any:
    """Return a server's JSON; ``None`` if the request fails or the answer is not JSON."""
    try:
        with anyio.fail_after(PATIENCE):
            response = await http.get(url)
            return parse_json(response.raise_for_status().content)
    except Exception as error:
        if classify(error) is None:
            raise
        return None


async def _judge(ask: Ask, url: str, *, model: str) -> str | None:
    models = await ask(f"{url}/models")
    entries = models.get("data") if isinstance(models, dict) else None
    if not isinstance(entries, list):
        return None
    own = next((x for x in entries if isinstance(x, dict) and x.get("id") == model), None)
    if own is None:
        return None
    parts = [model, *(f"{name} {own[name]}" for name in STATED if own.get(name) is not None)]
    version = await ask(f"{url.removesuffix('/v1')}/version")
    if isinstance(version, dict) and isinstance(version.get("version"), str):
        parts.append(f"server {version['version']}")
    return shorten(", ".join(parts))


async def _consistency(ask: Ask, url: str) -> str | None:
    info = await ask(f"{url}/info")
    scorer = info.get("scorer") if isinstance(info, dict) else None
    return shorten(scorer) if isinstance(scorer, str) else None
