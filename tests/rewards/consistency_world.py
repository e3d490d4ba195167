"""Chains with pictures whose consistency is known, and servers of it in processes of their own.

Scores come from the library's own scorer. Where no model is needed its detector is
`ColorDetector`, which finds patches of one color by looking for them, and has no features, so that
the L1 terms are measured for real.
"""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import torch
from PIL import Image
from torch import Tensor

from mteditflow.chains import Chain
from mteditflow.rewards import Consistency, ConsistencyScorer, Pair, PairScores
from mteditflow.rewards.images import png_base64
from tests.processes import Process

COLORS = {"red ball": (230, 20, 20), "blue ball": (20, 20, 230), "green ball": (20, 230, 20)}
PATIENCE = 120.0  # s; a busy machine is slow, not wrong


class ColorDetector:
    """Finds each named ball as the box of all pixels of its color."""

    def __call__(self, images: Sequence[Tensor], names: Sequence[Sequence[str]]) -> list[Tensor]:
        return [_boxes(image, wanted) for image, wanted in zip(images, names, strict=True)]


def _boxes(image: Tensor, names: Sequence[str]) -> Tensor:
    boxes = []
    for color in (COLORS[name] for name in names if name in COLORS):
        red, green, blue = (channel == value for channel, value in zip(image, color, strict=True))
        found = red & green & blue
        rows, columns = (found.any(dim=dim).nonzero()[:, 0] for dim in (1, 0))
        if len(rows):
            ends = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            boxes.append(torch.stack(ends).float())
    return torch.stack(boxes) if boxes else torch.zeros(0, 4)


def color_scorer() -> ConsistencyScorer:
    return ConsistencyScorer(ColorDetector())


def picture(seed: int, *, size: int = 32) -> Image.Image:
    """A gray picture with three balls; every seed gives another one."""
    dice = random.Random(seed)
    image = Image.new("RGB", (size, size), (dice.randrange(256),) * 3)
    for n, color in enumerate(COLORS.values()):
        left, top = dice.randrange(size // 4), dice.randrange(size // 2)
        ball = Image.new("RGB", (size // 4, size // 4), color)
        image.paste(ball, (n * size // 3 + left // 3, top))
    return image


def make_chain(seed: int, *, turns: int = 2) -> tuple[Chain, list[Image.Image]]:
    """A chain and its N + 1 pictures, of content that no other seed has."""
    unchanged, everything = ("Red ball.", "no such thing"), ("red ball", "blue ball")
    chain = Chain(
        id=str(seed),
        image="none",
        instructions=tuple(f"edit {n}" for n in range(turns)),
        unchanged_objects=(unchanged,) * turns,
        all_objects=(everything,) * turns,
        background_consistency=(True,) * turns,
    )
    return chain, [picture(1000 * seed + n) for n in range(turns + 1)]


def make_chains(seeds: Sequence[int]) -> tuple[list[Chain], list[list[Image.Image]]]:
    """Chains of one to three turns."""
    made = [make_chain(seed, turns=1 + seed % 3) for seed in seeds]
    return [chain for chain, _ in made], [images for _, images in made]


def in_process(scorer: ConsistencyScorer, chains, images, **options):
    return Consistency(scorer, **options).score(chains, images)


def request_of(images: Sequence[Image.Image], pairs: Sequence[Pair]) -> dict:
    """The body of a request."""
    return {
        "images": [png_base64(image) for image in images],
        "pairs": [pair.model_dump(mode="json") for pair in pairs],
    }


def pair(source: int = 0, edited: int = 1, **fields) -> Pair:
    names = {"unchanged_objects": ("red ball",), "all_objects": ("red ball", "blue ball")}
    return Pair(source=source, edited=edited, **{**names, **fields})


def scores_of(answer: dict) -> list[PairScores]:
    return [PairScores.model_validate_json(json.dumps(scores)) for scores in answer["pairs"]]


@dataclass
class ServerProcess:
    """A server in a process of its own while the `with` block lasts.

    Attributes:
        arguments: of Python; `models_server` makes them.
        environment: added to that of the tests.
        wait_ready: whether to wait until it scores.
    """

    arguments: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    wait_ready: bool = True
    url: str = ""

    def __enter__(self) -> ServerProcess:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.log: list[str] = []
        self._folder = tempfile.TemporaryDirectory()
        pipes = [Path(self._folder.name) / name for name in ("output", "errors")]
        for pipe in pipes:
            os.mkfifo(pipe)
        first: queue.Queue[str] = queue.Queue()
        self._readers = [
            threading.Thread(target=_read, args=(pipe, keep), daemon=True)
            for pipe, keep in zip(pipes, (first.put, self.log.append), strict=True)
        ]
        for reader in self._readers:
            reader.start()
        output, errors = pipes
        given = {**environment, **self.environment}
        self.process = Process(self.arguments, env=given, output=output, errors=errors)
        try:
            self.url = first.get(timeout=PATIENCE).split()[-1]
            if self.wait_ready:
                self.until("ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join()
        self._folder.cleanup()

    @property
    def port(self) -> int:
        return int(self.url.removesuffix("/v1").rsplit(":", 1)[1])

    def health(self) -> httpx2.Response:
        return httpx2.get(self.url.removesuffix("/v1") + "/health", verify=False)  # no TLS here

    def until(self, status: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.health().json()["status"] != status:
            assert time.monotonic() < deadline, f"not {status} in time: {self.log}"
            time.sleep(0.02)

    def until_logged(self, words: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not any(words in line for line in tuple(self.log)):
            assert time.monotonic() < deadline, f"{words!r} not logged in time: {self.log}"
            time.sleep(0.01)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def exit_status(self) -> int:
        return self.process.wait(PATIENCE)


def _read(pipe: Path, keep: Callable[[str], object]) -> None:
    """Pass on each line until the process has ended."""
    with pipe.open() as lines:
        for line in lines:
            keep(line)


def models_server(folder, *options: str) -> list[str]:
    """Arguments of the real server with the tiny models of a folder, at any free port."""
    return [
        *("-m", "mteditflow.rewards.server", "--port", "0"),
        *("--detector", str(folder / "grounding_dino"), "--features", str(folder / "dinov3")),
        *options,
    ]


def color_server(seconds: float = 0.0, **options: float) -> list[str]:
    """Arguments of a server that finds colors, and takes `seconds` for it."""
    code = f"""
import sys, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
import logging
logging.basicConfig(level=logging.INFO)
from consistency_world import ColorDetector, ConsistencyScorer
from mteditflow.rewards.server import Limits, create_app, serve
class Slow(ColorDetector):
    def __call__(self, images, names):
        logging.info("looking")
        time.sleep({seconds})
        return super().__call__(images, names)
options = {options!r}
grace = options.pop("grace", 30.0)
port = options.pop("port", 0)
app = create_app(ConsistencyScorer(Slow()), limits=Limits(**options))
sys.exit(serve(app, port=port, grace=grace))
"""
    return ["-c", code]
