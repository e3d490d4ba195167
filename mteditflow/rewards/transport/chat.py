"""Client of OpenAI-compatible endpoints: requests with images, retried until an answer parses.

Requests are built here and sent by the library's own HTTP client, so no setting of the environment
(organization, project, headers, base URL, key, proxies) reaches a server.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mteditflow._checks import check_count, check_number
from mteditflow.rewards.faults import AnswerError, Fault, Lost
from mteditflow.rewards.reasoning import FIX, has_reasoning, reasoning_alone
from mteditflow.rewards.request_options import RequestOptions
from mteditflow.rewards.transport.cache import AnswerCache, cached
from mteditflow.rewards.transport.dispatch import Dispatcher, Statistics
from mteditflow.rewards.transport.http_client import AttemptError, open_client, shorten

T = TypeVar("T")
SEED_STRIDE = 2**20  # between seeds of a request's draws, so that they differ from other votes'
# Temperature of a draw after an unreadable answer at temperature 0, which would give it again.
RETRY_TEMPERATURE = 0.7
LogProb = Annotated[float, Field(allow_inf_nan=False)]


class ChatAnswer(BaseModel):
    """Answer of a model.

    Attributes:
        text: text of the message.
        top_logprobs: for each token of the answer the likeliest tokens with their log-probabilities
            (natural logarithm); ``None`` if they were not requested.
    """

    model_config = ConfigDict(frozen=True)

    text: str
    top_logprobs: tuple[tuple[tuple[str, LogProb], ...], ...] | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens and reasoning of the answers received so far, readable or not.

    Attributes:
        answers: number of answers received; answers from the cache are not counted.
        reasoned: number of answers with reasoning before them.
        cut_off: number of answers cut off at the token limit.
        most_tokens: tokens of the longest answer, its reasoning included; ``None`` if no server
            reported a number.
        limit: largest token limit of an answered request.
    """

    answers: int = 0
    reasoned: int = 0
    cut_off: int = 0
    most_tokens: int | None = None
    limit: int = 0

    def __str__(self) -> str:
        tokens = "an unknown number" if self.most_tokens is None else f"{self.most_tokens:,}"
        return f"{tokens} of at most {self.limit:,} tokens"


