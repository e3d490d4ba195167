"""A synchronous trainer and asynchronous rewards, at the same time."""

import threading
from concurrent.futures import CancelledError

import anyio
import pytest

from mteditflow.rewards import Background, ChatClient
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
