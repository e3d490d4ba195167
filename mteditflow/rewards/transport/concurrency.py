"""Concurrent calls: many at once in an event loop, or in the background of synchronous code."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from typing import Any, ParamSpec, TypeVar

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal

P = ParamSpec("P")
T = TypeVar("T")


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
    """Event loop in a thread of its own: a synchronous trainer samples while rewards are fetched.

    Leaving the ``with`` block waits for submitted calls; an exception cancels them.

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
        self._stack = ExitStack()
        self._portal: BlockingPortal | None = None

    def __enter__(self) -> Background:
        """Start the thread."""
        self._portal = self._stack.enter_context(start_blocking_portal(name="mteditflow-rewards"))
        return self

    def __exit__(self, *error: Any) -> None:
        """Wait for submitted calls, or cancel them after an exception; end the thread."""
        self._portal = None
        self._stack.__exit__(*error)

    def submit(
        self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        """Start an asynchronous function; any thread may call this.

        Returns:
            Its future: ``result()`` waits, raises what the function raised, ``cancel()`` cancels.
        """
        if self._portal is None:
            raise RuntimeError("Background: expected submit() inside of its `with` block")
        return self._portal.start_task_soon(partial(function, *args, **kwargs))