class ChatClient:
    """Client of OpenAI-compatible chat endpoints; an answer parses, or is lost with a reason.

    An answer that does not parse is sampled again up to ``attempts`` times, each time with another
    seed. If the temperature is 0, it is then sampled at 0.7, since the same answer would result. An
    attempt without an answer (time-out, 5xx) is repeated unchanged. Log-probabilities hardly change
    between samples, so they are requested once at each endpoint.

    Args:
        endpoints: URLs that end in /v1, all serving ``model``.
        model: name of the model on the servers.
        api_key: key that is sent as a bearer token and never shown. A key in the environment is not
            used.
        cache: cache of accepted answers; a cached request is not sent.
        temperature: sampling temperature, >= 0; at 0 the model gives the same answer each time.
        request: token limits, arguments of the chat template, further parameters.
        **options: passed to the ``Dispatcher``: ``concurrency``, ``timeout``, ``attempts``,
            ``patience`` and the others.

    Raises:
        ValueError: a URL does not end in /v1, the model has no name, or a number is out of range.

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
        request: RequestOptions | None = None,
        **options: Any,
    ) -> None:
        if not model:
            raise ValueError("model: expected the name of a model on the endpoints, got ''")
        check_number("temperature", temperature, low=0.0)
        self.model, self.temperature, self._cache = model, temperature, cache
        self.request = request or RequestOptions()
        self._dispatcher = Dispatcher(endpoints, secret=api_key, **options)
        self._like_this = partial(
            ChatClient,
            model=model,
            api_key=api_key,
            temperature=temperature,
            request=self.request,
            **options,
        )
        for url in self._dispatcher.endpoints:
            if not url.endswith("/v1"):
                raise ValueError(f"endpoints: expected URLs that end in /v1, got {url!r}")
        self._http = open_client()
        self._http.headers["Content-Type"] = "application/json"
        if api_key is not None:
            self._http.headers["Authorization"] = f"Bearer {api_key}"
        self._usage = Usage()

    @property
    def statistics(self) -> Statistics:
        """Counts of requests and faults so far; answers from the cache are not counted."""
        return self._dispatcher.statistics

    @property
    def usage(self) -> Usage:
        """Tokens and reasoning of the answers so far."""
        return self._usage

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that determine answers apart from the question, as JSON values for a report."""
        return {"model": self.model, "temperature": self.temperature, **self.request.settings}

    def per_endpoint(self) -> dict[str, ChatClient]:
        """Return for each endpoint's URL a client of that endpoint only, without the cache."""
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
        """Ask one question, in up to ``attempts`` attempts until the answer parses.

        Args:
            content: text and image_url parts of one user message.
            read: parser of the answer, which raises ``AnswerError``. Any other exception is a bug
                and propagates.
            max_tokens: tokens that the answer needs; the limit of the request is
                ``request.limit(max_tokens)``. An answer that is cut off there is a fault, unless
                log-probabilities are requested.
            schema: JSON schema of the answer, for servers that support structured output. ``read``
                must check that the answer follows it, since some servers ignore it silently.
            top_logprobs: number of likeliest tokens to return at each position, 1..20.
            seed: seed of the first sample, >= 0; later samples use others.

        Returns:
            The result of ``read``, or ``Lost`` with the reason.
        """
        check_count("seed", seed, low=0)
        request = self._request(content, max_tokens, schema, top_logprobs)
        refused = 0  # received answers that did not parse

        async def attempt(endpoint: str) -> tuple[str, T]:
            nonlocal refused
            draw = self._draw(seed, refused)
            completion = await self._exchange(endpoint, {**request, **draw})
            try:
                answer = _read_answer(completion, request)
                value = read(answer)
            except AnswerError as error:
                # Log-probabilities would not change here; only another endpoint may have them.
                again = top_logprobs is None
                refused += again
                raise AttemptError(error.fault, error.detail, here_again=again) from error
            return answer.model_dump_json(), value

        return await cached(
            self._cache,
            {**request, "seed": seed},  # the first seed: a retry is an answer to the same question
            read=lambda stored: read(ChatAnswer.model_validate_json(stored)),
            ask=partial(self._dispatcher.run, attempt),
        )

    def _draw(self, seed: int, refused: int) -> dict[str, Any]:
        """Return seed and temperature of the sample after a number of refused answers."""
        temperature = self.temperature
        if refused and temperature == 0:
            temperature = RETRY_TEMPERATURE
        return {"seed": seed + refused * SEED_STRIDE, "temperature": temperature}

    def _request(
        self,
        content: Sequence[dict[str, Any]],
        max_tokens: int,
        schema: dict[str, Any] | None,
        top_logprobs: int | None,
    ) -> dict[str, Any]:
        """Return the body of the request without the seed."""
        check_count("max_tokens", max_tokens)
        limit = self.request.limit(max_tokens) if top_logprobs is None else max_tokens
        request: dict[str, Any] = {
            **self.request.body,
            "model": self.model,
            "messages": [{"role": "user", "content": list(content)}],
            "temperature": self.temperature,
            "max_completion_tokens": limit,
        }
        if schema is not None:
            named = {"name": "answer", "schema": schema, "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": named}
        if top_logprobs is not None:
            check_count("top_logprobs", top_logprobs)
            request |= {"logprobs": True, "top_logprobs": top_logprobs}
        return request

    async def _exchange(self, endpoint: str, request: dict[str, Any]) -> _Completion:
        body = json.dumps(request, allow_nan=False).encode()
        response = await self._http.post(f"{endpoint}/chat/completions", content=body)
        completion = _read_completion(response.raise_for_status().content)
        self._usage = completion.counted(self._usage, request["max_completion_tokens"])
        return completion


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
    reasoning: object = None
    reasoning_content: object = None

    @property
    def thoughts(self) -> str:
        """Reasoning that the server separates from the answer, under either of two names."""
        named = (self.reasoning, self.reasoning_content)
        return next((text for text in named if isinstance(text, str) and text.strip()), "")


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: _LogProbs | None = None


