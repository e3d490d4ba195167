"""What a run says, where it says it, and that a kill leaves nothing half said."""

import errno
import fcntl
import io
import logging
import os
import pty
import random
import re
import signal
import struct
import termios
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mteditflow.training.metrics_file import read_metrics
from mteditflow.training.run_log import RunLog
from tests.loops import some
from tests.processes import Process

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


class Screen(io.StringIO):
    """Standard error that is a terminal, or is none."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def screen(monkeypatch):
    def make(*, terminal):
        screen = Screen(terminal)
        monkeypatch.setattr("sys.stderr", screen)
        return screen

    return make


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("mteditflow.training.run_log.time.monotonic", lambda: now[0])
    return now


def test_words_go_to_the_file_and_to_the_terminal(tmp_path, screen):
    seen = screen(terminal=False)
    log = RunLog(tmp_path / "new", console=True, main=True)
    log.message("two\nlines [bold]with brackets[/bold]")
    log.warning("a group had equal rewards " * 9)
    text = (tmp_path / "new" / "log.txt").read_text()
    assert seen.getvalue() == text
    first, second, third = text.splitlines()
    assert re.fullmatch(STAMP + "two", first)
    assert re.fullmatch(STAMP + r"lines \[bold\]with brackets\[/bold\]", second)
    assert re.fullmatch(STAMP + "warning: (a group had equal rewards ){9}", third)


def test_warnings_are_yellow_on_a_terminal_only(tmp_path, screen):
    seen = screen(terminal=True)
    RunLog(tmp_path, console=True, main=True).warning("hot")
    assert "\x1b[33m" in seen.getvalue()
    assert "\x1b" not in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_that_has_gone_away_does_not_end_a_run(tmp_path, screen, monkeypatch, terminal):
    def gone(text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(screen(terminal=terminal), "write", gone)
    RunLog(tmp_path, console=True, main=True).message("still here")
    assert "still here" in (tmp_path / "log.txt").read_text()


@given(
    st.lists(
        st.text(st.characters(codec="utf-8", categories=None))
        | st.sampled_from(
            [
                "\x1b[1;31mred\x1b[0m",
                "\x1b]8;;http://x\x1b\\link\x1b]8;;\x07",
                "a\rb",
                "\x9b31m",
                "\ud800",
            ]
        )
    )
)
def test_the_text_log_is_plain(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("run")
    text = "".join(parts)
    RunLog(folder, console=False, main=True).message(text)
    written = (folder / "log.txt").read_bytes().decode()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", written)
    lines = written.split("\n")[:-1]
    assert all(re.match(STAMP, line) for line in some(lines))
    assert "31m" not in written or "31m" in "".join(x for x in parts if "\x1b" not in x)


def test_other_ranks_and_a_quiet_run_print_nothing(tmp_path, screen, clock):
    seen = screen(terminal=True)
    for name, console, main in (("rank 1", True, False), ("quiet", False, True)):
        log = RunLog(tmp_path / name, console=console, main=main)
        with log.bar("rollout", 3, unit="chains") as bar:
            bar.note("following 0.5")
            clock[0] += 100
            bar.advance()
        log.message("hello")
        log.warning("hello")
        flat = log.record(1, {"reward/following": 0.5})
        assert flat["reward/following"] == 0.5
        assert "seconds/other" in flat
        log.rewind(1)
        assert log.metrics == []
    assert seen.getvalue() == ""
    assert not (tmp_path / "rank 1").exists()
    assert len((tmp_path / "quiet" / "log.txt").read_text().splitlines()) == 3


def test_every_rank_reads_the_numbers(tmp_path):
    RunLog(tmp_path, console=False, main=True).record(4, {"kl": 0.25})
    (line,) = RunLog(tmp_path, console=False, main=False).metrics
    assert (line["round"], line["kl"]) == (4, 0.25)


def test_the_time_of_a_round_is_recorded_with_it(tmp_path):
    log = RunLog(tmp_path, console=False, main=True)
    with log.stopwatch.phase("sampling"):
        time.sleep(0.01)
    assert log.record(1, {})["seconds/sampling"] >= 0.01
    assert "seconds/sampling" not in log.record(2, {})
    assert log.metrics[0]["seconds/sampling"] >= 0.01


def test_bars_are_drawn_on_a_terminal(tmp_path, screen):
    seen = screen(terminal=True)
    log = RunLog(tmp_path, console=True, main=True)
    with log.bar("rounds", 9, unit="rounds", done=4) as rounds:
        with log.bar("rollout", 2, unit="chains") as rollout:
            rollout.advance()
            rollout.note("following 0.53")
        log.message("a message between bars")
        rounds.advance()
    text = seen.getvalue()
    assert "rounds:  44% 4/9" in text
    assert "rollout:  50% 1/2" in text
    assert "following 0.53" in text
    assert "a message between bars" in text
    assert (tmp_path / "log.txt").read_text().count("\n") == 1


@pytest.mark.parametrize("columns", [40, 80, 110])
def test_a_narrow_terminal_shows_the_counts(tmp_path, screen, monkeypatch, columns):
    seen = screen(terminal=True)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _: (columns, 24))
    log = RunLog(tmp_path, console=True, main=True)
    with log.bar("round", 700, unit="rounds", done=349) as bar:
        bar.note("following 0.53, consistency 0.98, strict 0.12, preference 21.37")
        bar.advance()
    last = re.split(r"[\r\n]", seen.getvalue().strip())[-1]
    assert "round:  50% 350/700 [" in last
    assert len(re.sub(r"\x1b\[[A-Z]", "", last)) <= columns


def test_no_time_is_left_where_nothing_is_done(tmp_path, clock):
    log = RunLog(tmp_path, console=False, main=True)
    with log.bar("rollout", 100, unit="chains", done=10) as bar:
        clock[0] += 180
        bar.advance(0)
        clock[0] += 180
        bar.advance(45)
    first, second = (tmp_path / "log.txt").read_text().splitlines()
    assert re.fullmatch(STAMP + "rollout: 10 of 100 chains, 03:00 gone", first)
    assert re.fullmatch(STAMP + "rollout: 55 of 100 chains, 06:00 gone, 06:00 left", second)


def test_words_of_libraries_and_warnings_are_stamped_and_logged(tmp_path, screen):
    seen = screen(terminal=False)
    log = RunLog(tmp_path, console=True, main=True)
    with warnings.catch_warnings(), log.capture():
        warnings.simplefilter("always")
        logging.getLogger("mteditflow.some.where").warning("answers cannot be %s", "written")
        logging.getLogger("mteditflow.some.where").info("no warning")
        warnings.warn("checkpoint skipped", stacklevel=1)
    logging.getLogger("mteditflow.some.where").debug("after it")
    first, *second = (tmp_path / "log.txt").read_text().splitlines()
    assert re.fullmatch(STAMP + "warning: mteditflow.some.where: answers cannot be written", first)
    assert any("checkpoint skipped" in line for line in second)
    assert all(re.match(STAMP, line) for line in some(second))
    assert seen.getvalue() == (tmp_path / "log.txt").read_text()


def test_a_half_line_of_a_killed_run_is_cut_off(tmp_path):
    log = RunLog(tmp_path, console=False, main=True)
    log.message("one")
    log.message("two")
    whole = (tmp_path / "log.txt").read_bytes()
    for cut in some(range(len(whole) + 1)):
        (tmp_path / "log.txt").write_bytes(whole[:cut])
        RunLog(tmp_path, console=False, main=True).message("on")
        *kept, last = (tmp_path / "log.txt").read_bytes().splitlines(keepends=True)
        assert b"".join(kept) == whole[: whole[:cut].rfind(b"\n") + 1]
        assert last.endswith(b" on\n")


@pytest.mark.parametrize("terminal", [False, True])
def test_elsewhere_a_plain_line_at_most_every_30_seconds(tmp_path, screen, clock, terminal):
    seen = screen(terminal=terminal)
    log = RunLog(tmp_path, console=True, main=True)
    with log.bar("rollout", 100, unit="chains", done=10) as bar:
        bar.note("following 0.53")
        for _ in range(30):
            clock[0] += 7
            bar.advance(2)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 6  # every fifth step of 7 seconds
    expected = "rollout: 20 of 100 chains, 00:35 gone, 04:40 left; following 0.53"
    assert re.fullmatch(STAMP + expected, lines[0])
    plain = "rollout: 20 of 100 chains, 00:35 gone" in seen.getvalue()
    assert plain != terminal


def test_words_of_many_threads_stay_whole(tmp_path):
    log = RunLog(tmp_path, console=False, main=True)
    work = [
        threading.Thread(target=lambda: [log.message("x" * 500) for _ in range(20)])
        for _ in range(8)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 160
    assert all(re.fullmatch(STAMP + "x{500}", line) for line in some(lines))


@pytest.mark.slow
def test_a_killed_run_leaves_whole_lines_and_goes_on(tmp_path):
    """SIGKILL at a random moment of a run that writes all the time, before a real terminal."""
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    script = Path(__file__).with_name("logging_run.py")
    process = Process([script, tmp_path], errors=os.ttyname(terminal))
    seen = read_until(reader, b"round 5: ")
    rest = threading.Thread(target=read_until, args=(reader, b"never"))
    rest.start()
    time.sleep(random.uniform(0, 0.1))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    os.close(terminal)
    rest.join()
    os.close(reader)
    assert b"rollout:   0%" in seen
    text = (tmp_path / "log.txt").read_text()
    assert "\x1b" not in text
    assert all(
        re.fullmatch(STAMP + r"round \d+: red and so on", x) for x in some(text.splitlines())
    )
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert len(lines) >= 5
    assert [line["round"] for line in lines] == list(range(1, len(lines) + 1))
    assert all(len(line) >= 202 for line in some(lines))
    log = RunLog(tmp_path, console=False, main=True)
    log.rewind(4)
    log.record(4, {"kl": 0.5})
    assert [line["round"] for line in log.metrics] == [1, 2, 3, 4]


def read_until(reader, words):
    """Read what comes to a terminal until it holds these words or is closed."""
    seen = b""
    with suppress(OSError):
        while words not in seen:
            seen += os.read(reader, 65536)
    return seen
