"""Checkpoints of a run: written atomically, verified before use; the last and the best are kept.

The manifest is written last. It holds format, round, number, score, size and SHA-256 of every file,
and its own checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mteditflow._checks import check_count, check_number

FORMAT = 1
MANIFEST = "manifest.json"
_Read = TypeVar("_Read")
# A complete checkpoint; one being replaced still counts, as the new one may not have its name yet.
_WHOLE = re.compile(r"(\.replaced-)?round-\d{6,}")
_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint whose files have been verified.

    Attributes:
        path: folder of the checkpoint.
        round: number of the round after which it was saved.
        score: score at the time of saving, higher is better; None: it has none.
        state: the state that was saved as JSON.
    """

    path: Path
    round: int
    score: float | None
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors saved under a name, on the CPU.

        Raises:
            FileNotFoundError: there are none.
        """
        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            held = sorted(path.stem for path in self.path.glob("*.safetensors"))
            raise FileNotFoundError(f"{self.path}: no tensors {name!r}, only {held}")
        return dict(load_file(file))


class Checkpoints:
    """Checkpoints in a folder, written by a single process: rank 0 of a distributed run.

    A save becomes visible by one rename, after its files and the manifest with their sizes and
    SHA-256 are safe on the disk. A kill or a full disk at any moment leaves the earlier checkpoints
    intact. The next save removes what an interrupted one has left.

    The last checkpoint is the one saved last, whatever its round: a run that was resumed from an
    older round continues from there when it is resumed again. Before such a run truncates its other
    files to that round, it should call ``set_aside_after``.

    Args:
        folder: folder of the checkpoints, created by the first save.
        keep_last: number of last checkpoints to keep, in addition to the best by score.

    Example:
        >>> import tempfile, torch
        >>> checkpoints = Checkpoints(tempfile.mkdtemp(), keep_last=2)
        >>> for round, score in enumerate([0.1, 0.9, 0.3, 0.4]):
        ...     weights = {"weight": torch.full((2,), float(round))}
        ...     path = checkpoints.save(round, {"model": weights}, {"seed": 0}, score=score)
        >>> path.name, sorted(p.name for p in path.parent.iterdir())
        ('round-000003', ['round-000001', 'round-000002', 'round-000003'])
        >>> found = checkpoints.find("auto")
        >>> found.round, found.state, found.tensors("model")
        (3, {'seed': 0}, {'weight': tensor([3., 3.])})
        >>> checkpoints.best().round
        1
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep_last: int = 3) -> None:
        check_count("keep_last", keep_last)
        self.folder = Path(folder)
        self.keep_last = keep_last

    def save(
        self,
        round: int,  # noqa: A002
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        score: float | None = None,
        extra: Callable[[Path], None] | None = None,
    ) -> Path:
        """Write a checkpoint, replacing one of the same round, and remove outdated ones.

        Args:
            round: number of the round after which it is saved, from 0.
            tensors: tensors by file stem, each written as ``stem.safetensors``; contiguous, and
                without shared memory within a file.
            state: any value that JSON can represent.
            score: finite score, higher is better; None: it is never the best.
            extra: called with the folder to write further files, which the manifest covers, too.

        Returns:
            The folder of the checkpoint, ``round-000040``.

        Raises:
            ValueError: a stem is no plain file name, or the score is not finite.
            TypeError: JSON cannot represent the state.
            OSError: it could not be written; the earlier checkpoints are as they were.
        """
        check_count("round", round, low=0)
        if score is not None:
            check_number("score", score)
        for stem in tensors:
            if not _STEM.fullmatch(stem):
                raise ValueError(f"tensors: expected names of letters, digits, _, got {stem!r}")
        text = json.dumps(state, indent=1)  # raises before anything is written
        self._sweep()
        # Numbers order the saves; rounds do not, since a run may go back to an older one.
        number = 1 + max((m["number"] for _, m in self._listed()), default=0)
        scratch = self.folder / f".partial-{uuid.uuid4().hex}"
        scratch.mkdir()
        try:
            (scratch / "state.json").write_text(text, encoding="utf-8")
            for stem, held in tensors.items():
                _write(held, scratch / f"{stem}.safetensors")
            if extra is not None:
                extra(scratch)
            seal(scratch, {"round": round, "number": number, "score": score})
            path = self._publish(scratch, round)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        self._prune()
        return path

    def latest(self) -> Checkpoint | None:
        """Return the intact checkpoint that was saved last; None if there is none.

        Damaged ones are skipped with a warning that gives the reason.

        Raises:
            ValueError: one is intact, but of another format version.
        """
        return _first_whole(self._listed(warn=True))

    def best(self) -> Checkpoint | None:
        """Return the intact checkpoint of highest score, the newest of equals; None without scores.

        Warnings and errors are those of ``latest``.
        """
        scored = [entry for entry in self._listed(warn=True) if entry[1]["score"] is not None]
        return _first_whole(sorted(scored, key=_standing, reverse=True))

    def find(self, which: str | os.PathLike[str]) -> Checkpoint | None:
        """Return a checkpoint by "auto" (the last), "best", or its path.

        Returns:
            The checkpoint; None only for "auto" where there is none yet, as in a new run.

        Raises:
            FileNotFoundError: none has a score, or there is none at the path.
            ValueError: the one at the path is damaged, or one is of another format version.
        """
        if which == "auto":
            return self.latest()
        if which == "best":
            if (found := self.best()) is None:
                raise FileNotFoundError(f"{self.folder}: no checkpoint with a score")
            return found
        if not Path(which).is_dir():
            raise FileNotFoundError(f"{which}: expected 'auto', 'best' or a checkpoint's folder")
        return _load(Path(which))

    def holds(self, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint is in this folder, and not set aside."""
        return any(path.samefile(checkpoint.path) for path, _ in self._listed())

    def set_aside_after(self, checkpoint: Checkpoint) -> list[Path]:
        """Rename the checkpoints that a run abandons by going back to an older one.

        These are all that were saved after it or are of a later round. None is deleted: each stays
        intact under its new name, such as ``aside-1-round-000040``, where only ``find`` by path
        reaches it. After a kill at any moment, the last checkpoint is ``checkpoint`` itself or one
        that was saved after it.

        Returns:
            The new paths; none if this is the last checkpoint.

        Raises:
            ValueError: it is not in this folder, or is set aside already.
            OSError: one cannot be renamed.

        Example:
            >>> import tempfile
            >>> checkpoints = Checkpoints(tempfile.mkdtemp())
            >>> for round in (1, 2, 3):
            ...     path = checkpoints.save(round, {}, {})
            >>> [path.name for path in checkpoints.set_aside_after(checkpoints.find("auto"))]
            []
            >>> older = checkpoints.find(path.with_name("round-000001"))
            >>> [path.name for path in checkpoints.set_aside_after(older)]
            ['aside-1-round-000003', 'aside-1-round-000002']
            >>> checkpoints.find("auto").round
            1
        """
        if not self.holds(checkpoint):
            raise ValueError(
                f"checkpoint: expected one of {self.folder}, not set aside, got {checkpoint.path}"
            )
        listed = self._listed()
        number = next(m["number"] for path, m in listed if path.samefile(checkpoint.path))
        # Last saved first, the order of ``_listed``: a kill leaves the earlier ones in place.
        given_up = [p for p, m in listed if m["number"] > number or m["round"] > checkpoint.round]
        return [self._set_aside(path) for path in given_up]

    def _set_aside(self, path: Path) -> Path:
        name = path.name.removeprefix(".replaced-")
        names = (path.with_name(f"aside-{n}-{name}") for n in count(1))
        aside = path.rename(next(free for free in names if not free.exists()))
        sync(self.folder)
        return aside

    def _listed(self, *, warn: bool = False) -> list[tuple[Path, dict[str, Any]]]:
        """Return folders and manifests, the last saved first, of those that ``glance`` accepts."""
        paths = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        whole = [path for path in paths if _WHOLE.fullmatch(path.name)]
        read = [(path, unless_damaged(glance, path, warn=warn)) for path in whole]
        found = [(path, manifest) for path, manifest in read if manifest is not None]
        return sorted(found, key=lambda entry: int(entry[1]["number"]), reverse=True)

    def _publish(self, scratch: Path, round: int) -> Path:  # noqa: A002
        """Rename a complete folder to its final name, and remove an older one of that name."""
        path = self.folder / f"round-{round:06d}"
        aside = path.with_name(f".replaced-{path.name}")
        # A folder cannot be replaced in one step; between the renames the old one still counts.
        if path.exists():
            path.rename(aside)
        scratch.rename(path)
        sync(self.folder)
        self._remove(aside)
        return path

    def _sweep(self) -> None:
        """Remove what an interrupted save has left, or undo its first rename."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for aside in self.folder.glob(".replaced-round-*"):
            path = aside.with_name(aside.name.removeprefix(".replaced-"))
            if path.exists():
                self._remove(aside)
            else:  # killed between the two renames of ``_publish``
                aside.rename(path)
        for partial in self.folder.glob(".partial-*"):
            shutil.rmtree(partial)

    def _prune(self) -> None:
        """Remove all but the last ones and the best; damaged ones stay, and are not counted."""
        entries = self._listed()
        kept = [path for path, _ in entries[: self.keep_last]]
        kept += [path for path, m in sorted(entries, key=_standing)[-1:] if m["score"] is not None]
        for path, _ in entries:
            if path not in kept:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint by way of a rename, so that a kill leaves no half of it."""
        if path.exists():
            partial = self.folder / f".partial-{uuid.uuid4().hex}"
            path.rename(partial)
            shutil.rmtree(partial)


def _standing(entry: tuple[Path, Mapping[str, Any]]) -> tuple[float, int]:
    """Return the sort key of an entry: its score (lowest without one), then its number."""
    score = entry[1]["score"]
    return (float("-inf") if score is None else score), entry[1]["number"]


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # a full disk, most likely
        raise OSError(f"{path.parent.parent}: {path.name} cannot be written, {error}") from error


def _first_whole(entries: Iterable[tuple[Path, dict[str, Any]]]) -> Checkpoint | None:
    """Return the first checkpoint whose files match their manifest; None if there is none."""
    for path, _ in entries:
        if (found := unless_damaged(_load, path, warn=True)) is not None:
            return found
    return None


def _load(path: Path) -> Checkpoint:
    manifest = verify(path)
    state = json.loads((path / "state.json").read_bytes())
    return Checkpoint(path, manifest["round"], manifest["score"], state)


class DamagedError(ValueError):
    """A folder does not match its manifest, or has none."""


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, after all its files are safe on the disk.

    Raises:
        OSError: a file cannot be read or written.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = _fingerprint(path)
    body = {"format": FORMAT, **about, "files": files}
    with (folder / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump(body | {"checksum": _checksum(body)}, stream, indent=1)
    sync(folder / MANIFEST)
    sync(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder, and verify its own checksum, but not the files.

    Raises:
        DamagedError: there is no manifest, or it is not as it was written.
        ValueError: it is intact, but of the format of another version of this library.
    """
    try:
        body = json.loads((folder / MANIFEST).read_bytes())
        checksum = body.pop("checksum")
    except FileNotFoundError:
        raise DamagedError(f"{folder}: no {MANIFEST}; not a checkpoint, or half-written") from None
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise DamagedError(f"{folder}: unreadable {MANIFEST}, {error!r}") from error
    if checksum != _checksum(body):
        raise DamagedError(f"{folder}: {MANIFEST} does not match its own checksum")
    if body["format"] != FORMAT:
        raise ValueError(f"{folder}: expected checkpoint format {FORMAT}, got {body['format']!r}")
    return dict(body)


def glance(folder: Path) -> dict[str, Any]:
    """Read the manifest, and check the size of every file.

    Raises:
        DamagedError: the manifest is damaged, or a file is missing or of another size.
        ValueError: as in ``read_manifest``.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{folder}: {name} is missing")
        if (size := path.stat().st_size) != expected["bytes"]:
            raise DamagedError(f"{folder}: {name} has {size} bytes instead of {expected['bytes']}")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """Read the manifest, and check size and SHA-256 of every file.

    Raises:
        DamagedError: the manifest is damaged, or a file is missing or not as it was written.
        ValueError: as in ``read_manifest``.
    """
    manifest = glance(folder)
    for name, expected in manifest["files"].items():
        if _fingerprint(folder / name) != expected:
            raise DamagedError(f"{folder}: {name} does not match its SHA-256")
    return manifest


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are safe on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _checksum(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def unless_damaged(read: Callable[[Path], _Read], folder: Path, *, warn: bool) -> _Read | None:
    """Return the result of ``read``; None, with a warning if ``warn``, if the folder is damaged."""
    try:
        return read(folder)
    except DamagedError as error:
        if warn:
            warnings.warn(f"checkpoint skipped: {error}", stacklevel=2)
        return None
