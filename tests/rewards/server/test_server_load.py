"""Many clients at once: every request gets its own answer, and none is lost."""

from dataclasses import replace

import anyio
import pytest
import torch
from consistency_world import ServerProcess, color_scorer, color_server, in_process, make_chains

from benchmarks.consistency_server import Soak, slope
from mteditflow.rewards import ConsistencyClient, Fault, Lost
from tests.loops import some

CLIENTS = 64
ROUNDS = 2


def run(url, seeds, **options):
    """Every client scores chains of its own, one after another; return what each got."""
    found = {}

    async def one(n):
        client = ConsistencyClient([url], concurrency=1, **options)
        chains, images = make_chains(seeds[n])
        found[n] = await client.score(chains, images)

    async def all_at_once():
        async with anyio.create_task_group() as tasks:
            for n in range(len(seeds)):
                tasks.start_soon(one, n)

    anyio.run(all_at_once)
    return [found[n] for n in range(len(seeds))]


def check(found, seeds):
    for scores, own in some(zip(found, seeds, strict=True)):
        assert not scores.lost
        expected = in_process(color_scorer(), *make_chains(own))
        for name in ("object_l1", "background_l1"):
            ours, theirs = getattr(scores, name), getattr(expected, name)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_64_clients_at_once_each_get_their_own_answers():
    seeds = [range(ROUNDS * n, ROUNDS * (n + 1)) for n in range(CLIENTS)]
    with ServerProcess(color_server(max_wait=0.02)) as server:
        found = run(server.url, seeds)
        server.terminate()
        assert server.exit_status() == 0
    check(found, seeds)
    distinct = {value for scores in found for value in scores.background_l1[:, 0].tolist()}
    assert len(distinct) > 0.9 * ROUNDS * CLIENTS  # an answer in the wrong place would be seen


def test_a_server_with_fewer_places_than_clients_turns_them_away_and_loses_nothing():
    seeds = [range(n, n + 1) for n in range(12)]
    with ServerProcess(color_server(0.02, max_requests=3)) as server:
        found = run(server.url, seeds, attempts=200, back_off=0.02, max_back_off=0.2)
    check(found, seeds)


# The soak of benchmarks/consistency_server.py judges itself by these


def test_the_slope_of_memory_is_that_of_the_second_half():
    memory = [(n, float(n), 100.0 if n < 500 else 50.0 + n / 100) for n in range(0, 1001, 10)]
    value, error = slope(memory)
    assert value == pytest.approx(10.0)
    assert error == pytest.approx(0.0, abs=1e-9)


def test_an_answer_that_is_wrong_or_lost_is_counted_as_that():
    right, other = (in_process(color_scorer(), *make_chains([seed])) for seed in (3, 6))
    nearly = replace(right, object_l1=right.object_l1 + 1e-7)
    missing = replace(right, object_l1=right.object_l1 * torch.nan)
    lost = replace(
        missing, background_l1=missing.object_l1, lost={(0, 0): Lost(Fault.timeout, "", 1)}
    )
    soak = Soak()
    for found in (right, nearly, other, missing, lost):
        soak.judge(found, right)
    assert (soak.same, soak.wrong, soak.lost) == (1, 2, 1)
    assert soak.largest > 0
