"""Rotation of endpoints: the least busy first, with a circuit breaker for dead ones."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2

from mteditflow._checks import check_count, check_number
from mteditflow.rewards.faults import Fault
from mteditflow.rewards.transport.http_client import AttemptError

LOG = logging.getLogger(__name__)
LONGEST_REST = 3600.0  # s, upper limit of a server's Retry-After
ENDPOINT_FAULTS = (Fault.timeout, Fault.connection, Fault.server_error)


def check_url(name: str, url: str) -> str:
    """Return an endpoint's URL without a trailing slash.

    Raises:
        ValueError: the URL is not http(s)://host[:port][/path]; user names, queries and fragments
            are refused.

    Example:
        >>> check_url("endpoint", "http://127.0.0.1:8000/v1/")
        'http://127.0.0.1:8000/v1'
    """
    shown = url.rpartition("@")[2]  # without a password, since messages are logged
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"{name}: expected http(s)://host[:port][/path], got {shown!r}") from error
    extra = parts.userinfo or parts.query or parts.fragment
    if parts.port is not None and not 0 < parts.port < 2**16:
        raise ValueError(f"{name}: expected a port of 1..65535, got {shown!r}")
    if parts.scheme not in ("http", "https") or not parts.host or extra:
        raise ValueError(f"{name}: expected http(s)://host[:port][/path], got {shown!r}")
    return url.rstrip("/")


@dataclass
class Endpoint:
    """State of one endpoint.

    Attributes:
        url: URL of the endpoint.
        cool_down: duration of its next outage, s.
        in_flight: number of attempts in flight.
        answered: number of attempts that succeeded.
        failed: number of attempts that failed, for any reason.
        faults_in_row: time-outs, broken connections and server errors since its last answer.
        is_out: whether it is taken out; after the cool-down, one probe at a time is sent to it.
        probing: whether that probe is in flight.
        rests_until: time before which no attempt is made, s of ``time.monotonic``.
        last_use: running number of its latest attempt.
    """

    url: str
    cool_down: float
    in_flight: int = 0
    answered: int = 0
    failed: int = 0
    faults_in_row: int = 0
    is_out: bool = False
    probing: bool = False
    rests_until: float = -math.inf
    last_use: int = 0

    @property
    def state(self) -> str:
        """``up``, ``resting`` (the server asked to wait) or ``out`` (it does not answer)."""
        if self.is_out:
            return "out"
        return "resting" if self.rests_until > time.monotonic() else "up"


class Rotation:
    """Choice of the next endpoint, with a circuit breaker.

    An endpoint with several consecutive faults of its own (time-out, connection, server error) is
    taken out for a cool-down. Then one attempt goes through as a probe: if it fails, the cool-down
    doubles; any answer brings the endpoint back. An endpoint that sends Retry-After rests for that
    time and does not count as dead.

    Args:
        urls: URLs of the endpoints, without duplicates.
        faults_to_rest: consecutive faults before an endpoint is taken out, >= 1.
        cool_down: first cool-down, s, > 0.
        max_cool_down: upper limit of the cool-down, s.

    Raises:
        ValueError: there is no URL, one is malformed or occurs twice, or a number is out of range.

    Example:
        >>> rotation = Rotation(["http://a/v1", "http://b/v1"], cool_down=60.0, faults_to_rest=1)
        >>> first = rotation.pick(rotation.urls)
        >>> try:
        ...     with rotation.use(first):
        ...         raise AttemptError(Fault.connection, "refused")
        ... except AttemptError:
        ...     [(endpoint.url, endpoint.state) for endpoint in rotation.endpoints]
        [('http://a/v1', 'out'), ('http://b/v1', 'up')]
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        faults_to_rest: int = 3,
        cool_down: float = 5.0,
        max_cool_down: float = 60.0,
    ) -> None:
        check_count("faults_to_rest", faults_to_rest)
        check_number("cool_down", cool_down, low=0.0, open_low=True)
        check_number("max_cool_down", max_cool_down, low=cool_down)
        if isinstance(urls, str) or not urls:
            raise ValueError(f"endpoints: expected a sequence of URLs, got {urls!r}")
        self.urls = tuple(check_url(f"endpoints[{i}]", url) for i, url in enumerate(urls))
        if len(set(self.urls)) < len(self.urls):
            raise ValueError(f"endpoints: expected each once, got {list(self.urls)}")
        self.endpoints = tuple(Endpoint(url, cool_down) for url in self.urls)
        self._faults_to_rest = faults_to_rest
        self._cool_down, self._max_cool_down = cool_down, max_cool_down
        self._uses = 0

    def pick(self, among: Collection[str], *, avoid: Collection[str] = ()) -> Endpoint | None:
        """Return the least busy endpoint that is ready, the longest unused one on a tie.

        Args:
            among: URLs to choose from.
            avoid: URLs to take only if no other is ready.

        Returns:
            The endpoint, or ``None`` if none is ready.
        """
        now = time.monotonic()
        ready = (e for e in self._candidates(among) if e.rests_until <= now)
        return min(ready, key=lambda e: (e.url in avoid, e.in_flight, e.last_use), default=None)

    def returns_in(self, among: Collection[str]) -> float:
        """Return seconds until one of these endpoints is ready; inf while all are being probed."""
        rests = (endpoint.rests_until for endpoint in self._candidates(among))
        return min(rests, default=math.inf) - time.monotonic()

    @contextmanager
    def use(self, endpoint: Endpoint) -> Iterator[None]:
        """Count an attempt, and update the endpoint's state with its outcome.

        An exception other than ``AttemptError``, such as a cancellation, changes no state.
        """
        probe = endpoint.is_out  # only an attempt that begins during an outage is its probe
        self._uses += 1
        endpoint.last_use = self._uses
        endpoint.in_flight += 1
        endpoint.probing |= probe
        try:
            yield
        except AttemptError as failure:
            endpoint.failed += 1
            self._judge(endpoint, failure, probe=probe)
            raise
        else:
            endpoint.answered += 1
            self._bring_back(endpoint)
        finally:
            endpoint.in_flight -= 1
            if probe:
                endpoint.probing = False

    def _candidates(self, among: Collection[str]) -> list[Endpoint]:
        return [e for e in self.endpoints if e.url in among and not e.probing]

    def _judge(self, endpoint: Endpoint, failure: AttemptError, *, probe: bool) -> None:
        if failure.retry_after is not None:  # an answer of a server that is alive
            self._bring_back(endpoint)
            rest = min(failure.retry_after, LONGEST_REST)
            endpoint.rests_until = max(endpoint.rests_until, time.monotonic() + rest)
        elif failure.fault in ENDPOINT_FAULTS:
            endpoint.faults_in_row += 1
            # Attempts already in flight when the endpoint was taken out do not count again.
            if probe or (not endpoint.is_out and endpoint.faults_in_row >= self._faults_to_rest):
                self._take_out(endpoint, failure)
        else:
            self._bring_back(endpoint)

    def _take_out(self, endpoint: Endpoint, failure: AttemptError) -> None:
        LOG.warning("%s is out for %g s: %s", endpoint.url, endpoint.cool_down, failure)
        endpoint.is_out = True
        endpoint.rests_until = time.monotonic() + endpoint.cool_down
        endpoint.cool_down = min(2 * endpoint.cool_down, self._max_cool_down)

    def _bring_back(self, endpoint: Endpoint) -> None:
        endpoint.faults_in_row = 0
        if endpoint.is_out:
            LOG.warning("%s is back", endpoint.url)
            endpoint.is_out, endpoint.cool_down = False, self._cool_down
            endpoint.rests_until = -math.inf
