"""Answers on disk: found again, shared by processes, whole after a kill, and never altered."""

import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mteditflow.rewards import AnswerCache
from mteditflow.rewards.transport.cache import request_key

ROOT = Path(__file__).parents[3]

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


def writer(path, name, number):
    command = [sys.executable, "-c", WRITER, str(path), name, str(number)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


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
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    with AnswerCache(path) as cache:
        assert len(cache) == 4 * 60 + 1
        for name in "abcd":
            assert cache.get(f"{name} 59") == "answer 59" * 50
        assert cache.get("shared") in {f"{name} 59" for name in "abcd"}


def test_a_killed_writer_leaves_whole_answers(tmp_path):
    path = tmp_path / "answers"
    for name in "abc":
        process = writer(path, name, 100_000)
        written = [process.stdout.readline() for _ in range(30)][-1]
        time.sleep(0.05)  # somewhere in the middle of a write
        process.send_signal(signal.SIGKILL)
        written = (process.communicate(timeout=60)[0].splitlines() or [written])[-1]
        assert process.returncode == -signal.SIGKILL
        with AnswerCache(path) as cache:
            for i in range(int(written) + 1):
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


def test_damage_is_an_error_and_never_another_answer(tmp_path):
    """Bytes of the file overwritten at random, 300 times: right, absent from it, or refused."""
    pristine = tmp_path / "answers"
    answers = {f"key {i}": f"score: {i % 5 + 1}; " * 20 for i in range(40)}
    with AnswerCache(pristine) as cache:
        for key, value in answers.items():
            cache.put(key, value)
    data, shuffler, refused = pristine.read_bytes(), random.Random(0), 0
    for trial in range(300):
        damaged = bytearray(data)
        for _ in range(shuffler.choice([1, 20, 400])):
            damaged[shuffler.randrange(len(damaged))] = shuffler.randrange(256)
        path = tmp_path / f"damaged {trial}"
        path.write_bytes(damaged[: shuffler.choice([len(damaged), len(damaged) // 2])])
        try:
            with AnswerCache(path) as cache:
                for key, value in answers.items():
                    assert cache.get(key) in (value, None)
        except ValueError as error:
            assert "not usable as a cache of answers: " in str(error)  # noqa: PT017
            refused += 1
    assert refused > 100
