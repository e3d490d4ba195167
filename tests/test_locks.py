"""One writer at a time, and who it is."""

import json
import os
import re
import signal
import socket

import pytest

from mteditflow._locks import InUseError, sole_writer

ME = rf"process {os.getpid()} \(.*\) on {re.escape(socket.gethostname())}, since 20\d\d-"


@pytest.mark.parametrize("name", ["", "chains.v1"])
def test_a_second_writer_is_refused_by_the_name_of_the_first(tmp_path, name):
    folder = tmp_path / "new"
    with sole_writer(folder, name) as stale:
        assert stale is None
        place = re.escape(str(folder / name))
        with (
            pytest.raises(InUseError, match=rf"^{place}: expected no other writer, got {ME}"),
            sole_writer(folder, name),
        ):
            pytest.fail("two writers")
        with sole_writer(folder, "another"):
            pass
    with sole_writer(folder, name) as stale:
        assert stale is None


@pytest.mark.parametrize("name", ["", "file"])
def test_another_name_of_the_same_place_is_the_same_lock(tmp_path, name):
    (folder := tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to(folder / name if name else folder)
    other = (tmp_path, "link") if name else (link, "")
    with (
        sole_writer(folder, name),
        pytest.raises(InUseError, match=re.escape(str(link))),
        sole_writer(*other),
    ):
        pytest.fail("two writers")


def test_a_writer_that_fails_leaves_no_stale_lock(tmp_path):
    with pytest.raises(RuntimeError), sole_writer(tmp_path):
        raise RuntimeError
    with sole_writer(tmp_path) as stale:
        assert stale is None


def test_a_writer_that_was_killed_is_named_once(tmp_path):
    child = os.fork()
    if child == 0:
        try:
            with sole_writer(tmp_path):
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with sole_writer(tmp_path) as stale:
        assert stale.startswith(f"process {child} (")
    with sole_writer(tmp_path) as stale:
        assert stale is None


@pytest.mark.parametrize("text", ["", "[]", '{"pid": 1}', "\x00"])
def test_a_damaged_record_is_of_a_process_that_is_not_known(tmp_path, text):
    (tmp_path / ".folder.writer.json").write_text(text)
    with sole_writer(tmp_path) as stale:
        assert stale == "an unknown process"
        assert json.loads((tmp_path / ".folder.writer.json").read_text())["pid"] == os.getpid()
