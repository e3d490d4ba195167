"""``python -m benchmarks.consistency_server``: many clients at the consistency server, for long.

Every score is compared with that of the same chain in process, and the memory of the server's
process is read all along.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import numpy
import psutil
import torch
from PIL import Image, ImageDraw

from benchmarks import report, rewards_page
from mteditflow.chains import Chain
from mteditflow.rewards import Consistency, ConsistencyClient, ConsistencyScorer, ConsistencyScores
from tests.rewards.tiny_models import save_dinov3, save_grounding_dino

CHAINS = 60  # different ones
NAMES = ("cat", "dog", "red ball", "tree")
SIZE = 128  # height and width of the images
ROUNDING = 1e-6  # between batches of different sizes
PERIOD = 1.0  # s between two looks at the memory
MIB = 2**20
COLUMNS = ("requests", "seconds", "memory of the server, MiB")
ABOUT = """\
{clients} clients at once ask a server of tiny models of the real classes for the scores of
{requests} chains, each of one or two turns of {size} x {size} images, and compare every answer with
that in process: {lost} lost, {wrong} wrong; {same:.2%} are equal bit by bit, none differs by more
than {largest:.1g}. {rate:.1f} chains/s; half of the answers within {median:.2f} s, 99% within
{late:.2f} s. The server's resident memory in the second half changes by {slope:+.3f} MiB
per 1000 requests, with a standard error of {error:.3f}, and is {peak:.0f} MiB at most; it has
{threads} threads. Servers and clients share {cores} cores."""

Work = tuple[Chain, list[Image.Image]]


@dataclass
class Soak:
    """Results of the requests so far."""

    seconds: list[float] = field(default_factory=list)  # of each answer
    memory: list[tuple[int, float, float]] = field(default_factory=list)  # requests, s, MiB
    lost: int = 0
    wrong: int = 0
    same: int = 0
    largest: float = 0.0  # difference of a score that is right up to rounding

    def judge(self, found: ConsistencyScores, expected: ConsistencyScores) -> None:
        """Count an answer as lost, wrong or right."""
        if found.lost:
            self.lost += 1
            return
        ours, theirs = (
            torch.stack([x.object, x.background, x.object_l1, x.background_l1])
            for x in (found, expected)
        )
        if not torch.equal(ours.isnan(), theirs.isnan()):
            self.wrong += 1
            return
        difference = float((ours - theirs).nan_to_num().abs().max())
        self.wrong += difference > ROUNDING
        self.same += difference == 0
        self.largest = max(self.largest, difference)


def make_work(count: int) -> list[Work]:
    """Chains of one or two turns, with pictures that no other chain has."""
    dice = random.Random(0)
    work = []
    for n in range(count):
        turns = 2 if n % 4 == 0 else 1
        chain = Chain(
            id=str(n),
            image="drawn",
            instructions=("edit",) * turns,
            unchanged_objects=(NAMES[n % 4 : n % 4 + 1],) * turns,
            all_objects=(NAMES[: 2 + n % 3],) * turns,
            background_consistency=(True,) * turns,
        )
        work.append((chain, [_picture(dice) for _ in range(turns + 1)]))
    return work


def _picture(dice: random.Random) -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), tuple(dice.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(5):
        x, y = dice.randrange(SIZE // 2), dice.randrange(SIZE // 2)
        color = tuple(dice.randrange(256) for _ in range(3))
        draw.ellipse((x, y, x + dice.randrange(9, SIZE), y + dice.randrange(9, SIZE)), fill=color)
    return image


def known_scores(folder: Path, work: Sequence[Work]) -> list[ConsistencyScores]:
    """Score every chain in process, on its own."""
    from mteditflow.rewards import DinoV3, GroundingDino

    scorer = ConsistencyScorer(
        GroundingDino.from_pretrained(folder / "grounding_dino"),
        DinoV3.from_pretrained(folder / "dinov3"),
    )
    return [Consistency(scorer).score([chain], [images]) for chain, images in work]


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The server as its users start it; its URL and process."""
    models = ("--detector", folder / "grounding_dino", "--features", folder / "dinov3")
    command = [sys.executable, "-m", "mteditflow.rewards.server", "--port", "0", *map(str, models)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1], psutil.Process(process.pid)
        finally:
            process.terminate()


