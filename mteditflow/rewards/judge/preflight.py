"""Check of endpoints before a run: some silently ignore the parts of a request they lack."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial

from PIL import Image

from mteditflow._checks import check_count
from mteditflow.rewards.faults import AnswerError, Fault, Lost
from mteditflow.rewards.images import png_data_url
from mteditflow.rewards.judge.prompts import CANDIDATES, object_schema
from mteditflow.rewards.judge.wording import image_part, text_part
from mteditflow.rewards.transport.chat import ChatAnswer, ChatClient
from mteditflow.rewards.transport.concurrency import gather

SIDE = 64  # pixels of a test image: vision towers refuse images of less than a few patches
FEWEST = 5  # log-probabilities that a Likert scale needs


@dataclass(frozen=True)
class EndpointReport:
    """Parts of a request that one endpoint supports.

    Attributes:
        endpoint: its URL.
        honours: part of a request ("images", "structured output", "log-probabilities") to ``None``
            if the endpoint supports it, or why not.
    """

    endpoint: str
    honours: Mapping[str, Lost | None]

    @property
    def missing(self) -> tuple[str, ...]:
        """Parts of a request that the endpoint does not support."""
        return tuple(part for part, lost in self.honours.items() if lost is not None)

    def __str__(self) -> str:
        lines = [
            f"{part}: {'honoured' if lost is None else lost}" for part, lost in self.honours.items()
        ]
        return "\n  ".join([self.endpoint, *lines])


async def inspect_endpoints(client: ChatClient, *, images: int = 4) -> list[EndpointReport]:
    """Ask each endpoint of a client three small questions whose answers prove what it supports.

    Structured output is proved by a random word that only the schema contains, log-probabilities by
    their presence, several images by an answer instead of a rejection.

    Args:
        client: client of the endpoints; its cache is not used.
        images: number of images in one request: N + 1 for a call per trajectory, 2 for one per
            turn.

    Returns:
        A report for each endpoint.

    Raises:
        ValueError: the number of images is below 1.

    Example:
        >>> import anyio
        >>> client = ChatClient(["http://127.0.0.1:9/v1"], "qwen3-vl", attempts=1)
        >>> [report] = anyio.run(inspect_endpoints, client)
        >>> report.missing
        ('images', 'structured output', 'log-probabilities')
    """
    check_count("images", images)
    parts: dict[str, Callable[[ChatClient], Awaitable[Lost | None]]] = {
        "images": partial(_images, count=images),
        "structured output": _structured_output,
        "log-probabilities": _logprobs,
    }

    async def ask(url: str, one: ChatClient) -> EndpointReport:
        answers = await gather([partial(part, one) for part in parts.values()])
        return EndpointReport(url, dict(zip(parts, answers, strict=True)))

    return await gather([partial(ask, url, one) for url, one in client.per_endpoint().items()])


async def _images(client: ChatClient, *, count: int) -> Lost | None:
    url = png_data_url(Image.effect_noise((SIDE, SIDE), 64))
    shown = [image_part(url)] * count
    content = [text_part("Here are some images."), *shown, text_part("Answer with the word ok.")]
    result = await client.ask(content, lambda _: None, max_tokens=8)
    talkative = isinstance(result, Lost) and result.fault is Fault.cut_off
    return None if talkative else result


async def _structured_output(client: ChatClient) -> Lost | None:
    word = secrets.token_hex(4)
    schema = object_schema({"word": {"type": "string", "enum": [word]}})

    def read(answer: ChatAnswer) -> None:
        if "".join(answer.text.split()) != f'{{"word":"{word}"}}':
            message = f"expected JSON with the word of the schema, got {answer.text[:200]!r}"
            raise AnswerError(Fault.request_ignored, message)

    content = [text_part("Answer with a JSON object of one word.")]
    return await client.ask(content, read, schema=schema, max_tokens=64)


async def _logprobs(client: ChatClient) -> Lost | None:
    def read(answer: ChatAnswer) -> None:
        count = len(answer.top_logprobs[0]) if answer.top_logprobs else 0
        if count < FEWEST:
            message = f"expected {CANDIDATES} log-probabilities of the first token, got {count}"
            raise AnswerError(Fault.request_ignored, message)

    content = [text_part("Answer yes or no.")]
    return await client.ask(content, read, top_logprobs=CANDIDATES, max_tokens=1)
