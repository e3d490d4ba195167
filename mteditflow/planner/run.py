"""Plan the chains of a folder of images: many at a time, written in order, resumable.

Chains go to one file, refused ones with their reasons to a second one beside it, both in the order
of the images. So what a killed run leaves is the beginning of what it would have written, and the
same call goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import anyio.to_thread
from PIL import Image
from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from mteditflow._checks import check_count
from mteditflow._files import append_line, cut_half_line, require_folder
from mteditflow._images import BOMBS, UNREADABLE, folder_images, read_image
from mteditflow._locks import sole_writer
from mteditflow.chains import Chain, read_chains
from mteditflow.chains.record import first_error
from mteditflow.planner.plan import Planner, Refused, Scene

LOG = logging.getLogger(__name__)
Record = TypeVar("Record", bound=BaseModel)


class Journal:
    """Appends lines to a file; a half line that a kill has left behind is cut off at the start.

    Args:
        path: made with its folder if it is not there.

    Raises:
        ValueError: the file ends with something else than a whole line or the begin of one.
        OSError: the file cannot be read or written.

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
        _whole_lines(path)
        cut_half_line(path)

    def append(self, line: str) -> None:
        """Write one line and wait until it lies on the disk.

        Raises:
            OSError: it cannot be written; the file is as it was.
        """
        append_line(self.path, f"{line}\n".encode(), sync=True)

    def read(self, model: type[Record]) -> Iterator[Record]:
        """Read the lines back.

        Raises:
            ValueError: a line is not of this form; the message names file, line and reason.
        """
        with self.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield _parsed(self.path, model, line, number)


def _parsed(path: Path, model: type[Record], line: str | bytes, number: int) -> Record:
    try:
        return model.model_validate_json(line)
    except ValidationError as error:
        raise ValueError(f"{path}:{number}: {first_error(error)}") from error


def _whole_lines(path: Path) -> bytes:
    """Return the whole lines of a file that is a journal, none if there is no file.

    Raises:
        ValueError: it ends with something else than a line or the begin of one.
    """
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    half = content[len(whole) :]
    if half and not half.startswith(b"{"):
        raise ValueError(f"{path}: expected lines of JSON objects, got {half[:40]!r}")
    return whole


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
        output: file of chains, one JSON object a line; refused ones go to the file that
            ``refused_path`` names. A run that was stopped goes on. To try refused chains again,
            delete that second file; they are then written at the end. One process at a time
            writes both.
        chains_per_image: how many to plan for each image.
        images_in_flight: most images that are worked on at one time.
        progress: show a bar.

    Returns:
        Contents of the two files.

    Raises:
        ValueError: there is no image, the file holds a line that is no chain, or chains that were
            planned with other settings.
        PlanningStoppedError: no endpoint can be reached.
        InUseError: another process plans into this file; the message names it.
        OSError: a file cannot be read or written.
    """
    folder_images(folder)  # before a lock is written beside what is no folder or file of a run
    planned_ids(planner.settings, output)
    with writing(output):
        return await plan_images(
            planner,
            folder,
            output,
            chains_per_image=chains_per_image,
            images_in_flight=images_in_flight,
            progress=progress,
        )


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Hold the lock of a file of chains while the block lasts; a stale one is named in the log.

    Raises:
        InUseError: another process plans into this file; the message names it.
        OSError: the lock cannot be made.
    """
    with sole_writer(output.parent, output.name) as stale:
        if stale is not None:
            LOG.warning("%s: going on after %s, which was killed", output, stale)
        yield


async def plan_images(
    planner: Planner,
    folder: Path,
    output: Path,
    *,
    chains_per_image: int,
    images_in_flight: int,
    progress: bool,
) -> Planned:
    """Plan as ``plan_folder`` does, where the caller holds the lock; see there."""
    check_count("chains_per_image", chains_per_image)
    check_count("images_in_flight", images_in_flight)
    done = planned_ids(planner.settings, output)
    jobs = _jobs_left(folder, folder_images(folder), done, chains_per_image)
    chains, refused = Journal(output), Journal(refused_path(output))

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


def refused_path(output: Path) -> Path:
    """Return the file of refused chains beside a file of chains; no two of these share one.

    Example:
        >>> [refused_path(Path(name)).name for name in ("x.jsonl", "x.v1", "x.v2")]
        ['x.refused.jsonl', 'x.v1.refused', 'x.v2.refused']
    """
    if output.suffix == ".jsonl":
        return output.with_suffix(".refused.jsonl")
    return output.with_name(f"{output.name}.refused")


def planned_ids(settings: Mapping[str, Any], output: Path) -> set[str]:
    """Return the ids of the chains that are planned or refused so far; nothing is written.

    Args:
        settings: of the planner that goes on.
        output: file of chains.

    Raises:
        ValueError: a line is no chain, a chain was planned with other settings, or a file is in the
            place of the folder.
        OSError: a file cannot be read.
    """
    require_folder("output", output.parent)
    refused = refused_path(output)
    lines = enumerate(_whole_lines(refused).splitlines(), start=1)
    done = {_parsed(refused, RefusedChain, line, number).id for number, line in lines}
    for number, line in enumerate(_whole_lines(output).splitlines(), start=1):
        chain = _parsed(output, Chain, line, number)
        made = (chain.model_extra or {}).get("planner") or {}
        if made.get("settings") != settings:
            raise ValueError(
                f"{output}: expected chains planned with {settings}, got "
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
