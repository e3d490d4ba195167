"""A score without an answer in writing: its expectation under the probabilities of one token."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mteditflow._checks import check_choice, check_number
from mteditflow.rewards.faults import AnswerError, Fault
from mteditflow.rewards.judge.answers import SCALES
from mteditflow.rewards.judge.prompts import Request, single_turns
from mteditflow.rewards.judge.wording import RUBRICS, question, token_form
from mteditflow.rewards.transport.chat import ChatAnswer

CANDIDATES = 20  # most that servers give
ROUNDING = 1e-2  # by which probabilities may add up to more than 1


@dataclass(frozen=True)
class ExpectationPrompt:
    r"""Asks for the score of one turn as one token, and takes its expectation.

    .. math:: \hat s = \sum_s s \, p(s) / \sum_s p(s)

    over the labels of the scale, from the likeliest tokens that the server names. Such a score is
    finer than an integer and needs no sampling. One request per turn, without thinking.

    Args:
        scale: "likert", labels 1..5, in [1, 5]; "binary", labels no and yes, the probability of
            yes, in [0, 1].
        min_mass: least probability that the labels must have together; with less the judge wanted
            to say something else, and its score is lost.

    Raises:
        ValueError: the scale is unknown, or the mass not in [0, 1].

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
        """Return one span for each turn: one token holds one score."""
        return single_turns(turns)

    def request(self, instructions: Sequence[str], images: Sequence[str]) -> Request:
        """Build the request about one turn.

        Args:
            instructions: of that turn, [1].
            images: URLs of the image before and after it, [2].

        Raises:
            ValueError: it is not one turn with two images.
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
    """Expected score under the first token's probabilities, renormalised over the labels.

    Tokens that differ from a label in case or in white space around it count as that label. A label
    that is not among the likeliest tokens counts as impossible.

    Args:
        answer: with ``top_logprobs``; log-probabilities in natural logarithm.
        scale: "likert" or "binary".
        min_mass: as in ``ExpectationPrompt``.

    Returns:
        In [1, 5], or in [0, 1].

    Raises:
        AnswerError: no log-probabilities came, they are none, or the labels have too little mass.
    """
    if not answer.top_logprobs or not answer.top_logprobs[0]:
        raise AnswerError(Fault.request_ignored, "expected top_logprobs of one token, got none")
    tokens = answer.top_logprobs[0]
    # A log-probability above 0 is not one; exp of a large one would overflow.
    total = sum(math.exp(min(logprob, 1.0)) for _, logprob in tokens)
    if not total <= 1 + ROUNDING:
        raise AnswerError(Fault.malformed, f"expected probabilities, got a sum of {total:.3g}")
    mass: defaultdict[int, float] = defaultdict(float)
    for token, logprob in tokens:
        score = SCALES[scale].get(token.strip().lower())
        if score is not None:
            mass[score] += math.exp(logprob)
    found = sum(mass.values())
    if found < min_mass or found == 0:
        likeliest = max(tokens, key=lambda item: item[1])[0]
        raise AnswerError(
            Fault.format,
            f"expected probability of at least {min_mass:g} on {', '.join(SCALES[scale])}, "
            f"got {found:.3g}; the likeliest token is {likeliest[:20]!r}",
        )
    return sum(score * p for score, p in mass.items()) / found
