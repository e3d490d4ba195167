"""Lets a synchronous trainer fetch the rewards of one batch while it samples the next."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import ParamSpec, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

P = ParamSpec("P")
T = TypeVar("T")


class Background:
    """An event loop in a thread of its own, as a context manager.

    Leaving the block waits for what was submitted; leaving it by an exception cancels that.

    Raises:
        RuntimeError: something is submitted outside of the block.

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for what was submitted, or cancel it; end the thread."""
        self._portal = None
        self._stack.__exit__(kind, error, traceback)

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
