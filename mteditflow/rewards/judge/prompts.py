"""Prompts of a judge about a chain, for written scores or for expected scores over tokens.

A request shows an image and, for each of N turns, the instruction and the image after it. A request
about a single turn is the same with a chain of one turn.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from mteditflow._checks import check_choice, check_number
from mteditflow.rewards.faults import AnswerError, Fault
from mteditflow.rewards.judge.answers import SCALES, parse_json, parse_text
from mteditflow.rewards.judge.wording import RUBRICS, json_form, question, text_form, token_form
from mteditflow.rewards.transport.chat import ChatAnswer

LONGEST_ANALYSIS = 400  # characters for each turn, if the server enforces the schema
CANDIDATES = 20  # log-probabilities of a token; the API's maximum of top_logprobs
ROUNDING = 1e-2  # rounding by which the sum of probabilities may exceed 1


@dataclass(frozen=True)
class Request:
    """One question to a judge: the arguments of ``ChatClient.ask``.

    Attributes:
        content: text and image_url parts of the message.
        read: parser of the answer to one score per turn, which raises ``AnswerError``.
        max_tokens: token limit of the answer.
        schema: JSON schema of the answer, for a server that enforces one.
        top_logprobs: number of likeliest tokens to return, if any.
    """

    content: list[dict[str, Any]]
    read: Callable[[ChatAnswer], tuple[float, ...]]
    max_tokens: int
    schema: dict[str, Any] | None = None
    top_logprobs: int | None = None


class Prompt(Protocol):
    """Prompt of a ``Judge``."""

    def spans(self, turns: int) -> list[range]:
        """Return the turns, counted from 0, that each request about a chain covers."""

    def request(self, instructions: Sequence[str], images: Sequence[str]) -> Request:
        """Build the request about N instructions and the URLs of N + 1 images."""


@dataclass(frozen=True)
class JudgePrompt:
    r"""Prompt for written scores, one per turn.

    Args:
        scope: "trajectory" for one request about all turns of a chain, "turn" for one per turn.
        scale: "likert", 1..5, or "binary", 0 or 1.
        thinking: whether a short analysis of each turn precedes its score.
        answer_format: "json" for a server that enforces a JSON schema; "text" for any other, one
            line per turn.

    Raises:
        ValueError: an argument is none of these choices.

    Source: MT-EditFlow (arXiv 2606.01985) for scopes, scales and modes; the wording is this
        library's own.

    Example:
        >>> prompt = JudgePrompt(thinking=False, answer_format="text")
        >>> request = prompt.request(["Remove a cat", "Add a dog"], ["data:0", "data:1", "data:2"])
        >>> request.content[-1]["text"].splitlines()[1:]
        ['Turn 1: <score of turn 1>', 'Turn 2: <score of turn 2>']
        >>> request.read(ChatAnswer(text="Turn 1: 5\nTurn 2: 3"))
        (5, 3)
    """

    scope: str = "trajectory"
    scale: str = "likert"
    thinking: bool = True
    answer_format: str = "json"

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, ("trajectory", "turn"))
        check_choice("scale", self.scale, tuple(SCALES))
        check_choice("answer_format", self.answer_format, ("json", "text"))

    def spans(self, turns: int) -> list[range]:
        """Return the turns, counted from 0, that each request about a chain covers."""
        return [range(turns)] if self.scope == "trajectory" else single_turns(turns)

    def request(self, instructions: Sequence[str], images: Sequence[str]) -> Request:
        """Build the request about N turns.

        Args:
            instructions: instruction of each turn, [N].
            images: URLs of the image before the first turn and of the one after each turn, [N + 1].

        Raises:
            ValueError: there is no turn, or the number of images is not one above that of
                instructions.
        """
        structured, turns = self.answer_format == "json", len(instructions)
        parse, form = (parse_json, json_form) if structured else (parse_text, text_form)
        read = partial(parse, turns=turns, scale=self.scale, thinking=self.thinking)
        return Request(
            content=question(
                instructions,
                images,
                rubric=RUBRICS[self.scale],
                names=self._names,
                form=form(turns, names=self._names, thinking=self.thinking),
            ),
            read=lambda answer: read(answer.text),
            max_tokens=32 + turns * (16 + 512 * self.thinking),
            schema=self.schema(turns) if structured else None,
        )

    def schema(self, turns: int) -> dict[str, Any]:
        """Return the JSON schema of an answer about N turns; analysis precedes score."""
        score = {"type": "integer", "enum": sorted(SCALES[self.scale].values())}
        if not self.thinking:
            return _only_key("scores", score, turns)
        analysis = {"type": "string", "minLength": 1, "maxLength": LONGEST_ANALYSIS}
        # Servers generate keys in the schema's order, so the analysis can inform the score.
        return _only_key("turns", object_schema({"analysis": analysis, "score": score}), turns)

    @property
    def _names(self) -> Mapping[str, int]:
        """Written form of each score: words in text, integers in JSON."""
        labels = SCALES[self.scale]
        if self.answer_format == "text":
            return labels
        return {str(score): score for score in labels.values()}


@dataclass(frozen=True)
class ExpectationPrompt:
    r"""Prompt for the expected score of one turn under the distribution of a single token.

    .. math:: \hat s = \sum_s s \, p(s) / \sum_s p(s)

    over the labels of the scale, from the likeliest tokens that the server returns. This score is
    finer than an integer and needs no sampling. It takes one request per turn, without thinking.

    Args:
        scale: "likert", labels 1..5, score in [1, 5]; or "binary", labels no and yes, score in
            [0, 1], the probability of yes.
        min_mass: minimum total probability of the labels, in [0, 1]; below it the model was about
            to write something else, and the score is lost.

    Raises:
        ValueError: the scale is unknown, or ``min_mass`` is not in [0, 1].

    Source: Edit-R1 for the expectation over digits.

    Example:
        >>> request = ExpectationPrompt("binary").request(["Remove the cat"], ["data:0", "data:1"])
        >>> tokens = (("yes", math.log(0.6)), (" Yes", math.log(0.12)), ("no", math.log(0.18)))
        >>> (score,) = request.read(ChatAnswer(text="yes", top_logprobs=(tokens,)))
        >>> round(score, 6)
        0.8
    """

    scale: str = "likert"
    min_mass: float = 0.5

    def __post_init__(self) -> None:
        check_choice("scale", self.scale, tuple(SCALES))
        check_number("min_mass", self.min_mass, low=0.0, high=1.0)

    def spans(self, turns: int) -> list[range]:
        """Return one span for each turn, since a token holds one score."""
        return single_turns(turns)

    def request(self, instructions: Sequence[str], images: Sequence[str]) -> Request:
        """Build the request about one turn.

        Args:
            instructions: instruction of the turn, [1].
            images: URLs of the images before and after the turn, [2].

        Raises:
            ValueError: there is not exactly one instruction with two images.
        """
        if len(instructions) != 1:
            raise ValueError(f"instructions: expected that of one turn, got {len(instructions)}")
        labels = SCALES[self.scale]
        return Request(
            content=question(
                instructions,
                images,
                rubric=RUBRICS[self.scale],
                names=labels,
                form=token_form(labels),
            ),
            read=lambda answer: (expectation(answer, scale=self.scale, min_mass=self.min_mass),),
            max_tokens=1,
            top_logprobs=CANDIDATES,
        )


def expectation(answer: ChatAnswer, *, scale: str, min_mass: float) -> float:
    """Return the expected score under the first token's probabilities, normalized over the labels.

    Tokens that differ from a label only in case or surrounding white space count as that label. A
    label that is not among the likeliest tokens has probability 0.

    Args:
        answer: answer with ``top_logprobs`` (natural logarithm).
        scale: "likert" or "binary".
        min_mass: as in ``ExpectationPrompt``.

    Returns:
        Score in [1, 5] ("likert") or [0, 1] ("binary").

    Raises:
        AnswerError: there are no log-probabilities, they are invalid, or the total probability of
            the labels is below ``min_mass``.
    """
    if not answer.top_logprobs or not answer.top_logprobs[0]:
        raise AnswerError(Fault.request_ignored, "expected top_logprobs of one token, got none")
    tokens = answer.top_logprobs[0]
    # A log-probability above 0 is invalid; clamped, since exp of a large one would overflow.
    total = sum(math.exp(min(logprob, 1.0)) for _, logprob in tokens)
    if not total <= 1 + ROUNDING:
        raise AnswerError(Fault.malformed, f"expected probabilities, got a sum of {total:.3g}")
    mass: defaultdict[int, float] = defaultdict(float)
    for token, logprob in tokens:
        score = SCALES[scale].get(token.strip().lower())
        if score is not None:
            mass[score] += math.exp(logprob)
    total_mass = sum(mass.values())
    if total_mass < min_mass or total_mass == 0:
        likeliest = max(tokens, key=lambda item: item[1])[0]
        raise AnswerError(
            Fault.format,
            f"expected probability of at least {min_mass:g} on {', '.join(SCALES[scale])}, "
            f"got {total_mass:.3g}; the likeliest token is {likeliest[:20]!r}",
        )
    return sum(score * p for score, p in mass.items()) / total_mass


def single_turns(turns: int) -> list[range]:
    """Return one span for each of N turns."""
    return [range(n, n + 1) for n in range(turns)]


def object_schema(properties: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of an object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _only_key(key: str, item: dict[str, Any], count: int) -> dict[str, Any]:
    array = {"type": "array", "items": item, "minItems": count, "maxItems": count}
    return object_schema({key: array})
