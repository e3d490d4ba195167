"""Micro-batching: waiting requests are processed together, each with its own answer."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import anyio

from mteditflow._checks import check_count, check_number

LOG = logging.getLogger(__name__)
ENDED = "expected a request while the worker runs, got one after its end"

Q = TypeVar("Q")
A = TypeVar("A")
R = TypeVar("R")


@dataclass(eq=False)
class _Job(Generic[Q, A]):
    request: Q
    answer: asyncio.Future[A] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class MicroBatcher(Generic[Q, A]):
    """Processing of requests in batches, in one thread, in order of arrival.

    The requests of a failed batch are retried one by one, so that only the faulty one fails. A
    request whose caller is cancelled is dropped, unless its batch has begun. The caller must limit
    the number of waiting requests.

    Args:
        work: function that returns one answer for each request, in order; it runs in its own
            thread, never twice at a time.
        max_batch: maximum number of requests in one batch.
        max_wait: longest wait of a request for others to join its batch while the thread is idle,
            s.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> async def ask() -> list[int]:
        ...     batcher = MicroBatcher(lambda numbers: [n * n for n in numbers])
        ...     worker = asyncio.create_task(batcher.run())
        ...     answers = await asyncio.gather(batcher.submit(2), batcher.submit(3))
        ...     worker.cancel()
        ...     return answers
        >>> asyncio.run(ask())
        [4, 9]
    """

    def __init__(
        self,
        work: Callable[[list[Q]], Sequence[A]],
        *,
        max_batch: int = 8,
        max_wait: float = 0.005,
    ) -> None:
        check_count("max_batch", max_batch)
        check_number("max_wait", max_wait, low=0.0)
        self._work, self._max_batch, self._max_wait = work, max_batch, max_wait
        self._waiting: deque[_Job[Q, A]] = deque()
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "mteditflow-scorer")
        self._ended = False
        self.working = False  # whether the thread is running

    async def submit(self, request: Q) -> A:
        """Wait for the answer to one request.

        Raises:
            Exception: the exception of ``work`` for this request alone.
            RuntimeError: ``run`` has ended.
        """
        if self._ended:  # no one would ever answer
            raise RuntimeError(ENDED)
        job = _Job[Q, A](request)
        self._waiting.append(job)
        self._arrival.set()
        try:
            return await job.answer
        finally:
            if job in self._waiting:
                self._waiting.remove(job)

    async def run(self) -> None:
        """Process batches until cancelled."""
        try:
            while True:
                if jobs := await self._next_batch():
                    try:
                        await self._answer(jobs)
                    finally:
                        _fail_pending(jobs)
        finally:
            self._ended = True
            self._thread.shutdown(wait=False, cancel_futures=True)
            _fail_pending(self._waiting)

    async def in_thread(self, function: Callable[..., R], *args: Any) -> R:
        """Run a function in the thread that processes the batches."""

        def work() -> R:
            self.working = True
            try:
                return function(*args)
            finally:
                self.working = False

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _next_batch(self) -> list[_Job[Q, A]]:
        await self._arrivals(1)
        with anyio.move_on_after(self._max_wait):  # a full batch ends the wait early
            await self._arrivals(self._max_batch)
        count = min(len(self._waiting), self._max_batch)
        return [self._waiting.popleft() for _ in range(count)]

    async def _arrivals(self, count: int) -> None:
        while len(self._waiting) < count:
            self._arrival.clear()
            await self._arrival.wait()

    async def _answer(self, jobs: list[_Job[Q, A]]) -> None:
        try:
            answers = await self.in_thread(self._checked_work, [job.request for job in jobs])
        except Exception as error:
            if len(jobs) > 1:  # one bad request must not cost the others their answers
                LOG.warning("a batch of %d failed (%r): retrying one by one", len(jobs), error)
                for job in jobs:
                    if not job.answer.done():
                        await self._answer([job])
            elif not jobs[0].answer.done():
                jobs[0].answer.set_exception(error)
        else:
            for job, answer in zip(jobs, answers, strict=True):
                if not job.answer.done():  # a cancelled caller has no use for it
                    job.answer.set_result(answer)

    def _checked_work(self, requests: list[Q]) -> Sequence[A]:
        answers = self._work(requests)
        if len(answers) != len(requests):
            raise RuntimeError(f"expected {len(requests)} answers of a batch, got {len(answers)}")
        return answers


def _fail_pending(jobs: Iterable[_Job[Any, Any]]) -> None:
    """Set an exception on every job without an answer, so that no caller waits forever."""
    for job in jobs:
        if not job.answer.done():
            job.answer.set_exception(RuntimeError(ENDED))
