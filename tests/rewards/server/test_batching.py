"""Micro-batching: each request gets its own answer, whatever befalls those beside it."""

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mteditflow.rewards.server.batching import MicroBatcher
from tests.loops import some


class Squares:
    """Squares numbers, and remembers each batch; -1 is poison, `opened` lets it work."""

    def __init__(self, *, closed=False):
        self.batches, self.threads = [], set()
        self.at_once = self.most_at_once = 0
        self.opened = threading.Event()
        if not closed:
            self.opened.set()

    def __call__(self, numbers):
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.threads.add(threading.get_ident())
        self.batches.append(list(numbers))
        self.opened.wait()
        self.at_once -= 1
        if -1 in numbers:
            raise ValueError("poison")
        return [n * n for n in numbers]


@asynccontextmanager
async def running(work, **options):
    batcher = MicroBatcher(work, **options)
    worker = asyncio.create_task(batcher.run())
    try:
        yield batcher
    finally:
        worker.cancel()


def ask(work, numbers, **options):
    async def main():
        async with running(work, **options) as batcher:
            asked = [batcher.submit(n) for n in numbers]
            return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(main())


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40), st.integers(1, 9))
def test_every_request_gets_its_own_answer_in_batches_that_are_bounded_and_in_order(numbers, most):
    work = Squares()
    assert ask(work, numbers, max_batch=most) == [n * n for n in numbers]
    assert [n for batch in work.batches for n in batch] == numbers
    assert all(1 <= len(batch) <= most for batch in some(work.batches))


def test_all_work_is_done_in_one_thread_one_batch_at_a_time():
    work = Squares()
    ask(work, range(50), max_batch=3)
    assert len(work.threads) == work.most_at_once == 1
    assert threading.get_ident() not in work.threads


def test_requests_that_wait_together_are_one_batch_without_waiting_longer_than_needed():
    work = Squares()
    assert ask(work, [1, 2, 3], max_batch=3, max_wait=3600.0) == [1, 4, 9]
    assert work.batches == [[1, 2, 3]]


def test_an_idle_worker_waits_no_longer_than_it_may():
    assert ask(Squares(), [3], max_batch=3, max_wait=0.01) == [9]


@given(st.lists(st.integers(-1, 9), min_size=1, max_size=12))
def test_a_request_that_fails_fails_alone(numbers):
    for number, answer in some(zip(numbers, ask(Squares(), numbers, max_batch=4), strict=True)):
        if number == -1:
            assert isinstance(answer, ValueError)
            assert str(answer) == "poison"
        else:
            assert answer == number**2


def test_work_that_gives_too_few_answers_fails_and_mixes_none_up():
    def forgetful(numbers):
        return [n * n for n in numbers if n != 2]

    first, second, third = ask(forgetful, [1, 2, 3])
    assert (first, third) == (1, 9)
    assert str(second) == "expected 1 answers of a batch, got 0"


def test_a_request_whose_caller_is_gone_is_dropped_before_it_starts():
    async def main():
        work = Squares(closed=True)
        async with running(work, max_batch=1) as batcher:
            first = asyncio.create_task(batcher.submit(1))
            while not work.batches:
                await asyncio.sleep(0.001)
            dropped, kept = (asyncio.create_task(batcher.submit(n)) for n in (2, 3))
            await asyncio.sleep(0)
            dropped.cancel()
            await asyncio.sleep(0)
            work.opened.set()
            assert await asyncio.gather(first, kept) == [1, 9]
        assert work.batches == [[1], [3]]
        assert dropped.cancelled()

    asyncio.run(main())


@pytest.mark.parametrize("poison", [False, True])
def test_a_caller_that_leaves_in_the_middle_of_its_batch_harms_nobody(poison):
    async def main():
        work = Squares(closed=True)
        async with running(work, max_batch=3, max_wait=3600.0) as batcher:
            numbers = [1, -1 if poison else 2, 3]
            first, second, third = (asyncio.create_task(batcher.submit(n)) for n in numbers)
            while not work.batches:
                await asyncio.sleep(0.001)
            first.cancel()
            work.opened.set()
            assert await third == 9
            if poison:
                with pytest.raises(ValueError, match="poison"):
                    await second
                assert work.batches == [[1, -1, 3], [-1], [3]]  # 1 has no caller any more
            else:
                assert await second == 4

    asyncio.run(main())


def test_everybody_leaving_while_the_worker_waits_for_more_leaves_no_empty_batch():
    async def main():
        work = Squares()
        async with running(work, max_batch=2, max_wait=0.02) as batcher:
            alone = asyncio.create_task(batcher.submit(5))
            await asyncio.sleep(0.001)
            alone.cancel()
            await asyncio.sleep(0.05)
            assert await batcher.submit(6) == 36
        assert work.batches == [[6]]

    asyncio.run(main())


def test_nobody_waits_for_a_worker_that_has_ended():
    async def main():
        work = Squares(closed=True)
        async with running(work, max_batch=1) as batcher:
            asked = [asyncio.create_task(batcher.submit(n)) for n in (1, 2)]
            while not work.batches:
                await asyncio.sleep(0.001)
        work.opened.set()
        for one in some(asked):  # in the batch and behind it
            with pytest.raises(RuntimeError, match="expected a request while the worker runs"):
                await one
        with pytest.raises(RuntimeError, match="expected a request while the worker runs"):
            await batcher.submit(3)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_batch": 0}, ValueError, "max_batch: expected an integer >= 1, got 0"),
        ({"max_wait": -1.0}, ValueError, "max_wait: expected a finite number in"),
    ],
)
def test_numbers_out_of_range_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        MicroBatcher(Squares(), **options)
