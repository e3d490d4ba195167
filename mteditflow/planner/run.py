"""Plan the chains of a folder of images: many at a time, written in order, resumable.

Chains go to one file, refused ones with their reasons to a second one beside it, both in the order
of the images. So what a killed run leaves is the beginning of what it would have written, and the
same call goes on from there.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import anyio.to_thread
from PIL import Image
from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from mteditflow._checks import check_count
from mteditflow._images import BOMBS, UNREADABLE, read_image
from mteditflow.chains import Chain, read_chains
from mteditflow.chains.record import first_error
from mteditflow.planner.plan import Planner, Refused, Scene

Record = TypeVar("Record", bound=BaseModel)


class Journal:
    """Appends lines to a file; a half line that a kill has left behind is cut off at the start.

    Args:
        path: made with its folder if it is not there.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "names.jsonl"
        >>> Journal(path).append('{"name": "cat"}')
        >>> with path.open("a") as file:
        ...     _ = file.write('{"na')
        >>> Journal(path).append('{"name": "dog"}')
        >>> path.read_text().split()
        ['{"name":', '"cat"}', '{"name":', '"dog"}']
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        whole = path.read_bytes()
        if not whole.endswith(b"\n"):
            os.truncate(path, whole.rfind(b"\n") + 1)

    def append(self, line: str) -> None:
        """Write one line and wait until it lies on the disk."""
        with self.path.open("ab") as file:
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())

    def read(self, model: type[Record]) -> Iterator[Record]:
        """Read the lines back.

        Raises:
            ValueError: a line is not of this form; the message names file, line and reason.
        """
        with self.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield self._parse(model, line, number)

    def _parse(self, model: type[Record], line: str, number: int) -> Record:
        try:
            return model.model_validate_json(line)
        except ValidationError as error:
            raise ValueError(f"{self.path}:{number}: {first_error(error)}") from error


SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
UNREADABLE_IMAGE = "image cannot be read"
SIDE_MAX = 1024  # pixels: larger images are made smaller before they are looked at
J = TypeVar("J")
R = TypeVar("R")


class RefusedChain(BaseModel):
    """A line of the second file.

    Attributes:
        id: of the chain.
        image: its path, relative to the file.
        reason: kind of failure.
        detail: what was expected and what came.
    """

    id: str
    image: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Planned:
    """Contents of the two files at the end of a run.

    Attributes:
        chains: all of them, those of earlier runs too.
        refused: reason to number of chains, the most frequent first.
    """

    chains: tuple[Chain, ...]
    refused: dict[str, int]


class _Job(NamedTuple):
    """An image and the ids of its chains that are still to be planned."""

    path: Path
    name: str  # as text; bytes that are no UTF-8 are escaped
    ids: tuple[str, ...]


async def plan_folder(
    planner: Planner,
    folder: Path,
    output: Path,
    *,
    chains_per_image: int = 1,
    images_in_flight: int = 16,
    progress: bool = True,
) -> Planned:
    """Plan chains for every image of a folder and of those in it.

    Args:
        planner: plans one chain.
        folder: of PNG, JPEG and WebP images.
        output: file of chains, one JSON object a line; refused ones go to ``refused_file`` of it.
            A run that was stopped goes on. To try refused chains again, delete that second file;
            they are then written at the end.
        chains_per_image: how many to plan for each image.
        images_in_flight: most images that are worked on at one time.
        progress: show a bar.

    Returns:
        Contents of the two files.

    Raises:
        ValueError: there is no image, the file holds a line that is no chain, or chains that were
            planned with other settings.
        PlanningStoppedError: no endpoint can be reached.
    """
    check_count("chains_per_image", chains_per_image)
    check_count("images_in_flight", images_in_flight)
    images = _images(folder)
    chains = Journal(output)
    refused = Journal(refused_file(output))
    done = _done(planner, chains, refused)
    jobs = _jobs_left(folder, images, done, chains_per_image)

    async def work(job: _Job) -> list[Chain | RefusedChain]:
        return await _plan_image(planner, job, output.parent)

    total = len(done) + sum(len(job.ids) for job in jobs)
    with tqdm(total=total, initial=len(done), unit="chain", disable=not progress) as bar:

        def write(results: Sequence[Chain | RefusedChain]) -> None:
            for result in results:
                if isinstance(result, Chain):
                    chains.append(result.to_json())
                else:
                    refused.append(result.model_dump_json())
            bar.update(len(results))

        await in_order(work, jobs, write, limit=images_in_flight)
    reasons = Counter(x.reason for x in refused.read(RefusedChain))
    return Planned(_chains_in(chains.path), dict(reasons.most_common()))


