"""Options of every request to a model: token limits, chat template, further parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mteditflow._checks import check_count

# Parameters that the client sets for each question, or that conflict with reading one whole answer.
RESERVED = frozenset(
    {
        "model", "messages", "temperature", "seed", "n", "best_of", "use_beam_search", "max_tokens",
        "max_completion_tokens", "response_format", "structured_outputs", "guided_json",
        "guided_regex", "guided_choice", "guided_grammar", "logprobs", "top_logprobs", "stream",
        "stream_options", "stop", "stop_token_ids", "echo", "tools", "tool_choice", "functions",
        "function_call", "chat_template_kwargs",
    }
)  # fmt: skip


@dataclass(frozen=True)
class RequestOptions:
    """Options of every request to a model, apart from its question.

    Args:
        answer_tokens: token limit of an answer; ``None`` keeps that of the question, such as
            32 + 528 N for a judge that analyzes N turns.
        reasoning_tokens: additional tokens for a model's own reasoning, since servers count it
            toward the limit; 0 for a model that does not reason.
        chat_template_kwargs: arguments of the server's chat template, such as
            ``{"enable_thinking": False}``.
        extra_body: further parameters of the request, such as ``{"top_p": 0.8}``; parameters that
            the client sets are refused.

    The limits apply to answers that are read as text; a request for the log-probabilities of one
    token keeps its own limit. All options are part of a cached answer's key.

    Raises:
        ValueError: a limit is out of range, or a parameter is set by the client or is not JSON.

    Example:
        >>> options = RequestOptions(reasoning_tokens=4096, extra_body={"top_k": 20})
        >>> options.limit(80), options.body
        (4176, {'top_k': 20})
        >>> RequestOptions(extra_body={"seed": 1})
        Traceback (most recent call last):
        ValueError: extra_body: expected parameters that the client does not set, got 'seed'
    """

    answer_tokens: int | None = None
    reasoning_tokens: int = 0
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.answer_tokens is not None:
            check_count("answer_tokens", self.answer_tokens)
        check_count("reasoning_tokens", self.reasoning_tokens, low=0)
        for name in ("chat_template_kwargs", "extra_body"):
            object.__setattr__(self, name, _copied(name, getattr(self, name)))
        for name in self.extra_body:
            if name in RESERVED:
                raise ValueError(
                    f"extra_body: expected parameters that the client does not set, got {name!r}"
                )

    def limit(self, tokens: int) -> int:
        """Return the token limit of a request whose question allows ``tokens`` for its answer."""
        return (self.answer_tokens or tokens) + self.reasoning_tokens

    @property
    def body(self) -> dict[str, Any]:
        """Parameters of a request's body."""
        template = {"chat_template_kwargs": self.chat_template_kwargs}
        return {**self.extra_body, **(template if self.chat_template_kwargs else {})}

    @property
    def settings(self) -> dict[str, Any]:
        """Options that differ from their defaults, by name, for a report."""
        defaults = asdict(RequestOptions())
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    @property
    def stated(self) -> str | None:
        """``settings`` as one line of JSON for a record; ``None`` if all are defaults."""
        return json.dumps(self.settings, sort_keys=True) if self.settings else None


def _copied(name: str, value: object) -> dict[str, Any]:
    """Return a deep copy of a JSON object, independent of later changes by the caller."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name}: expected a JSON object, got {value!r}")
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except RecursionError:
        raise ValueError(f"{name}: expected JSON values, got too deeply nested ones") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected JSON values, got {value!r} ({error})") from error
    return copied
