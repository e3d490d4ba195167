"""Where a file is written: links, devices, two names of one file; and whom an error names."""

import errno
import os
import re
from pathlib import Path

import pytest

from mteditflow import _files
from mteditflow._exits import refusing
from mteditflow._files import (
    destination,
    replacing,
    replacing_all,
    require_other_files,
    write_all_atomically,
    write_atomically,
)
from tests.loops import some


@pytest.mark.parametrize("old", [b"old", None], ids=["there", "dangling"])
def test_a_link_stays_and_its_file_is_replaced(tmp_path, old):
    (folder := tmp_path / "far").mkdir()
    target, link = folder / "file", tmp_path / "link"
    if old is not None:
        target.write_bytes(old)
    link.symlink_to("far/file")
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert sorted(x.name for x in tmp_path.rglob("*")) == ["far", "file", "link"]


def test_a_pipe_or_a_folder_is_no_file_and_nothing_is_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "ring").symlink_to("ring")
    (tmp_path / "to_pipe").symlink_to("pipe")
    for name, why in some({
        "pipe": "expected a file, got a device or a pipe",
        "to_pipe": "expected a file, got a device or a pipe",
        "folder": "Is a directory",
        "ring": "symbolic links",
    }.items()):  # fmt: skip
        place = re.escape(repr(str(tmp_path / name)))
        with pytest.raises(OSError, match=f"{why}.*{place}"):
            write_all_atomically(tmp_path, {"first": b"1", name: b"2"})
    assert not (tmp_path / "first").exists()
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_on_standard_output_is_that_file(tmp_path):
    with (tmp_path / "file").open("w") as stream:
        assert destination(Path(f"/proc/self/fd/{stream.fileno()}")) == tmp_path / "file"


def test_two_names_of_one_file(tmp_path):
    (tmp_path / "link").symlink_to("file")
    for other in some(["file", "link", "../" + tmp_path.name + "/file"]):
        with pytest.raises(ValueError, match=r"^a, b: expected different files, got .* twice"):
            require_other_files("a, b", tmp_path / "file", tmp_path / other)
    require_other_files("a, b", tmp_path / "file", tmp_path / "another")


def test_a_file_lies_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(_files.os, "fsync", lambda _: synced.append((tmp_path / "x").exists()))
    write_atomically(tmp_path / "x", b"new")
    assert synced == [False]


def test_an_error_names_the_file_and_not_its_scratch_path(tmp_path):
    full = OSError(errno.ENOSPC, "No space left")
    with pytest.raises(OSError, match=r"No space left.*name'$"), replacing(tmp_path / "name"):
        raise full
    with (
        pytest.raises(OSError, match=r"Permission.*second'$"),
        replacing_all(tmp_path / "first", tmp_path / "second") as scratch,
    ):
        raise PermissionError(errno.EACCES, "Permission denied", str(scratch[1]))
    with (
        pytest.raises(FileNotFoundError, match=r"of_another'$"),
        replacing(tmp_path / "name"),
    ):
        (tmp_path / "of_another").read_bytes()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named_by_its_file(tmp_path, monkeypatch):
    def read_only(self, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "open", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(OSError, match=r"Read-only file system.*name'$"):
        write_atomically(tmp_path / "name", b"new")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left"), 1),
        (OSError(errno.EIO, "Input/output error"), 1),
        (PermissionError(errno.EACCES, "Permission denied"), 2),
        (ValueError("seed: expected a number"), 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_the_machine_cannot_is_a_failure_and_no_bad_input(capsys, error, code):
    with pytest.raises(SystemExit) as ended, refusing():
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err.count("\n") == 1
