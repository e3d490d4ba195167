"""Check of endpoints before a run, since some silently ignore parts of a request."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial

from PIL import Image

from mteditflow._checks import check_count
from mteditflow.rewards.faults import AnswerError, Fault, Lost
from mteditflow.rewards.images import png_data_url
from mteditflow.rewards.judge.prompts import CANDIDATES, JudgePrompt, object_schema
from mteditflow.rewards.judge.wording import image_part, text_part
from mteditflow.rewards.transport.chat import ChatAnswer, ChatClient, Usage
from mteditflow.rewards.transport.concurrency import gather

SIDE = 64  # pixels of a test image: vision towers refuse images of less than a few patches
DEAD = (  # faults with which an endpoint would fail any other request too
    Fault.timeout, Fault.connection, Fault.rate_limited, Fault.server_error, Fault.redirected,
    Fault.rejected, Fault.malformed, Fault.unavailable,
)  # fmt: skip
FEWEST = 5  # minimum number of log-probabilities: one for each label of the Likert scale


@dataclass(frozen=True)
class EndpointReport:
    """Parts of a request that one endpoint supports, and the token usage of a judge's answer.

    Attributes:
        endpoint: URL of the endpoint.
        honors: part of a request ("images", "structured output", "log-probabilities", and
            "judge's answer" for a whole question of a judge) to ``None`` if the endpoint supports
            it, else to the reason why not.
        usage: tokens and reasoning of the judge's answers, readable or not.
    """

    endpoint: str
    honors: Mapping[str, Lost | None]
    usage: Usage

    @property
    def missing(self) -> tuple[str, ...]:
        """Parts of a request that the endpoint does not support."""
        return tuple(part for part, lost in self.honors.items() if lost is not None)

    @property
    def reasoning(self) -> str:
        """Whether the model reasons before it answers: "on", "off", or "unknown"."""
        if not self.usage.answers:
            return "unknown"
        return "on" if self.usage.reasoned else "off"

    def __str__(self) -> str:
        lines = [
            f"{part}: {'honored' if lost is None else lost}" for part, lost in self.honors.items()
        ]
        lines += [f"reasoning: {self.reasoning}", f"longest answer: {self.usage}"]
        return "\n  ".join([self.endpoint, *lines])


async def inspect_endpoints(
    client: ChatClient, *, images: int = 4, prompt: JudgePrompt | None = None
) -> list[EndpointReport]:
    """Send each endpoint of a client three small requests and one full question of a judge.

    Structured output is proved by a random word that only the schema contains, log-probabilities by
    their presence, several images by an answer instead of a rejection. The judge's question shows
    whether the model reasons first, how much of the token limit an answer takes, and why an answer
    is unreadable or cut off.

    Args:
        client: client of the endpoints; its cache is not used.
        images: number of images in one request: N + 1 for one request per trajectory, 2 for one
            per turn.
        prompt: prompt of the judge's question; ``None`` is ``JudgePrompt()``.

    Returns:
        A report for each endpoint.

    Raises:
        ValueError: the number of images is below 1.

    Example:
        >>> import anyio
        >>> client = ChatClient(["http://127.0.0.1:9/v1"], "qwen3-vl", attempts=1)
        >>> [report] = anyio.run(inspect_endpoints, client)
        >>> report.missing
        ('images', 'structured output', 'log-probabilities', "judge's answer")
        >>> report.reasoning
        'unknown'
    """
    check_count("images", images)
    judges = client.per_endpoint()  # separate clients, whose usage is that of the judge alone

    async def ask(url: str, one: ChatClient) -> EndpointReport:
        parts: dict[str, Callable[[], Awaitable[Lost | None]]] = {
            "images": partial(_images, one, count=images),
            "structured output": partial(_structured_output, one),
            "log-probabilities": partial(_logprobs, one),
            "judge's answer": partial(_judged, judges[url], prompt or JudgePrompt(), images),
        }
        honors = dict(zip(parts, await gather(list(parts.values())), strict=True))
        return EndpointReport(url, honors, judges[url].usage)

    return await gather([partial(ask, url, one) for url, one in client.per_endpoint().items()])


async def reach_endpoints(client: ChatClient, *, images: int = 1) -> dict[str, Lost | None]:
    """Send each endpoint of a client one small request, before a run that needs them all.

    It proves that the endpoint answers, accepts the model and the key, and accepts that many images
    in one request. ``inspect_endpoints`` tests the content of its answers.

    Args:
        client: client of the endpoints; its cache is not used.
        images: number of images in one request.

    Returns:
        URL of an endpoint to ``None`` if it answered, else to the reason why not.

    Raises:
        ValueError: the number of images is below 1.

    Example:
        >>> import anyio
        >>> client = ChatClient(["http://127.0.0.1:9/v1"], "qwen3-vl", attempts=1)
        >>> anyio.run(reach_endpoints, client)["http://127.0.0.1:9/v1"].fault
        <Fault.connection: 'no connection'>
    """
    check_count("images", images)
    clients = client.per_endpoint()
    found = await gather([partial(_images, one, count=images) for one in clients.values()])
    return {
        url: lost if lost is not None and lost.fault in DEAD else None
        for url, lost in zip(clients, found, strict=True)
    }


async def _judged(client: ChatClient, prompt: JudgePrompt, images: int) -> Lost | None:
    """Ask about an edit in which nothing changed; any readable score is accepted."""
    turns = max(1, images - 1) if prompt.scope == "trajectory" else 1
    request = prompt.request(["Paint the sky green."] * turns, [_picture()] * (turns + 1))
    answer = await client.ask(
        request.content, request.read, max_tokens=request.max_tokens, schema=request.schema
    )
    return answer if isinstance(answer, Lost) else None


def _picture() -> str:
    return png_data_url(Image.effect_noise((SIDE, SIDE), 64))


async def _images(client: ChatClient, *, count: int) -> Lost | None:
    shown = [image_part(_picture())] * count
    content = [text_part("Here are some images."), *shown, text_part("Answer with the word ok.")]
    result = await client.ask(content, lambda _: None, max_tokens=8)
    # An answer that is cut off came after the images were accepted, which is all that matters here.
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
