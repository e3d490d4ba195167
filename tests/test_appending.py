"""Files that hold a run's state take a line whole or not at all, on a disk that fills up.

A disk takes part of a write, and refuses the next. Here the file of the operating system is real;
what it takes is bounded at every byte in turn.
"""

import errno
import io
import os
import resource
import signal
from pathlib import Path

import pytest

from mteditflow import _files
from mteditflow._files import append_line, cut_half_line
from mteditflow.planner.run import Journal, RefusedChain
from mteditflow.rewards import AnswerCache
from mteditflow.training.metrics_file import MetricsFile, read_metrics
from mteditflow.training.run_log import RunLog
from tests.loops import some

LINE = b"a line of 24 characters\n"


class Filling(io.FileIO):
    """A file on a disk with so many bytes left; writes are short, then refused."""

    left = 0

    def write(self, data):
        room = min(len(data), Filling.left)
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Filling.left -= room
        return super().write(bytes(data[:room]))


@pytest.fixture
def disk(monkeypatch):
    """Opens files that are appended to on a disk with so many bytes left."""
    opened = Path.open

    def open_(path, mode="r", *given, **named):
        return Filling(path, mode) if mode == "ab" else opened(path, mode, *given, **named)

    monkeypatch.setattr(Path, "open", open_)

    def fill(left):
        Filling.left = left

    return fill


def journal(folder):
    path = folder / "chains.refused.jsonl"
    record = RefusedChain(id="1", image="a.png", reason="no", detail="none").model_dump_json()
    return path, lambda: Journal(path).append(record)


def metrics(folder):
    path = folder / "metrics.jsonl"

    def write():
        done = len(read_metrics(path))
        MetricsFile(path).append(done + 1, {"reward/following": 0.5})

    return path, write


def log(folder):
    return folder / "log.txt", lambda: RunLog(folder, console=False, main=True).message("words")


@pytest.mark.parametrize("writer", [journal, metrics, log])
def test_a_full_disk_leaves_whole_lines_and_the_file_goes_on(tmp_path, disk, writer):
    path, write = writer(tmp_path)
    disk(10**6)
    write()
    before = path.read_bytes()
    assert before.endswith(b"\n")
    for left in some(range(len(before))):
        disk(left)
        with pytest.raises(OSError, match="No space left"):
            write()
        assert path.read_bytes() == before
    disk(10**6)
    write()
    assert path.read_bytes().startswith(before)
    assert path.read_bytes().count(b"\n") == 2


def test_short_writes_alone_lose_nothing(tmp_path, monkeypatch):
    class Slow(io.FileIO):
        def write(self, data):
            return super().write(bytes(data[:5]))

    path = tmp_path / "file"
    monkeypatch.setattr(Path, "open", lambda self, mode, **_: Slow(self, mode))
    append_line(path, LINE, sync=True)
    append_line(path, LINE, sync=True)
    monkeypatch.undo()
    assert path.read_bytes() == 2 * LINE


@pytest.mark.parametrize("writer", [journal, metrics])
def test_lines_of_state_lie_on_the_disk_before_the_next_step(tmp_path, monkeypatch, writer):
    path, write = writer(tmp_path)
    synced = []
    monkeypatch.setattr(_files.os, "fsync", lambda _: synced.append(path.read_bytes()))
    write()
    assert synced == [path.read_bytes()]
    assert synced[0].endswith(b"\n")


def test_a_kill_before_the_line_is_on_the_disk_takes_it_back_or_leaves_it_whole(
    tmp_path, monkeypatch
):
    path = tmp_path / "file"
    append_line(path, LINE, sync=True)

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        append_line(path, LINE, sync=True)
    assert path.read_bytes() == LINE


def test_a_journal_cut_at_any_byte_keeps_its_whole_lines_and_goes_on(tmp_path):
    path, write = journal(tmp_path)
    write()
    write()
    whole = path.read_bytes()
    for cut in some(range(len(whole) + 1)):
        path.write_bytes(whole[:cut])
        for _ in range(2 - whole[:cut].count(b"\n")):
            write()
        assert path.read_bytes() == whole
    path.write_bytes(whole + b"\x89PNG")
    with pytest.raises(ValueError, match=r"jsonl: expected lines of JSON objects, got b'.x89PNG'"):
        Journal(path)
    assert path.read_bytes() == whole + b"\x89PNG"


@pytest.mark.parametrize("size", [0, 10, 2**16 - 1, 2**16, 2**16 + 1, 3 * 2**16])
def test_a_half_line_of_any_length_is_cut_off(tmp_path, size):
    path = tmp_path / "new" / "file"
    cut_half_line(path)
    assert path.read_bytes() == b""
    for whole in (b"", LINE):
        path.write_bytes(whole + b"x" * size)
        cut_half_line(path)
        assert path.read_bytes() == whole


def test_answers_on_a_disk_that_is_full_are_misses_and_those_of_before_stay(tmp_path):
    """In a process of its own, whose files may not grow: SQLite meets the limit at any page."""
    path = tmp_path / "answers.sqlite"
    with AnswerCache(path) as cache:
        cache.put("first", "an answer")
    for limit in (path.stat().st_size, 2**15 + 100, 2**15 + 9000, 2**16):  # its index has 2**15
        child = os.fork()
        if child == 0:
            try:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                with AnswerCache(path) as cache:
                    for n in range(20):
                        cache.put(f"later {n}", "x" * 2000)
                    first = {"an answer", None} if limit < 2**15 else {"an answer"}
                    os._exit(0 if cache.failures and cache.get("first") in first else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        with AnswerCache(path) as cache:
            assert cache.get("first") == "an answer"
            assert {cache.get(f"later {n}") for n in range(20)} <= {None, "x" * 2000}
            cache.put("first", "an answer")
            assert cache.failures == 0


def test_answers_of_a_process_that_is_killed_are_whole_or_missing(tmp_path):
    path = tmp_path / "answers.sqlite"
    for pages in range(6):
        child = os.fork()
        if child == 0:
            try:
                with AnswerCache(path) as cache:
                    for n in range(pages):
                        cache.put(f"{pages} {n}", f"answer {n} " * 300)
                    os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        with AnswerCache(path) as cache:
            assert len(cache) == sum(range(pages + 1))
            found = [cache.get(f"{pages} {n}") for n in range(pages)]
            assert found == [f"answer {n} " * 300 for n in range(pages)]