class _Completion(BaseModel):
    """Parsed part of a chat completion; servers differ in the rest."""

    choices: Annotated[list[_Choice], Field(min_length=1, max_length=1)]
    usage: object = None

    @property
    def tokens(self) -> int | None:
        """Tokens of the answer and its reasoning, if the server counts them."""
        return _count_in(self.usage, "completion_tokens")

    @property
    def reasoned(self) -> bool:
        """Whether the answer has reasoning, or the server counted tokens of it."""
        message = self.choices[0].message
        details = (
            self.usage.get("completion_tokens_details") if isinstance(self.usage, dict) else None
        )
        counted = _count_in(details, "reasoning_tokens")
        return bool(message.thoughts or has_reasoning(message.content or "") or counted)

    def counted(self, usage: Usage, limit: int) -> Usage:
        """Return the usage with this answer added."""
        cut_off = self.choices[0].finish_reason == "length"
        counts = [x for x in (usage.most_tokens, self.tokens) if x is not None]
        return Usage(
            usage.answers + 1,
            usage.reasoned + self.reasoned,
            usage.cut_off + cut_off,
            max(counts, default=None),
            max(usage.limit, limit),
        )


def _count_in(usage: object, name: str) -> int | None:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) else None


def _read_completion(body: bytes) -> _Completion:
    try:
        return _Completion.model_validate_json(body)
    except ValidationError as error:
        came = shorten(body.decode(errors="replace")) or "an empty body"
        message = f"expected a chat completion, got {came}"
        raise AnswerError(Fault.malformed, message) from error


def _read_answer(completion: _Completion, request: dict[str, Any]) -> ChatAnswer:
    """Return the answer of a completion, or raise ``AnswerError`` with the reason."""
    choice = completion.choices[0]
    message, text = choice.message, choice.message.content or ""
    if message.refusal or choice.finish_reason == "content_filter":
        raise AnswerError(Fault.refusal, shorten(message.refusal or "content filter"))
    # A request for one token always ends at its limit, which is no fault: hence before that check.
    if "logprobs" in request:
        return ChatAnswer(text=text, top_logprobs=_top_logprobs(choice))
    if choice.finish_reason == "length":
        raise _cut_off(message, request["max_completion_tokens"])
    if message.thoughts and not text.strip():
        raise reasoning_alone(message.thoughts)
    if message.content is None:
        raise AnswerError(Fault.format, "expected text, got a message without any")
    return ChatAnswer(text=text)


def _top_logprobs(choice: _Choice) -> tuple[tuple[tuple[str, float], ...], ...]:
    if choice.message.thoughts or has_reasoning(choice.message.content or ""):
        raise reasoning_alone(choice.message.thoughts or choice.message.content or "")
    tokens = choice.logprobs and choice.logprobs.content
    if not tokens or not all(token.top_logprobs for token in tokens):
        raise AnswerError(Fault.request_ignored, "expected top_logprobs, got none")
    return tuple(tuple((x.token, x.logprob) for x in token.top_logprobs) for token in tokens)


def _cut_off(message: _Message, limit: int) -> AnswerError:
    text = message.content or ""
    came, fix = f"got {shorten(text)!r}", "raise answer_tokens"
    if message.thoughts or has_reasoning(text):
        came += f" after reasoning {shorten(message.thoughts)!r}" if message.thoughts else ""
        fix = FIX
    return AnswerError(Fault.cut_off, f"{came} within {limit} tokens; {fix}")
