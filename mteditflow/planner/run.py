"""Planning of chains for a folder of images: concurrent, written in order, resumable.

Chains are written to one file, and refused ones with their reasons to a second file beside it, both
in the order of the images. A killed run therefore leaves a prefix of its complete output, and the
same call resumes from there.
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
    """Writer of a file of lines; opening cuts off an incomplete last line that a kill has left.

    Args:
        path: path of the file, created with its folder if missing.

    Raises:
        ValueError: the file does not end with a complete line or the beginning of one.
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
        """Write one line, and wait until it is on the disk.

        Raises:
            OSError: it cannot be written; the file is as it was.
        """
        append_line(self.path, f"{line}\n".encode(), sync=True)

    def read(self, model: type[Record]) -> Iterator[Record]:
        """Yield the lines as records.

        Raises:
            ValueError: a line is not of this form; the message has file, line and reason.
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
    """Return the complete lines of a journal; none if there is no file.

    Raises:
        ValueError: it does not end with a complete line or the beginning of one.
    """
    content = path.read_bytes() if path.exists() else b""
    # A rest that begins no JSON object is not ours: the path may be of another file, so keep it.
    whole = content[: content.rfind(b"\n") + 1]
    half = content[len(whole) :]
    if half and not half.startswith(b"{"):
        raise ValueError(f"{path}: expected lines of JSON objects, got {half[:40]!r}")
    return whole


UNREADABLE_IMAGE = "image cannot be read"
SIDE_MAX = 1024  # pixels of the longer side, to which larger images are scaled down
J = TypeVar("J")
R = TypeVar("R")


class RefusedChain(BaseModel):
    """Line of the file of refused chains.

    Attributes:
        id: id of the chain.
        image: path of its image, relative to the file.
        reason: kind of failure.
        detail: what was expected, and what the planner got.
    """

    id: str
    image: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Planned:
    """Contents of the two files at the end of a run.

    Attributes:
        chains: all chains, including those of earlier runs.
        refused: number of refused chains by reason, the most frequent first.
    """

    chains: tuple[Chain, ...]
    refused: dict[str, int]


class _Job(NamedTuple):
    """Image with the ids of its chains that are not planned yet."""

    path: Path
    name: str  # relative path as text; bytes that are not UTF-8 are escaped
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
    """Plan chains for every image in and below a folder.

    Args:
        planner: planner of one chain.
        folder: folder of PNG, JPEG and WebP images.
        output: file of chains, one JSON object per line; refused chains go to
            ``refused_path(output)``. A stopped run is resumed. To retry refused chains, delete that
            second file; they are then written at the end. Only one process at a time may write.
        chains_per_image: number of chains to plan for each image.
        images_in_flight: largest number of images that are processed at a time.
        progress: whether to show a progress bar.

    Returns:
        Contents of the two files.

    Raises:
        ValueError: there is no image, a line of the file is no chain, or chains in it were planned
            with other settings.
        PlanningStoppedError: no endpoint can be reached.
        InUseError: another process plans into this file; the message names it.
        OSError: a file cannot be read or written.
    """
    # Both checks come first, so that wrong paths get no lock file beside them.
    folder_images(folder)
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
    """Hold the lock of a file of chains inside the context; a stale lock is logged as a warning.

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
    """Plan as ``plan_folder`` does, for a caller that holds the lock of ``writing``."""
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
    """Return the path of the refused chains of a file of chains, unique for each such file.

    Example:
        >>> [refused_path(Path(name)).name for name in ("x.jsonl", "x.v1", "x.v2")]
        ['x.refused.jsonl', 'x.v1.refused', 'x.v2.refused']
    """
    if output.suffix == ".jsonl":
        return output.with_suffix(".refused.jsonl")
    return output.with_name(f"{output.name}.refused")


def planned_ids(settings: Mapping[str, Any], output: Path) -> set[str]:
    """Return the ids of all chains planned or refused so far; nothing is written.

    Args:
        settings: settings of the planner that resumes.
        output: file of chains.

    Raises:
        ValueError: a line is no chain, a chain was planned with other settings, or the parent of
            ``output`` is a file.
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
    """Return the images with chains that are not planned yet."""
    jobs = []
    for path in images:
        name = _as_text(path.relative_to(folder))
        ids = tuple(f"{name}#{k}" for k in range(chains_per_image))
        jobs.append(_Job(path, name, tuple(x for x in ids if x not in done)))
    return [job for job in jobs if job.ids]


def _chains_in(path: Path) -> tuple[Chain, ...]:
    """Return the chains of a file, which may be empty."""
    if not path.stat().st_size:
        return ()
    # The images are in their own folder, which need not be below that of the chains.
    return read_chains(path, format="native", allow_outside=True).chains


async def _plan_image(planner: Planner, job: _Job, root: Path) -> list[Chain | RefusedChain]:
    """Plan the chains of one image, whose path is written relative to ``root``."""
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
    """Return a name as text, with escapes for bytes that are not UTF-8."""
    raw = os.fsencode(name.as_posix() if isinstance(name, Path) else name)
    return raw.decode("utf-8", errors="backslashreplace")


async def _look(planner: Planner, path: Path) -> Scene | Refused:
    try:
        image = await anyio.to_thread.run_sync(open_image, path)
    except (*UNREADABLE, *BOMBS) as error:
        return Refused(UNREADABLE_IMAGE, _as_text(f"{type(error).__name__}: {error}"))
    return await planner.look(image)


def open_image(path: Path) -> Image.Image:
    """Read an image as upright RGB, scaled down to at most 1,024 pixels a side."""
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
    """Run up to ``limit`` jobs concurrently, and pass their results on in the order of the jobs.

    Args:
        work: coroutine function of one job.
        jobs: the jobs.
        take: called with each result, in order.
        limit: largest number of jobs that have started and whose result was not passed on.

    Raises:
        Exception: any exception of ``work`` or ``take``; running jobs are canceled.
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
