"""Single-turn items of a benchmark: an image, an instruction, what an editor made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
from PIL import Image, ImageOps
from tqdm import tqdm

from mteditflow.evaluation.benchmarks.rubric import Rubric
from mteditflow.rewards import ChatClient, Lost
from mteditflow.rewards.images import BOMBS, UNREADABLE, png_data_url
from mteditflow.rewards.transport.concurrency import gather

Scores = tuple[float, ...]
AT_ONCE = 64  # items whose encoded images are in memory at a time


@dataclass(frozen=True)
class Item:
    """One edit.

    Attributes:
        key: names the item; unique.
        group: category or type, over which the benchmark averages.
        instruction: what the editor was told.
        source: file of the image before.
        edited: file of what the editor made.
    """

    key: str
    group: str
    instruction: str
    source: Path
    edited: Path


@dataclass(frozen=True)
class ItemReading:
    """What the file of a benchmark held.

    Attributes:
        items: in the order of the file.
        skipped: what is wrong with each entry that is no item.
    """

    items: tuple[Item, ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class ItemScores:
    """What came of every item; each key is in one of the three.

    Attributes:
        items: all of them.
        scores: key to the number of each criterion.
        lost: key to why the judge's answer did not come.
        missing: key to why an image could not be read.
    """

    items: tuple[Item, ...]
    scores: Mapping[str, Scores]
    lost: Mapping[str, Lost]
    missing: Mapping[str, str]


async def score_items(
    client: ChatClient,
    items: Sequence[Item],
    rubrics: Callable[[Item], Sequence[Rubric]],
    *,
    progress: bool = False,
) -> ItemScores:
    """Ask a judge about every item; what is lost has a reason, never a number.

    With a cache in the client the same call, made again, asks only for what was lost.

    Args:
        client: asks the endpoints.
        items: what to score.
        rubrics: of an item; each is one request. One that is lost loses the item.
        progress: whether to show a bar.

    Raises:
        ValueError: two items have the same key.

    Example:
        >>> client = ChatClient(["http://127.0.0.1:9/v1"], "qwen3-vl", attempts=1)
        >>> item = Item("7", "add", "Add a cat", Path("7.jpg"), Path("no/7.png"))
        >>> rubric = Rubric({"quality": "how clean the image is"}, low=1, high=5)
        >>> found = anyio.run(score_items, client, [item], lambda item: [rubric])
        >>> list(found.missing), found.scores
        (['7'], {})
    """
    keys = [item.key for item in items]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"items: expected each key once, got {twice!r} again")
    slots = anyio.Semaphore(AT_ONCE)

    async def score(item: Item) -> Scores | Lost | str:
        async with slots:
            result = await _score(client, item, rubrics(item))
        bar.update()
        return result

    with tqdm(total=len(items), desc="judge", unit="item", disable=not progress) as bar:
        results = await gather([partial(score, item) for item in items])
    found = dict(zip(keys, results, strict=True))
    return ItemScores(
        tuple(items),
        scores={key: x for key, x in found.items() if isinstance(x, tuple)},
        lost={key: x for key, x in found.items() if isinstance(x, Lost)},
        missing={key: x for key, x in found.items() if isinstance(x, str)},
    )


async def _score(client: ChatClient, item: Item, rubrics: Sequence[Rubric]) -> Scores | Lost | str:
    try:
        urls = await anyio.to_thread.run_sync(_load, item)
    except (*UNREADABLE, *BOMBS) as error:
        return str(error)
    requests = [rubric.request(item.instruction, urls) for rubric in rubrics]
    answers = await gather(
        [
            partial(client.ask, x.content, x.read, max_tokens=x.max_tokens, schema=x.schema)
            for x in requests
        ]
    )
    lost = [answer for answer in answers if isinstance(answer, Lost)]
    if lost:
        return lost[0]
    return tuple(x for answer in answers if not isinstance(answer, Lost) for x in answer)


def _load(item: Item) -> list[str]:
    """Both images as URLs, upright."""
    urls = []
    for path in (item.source, item.edited):
        with Image.open(path) as image:
            urls.append(png_data_url(ImageOps.exif_transpose(image)))
    return urls
