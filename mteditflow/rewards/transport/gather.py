"""Many requests at once, their results in order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio

T = TypeVar("T")


async def gather(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Make all calls at once; return their results in the order of the calls.

    An exception of one cancels the others.

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
