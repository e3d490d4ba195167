"""Client of OpenAI-compatible endpoints: one question with images, repeated until it parses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Annotated, Any, TypeVar

import httpx2
import openai
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mteditflow._checks import check_count, check_number
from mteditflow.rewards.faults import AnswerError, Fault, Lost
from mteditflow.rewards.transport.cache import AnswerCache, cached
from mteditflow.rewards.transport.dispatch import Dispatcher, Statistics
from mteditflow.rewards.transport.http_client import open_client, shorten

T = TypeVar("T")
SEED_STRIDE = 2**20  # between the seeds of one request's attempts; votes count up by 1
NO_KEY = "EMPTY"  # what servers that need none are given by custom
LogProb = Annotated[float, Field(allow_inf_nan=False)]


class ChatAnswer(BaseModel):
    """Answer of a model.

    Attributes:
        text: the message.
        top_logprobs: for each token of the answer the likeliest tokens with their log-probabilities
            (natural logarithm); ``None`` where they were not asked for.
    """

    model_config = ConfigDict(frozen=True)

    text: str
    top_logprobs: tuple[tuple[tuple[str, LogProb], ...], ...] | None = None


class ChatClient:
    """Client of OpenAI-compatible chat endpoints; an answer parses, or is lost with a reason.

    Args:
        endpoints: URLs that end in /v1, all serving ``model``.
        model: its name on the servers.
        api_key: sent as a bearer token; never shown. A key in the environment is never sent.
        cache: accepted answers; a request found in it is not sent.
        temperature: sampling temperature; at 0 the model answers the same each time.
        **options: passed to the ``Dispatcher``: ``concurrency``, ``timeout``, ``attempts``,
            ``patience`` and the others.

    Raises:
        ValueError: a URL does not end in /v1, or a number is out of range.

    Example:
        >>> import anyio
        >>> client = ChatClient(["http://127.0.0.1:9/v1"], "qwen3-vl", attempts=1)
        >>> question = [{"type": "text", "text": "How many cats are in the picture?"}]
        >>> lost = anyio.run(lambda: client.ask(question, lambda a: int(a.text), max_tokens=8))
        >>> lost.fault
        <Fault.connection: 'no connection'>
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        model: str,
        *,
        api_key: str | None = None,
        cache: AnswerCache | None = None,
        temperature: float = 0.0,
        **options: Any,
    ) -> None:
        check_number("temperature", temperature, low=0.0)
        self.model, self.temperature, self._cache = model, temperature, cache
        self._dispatcher = Dispatcher(endpoints, secret=api_key, **options)
        self._like_this = partial(
            ChatClient, model=model, api_key=api_key, temperature=temperature, **options
        )
        for url in self._dispatcher.endpoints:
            if not url.endswith("/v1"):
                raise ValueError(f"endpoints: expected URLs that end in /v1, got {url!r}")
        http = open_client()
        self._clients = {
            url: openai.AsyncOpenAI(
                base_url=url, api_key=api_key or NO_KEY, max_retries=0, http_client=http
            )
            for url in self._dispatcher.endpoints
        }

    @property
    def statistics(self) -> Statistics:
        """Counts of requests and faults so far; answers from the cache are not counted."""
        return self._dispatcher.statistics

    def per_endpoint(self) -> dict[str, ChatClient]:
        """Map each endpoint's URL to a client of it alone, without the cache."""
        return {url: self._like_this(endpoints=[url]) for url in self._dispatcher.endpoints}

    async def ask(
        self,
        content: Sequence[dict[str, Any]],
        read: Callable[[ChatAnswer], T],
        *,
        max_tokens: int,
        schema: dict[str, Any] | None = None,
        top_logprobs: int | None = None,
        seed: int = 0,
    ) -> T | Lost:
        """Ask one question, again up to ``attempts`` times while the answer does not parse.

        Args:
            content: text and image_url parts of one user message.
            read: parses the answer, or raises ``AnswerError``. Any other exception is a bug and
                propagates.
            max_tokens: token limit of the answer. An answer cut off there is a fault, unless
                log-probabilities are asked for.
            schema: JSON schema of the answer, for servers that support structured output. ``read``
                must check that the answer follows it: some servers ignore it silently.
            top_logprobs: number of likeliest tokens to return at each position, 1..20.
            seed: seed of the first attempt; later attempts use others, for another draw.

        Returns:
            The result of ``read``, or why there is no answer.
        """
        check_count("seed", seed, low=0)
        request = self._request(content, max_tokens, schema, top_logprobs)
        seeds = count(seed, SEED_STRIDE)

        async def attempt(endpoint: str) -> tuple[str, T]:
            answer = await self._exchange(endpoint, {**request, "seed": next(seeds)})
            value = read(answer)
            return answer.model_dump_json(), value

        return await cached(
            self._cache,
            {**request, "seed": seed},
            read=lambda stored: read(ChatAnswer.model_validate_json(stored)),
            ask=partial(self._dispatcher.run, attempt),
        )

    def _request(
        self,
        content: Sequence[dict[str, Any]],
        max_tokens: int,
        schema: dict[str, Any] | None,
        top_logprobs: int | None,
    ) -> dict[str, Any]:
        """Return the body of the request without the seed."""
        check_count("max_tokens", max_tokens)
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": list(content)}],
            "temperature": self.temperature,
            "max_completion_tokens": max_tokens,
        }
        if schema is not None:
            named = {"name": "answer", "schema": schema, "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": named}
        if top_logprobs is not None:
            check_count("top_logprobs", top_logprobs)
            request |= {"logprobs": True, "top_logprobs": top_logprobs}
        return request

    async def _exchange(self, endpoint: str, request: dict[str, Any]) -> ChatAnswer:
        # The raw exchange: the typed method takes twice as long for a large request, and lets
        # invalid answers through.
        response = await self._clients[endpoint].post(
            "/chat/completions", body=request, cast_to=httpx2.Response
        )
        return _read_completion(response.content, logprobs="logprobs" in request)


class _TopLogProb(BaseModel):
    token: str
    logprob: LogProb


class _Token(BaseModel):
    top_logprobs: list[_TopLogProb]


class _LogProbs(BaseModel):
    content: list[_Token] | None = None


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: _LogProbs | None = None


class _Completion(BaseModel):
    """Parsed part of a chat completion; servers differ in the rest."""

    choices: Annotated[list[_Choice], Field(min_length=1, max_length=1)]


def _read_completion(body: bytes, *, logprobs: bool) -> ChatAnswer:
    try:
        choice = _Completion.model_validate_json(body).choices[0]
    except ValidationError as error:
        came = shorten(body.decode(errors="replace")) or "an empty body"
        message = f"expected a chat completion, got {came}"
        raise AnswerError(Fault.malformed, message) from error
    if choice.message.refusal or choice.finish_reason == "content_filter":
        raise AnswerError(Fault.refusal, shorten(choice.message.refusal or "content filter"))
    if logprobs:
        tokens = choice.logprobs and choice.logprobs.content
        if not tokens or not all(token.top_logprobs for token in tokens):
            raise AnswerError(Fault.request_ignored, "expected top_logprobs, got none")
        top = tuple(tuple((x.token, x.logprob) for x in token.top_logprobs) for token in tokens)
        return ChatAnswer(text=choice.message.content or "", top_logprobs=top)
    if choice.finish_reason == "length":
        raise AnswerError(Fault.cut_off, f"got {shorten(choice.message.content or '')!r}")
    if choice.message.content is None:
        raise AnswerError(Fault.format, "expected text, got a message without any")
    return ChatAnswer(text=choice.message.content)
