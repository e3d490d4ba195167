"""Faults of an answer: one vocabulary for the judge, content consistency and the planner.

A failed attempt raises ``AnswerError`` and is retried a bounded number of times. An answer that is
still missing then is a ``Lost``. Nothing in this library turns a ``Lost`` into a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from mteditflow._text import escape_controls


class Fault(Enum):
    """Reason why one attempt failed."""

    timeout = "time-out"
    connection = "no connection"
    rate_limited = "too many requests (429)"
    server_error = "server error (5xx)"
    redirected = "redirected elsewhere (3xx)"
    rejected = "request rejected (4xx)"
    malformed = "not an answer of this protocol"
    refusal = "refusal"
    cut_off = "cut off at the token limit"
    reasoning = "reasoning without an answer"
    format = "answer not in the format that was asked for"
    wrong_count = "wrong number of scores"
    out_of_range = "score out of range"
    not_a_number = "score is not a number"
    senseless = "answer makes no sense"
    request_ignored = "server ignored part of the request"
    unavailable = "no endpoint was available"


class AnswerError(Exception):
    """One attempt failed; the caller decides whether to retry.

    Args:
        fault: kind of failure.
        detail: what was expected and what came, for the log; control characters, which a server's
            words may hold, are escaped.

    Example:
        >>> raise AnswerError(Fault.out_of_range, "expected 1..5, got 7")
        Traceback (most recent call last):
        mteditflow.rewards.faults.AnswerError: score out of range: expected 1..5, got 7
    """

    def __init__(self, fault: Fault, detail: str) -> None:
        detail = escape_controls(detail)
        super().__init__(fault, detail)
        self.fault, self.detail = fault, detail

    def __str__(self) -> str:
        return f"{self.fault.value}: {self.detail}"


@dataclass(frozen=True)
class Lost:
    """An answer that is missing after all attempts.

    Attributes:
        fault: fault of the last attempt.
        detail: what was expected and what came, in the last attempt.
        attempts: number of attempts.
    """

    fault: Fault
    detail: str
    attempts: int

    def __str__(self) -> str:
        times = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        return f"{self.fault.value} after {times}: {self.detail}"
