"""Checkpoints of a run: written atomically, verified before use, the last and the best kept.

The manifest is written last: format, round, score, size and SHA-256 of every file, own checksum.
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
_WHOLE = re.compile(r"(\.replaced-)?round-\d{6,}")
_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been verified.

    Attributes:
        path: its folder.
        round: number of the round after which it was saved.
        score: score at the time of saving, higher is better; or None.
        state: the JSON part.
    """

    path: Path
    round: int
    score: float | None
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors saved under a name, on the CPU.

        Raises:
            FileNotFoundError: there are none.
        """
        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            held = sorted(path.stem for path in self.path.glob("*.safetensors"))
            raise FileNotFoundError(f"{self.path}: no tensors {name!r}, only {held}")
        return dict(load_file(file))


class Checkpoints:
    """Checkpoints in a folder; a single process writes them, rank 0 in a distributed run.

    A save becomes visible by one rename, after all of its files and the manifest with their sizes
    and SHA-256 are safe on the disk. A kill or a full disk at any moment leaves the checkpoints of
    before; remains of an interrupted save are removed by the next one.

    "The last" is the one saved last, whatever its round: a run that was resumed from an older
    round goes on from there when it is resumed again. Before it cuts its other files back to that
    round, it sets the checkpoints of the rounds it gives up aside.

    Args:
        folder: where they are; made by the first save.
        keep_last: how many to keep, beside the best by score.

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
        """Write a checkpoint, replace one of the same round, and remove those not to be kept.

        Args:
            round: number of the round after which it is taken, from 0.
            tensors: file stem -> tensors, each written as ``stem.safetensors``; contiguous, and
                sharing no memory with each other within a file.
            state: anything that JSON can hold.
            score: higher is better, finite; without one it is never the best.
            extra: called with the folder to write more files there; the manifest has them too.

        Returns:
            The folder of the checkpoint, ``round-000040``.

        Raises:
            ValueError: a stem is no plain file name, or the score is not finite.
            TypeError: JSON cannot hold the state.
            OSError: it could not be written; the checkpoints of before are as they were.
        """
        check_count("round", round, low=0)
        if score is not None:
            check_number("score", score)
        for stem in tensors:
            if not _STEM.fullmatch(stem):
                raise ValueError(f"tensors: expected names of letters, digits, _, got {stem!r}")
        text = json.dumps(state, indent=1)
        self._sweep()
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
        """Return the checkpoint saved last, of those that are whole; None if there is none.

        A damaged one is skipped with a warning that gives the reason.

        Raises:
            ValueError: one is whole, but of another format version.
        """
        return _first_whole(self._listed(warn=True))

    def best(self) -> Checkpoint | None:
        """Return the one of highest score, the newer of equals, otherwise as ``latest``."""
        scored = [entry for entry in self._listed(warn=True) if entry[1]["score"] is not None]
        return _first_whole(sorted(scored, key=_standing, reverse=True))

    def find(self, which: str | os.PathLike[str]) -> Checkpoint | None:
        """Return the checkpoint that a user names: "auto", "best", or the path of one.

        Returns:
            None only for "auto" where there is none yet: the run starts afresh.

        Raises:
            FileNotFoundError: there is none with a score, or none at the path.
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
        """Whether a checkpoint is one of these: not of another folder, and not set aside."""
        return any(path.samefile(checkpoint.path) for path, _ in self._listed())

    def set_aside_after(self, checkpoint: Checkpoint) -> list[Path]:
        """Rename the checkpoints of the history that a run gives up by going back to an older one.

        Those are what was saved after it, and what is of a later round. None is deleted: each is
        whole under its new name, ``aside-1-round-000040``, and no method finds or removes it but
        ``find`` by its path. After a kill at any moment the last one is this or one
        that was saved after it.

        Returns:
            The new paths; none if this is the last checkpoint.

        Raises:
            ValueError: it is none of these.
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
        given_up = [p for p, m in listed if m["number"] > number or m["round"] > checkpoint.round]
        return [self._set_aside(path) for path in given_up]

    def _set_aside(self, path: Path) -> Path:
        name = path.name.removeprefix(".replaced-")
        names = (path.with_name(f"aside-{n}-{name}") for n in count(1))
        aside = path.rename(next(free for free in names if not free.exists()))
        sync(self.folder)
        return aside

    def _listed(self, *, warn: bool = False) -> list[tuple[Path, dict[str, Any]]]:
        """Folders and manifests, the last saved first, without those damaged at first sight."""
        paths = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        whole = [path for path in paths if _WHOLE.fullmatch(path.name)]
        read = [(path, unless_damaged(glance, path, warn=warn)) for path in whole]
        found = [(path, manifest) for path, manifest in read if manifest is not None]
        return sorted(found, key=lambda entry: int(entry[1]["number"]), reverse=True)

    def _publish(self, scratch: Path, round: int) -> Path:  # noqa: A002
        """Rename a finished folder to its name; what has that name steps aside, then goes."""
        path = self.folder / f"round-{round:06d}"
        aside = path.with_name(f".replaced-{path.name}")
        if path.exists():
            path.rename(aside)
        scratch.rename(path)
        sync(self.folder)
        self._remove(aside)
        return path

    def _sweep(self) -> None:
        """Remove the remains of an interrupted save."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for aside in self.folder.glob(".replaced-round-*"):
            path = aside.with_name(aside.name.removeprefix(".replaced-"))
            if path.exists():
                self._remove(aside)
            else:
                aside.rename(path)
        for partial in self.folder.glob(".partial-*"):
            shutil.rmtree(partial)

    def _prune(self) -> None:
        """Remove all but the last ones and the best; damaged ones stay, and count for nothing."""
        entries = self._listed()
        kept = [path for path, _ in entries[: self.keep_last]]
        kept += [path for path, m in sorted(entries, key=_standing)[-1:] if m["score"] is not None]
        for path, _ in entries:
            if path not in kept:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint such that a kill leaves no half of it under its name."""
        if path.exists():
            partial = self.folder / f".partial-{uuid.uuid4().hex}"
            path.rename(partial)
            shutil.rmtree(partial)


