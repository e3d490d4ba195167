"""Service behind the routes: loading of the scorer, admission of requests, scoring in batches."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import platform
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import anyio
import torch
from fastapi import HTTPException
from PIL import Image
from torch import Tensor, nn

from mteditflow._hub import HubError
from mteditflow.rewards.consistency.pairs import Pair, PairScores
from mteditflow.rewards.consistency.scorer import ConsistencyScorer
from mteditflow.rewards.consistency.wire import Info, Limits
from mteditflow.rewards.server.batching import MicroBatcher
from mteditflow.rewards.transport.cache import request_key
from mteditflow.rewards.transport.http_client import shorten

LOG = logging.getLogger(__name__)
RETRY_AFTER = {"ready": 1, "loading": 10, "stopping": 10, "broken": 60}  # s; "ready" means busy
LIBRARIES = ("mteditflow", "torch", "transformers", "pillow")

Chain = tuple[Sequence[Image.Image], Sequence[Pair]]


class Service:
    """Scorer of the chains of concurrent requests.

    Args:
        scorer: the scorer, or a function that loads it, which runs in the scoring thread.
        limits: limits of concurrent requests and of a batch.
    """

    def __init__(
        self, scorer: ConsistencyScorer | Callable[[], ConsistencyScorer], limits: Limits
    ) -> None:
        self._limits = limits
        self._batcher: MicroBatcher[Chain, Sequence[PairScores]] | None = None
        self._inside: set[anyio.CancelScope] = set()  # one for each admitted request
        self._stopping = False
        self.broken = False  # whether loading failed
        self.closing = False  # whether the remaining requests have been cut off
        self._load = scorer if callable(scorer) else None
        self._loaded = None if callable(scorer) else (scorer, describe(scorer, limits))

    @property
    def state(self) -> str:
        """``loading``, ``ready``, ``stopping``, or ``broken`` if loading failed."""
        if self._stopping or self.broken:
            return "stopping" if self._stopping else "broken"
        return "ready" if self._loaded and self._batcher else "loading"

    @property
    def info(self) -> Info:
        """Description of the scorer.

        Raises:
            HTTPException: 503 if it is not loaded.
        """
        if self._loaded is None:
            raise self._unavailable(f"the server is {self.state}")
        return self._loaded[1]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load and score for the duration of the block."""
        limits = self._limits
        self._batcher = MicroBatcher(
            self._work, max_batch=limits.max_batch, max_wait=limits.max_wait
        )
        worker = asyncio.create_task(self._run(self._batcher))
        try:
            yield
        finally:
            worker.cancel()
            with suppress(asyncio.CancelledError):
                await worker

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count a request as admitted for the duration of the block.

        Raises:
            HTTPException: 503 with Retry-After if there are too many requests, the server is not
                ready, or it stops and ``cut_off`` ends the request.
        """
        if self.state != "ready":
            raise self._unavailable(f"the server is {self.state}")
        if len(self._inside) >= self._limits.max_requests:
            raise self._unavailable(f"{len(self._inside)} requests are being served, try later")
        with anyio.CancelScope() as scope:
            self._inside.add(scope)
            try:
                yield
            finally:
                self._inside.discard(scope)
        if scope.cancelled_caught:
            raise self._unavailable("the server is stopping")

    def stop(self) -> None:
        """Refuse new requests; admitted ones continue."""
        self._stopping = True

    def cut_off(self) -> None:
        """Answer all admitted requests with 503 immediately."""
        self.closing = True
        for scope in self._inside:
            scope.cancel()

    @property
    def busy(self) -> bool:
        """Whether there are admitted requests."""
        return bool(self._inside)

    @property
    def working(self) -> bool:
        """Whether the models are running, even if no request waits for them."""
        return self._batcher is not None and self._batcher.working

    async def score(
        self, images: Sequence[Image.Image], pairs: Sequence[Pair]
    ) -> Sequence[PairScores]:
        """Score one chain, in a batch with other waiting chains.

        Raises:
            HTTPException: 422 if the models refuse this chain, which a retry would not change, for
                instance for a name of too many tokens; 500 if they fail.
        """
        if self._batcher is None:
            raise RuntimeError("expected a chain while the service runs")
        try:
            return await self._batcher.submit((images, pairs))
        except ValueError as error:
            reason = f"the models refuse this chain: {shorten(str(error))}"
            LOG.warning("%s", reason)
            raise HTTPException(422, reason) from error
        except Exception as error:
            LOG.exception("a chain could not be scored")
            raise HTTPException(500, "scoring failed; see the server's log") from error

    async def _run(self, batcher: MicroBatcher[Chain, Sequence[PairScores]]) -> None:
        if self._load is not None:
            await batcher.in_thread(self._load_and_describe, self._load)
        if self._loaded is not None:
            await batcher.run()

    def _load_and_describe(self, load: Callable[[], ConsistencyScorer]) -> None:
        start = time.monotonic()
        try:
            scorer = load()
            self._loaded = scorer, describe(scorer, self._limits)
        except HubError as error:  # its message has the reason and the remedy
            LOG.error("the models could not be loaded: %s", error)
            self.broken = True
        except Exception:
            LOG.exception("the models could not be loaded")
            self.broken = True
        else:
            LOG.info("ready: models loaded in %.1f s", time.monotonic() - start)

    def _work(self, chains: list[Chain]) -> Sequence[Sequence[PairScores]]:
        if self._loaded is None:
            raise RuntimeError("expected work after the scorer was loaded")
        answers = self._loaded[0].score_many(chains)
        for (_, pairs), answer in zip(chains, answers, strict=False):  # the batcher checks lengths
            if len(answer) != len(pairs):
                raise RuntimeError(f"expected scores of {len(pairs)} pairs, got {len(answer)}")
        return answers

    def _unavailable(self, reason: str) -> HTTPException:
        return HTTPException(503, reason, {"Retry-After": str(RETRY_AFTER[self.state])})


def describe(scorer: ConsistencyScorer, limits: Limits) -> Info:
    """Return the description of a scorer: classes, settings and a hash of all weights.

    Example:
        >>> scorer = ConsistencyScorer(lambda images, names: [])
        >>> describe(scorer, Limits()).models["tokens"]
        'strict'
    """
    models = {
        "tokens": scorer.tokens,
        "detector": _describe(scorer.detector),
        "features": _describe(scorer.features),
    }
    return Info(scorer=request_key(models), models=models, versions=_versions(), limits=limits)


def _describe(model: Any) -> dict[str, Any] | None:
    if model is None:
        return None
    kind = model if hasattr(model, "__qualname__") else type(model)
    parts = getattr(model, "__dict__", {})
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        **{name.lstrip("_"): x for name, x in parts.items() if isinstance(x, (bool, int, float))},
        "weights": {
            name.lstrip("_"): _digest(x) for name, x in parts.items() if isinstance(x, nn.Module)
        },
    }


def _digest(module: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers, on any device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data  # numpy has no bfloat16, so view bytes first


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
