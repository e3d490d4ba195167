"""A synchronous trainer and asynchronous rewards, at the same time."""

import asyncio
import logging
import os
import sys
import threading
from concurrent.futures import CancelledError
from contextlib import suppress

import anyio
import pytest

from mteditflow.rewards import Background, ChatClient
from mteditflow.rewards.transport import concurrency
from mteditflow.rewards.transport.concurrency import ending_past_calls
from mteditflow.testing.endpoint import ScriptedServer, completion
from tests.loops import some


def test_rewards_of_one_batch_are_fetched_while_the_next_is_sampled():
    """The fetch ends only after sampling has gone on, so a blocking submit would never return."""
    sampled = threading.Event()

    async def fetch(batch, *, scale):
        while not sampled.is_set():
            await anyio.sleep(0.001)
        return scale * batch

    with Background() as background:
        futures = [background.submit(fetch, batch, scale=10) for batch in range(3)]
        assert not any(future.done() for future in some(futures))
        sampled.set()
        assert [future.result(timeout=30) for future in futures] == [0, 10, 20]


def test_real_requests_overlap_with_the_trainer():
    asked, may_answer = threading.Event(), threading.Event()

    async def held(exchange):
        asked.set()
        while not may_answer.is_set():
            await anyio.sleep(0.001)
        await exchange.reply(exchange.right())

    with ScriptedServer(lambda _: completion("5"), [held]) as server, Background() as background:
        client = ChatClient([server.url], "judge")
        content = [{"type": "text", "text": "score"}]
        future = background.submit(client.ask, content, lambda a: int(a.text), max_tokens=4)
        assert asked.wait(30)  # the trainer goes on while the server has the question
        assert not future.done()
        may_answer.set()
        assert future.result(timeout=30) == 5
        # connections outlive a request, and the loop
        again = background.submit(client.ask, content, lambda a: int(a.text), max_tokens=4)
        assert again.result(timeout=30) == 5


def test_exceptions_come_out_of_the_future():
    async def fail():
        raise KeyError("lost")

    with Background() as background:
        future = background.submit(fail)
        with pytest.raises(KeyError, match="lost"):
            future.result(timeout=30)


def test_leaving_waits_for_what_was_submitted():
    done = []

    async def work():
        await anyio.sleep(0.05)
        done.append(True)

    with Background() as background:
        background.submit(work)
    assert done == [True]


def test_an_exception_in_the_block_cancels_it():
    async def work():
        await anyio.sleep_forever()

    futures = []

    def interrupted():
        with Background() as background:
            futures.append(background.submit(work))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(CancelledError):
        futures[0].result(timeout=30)


def test_a_future_can_be_cancelled():
    cancelled = threading.Event()

    async def work():
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    with Background() as background:
        future = background.submit(work)
        background.submit(anyio.sleep, 0.01).result(timeout=30)  # it has begun
        future.cancel()
        assert cancelled.wait(30)


def test_outside_of_its_block_it_says_so():
    background = Background()
    with pytest.raises(RuntimeError, match=r"^Background: expected submit\(\) inside of its"):
        background.submit(anyio.sleep, 0)
    for _ in range(2):  # and it may be entered again
        with background:
            assert background.submit(anyio.sleep, 0).result(timeout=30) is None
    with pytest.raises(RuntimeError, match=r"^Background: expected"):
        background.submit(anyio.sleep, 0)
    assert not [t for t in threading.enumerate() if t.name == "mteditflow-rewards"]


class Blocking:
    """Calls that nothing can cancel, until they are let go."""

    def __init__(self):
        self.begun, self.let_go = threading.Event(), threading.Event()

    def block(self):
        self.begun.set()
        assert self.let_go.wait(60)

    async def loop(self):
        self.block()

    async def asyncio(self):
        await asyncio.to_thread(self.block)

    async def anyio(self):
        await anyio.to_thread.run_sync(self.block)


@pytest.fixture
def blocking(monkeypatch):
    """One whose threads are gone afterwards."""
    monkeypatch.setattr(concurrency, "GRACE", 0.05)
    call = Blocking()
    yield call
    call.let_go.set()
    left = [thread for thread in threading.enumerate() if thread.name == concurrency.THREAD]
    for thread in left:
        thread.join(30)
    assert not [thread for thread in left if thread.is_alive()]


@pytest.mark.parametrize("where", ["loop", "asyncio", "anyio"])
@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (SystemExit(), 0, ""),
        (SystemExit(1), 1, ""),
        (SystemExit("no"), 1, "no\n"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt\n"),
        (ValueError("bad"), 1, "ValueError: bad\n"),
        (EOFError(), 0, ""),  # caught: the program ends as after a signal
    ],
)
def test_a_call_that_blocks_is_left_behind(
    blocking, monkeypatch, caplog, capsys, where, end, code, said
):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(logging, "shutdown", lambda: codes.append("flushed"))

    def program():
        with ending_past_calls():
            try:
                with Background() as background:
                    background.submit(getattr(blocking, where))
                    assert blocking.begun.wait(30)
                    raise end
            except EOFError:
                pass

    if isinstance(end, EOFError):
        program()
    else:
        with pytest.raises(type(end)):
            program()
    assert codes == ["flushed", code]
    assert caplog.messages == ["a scorer was still running 0.05 s after its cancellation"]
    assert capsys.readouterr().err.endswith(said)


def test_a_closed_stream_changes_no_exit_code(blocking, monkeypatch):
    """As of a program whose output nobody reads any more."""
    codes = []
    with open(os.devnull, "w") as closed:
        pass
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    with ending_past_calls(), suppress(EOFError), Background() as background:
        background.submit(blocking.loop)
        assert blocking.begun.wait(30)
        monkeypatch.setattr(sys, "stdout", closed)
        raise EOFError
    assert codes == [0]


def test_a_call_that_blocks_holds_nobody_up_who_submits_another(blocking):
    with Background() as background:
        first = background.submit(blocking.loop)
        assert blocking.begun.wait(30)
        second = background.submit(anyio.sleep, 0)  # returns, although nothing runs it yet
        assert not second.done()
        blocking.let_go.set()
        assert (first.result(timeout=30), second.result(timeout=30)) == (None, None)


def test_no_process_is_ended_where_no_call_was_left_behind(monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"ended with {code}"))
    with ending_past_calls(), Background() as background:
        background.submit(anyio.sleep, 0)

    def leave():
        with ending_past_calls(), Background() as background:
            background.submit(anyio.sleep_forever)
            raise SystemExit(3)

    with pytest.raises(SystemExit):
        leave()


def test_an_end_of_the_program_in_a_call_comes_out_of_the_future():
    async def leave():
        raise SystemExit(3)

    with Background() as background:
        with pytest.raises(SystemExit):
            background.submit(leave).result(timeout=30)
        assert background.submit(anyio.sleep, 0).result(timeout=30) is None
