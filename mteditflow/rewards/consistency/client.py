"""Client of consistency servers, with the same scores as ``Consistency`` in this process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
from PIL import Image
from tqdm import tqdm

from mteditflow._checks import check_choice, check_count
from mteditflow.chains import Chain
from mteditflow.rewards.consistency.pairs import (
    PAIRINGS,
    ConsistencyScores,
    Pair,
    PairScores,
    image_pairs,
)
from mteditflow.rewards.consistency.wire import Info, read_answer, to_send
from mteditflow.rewards.faults import Lost
from mteditflow.rewards.images import png_base64
from mteditflow.rewards.transport.cache import AnswerCache, cached
from mteditflow.rewards.transport.concurrency import gather
from mteditflow.rewards.transport.dispatch import Dispatcher, Statistics
from mteditflow.rewards.transport.http_client import open_client

Scores = tuple[PairScores, ...]


class ConsistencyClient:
    """Client of ``python -m mteditflow.rewards.server``, which scores content consistency.

    Scores equal those of ``Consistency`` up to 1e-6: images and scores are sent without loss, but a
    server scores several chains in one batch, which may change the last bits of its models'
    outputs. The L1 terms are equal bit by bit.

    All scores come from one set of models, that of the server that answered first. Answers of
    other models, for instance after a restart, are faults.

    Args:
        endpoints: URLs that end in /v1, all serving the same models.
        pairing: "reference" or "consecutive", as in ``pairs_of``.
        token: bearer token of the servers, never shown.
        cache: cache of accepted answers; a cached chain is not sent.
        chains_at_once: maximum number of chains whose encoded images are in memory at once.
        **options: passed to the ``Dispatcher``: ``concurrency``, ``timeout``, ``attempts``,
            ``patience`` and the others.

    Raises:
        ValueError: the pairing is unknown, a URL does not end in /v1, or a number is out of
            range.

    Example:
        >>> client = ConsistencyClient(["http://127.0.0.1:9/v1"], attempts=1)
        >>> chain = Chain(id="7", image="7.png", instructions=("Remove the cat",),
        ...     unchanged_objects=(("dog",),), all_objects=(("cat", "dog"),))
        >>> images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        >>> anyio.run(client.score, [chain], [images]).scores.reasons
        {'no connection': 1}
        >>> anyio.run(client.reach)["http://127.0.0.1:9/v1"].fault.value
        'no connection'
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        pairing: str = "reference",
        token: str | None = None,
        cache: AnswerCache | None = None,
        chains_at_once: int = 64,
        **options: Any,
    ) -> None:
        check_choice("pairing", pairing, PAIRINGS)
        check_count("chains_at_once", chains_at_once)
        self.pairing, self._cache, self._chains_at_once = pairing, cache, chains_at_once
        self._options = {"secret": token, **options}
        self._dispatcher = Dispatcher(endpoints, **self._options)
        for url in self._dispatcher.endpoints:
            if not url.endswith("/v1"):
                raise ValueError(f"endpoints: expected URLs that end in /v1, got {url!r}")
        self._http = open_client()
        if token is not None:
            self._http.headers["Authorization"] = f"Bearer {token}"
        self._scorer: str | None = None

    @property
    def statistics(self) -> Statistics:
        """Counts of requests and faults so far; answers from the cache are not counted."""
        return self._dispatcher.statistics

    async def reach(self) -> dict[str, Lost | None]:
        """Request the models of each server, before a run that needs all servers.

        Returns:
            URL of an endpoint to ``None`` if it answered, else to the reason why not.
        """

        async def ask(url: str) -> Lost | None:
            one = Dispatcher([url], **self._options)
            info = await one.run(self._ask_info)
            return info if isinstance(info, Lost) else None

        urls = self._dispatcher.endpoints
        found = await gather([partial(ask, url) for url in urls])
        return dict(zip(urls, found, strict=True))

    async def score(
        self,
        chains: Sequence[Chain],
        images: Sequence[Sequence[Image.Image]],
        *,
        progress: bool = False,
    ) -> ConsistencyScores:
        """Score every turn of B chains; a chain whose answer is lost loses all its turns.

        Args:
            chains: B chains with the names of their objects; N may differ.
            images: for each chain N + 1 images: the reference, then the result of each turn.
            progress: whether to show a bar that counts chains.

        Returns:
            Scores [B, N], float32, in the order of ``chains``; N is that of the longest chain.

        Raises:
            ValueError: there is no chain, its images are too few, too many or unreadable, or a
                chain has no names of objects.
            TypeError: an image is not a PIL image.
        """
        work = image_pairs(chains, images, pairing=self.pairing)
        shown = await anyio.to_thread.run_sync(_prepare, images)
        scorer = await self._identify()
        slots = anyio.Semaphore(self._chains_at_once)

        async def score_chain(b: int) -> Scores | Lost:
            async with slots:
                answer: Scores | Lost = (
                    scorer
                    if isinstance(scorer, Lost)
                    else await self._score_chain(shown[b], work[b][1], scorer)
                )
                bar.update()
                return answer

        with tqdm(total=len(chains), desc="consistency", unit="chain", disable=not progress) as bar:
            answers = await gather([partial(score_chain, b) for b in range(len(chains))])
        return ConsistencyScores.collect(answers, [chain.turns for chain in chains])

    async def _identify(self) -> str | Lost:
        """Return the identity of the models, requested once; cached answers must have it too."""
        if self._scorer is None:
            info = await self._dispatcher.run(self._ask_info)
            if isinstance(info, Lost):
                return info
            self._scorer = self._scorer or info.scorer  # a concurrent call may have set it
        return self._scorer

    async def _ask_info(self, endpoint: str) -> Info:
        response = await self._http.get(f"{endpoint}/info")
        return Info.model_validate_json(response.raise_for_status().content)

    async def _score_chain(
        self, images: Sequence[Image.Image], pairs: Sequence[Pair], scorer: str
    ) -> Scores | Lost:
        body = await anyio.to_thread.run_sync(_body, images, pairs)

        async def attempt(endpoint: str) -> tuple[str, Scores]:
            content_type = {"Content-Type": "application/json"}
            url = f"{endpoint}/consistency"
            response = await self._http.post(url, content=body, headers=content_type)
            answer = response.raise_for_status().content
            scores = read_answer(answer, pairs, scorer)
            return answer.decode(), scores

        return await cached(
            self._cache,
            # The digest of the body stands for megabytes of base64, and the models are part of it.
            {"scorer": scorer, "request": hashlib.sha256(body).hexdigest()},
            read=lambda stored: read_answer(stored.encode(), pairs, scorer),
            ask=partial(self._dispatcher.run, attempt),
        )


def _prepare(images: Sequence[Sequence[Image.Image]]) -> list[list[Image.Image]]:
    return [
        [to_send(f"images[{b}][{n}]", image) for n, image in enumerate(shown)]
        for b, shown in enumerate(images)
    ]


def _body(images: Sequence[Image.Image], pairs: Sequence[Pair]) -> bytes:
    encoded = [png_base64(image) for image in images]
    return json.dumps({"images": encoded, "pairs": [pair.model_dump() for pair in pairs]}).encode()
