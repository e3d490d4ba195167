"""Concurrent calls: many at once in an event loop, or in the background of synchronous code."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, ParamSpec, TypeVar

import anyio

LOG = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
THREAD = "mteditflow-rewards"  # name of the thread of a Background
GRACE = 5.0  # s within which cancelled calls must end


async def gather(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Make all calls at once and return their results in order.

    An exception in one cancels the others.

    Example:
        >>> async def number(n):
        ...     await anyio.sleep(0.01 / (1 + n))
        ...     return n
        >>> anyio.run(gather, [lambda: number(0), lambda: number(1)])
        [0, 1]
    """
    results: dict[int, T] = {}

    async def call(i: int) -> None:
        results[i] = await calls[i]()

    async with anyio.create_task_group() as tasks:
        for i in range(len(calls)):
            tasks.start_soon(call, i)
    return [results[i] for i in range(len(calls))]


class Background:
    """Event loop in its own thread, so that a synchronous trainer samples while rewards arrive.

    Leaving the ``with`` block waits for submitted calls; an exception cancels them. A blocking
    call, such as ``time.sleep``, cannot be cancelled: 5 s after an exception it is abandoned with a
    warning in the log. Its thread ends with the process (see ``ending_past_calls``).

    Raises:
        RuntimeError: ``submit`` was called outside of the block.

    Example:
        >>> async def score(batch: int) -> str:
        ...     return f"rewards of batch {batch}"
        >>> with Background() as background:
        ...     rewards = background.submit(score, 1)
        ...     "sampling of batch 2", rewards.result()
        ('sampling of batch 2', 'rewards of batch 1')
    """

    def __init__(self) -> None:
        self._calls: _Calls | None = None

    def __enter__(self) -> Background:
        """Start the thread."""
        self._calls = _Calls()
        return self

    def __exit__(self, *error: Any) -> None:
        """Wait for submitted calls, or cancel them after an exception; end the thread."""
        calls, self._calls = self._calls, None
        if calls is not None and not calls.end(cancel=error[0] is not None):
            LOG.warning("a scorer was still running %g s after its cancellation", GRACE)

    def submit(
        self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        """Start an asynchronous function without waiting; any thread may call this.

        Returns:
            Its future: ``result()`` waits for the result or raises the function's exception,
            ``cancel()`` cancels the function.
        """
        if self._calls is None:
            raise RuntimeError("Background: expected submit() inside of its `with` block")
        return self._calls.start(partial(function, *args, **kwargs))


class _Calls:
    """Calls in an event loop of another thread; only ``end`` waits for them.

    The thread is a daemon, so that a blocking call does not keep the program alive.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._scopes: set[anyio.CancelScope] = set()
        self._cancelling = False
        self._ending = asyncio.Event()
        started: Future[asyncio.AbstractEventLoop] = Future()
        serve = partial(asyncio.run, self._serve(started))
        self._thread = threading.Thread(target=serve, name=THREAD, daemon=True)
        self._thread.start()
        self._loop = started.result()

    async def _serve(self, started: Future[asyncio.AbstractEventLoop]) -> None:
        started.set_result(asyncio.get_running_loop())
        await self._ending.wait()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def start(self, call: Callable[[], Awaitable[T]]) -> Future[T]:
        """Start a call soon."""
        future: Future[T] = Future()
        self._soon(self._begin, future, call)
        return future

    def end(self, *, cancel: bool) -> bool:
        """End the thread after all calls and return whether it ended.

        With ``cancel``, calls are cancelled and the wait is at most ``GRACE`` seconds.
        """
        if cancel:
            self._soon(self._cancel)
        self._soon(self._ending.set)
        self._thread.join(GRACE if cancel else None)
        return not self._thread.is_alive()

    def _begin(self, future: Future[T], call: Callable[[], Awaitable[T]]) -> None:
        task = self._loop.create_task(self._settle(future, call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _settle(self, future: Future[T], call: Callable[[], Awaitable[T]]) -> None:
        """Set the result of a call, or its exception of any kind, on a future."""
        try:
            with self._cancelled_with(future):
                result = await call()
                if future.set_running_or_notify_cancel():
                    future.set_result(result)
        except asyncio.CancelledError:  # raised by the call itself
            _notify_cancelled(future)
        except BaseException as error:  # SystemExit too: it must reach the caller, not end the loop
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    @contextmanager
    def _cancelled_with(self, future: Future[T]) -> Iterator[None]:
        """Cancel the block as soon as its future or all calls are cancelled."""
        with anyio.CancelScope() as scope:
            self._scopes.add(scope)
            future.add_done_callback(partial(self._cancel_with, scope))
            if self._cancelling:  # submitted before the cancellation, begun after it
                scope.cancel()
            try:
                yield
            finally:
                self._scopes.discard(scope)
        if scope.cancelled_caught:
            _notify_cancelled(future)

    def _cancel_with(self, scope: anyio.CancelScope, future: Future[T]) -> None:
        if future.cancelled():
            self._soon(scope.cancel)

    def _cancel(self) -> None:
        self._cancelling = True
        for scope in self._scopes:
            scope.cancel()

    def _soon(self, function: Callable[..., object], *args: object) -> None:
        with suppress(RuntimeError):  # the loop is closed, so every call has ended
            self._loop.call_soon_threadsafe(function, *args)


def _notify_cancelled(future: Future[T]) -> None:
    future.cancel()
    future.set_running_or_notify_cancel()  # notifies concurrent.futures.wait, as cancel() does not


@contextmanager
def ending_past_calls() -> Iterator[None]:
    """End the process after the block if a ``Background`` has abandoned a call.

    Python would otherwise wait for threads that such a call has started. Exit code and messages are
    those of a normal end of the block. If no call was abandoned, this does nothing.

    Example:
        >>> with ending_past_calls(), Background() as background:
        ...     background.submit(anyio.sleep, 0).result()
    """
    try:
        yield
    except BaseException as error:
        if _left_behind():
            _end(_status(error))
        raise
    if _left_behind():
        _end(0)


def _left_behind() -> bool:
    return any(thread.name == THREAD for thread in threading.enumerate())


def _status(error: BaseException) -> int:
    """Return the exit code that an exception gives a program; print what Python prints."""
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return error.code or 0
    if isinstance(error, SystemExit):
        sys.stderr.write(f"{error.code}\n")
    else:
        sys.excepthook(type(error), error, error.__traceback__)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _end(code: int) -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a broken pipe, a closed stream
            stream.flush()
    os._exit(code)  # skips the join of non-daemon threads, which sys.exit would wait for