def refused_file(output: Path) -> Path:
    """Return the file of refused chains beside a file of chains; no two of these share one.

    Example:
        >>> [refused_file(Path(name)).name for name in ("x.jsonl", "x.v1", "x.v2")]
        ['x.refused.jsonl', 'x.v1.refused', 'x.v2.refused']
    """
    if output.suffix == ".jsonl":
        return output.with_suffix(".refused.jsonl")
    return output.with_name(f"{output.name}.refused")


def _done(planner: Planner, chains: Journal, refused: Journal) -> set[str]:
    """Return the ids of the chains that are planned or refused."""
    done = {x.id for x in refused.read(RefusedChain)}
    for chain in _chains_in(chains.path):
        made = (chain.model_extra or {}).get("planner") or {}
        if made.get("settings") != planner.settings:
            raise ValueError(
                f"{chains.path}: expected chains planned with {planner.settings}, got "
                f"{made.get('settings')} in chain {chain.id!r}"
            )
        done.add(chain.id)
    return done


def _jobs_left(
    folder: Path, images: Sequence[Path], done: Set[str], chains_per_image: int
) -> list[_Job]:
    """Return what is still to be done."""
    jobs = []
    for path in images:
        name = _as_text(path.relative_to(folder))
        ids = tuple(f"{name}#{k}" for k in range(chains_per_image))
        jobs.append(_Job(path, name, tuple(x for x in ids if x not in done)))
    return [job for job in jobs if job.ids]


def _chains_in(path: Path) -> tuple[Chain, ...]:
    """Read what is planned so far, which may be nothing."""
    if not path.stat().st_size:
        return ()
    return read_chains(path, format="native", allow_outside=True).chains  # images are the folder's


def _images(folder: Path) -> list[Path]:
    """Return the images in and under a folder, in an order that no file system changes."""
    found = (x for x in folder.rglob("*") if x.suffix.lower() in SUFFIXES and x.is_file())
    images = sorted(found, key=lambda x: x.relative_to(folder).as_posix())
    if not images:
        raise ValueError(f"folder: expected {', '.join(SUFFIXES)} files in {folder}, got none")
    return images


async def _plan_image(planner: Planner, job: _Job, root: Path) -> list[Chain | RefusedChain]:
    """Plan the chains of one image; ``root`` is what its path is written relative to."""
    image = Path(os.path.relpath(job.path, root))

    def refuse(chain_id: str, why: Refused) -> RefusedChain:
        return RefusedChain(
            id=chain_id, image=_as_text(image), reason=why.reason, detail=why.detail
        )

    if _as_text(image) != image.as_posix():
        detail = f"expected a name in UTF-8, which a chain can hold, got {_as_text(image)!r}"
        return [refuse(chain_id, Refused(UNREADABLE_IMAGE, detail)) for chain_id in job.ids]
    scene = await _look(planner, job.path)
    if isinstance(scene, Refused):
        return [refuse(chain_id, scene) for chain_id in job.ids]
    results: list[Chain | RefusedChain] = []
    for chain_id in job.ids:
        planned = await planner.plan(scene, chain_id=chain_id, image=image.as_posix())
        results.append(refuse(chain_id, planned) if isinstance(planned, Refused) else planned)
    return results


def _as_text(name: Path | str) -> str:
    """Return a name with escapes for its bytes that are not UTF-8."""
    raw = os.fsencode(name.as_posix() if isinstance(name, Path) else name)
    return raw.decode("utf-8", errors="backslashreplace")


async def _look(planner: Planner, path: Path) -> Scene | Refused:
    try:
        image = await anyio.to_thread.run_sync(open_image, path)
    except (*UNREADABLE, *BOMBS) as error:
        return Refused(UNREADABLE_IMAGE, _as_text(f"{type(error).__name__}: {error}"))
    return await planner.look(image)


def open_image(path: Path) -> Image.Image:
    """Read an image as a person sees it: RGB, the right way up, no side over 1024 pixels."""
    upright = read_image(path)
    upright.thumbnail((SIDE_MAX, SIDE_MAX), Image.Resampling.LANCZOS)
    return upright


async def in_order(
    work: Callable[[J], Awaitable[R]],
    jobs: Iterable[J],
    take: Callable[[R], None],
    *,
    limit: int,
) -> None:
    """Work on ``limit`` jobs at a time and take their results in the order of the jobs.

    Args:
        work: on one job.
        jobs: what to do.
        take: called with each result.
        limit: most jobs that are begun and whose result is not taken.

    Raises:
        Whatever ``work`` or ``take`` raises; the jobs that are under way are cancelled.
    """
    pending: deque[asyncio.Future[R]] = deque()
    try:
        for job in jobs:
            pending.append(asyncio.ensure_future(work(job)))
            if len(pending) == limit:
                take(await pending.popleft())
        while pending:
            take(await pending.popleft())
    finally:
        for future in pending:
            future.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