def _standing(entry: tuple[Path, Mapping[str, Any]]) -> tuple[float, int]:
    """Order by score, those without at the bottom, then by when they were saved."""
    score = entry[1]["score"]
    return (float("-inf") if score is None else score), entry[1]["number"]


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:  # a full disk, most likely
        raise OSError(f"{path.parent.parent}: {path.name} cannot be written, {error}") from error


def _first_whole(entries: Iterable[tuple[Path, dict[str, Any]]]) -> Checkpoint | None:
    """Return the first whose files match their manifest."""
    for path, _ in entries:
        if (found := unless_damaged(_load, path, warn=True)) is not None:
            return found
    return None


def _load(path: Path) -> Checkpoint:
    manifest = verify(path)
    state = json.loads((path / "state.json").read_bytes())
    return Checkpoint(path, manifest["round"], manifest["score"], state)


class DamagedError(ValueError):
    """A folder that does not match its manifest, or has none."""


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, after all of its files are safe on the disk.

    Raises:
        OSError: something cannot be written.
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
    """Read and verify the manifest of a folder, not its files.

    Raises:
        DamagedError: there is no manifest, or it is not as written.
        ValueError: it is whole, and of a format of another version of this library.
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
    """Read the manifest and check the size of every file; raises as ``read_manifest``."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{folder}: {name} is missing")
        if (size := path.stat().st_size) != expected["bytes"]:
            raise DamagedError(f"{folder}: {name} has {size} bytes instead of {expected['bytes']}")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """Read the manifest and check the SHA-256 of every file; raises as ``read_manifest``."""
    manifest = glance(folder)
    for name, expected in manifest["files"].items():
        if _fingerprint(folder / name) != expected:
            raise DamagedError(f"{folder}: {name} is not what was written, by its SHA-256")
    return manifest


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are safe on the disk."""
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
    """Read a folder; None, and a warning if wanted, where it is damaged."""
    try:
        return read(folder)
    except DamagedError as error:
        if warn:
            warnings.warn(f"checkpoint skipped: {error}", stacklevel=2)
        return None