async def soak(
    url: str,
    process: psutil.Process,
    work: Sequence[Work],
    expected: Sequence[ConsistencyScores],
    *,
    clients: int,
    requests: int,
) -> Soak:
    """Let clients ask, each one chain after another, until all is asked."""
    result, start = Soak(), time.perf_counter()
    left = iter(range(requests))

    async def ask() -> None:
        client = ConsistencyClient([url], concurrency=1)
        for n in left:
            chain, images = work[n % len(work)]
            begin = time.perf_counter()
            found = await client.score([chain], [images])
            result.seconds.append(time.perf_counter() - begin)
            result.judge(found, expected[n % len(work)])

    async def watch() -> None:
        while True:
            memory = process.memory_info().rss / MIB
            result.memory.append((len(result.seconds), time.perf_counter() - start, memory))
            if len(result.memory) % 30 == 1:
                print(
                    "{:6} requests, {:6.0f} s, {:8.2f} MiB".format(*result.memory[-1]), flush=True
                )
            await anyio.sleep(PERIOD)

    async with anyio.create_task_group() as watching:
        watching.start_soon(watch)
        async with anyio.create_task_group() as asking:
            for _ in range(clients):
                asking.start_soon(ask)
        watching.cancel_scope.cancel()
    result.memory.append((requests, time.perf_counter() - start, process.memory_info().rss / MIB))
    return result


def slope(memory: Sequence[tuple[int, float, float]]) -> tuple[float, float]:
    """Least-squares slope of the memory in the second half, MiB per 1000 requests, and its error.

    The error counts samples as independent, which makes it small rather than large.
    """
    half = memory[-1][0] / 2
    requests, mib = numpy.array([(n / 1000, m) for n, _, m in memory if n >= half]).T
    (value, _), covariance = numpy.polyfit(requests, mib, 1, cov=True)
    return float(value), float(covariance[0, 0] ** 0.5)


def section(result: Soak, *, clients: int, threads: int) -> dict[str, Any]:
    """Return the lines of the page."""
    requests, seconds, _ = result.memory[-1]
    value, error = slope(result.memory)
    median, late = numpy.quantile(result.seconds, [0.5, 0.99])
    about = ABOUT.format(
        clients=clients,
        requests=requests,
        size=SIZE,
        lost=result.lost,
        wrong=result.wrong,
        same=result.same / requests,
        largest=result.largest,
        rate=requests / seconds,
        median=median,
        late=late,
        slope=value,
        error=error,
        peak=max(mib for _, _, mib in result.memory),
        threads=threads,
        cores=psutil.cpu_count(),
    )
    marks = [requests * tenth / 10 for tenth in range(11)]
    rows = [min(result.memory, key=lambda row: abs(row[0] - mark)) for mark in marks]
    shown = [[n, f"{s:.0f}", f"{mib:.1f}"] for n, s, mib in rows]
    return {
        "about": about,
        "environment": report.environment("cpu"),
        "tables": [{"columns": COLUMNS, "rows": shown}],
    }


def main() -> bool:
    """Run, print, and write ``rewards.json`` and ``rewards.md``; whether nothing went wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.consistency_server")
    parser.add_argument("--clients", type=int, default=64, help="at once")
    parser.add_argument("--requests", type=int, default=10_000, help="of all clients together")
    report.add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_grounding_dino(folder / "grounding_dino")
        save_dinov3(folder / "dinov3")
        work = make_work(CHAINS)
        expected = known_scores(folder, work)
        with server(folder) as (url, process):
            result = anyio.run(
                lambda: soak(
                    url,
                    process,
                    work,
                    expected,
                    clients=options.clients,
                    requests=options.requests,
                )
            )
            threads = process.num_threads()
    page = section(result, clients=options.clients, threads=threads)
    rewards_page.write(options.output, "Consistency server", page)
    print(f"{page['about']}\nWritten to {options.output / 'rewards.md'}")
    return not result.lost and not result.wrong


if __name__ == "__main__":
    raise SystemExit(not main())
