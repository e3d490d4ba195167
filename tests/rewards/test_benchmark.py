"""The rewards' benchmarks measure what they say, and their page is made from what they stored."""

import json
from pathlib import Path

import anyio
import pytest

from benchmarks import judge_client, report, rewards_page
from mteditflow.testing.endpoint import ScriptedServer, completion
from tests.loops import some
from tests.processes import CONTEXT

ROOT = Path(__file__).parents[2]


def five(request):
    return completion("5")


ASKERS = pytest.mark.parametrize("name", ["httpx2", "openai", "ChatClient"])


async def ask(url, name):
    async with judge_client.askers(url, 100, 4) as asks:
        await asks[name]()


@ASKERS
def test_all_three_ask_the_same(name):
    with ScriptedServer(five) as served:
        anyio.run(ask, served.url, name)
        (request,) = served.requests
    assert request.path == "/v1/chat/completions"
    assert request.json == {
        "model": "scripted",
        "messages": [{"role": "user", "content": judge_client.question(100)}],
        "temperature": 0.0,
        "max_completion_tokens": 8,
        "seed": 0,
    }


@ASKERS
def test_a_wrong_answer_is_not_counted(name):
    with (
        ScriptedServer(lambda _: completion("4")) as served,
        pytest.raises(RuntimeError, match="expected the score 5, got 4"),
    ):
        anyio.run(ask, served.url, name)


@ASKERS
def test_a_rate_counts_what_was_answered_and_keeps_so_many_in_flight(name):
    with ScriptedServer(five) as served:
        found = anyio.run(judge_client.rate, served.url, 100, name, 4, 0.2)
        assert 0 < found <= len(served.requests) / 0.2
        assert served.most_at_once <= 4


@pytest.mark.slow
def test_a_small_run_makes_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(judge_client, "SIZES", {"1 kB": 1000})
    monkeypatch.setattr(judge_client, "IN_FLIGHT", (1, 4))
    monkeypatch.setattr(judge_client.multiprocessing, "get_context", lambda _: CONTEXT)
    command = ["judge_client", "--seconds", "0.1", "--rounds", "2", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    judge_client.main()
    stored = json.loads((tmp_path / "rewards.json").read_text())
    rates, costs = (table["rows"] for table in stored["Judge client"]["tables"])
    assert [row[:4] for row in rates] == [
        ["1 kB", "200 ms", 1, 5.0],
        ["1 kB", "200 ms", 4, 20.0],
        ["1 kB", "0 ms", 4, "-"],
    ]
    for _, _, _, most, bare, ours, ratio in some(rates):
        assert most == "-" or (bare <= 1.1 * most and ours <= 1.1 * most)
        assert ratio == pytest.approx(ours / bare)
    for _, bare, _, ours, added, _ in some(costs):
        assert added == pytest.approx(ours - bare)
    assert (tmp_path / "rewards.md").read_text() == rewards_page.render(stored)


def test_sections_stand_side_by_side(tmp_path):
    section = {
        "about": "What was measured.",
        "environment": report.environment("cpu"),
        "tables": [{"columns": ["what", "how much"], "rows": [["this", 1.23456], ["that", 7]]}],
    }
    rewards_page.write(tmp_path, "B", section)
    rewards_page.write(tmp_path, "A", section)
    rewards_page.write(tmp_path, "B", section)
    page = (tmp_path / "rewards.md").read_text()
    assert page.index("## A\n") < page.index("## B\n")
    assert page.count("| this | 1.23 |\n| that | 7 |\n") == 2
    assert list(json.loads((tmp_path / "rewards.json").read_text())) == ["A", "B"]


def test_the_page_is_made_from_the_stored_results():
    stored = json.loads((ROOT / "benchmarks" / "rewards.json").read_text())
    assert (ROOT / "benchmarks" / "rewards.md").read_text() == rewards_page.render(stored)
