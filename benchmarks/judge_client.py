"""``python -m benchmarks.judge_client``: what the judge's client adds to bare HTTP requests."""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from itertools import repeat
from multiprocessing.connection import Connection
from typing import Any

import anyio
import httpx2
import openai
from anyio.from_thread import start_blocking_portal

from benchmarks import measure, report, rewards_page
from mteditflow.rewards import ChatClient
from mteditflow.testing import ScriptedServer
from mteditflow.testing.endpoint import completion, late

IN_FLIGHT = (1, 8, 64)
LATENCY = 0.2  # s; of the server's answers in the first table: those of a quick judge
# Characters of the images in one request: an icon, and four 512 x 512 photographs as PNG.
SIZES = {"1 kB": 1_000, "2 MB": 2_000_000}
RATES = ("images", "latency", "in flight", "most", "httpx2", "ChatClient", "ratio")
COSTS = ("images", "httpx2", "openai", "ChatClient", "added", "ratio")
ABOUT = f"""\
The client asks a scripted server for one score per request. First scores per second, with answers
that come after {1e3 * LATENCY:g} ms, and then with answers that come at once, where the client is
the limit: beside the most that the latency allows (in flight / latency), and beside what bare
`httpx2` requests of the same bytes reach. Then, one request after the other, milliseconds of a
request by `httpx2` alone, by the `openai` client, and by `ChatClient`, which adds the deadline,
retries, rotation and checks of the answer, and leaves out part of what `openai` does; medians over
{{rounds}} rounds in which the three take turns, the ratio to `httpx2` with its quartiles in
brackets. All of a client's work is done in one thread."""

Ask = Callable[[], Awaitable[object]]


def question(size: int) -> list[dict[str, Any]]:
    """Content of a message with so many characters of image."""
    url = "data:image/png;base64," + "A" * size
    return [
        {"type": "text", "text": "Score the edit from 1 to 5."},
        {"type": "image_url", "image_url": {"url": url}},
    ]


@contextmanager
def server(latency: float) -> Iterator[str]:
    """A scripted server in a process of its own; the URL of its endpoint."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(latency, there))
    process.start()
    try:
        yield here.recv()
    finally:
        here.send("stop")
        process.join()


def _serve(latency: float, pipe: Connection) -> None:
    behave = late(latency) if latency else None
    script = repeat(behave) if behave else ()
    with ScriptedServer(lambda _: completion("5"), script, requests=deque(maxlen=0)) as served:
        pipe.send(served.url)
        pipe.recv()


@asynccontextmanager
async def askers(url: str, size: int, concurrency: int) -> AsyncIterator[dict[str, Ask]]:
    """Three ways to ask the same; each checks that the answer is right."""
    content = question(size)
    request = {
        "model": "scripted",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0.0,
        "max_completion_tokens": 8,
        "seed": 0,
    }
    client = ChatClient([url], "scripted", concurrency=concurrency)
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(limits=limits, timeout=60.0) as http:
        by_library = openai.AsyncOpenAI(base_url=url, api_key="-", http_client=http)

        async def bare() -> None:
            answer = (await http.post(f"{url}/chat/completions", json=request)).json()
            check(int(answer["choices"][0]["message"]["content"]))

        async def library() -> None:
            answer = await by_library.chat.completions.create(**request)
            check(int(answer.choices[0].message.content))

        async def ours() -> None:
            check(await client.ask(content, lambda answer: int(answer.text), max_tokens=8))

        yield {"httpx2": bare, "openai": library, "ChatClient": ours}


def check(score: object) -> None:
    if score != 5:
        raise RuntimeError(f"expected the score 5, got {score}")


async def rate(url: str, size: int, name: str, in_flight: int, seconds: float) -> float:
    """Requests per second with so many in flight, over about so many seconds."""
    async with askers(url, size, in_flight) as asks:
        await _rate(asks[name], in_flight, seconds / 4)  # opens connections
        return await _rate(asks[name], in_flight, seconds)


async def _rate(ask: Ask, in_flight: int, seconds: float) -> float:
    finished, start = 0, time.perf_counter()

    async def work() -> None:
        nonlocal finished
        while time.perf_counter() < start + seconds:
            await ask()
            finished += 1

    async with anyio.create_task_group() as tasks:
        for _ in range(in_flight):
            tasks.start_soon(work)
    return finished / (time.perf_counter() - start)


def throughput(
    url: str, latency: float, *, in_flight: Sequence[int], seconds: float
) -> list[list[Any]]:
    """Rows of the first table."""
    rows = []
    for name, size in SIZES.items():
        for k in in_flight:
            bare, ours = (
                anyio.run(rate, url, size, which, k, seconds) for which in ("httpx2", "ChatClient")
            )
            most = k / latency if latency else "-"
            rows.append([name, f"{1e3 * latency:g} ms", k, most, bare, ours, ours / bare])
            print(f"{name:>6} {k:4} in flight: {ours:8.1f} scores/s, {ours / bare:.3f} of bare")
    return rows


def overhead(url: str, *, rounds: int) -> list[list[Any]]:
    """Rows of the second table; the server answers at once."""
    rows = []
    for name, size in SIZES.items():
        with (
            start_blocking_portal() as portal,
            portal.wrap_async_context_manager(askers(url, size, 1)) as asks,
        ):
            calls = {key: partial(portal.call, ask) for key, ask in asks.items()}
            seconds = measure.interleaved_seconds(calls, device="cpu", rounds=rounds)
        low, ratio, high = measure.ratios(seconds["ChatClient"], seconds["httpx2"])
        medians = [1e3 * statistics.median(seconds[key]) for key in calls]
        added = medians[-1] - medians[0]
        rows.append([name, *medians, added, f"{ratio:.3g} ({low:.3g}..{high:.3g})"])
        print(f"{name:>6}: {added:.2f} ms more than a bare request, {ratio:.2f} times as long")
    return rows


def main() -> None:
    """Measure, print, and write ``rewards.json`` and ``rewards.md``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.judge_client", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each rate")
    parser.add_argument("--rounds", type=int, default=21, help="samples of each candidate")
    report.add_output(parser)
    options = parser.parse_args()
    with server(LATENCY) as url:
        rates = throughput(url, LATENCY, in_flight=IN_FLIGHT, seconds=options.seconds)
    with server(0.0) as url:
        rates += throughput(url, 0.0, in_flight=IN_FLIGHT[-1:], seconds=options.seconds)
        costs = overhead(url, rounds=options.rounds)
    rewards_page.write(
        options.output,
        "Judge client",
        {
            "about": ABOUT.format(rounds=options.rounds),
            "environment": report.environment("cpu"),
            "tables": [
                {
                    "columns": RATES,
                    "rows": rates,
                },
                {
                    "columns": COSTS,
                    "rows": costs,
                },
            ],
        },
    )
    print(f"Written to {options.output / 'rewards.md'}")


if __name__ == "__main__":
    main()
