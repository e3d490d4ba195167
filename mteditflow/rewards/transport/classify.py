"""What an exception of an HTTP client says: which fault, and what to do about it.

The library knows the ``openai`` client and ``httpx2``. Any other exception is a bug of the caller's
and is not a fault of an answer.
"""

from __future__ import annotations

import json
import math
import ssl
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

import anyio
import httpx2
import openai
import pydantic

from mteditflow.rewards.faults import AnswerError, Fault

SHOWN = 300  # characters of a server's own words in a detail
CUT = " ..."  # after words that were more
MALFORMED = (
    openai.APIResponseValidationError,
    pydantic.ValidationError,
    json.JSONDecodeError,
    UnicodeDecodeError,
    RecursionError,  # JSON nested without end
    httpx2.DecodingError,
    httpx2.TooManyRedirects,
)
BROKEN = (openai.APIConnectionError, httpx2.TransportError, ssl.SSLError, anyio.EndOfStream)
# Statuses that say "not now"; every other 4xx says "never", at this endpoint.
STATUSES = {408: Fault.timeout, 409: Fault.rejected, 425: Fault.rejected, 429: Fault.rate_limited}


class AttemptError(AnswerError):
    """One attempt failed, and what that means for the next one.

    Args:
        fault: what kind of failure.
        detail: what was expected and what came.
        retry_after: seconds that the server asks to wait, ``None`` if it does not.
        here_again: whether the same request may be tried again at the same endpoint.
    """

    def __init__(
        self,
        fault: Fault,
        detail: str,
        *,
        retry_after: float | None = None,
        here_again: bool = True,
    ) -> None:
        super().__init__(fault, detail)
        self.retry_after, self.here_again = retry_after, here_again


def classify(error: Exception) -> AttemptError | None:
    """Say which fault an exception stands for.

    Args:
        error: raised by one HTTP exchange or by what read its answer.

    Returns:
        The failure, or ``None`` for an exception that is no fault of an answer.

    Example:
        >>> request = httpx2.Request("POST", "http://127.0.0.1/v1")
        >>> response = httpx2.Response(429, headers={"Retry-After": "7"}, request=request)
        >>> failure = classify(httpx2.HTTPStatusError("", request=request, response=response))
        >>> failure.fault, failure.retry_after
        (<Fault.rate_limited: 'too many requests (429)'>, 7.0)
    """
    if isinstance(error, AnswerError):
        return AttemptError(error.fault, error.detail)
    if isinstance(error, (openai.APIStatusError, httpx2.HTTPStatusError)):
        return _of_status(error.response)
    if isinstance(error, (TimeoutError, openai.APITimeoutError, httpx2.TimeoutException)):
        return AttemptError(Fault.timeout, _words(error))
    if isinstance(error, MALFORMED):
        return AttemptError(Fault.malformed, _words(error))
    if isinstance(error, BROKEN):
        return AttemptError(Fault.connection, _words(error.__cause__ or error))
    return None


def shorten(text: str) -> str:
    """Bring a server's words to one line of bounded length."""
    line = " ".join(text[: 2 * SHOWN].split())
    return line if len(line) <= SHOWN else line[:SHOWN] + CUT


def retry_after(header: str | None) -> float | None:
    """Read a Retry-After header, seconds or an HTTP date, as seconds from now.

    Returns:
        Seconds, >= 0; ``None`` where there is no header or it makes no sense.

    Source: RFC 9110, section 10.2.3.

    Example:
        >>> retry_after("2.5"), retry_after("Thu, 01 Jan 1970 00:00:00 GMT"), retry_after("soon")
        (2.5, 0.0, None)
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except (ValueError, OverflowError):
            return None
        zone = date.tzinfo or timezone.utc
        return max(0.0, (date.replace(tzinfo=zone) - datetime.now(timezone.utc)).total_seconds())
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _of_status(response: httpx2.Response) -> AttemptError:
    status = response.status_code
    fault = Fault.server_error if status >= 500 else STATUSES.get(status, Fault.rejected)
    header = response.headers.get("retry-after")
    wait = "" if header is None else f" (Retry-After: {shorten(header)})"
    return AttemptError(
        fault,
        f"HTTP {status}{wait}: {shorten(response.text)}",
        retry_after=retry_after(header),
        here_again=status >= 500 or status in STATUSES,
    )


def _words(error: BaseException) -> str:
    return shorten(f"{type(error).__name__}: {error}").rstrip(":")
