"""Answers on disk: found again, shared by processes, whole after a kill, and never altered."""

import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mteditflow.rewards import AnswerCache
from mteditflow.rewards.transport import cache as module
from mteditflow.rewards.transport.cache import cached, request_key
from tests.loops import some
from tests.processes import Process

WRITER = """
import sys
from mteditflow.rewards.transport.cache import AnswerCache
path, name, number = sys.argv[1:]
with AnswerCache(path) as cache:
    for i in range(int(number)):
        cache.put(f"{name} {i}", f"answer {i}" * 50)
        cache.put("shared", f"{name} {i}")
        assert cache.get(f"{name} {i}") == f"answer {i}" * 50
        print(i, flush=True)
"""


def writer(path, name, number, output=None):
    return Process(["-c", WRITER, path, name, number], output=output)


def test_golden_key():
    # printf '%s' '{"messages":["\u00e9"],"model":"m","seed":0}' | sha256sum
    key = request_key({"seed": 0, "model": "m", "messages": ["é"]})
    assert key == "a8b80966563a5102269044bc0384d2198a7567cb84695a964429e9de957c4e24"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
REQUESTS = st.dictionaries(st.text(), JSON, max_size=4)


@given(REQUESTS, st.randoms())
def test_the_order_of_names_makes_no_other_key(request_, shuffler):
    names = list(request_)
    shuffler.shuffle(names)
    assert request_key({name: request_[name] for name in names}) == request_key(request_)


@given(REQUESTS, REQUESTS)
def test_keys_are_equal_where_requests_are(a, b):
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (request_key(a) == request_key(b)) == same


def test_what_has_no_canonical_json_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        request_key({"temperature": float("nan")})
    with pytest.raises(TypeError, match="not JSON serializable"):
        request_key({"image": b"png"})


@pytest.fixture(scope="module")
def one_cache(tmp_path_factory):
    with AnswerCache(tmp_path_factory.mktemp("cache") / "answers") as cache:
        yield cache


@given(key=st.text(), value=st.text(st.characters(exclude_categories=["Cs"])))
def test_what_is_put_is_got(one_cache, key, value):
    if not key.isprintable():
        key = request_key({"key": key})
    one_cache.put(key, value)
    assert one_cache.get(key) == value
    assert one_cache.get(request_key({"another key than": key})) is None


def test_it_is_there_when_opened_again(tmp_path):
    path = tmp_path / "new" / "folder" / "answers.sqlite"
    with AnswerCache(path) as cache:
        cache.put("a", "1")
        cache.put("b", "2")
        cache.put("a", "3")
        assert len(cache) == 2
    with AnswerCache(str(path)) as cache:
        assert (cache.get("a"), cache.get("b"), cache.get("c")) == ("3", "2", None)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        cache.get("a")


def test_readers_and_writers_do_not_wait_for_each_other(tmp_path):
    """SQLite's write-ahead log is on: a read goes on beside another connection's open write."""
    with AnswerCache(tmp_path / "answers") as cache:
        cache.put("a", "1")
        with sqlite3.connect(cache.path, isolation_level=None) as other:
            other.execute("BEGIN EXCLUSIVE")
            other.execute("DELETE FROM answers")
            assert cache.get("a") == "1"
            other.execute("ROLLBACK")
        other.close()


def test_threads_share_one_cache(tmp_path):
    with AnswerCache(tmp_path / "answers") as cache:

        def work(name):
            for i in range(50):
                cache.put(f"{name} {i}", f"{i}")
                assert cache.get(f"{name} {i}") == f"{i}"

        threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(cache) == 200


def test_processes_write_at_once_and_may_make_the_file_at_once(tmp_path):
    path = tmp_path / "answers"
    processes = [writer(path, name, 60) for name in "abcd"]
    for process in some(processes):
        assert process.wait(timeout=120) == 0
    with AnswerCache(path) as cache:
        assert len(cache) == 4 * 60 + 1
        for name in "abcd":
            assert cache.get(f"{name} 59") == "answer 59" * 50
        assert cache.get("shared") in {f"{name} 59" for name in "abcd"}


def test_a_killed_writer_leaves_whole_answers(tmp_path):
    path = tmp_path / "answers"
    for name in "abc":
        output = tmp_path / f"written by {name}"
        process = writer(path, name, 100_000, output)
        while not output.exists() or output.read_text().count("\n") < 30:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.05)  # somewhere in the middle of a write
        process.kill()
        assert process.wait(timeout=60) == -signal.SIGKILL
        written = output.read_text().count("\n")
        with AnswerCache(path) as cache:
            for i in some(range(written)):
                assert cache.get(f"{name} {i}") == f"answer {i}" * 50
            cache.put("after", name)
            assert cache.get("after") == name


def test_foreign_files_are_refused_and_left_alone(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("these are my notes\n" * 100)
    other = tmp_path / "other.sqlite"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE answers (question TEXT)")
    connection.commit()
    connection.close()
    for path in (text, other):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=rf"{path.name}: not usable as a cache of answers: "):
            AnswerCache(path)
        assert path.read_bytes() == before
    with pytest.raises(ValueError, match=r"not usable as a cache of answers: unable to open"):
        AnswerCache(tmp_path)


