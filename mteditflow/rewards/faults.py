"""Faults of an answer, shared by the judge, content consistency and the planner.

A failed attempt raises ``AnswerError`` and is retried a bounded number of times. If the answer is
still missing then, the result is a ``Lost``. Nothing in this library turns a ``Lost`` into a
number.
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
    """Failure of one attempt; the caller decides whether to retry.

    Args:
        fault: kind of failure.
        detail: expected and received answer, for the log; control characters, which a server's
            text may contain, are escaped.

    Example:
        >>> raise AnswerError(Fault.out_of_range, "expected 1..5, got 7")
        Traceback (most recent call last):
        mteditflow.rewards.faults.AnswerError: score out of range: expected 1..5, got 7
    """

    def __init__(self, fault: Fault, detail: str) -> None:
        detail = escape_controls(detail)
        super().__init__(fault, detail)  # both, so that the exception can be pickled
        self.fault, self.detail = fault, detail

    def __str__(self) -> str:
        return f"{self.fault.value}: {self.detail}"


@dataclass(frozen=True)
class Lost:
    """Answer that is missing after all attempts.

    Attributes:
        fault: fault of the last attempt.
        detail: expected and received answer of the last attempt.
        attempts: number of attempts.
    """

    fault: Fault
    detail: str
    attempts: int

    def __str__(self) -> str:
        times = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        return f"{self.fault.value} after {times}: {self.detail}"
