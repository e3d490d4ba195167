"""Attempts at several endpoints: concurrency, deadlines, retries with back-off."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import anyio
from anyio.lowlevel import RunVar
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from mteditflow._checks import check_count, check_number
from mteditflow.rewards.faults import Fault, Lost
from mteditflow.rewards.transport.endpoints import Endpoint, Rotation
from mteditflow.rewards.transport.http_client import CUT, AttemptError, classify

T = TypeVar("T")
HIDDEN = "***"
POLL = 1.0  # s; the end of a probe in another event loop does not wake up this one


@dataclass(frozen=True)
class Statistics:
    """Counts of a dispatcher so far, for a log.

    Attributes:
        answered: number of answered requests.
        lost: number of requests without an answer after all attempts.
        attempts: number of attempts of all requests.
        faults: reason to the number of attempts that failed for it.
        endpoints: URL to its state, ``up``, ``resting`` or ``out``.
    """

    answered: int
    lost: int
    attempts: int
    faults: Mapping[str, int]
    endpoints: Mapping[str, str]


@dataclass
class _Request:
    """State of one request across its attempts."""

    open: set[str]  # endpoints that have not rejected the request
    failed: set[str] = field(default_factory=set)
    attempts: int = 0
    last: AttemptError | None = None


class _Loop:
    """State of one event loop; anyio's primitives belong to the loop that they are used in."""

    def __init__(self, concurrency: int) -> None:
        self.slots = anyio.Semaphore(concurrency)
        self.changed = anyio.Event()

    def notify(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()


class Dispatcher:
    """Dispatcher of requests to several endpoints, with retries until one attempt succeeds.

    Every attempt has a deadline around the whole exchange, so slow bytes do not prolong it. Failed
    attempts are retried after an exponential back-off with full jitter, if possible at an endpoint
    that has not failed this request. A request that the server rejects (4xx) is never repeated at
    that endpoint. If all endpoints rest or are out, a request waits for the first one to return. A
    dispatcher may be used from several event loops.

    Args:
        endpoints: URLs of the endpoints.
        concurrency: maximum number of attempts in flight, in each event loop.
        timeout: deadline of one attempt, s.
        attempts: maximum number of attempts for one request.
        back_off: base of the back-off, s; the n-th pause is uniform on [0, back_off 2^(n - 1)].
        max_back_off: upper limit of that interval's end, s.
        patience: longest wait of a request for endpoints to return, s. An endpoint that demands a
            longer wait (Retry-After) is not waited for.
        faults_to_rest: consecutive faults after which the circuit breaker takes an endpoint out.
        cool_down: first time for which it is out, s; doubles at each failed probe.
        max_cool_down: upper limit of that time, s.
        secret: key or token that must not appear in any message.

    Raises:
        ValueError: a number is out of range, a URL malformed, the secret not printable ASCII.

    Example:
        >>> async def attempt(endpoint):
        ...     return f"answer of {endpoint}"
        >>> anyio.run(Dispatcher(["http://127.0.0.1:8000/v1"]).run, attempt)
        'answer of http://127.0.0.1:8000/v1'
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        concurrency: int = 64,
        timeout: float = 120.0,
        attempts: int = 4,
        back_off: float = 0.5,
        max_back_off: float = 20.0,
        patience: float = 300.0,
        faults_to_rest: int = 3,
        cool_down: float = 5.0,
        max_cool_down: float = 60.0,
        secret: str | None = None,
    ) -> None:
        check_count("concurrency", concurrency)
        check_number("timeout", timeout, low=0.0, open_low=True)
        check_count("attempts", attempts)
        check_number("back_off", back_off, low=0.0)
        check_number("max_back_off", max_back_off, low=back_off)
        check_number("patience", patience, low=0.0)
        if secret is not None and not (secret.isascii() and secret.isprintable() and secret):
            raise ValueError(
                "secret: expected a key or token of printable ASCII (OPENAI_API_KEY, "
                "MTEDITFLOW_TOKEN), got an empty one or other characters"
            )
        self._rotation = Rotation(
            endpoints,
            faults_to_rest=faults_to_rest,
            cool_down=cool_down,
            max_cool_down=max_cool_down,
        )
        self._concurrency, self._timeout, self._attempts = concurrency, timeout, attempts
        self._wait = wait_random_exponential(multiplier=back_off, max=max_back_off)
        self._patience, self._secret = patience, secret
        self._loops: RunVar[_Loop] = RunVar("mteditflow dispatcher")
        self._counts: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """URLs of the endpoints, without trailing slashes."""
        return self._rotation.urls

    @property
    def statistics(self) -> Statistics:
        """Counts so far, and the state of each endpoint."""
        counts = self._counts
        states = {endpoint.url: endpoint.state for endpoint in self._rotation.endpoints}
        faults = dict(self._faults.most_common())
        return Statistics(counts["answered"], counts["lost"], counts["attempts"], faults, states)

    async def run(self, attempt: Callable[[str], Awaitable[T]]) -> T | Lost:
        """Make attempts until one returns.

        Args:
            attempt: function of an endpoint's URL that does one exchange and returns its answer. It
                raises ``AnswerError`` or an exception of ``httpx2``. Any other exception is a bug
                and propagates.

        Returns:
            The result of the attempt, or ``Lost`` with the reason of the last failure.
        """
        request = _Request(set(self.endpoints))
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._attempts),
            wait=self._wait,
            # No retry once every endpoint has rejected the request.
            retry=retry_if_exception(lambda e: isinstance(e, AttemptError) and bool(request.open)),
            sleep=anyio.sleep,
            reraise=True,
        )
        try:
            answer: T = await retrying(self._try_once, attempt, request)
        except AttemptError as failure:
            self._counts["lost"] += 1
            return Lost(failure.fault, failure.detail, request.attempts)
        self._counts["answered"] += 1
        return answer

    async def _try_once(self, attempt: Callable[[str], Awaitable[T]], request: _Request) -> T:
        loop = self._loop()
        async with loop.slots:
            endpoint = await self._endpoint_for(request, loop)
            request.attempts += 1
            self._counts["attempts"] += 1
            try:
                with self._rotation.use(endpoint):
                    return await self._against_deadline(attempt, endpoint.url)
            except AttemptError as failure:
                self._faults[failure.fault.value] += 1
                request.last = failure
                request.failed.add(endpoint.url)
                if not failure.here_again:
                    request.open.discard(endpoint.url)
                raise
            finally:
                loop.notify()  # the attempt may have brought its endpoint back

    async def _against_deadline(self, attempt: Callable[[str], Awaitable[T]], url: str) -> T:
        try:
            with anyio.move_on_after(self._timeout):  # falls through to the time-out below
                return await attempt(url)
        except Exception as error:
            failure = classify(error)
            if failure is None:
                raise
            raise self._about(url, failure) from error
        raise self._about(url, AttemptError(Fault.timeout, f"no answer within {self._timeout:g} s"))

    def _about(self, url: str, failure: AttemptError) -> AttemptError:
        """Return a failure with the endpoint's URL in its detail and the secret hidden."""
        detail = f"{url}: {failure.detail}"
        if self._secret is not None:
            detail = _hide(self._secret, detail)
        return AttemptError(
            failure.fault,
            detail,
            retry_after=failure.retry_after,
            here_again=failure.here_again,
        )

    async def _endpoint_for(self, request: _Request, loop: _Loop) -> Endpoint:
        """Wait for a ready endpoint; the caller must use it before it awaits anything.

        Otherwise another request could pick the same one, such as for a second probe.
        """
        until = anyio.current_time() + self._patience
        while (endpoint := self._rotation.pick(request.open, avoid=request.failed)) is None:
            rest, left = self._rotation.returns_in(request.open), until - anyio.current_time()
            if left <= 0 or left < rest < math.inf:
                raise self._unavailable(request)
            with anyio.move_on_after(min(rest, left, POLL)):
                await loop.changed.wait()
        return endpoint

    def _unavailable(self, request: _Request) -> AttemptError:
        request.open.clear()  # ends the retries of ``run``
        detail = f"no endpoint comes back within {self._patience:g} s"
        if request.last is None:
            return AttemptError(Fault.unavailable, detail)
        return AttemptError(request.last.fault, f"{request.last.detail}; {detail}")

    def _loop(self) -> _Loop:
        loop = self._loops.get(None)
        if loop is None:
            loop = _Loop(self._concurrency)
            self._loops.set(loop)
        return loop


def _hide(secret: str, detail: str) -> str:
    """Remove a secret from a server's message, which may be truncated in the middle of it."""
    detail = detail.replace(secret, HIDDEN)
    # The longest prefix first, or a shorter one would leave characters of the secret before it.
    for length in range(len(secret) - 1, 0, -1):
        if detail.endswith(f"{secret[:length]}{CUT}"):
            return detail.removesuffix(f"{secret[:length]}{CUT}") + HIDDEN + CUT
    return detail