def test_damage_is_a_miss_and_never_another_answer(tmp_path):
    """Bytes of the file overwritten at random, 300 times: right, a miss, or refused as foreign."""
    pristine = tmp_path / "answers"
    answers = {f"key {i}": f"score: {i % 5 + 1}; " * 20 for i in range(40)}
    with AnswerCache(pristine) as cache:
        for key, value in answers.items():
            cache.put(key, value)
    data, shuffler = pristine.read_bytes(), random.Random(0)
    refused = missed = 0
    for trial in range(300):
        damaged = bytearray(data)
        for _ in range(shuffler.choice([1, 20, 400])):
            damaged[shuffler.randrange(len(damaged))] = shuffler.randrange(256)
        path = tmp_path / f"damaged {trial}"
        path.write_bytes(damaged[: shuffler.choice([len(damaged), len(damaged) // 2])])
        try:
            cache = AnswerCache(path)
        except ValueError as error:
            assert "not usable as a cache of answers: " in str(error)  # noqa: PT017
            refused += 1
            continue
        with cache:
            for key, value in some(answers.items()):
                found = cache.get(key)
                assert found in (value, None)
                missed += found is None
            cache.put("after", "the damage")
            assert cache.get("after") in ("the damage", None)
    assert refused < 10  # those whose first page shows no cache any more
    assert missed > 100


def damage_row(path, key):
    """Overwrite bytes of one row's value in the file."""
    data = path.read_bytes()
    place = data.index(f"answer {key}".encode())
    path.write_bytes(data[:place] + b"score!" + data[place + 6 :])


@pytest.fixture
def of_two(tmp_path):
    """File of a cache with two answers."""
    path = tmp_path / "answers"
    with AnswerCache(path) as cache:
        for key in "ab":
            cache.put(key, f"answer {key}" * 9)
    return path


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_one_damaged_row_is_a_miss_and_is_mended(of_two, caplog):
    damage_row(of_two, "a")
    with AnswerCache(of_two) as cache:
        assert [cache.get("a"), cache.get("a")] == [None, None]
        assert cache.get("b") == "answer b" * 9
        cache.put("a", "again")
        assert cache.get("a") == "again"
        assert cache.failures == 2
    [once, at_the_end] = warnings_of(caplog)
    assert "answers cannot be read, continuing without: the answer to a is not what" in once
    assert "2 not read" in at_the_end


def test_a_damaged_file_is_a_cache_of_misses(of_two, caplog):
    data = bytearray(of_two.read_bytes())
    data[:16] = b"x" * 16  # no SQLite file any more, but still a cache
    of_two.write_bytes(data)
    with AnswerCache(of_two) as cache:
        assert cache.get("a") is None
        cache.put("a", "1")
        cache.put("b", "2")
        assert (cache.get("a"), len(cache)) == (None, 0)
    assert of_two.read_bytes() == bytes(data)
    assert sum("file is not a database" in text for text in warnings_of(caplog)) == 2


@contextmanager
def full_disk(size):
    """No file may grow beyond so many bytes, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_keeps_nothing_and_loses_nothing(of_two, caplog):
    with AnswerCache(of_two) as cache:
        with full_disk(8192):
            for i in range(3):
                cache.put(f"long {i}", "x" * 100_000)
            assert cache.get("long 0") is None
            assert cache.get("a") == "answer a" * 9
        cache.put("long 0", "x" * 100_000)
        assert cache.get("long 0") == "x" * 100_000
    assert sum("cannot be written" in text for text in warnings_of(caplog)) == 1


def test_a_disk_that_is_full_from_the_start(tmp_path):
    path = tmp_path / "answers"
    with full_disk(0):
        path.touch()
        cache = AnswerCache(path)
        cache.put("a", "1")
        assert cache.get("a") is None
    with cache:  # there is room again
        cache.put("a", "1")
        assert cache.get("a") == "1"


@contextmanager
def as_nobody():
    """Root may write whatever the mode of a file is."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_read_only_file_is_read(of_two, caplog):
    open_folder = Path(tempfile.mkdtemp())
    path = shutil.copy(of_two, open_folder / "answers")
    open_folder.chmod(0o777)
    path.chmod(0o444)
    try:
        with as_nobody(), AnswerCache(path) as cache:
            assert cache.get("a") == "answer a" * 9
            cache.put("c", "3")
            assert cache.get("c") is None
    finally:
        shutil.rmtree(open_folder)
    assert "attempt to write a readonly database" in warnings_of(caplog)[0]


def test_a_locked_file_is_left_alone_for_a_while(of_two, caplog, monkeypatch):
    """Another process holds the lock: one wait, and then misses without waiting."""
    monkeypatch.setattr(module, "BUSY_TIMEOUT", 0.1)
    lock = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('PRAGMA locking_mode = EXCLUSIVE'); c.execute('BEGIN EXCLUSIVE');"
        "print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", lock, str(of_two)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        with AnswerCache(of_two) as cache:
            start = time.monotonic()
            for _ in range(100):
                cache.put("a", "1")
                cache.get("a")
            assert time.monotonic() - start < 5
            other.communicate("")
            monkeypatch.setattr(module, "REST", 0.0)
            cache._rests_until.clear()  # as after a minute
            cache.put("a", "2")
            assert cache.get("a") == "2"
    assert "database is locked" in warnings_of(caplog)[0]


def test_an_answer_that_arrived_survives_a_cache_that_fails(of_two):
    """The whole way: the file is damaged, the disk full, and each question gets its answer."""

    async def ask():
        return "text", 5

    async def main(cache):
        return [await cached(cache, {"n": n}, read=int, ask=ask) for n in range(3)]

    with AnswerCache(of_two) as cache:
        of_two.write_bytes(b"damage" * 5000)
        with full_disk(1):
            assert anyio.run(main, cache) == [5, 5, 5]
        assert cache.failures > 0


def test_a_read_that_fails_as_a_bug_is_one(of_two):
    async def main(cache):
        cache.put(request_key({}), "x")
        return await cached(cache, {}, read=int, ask=None)

    with AnswerCache(of_two) as cache, pytest.raises(ValueError, match="invalid literal"):
        anyio.run(main, cache)
