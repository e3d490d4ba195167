"""Identity of servers: what they say of their models, asked once, on one line."""

import anyio
import pytest

from mteditflow.rewards.transport.identity import consistency_identity, judge_identity
from mteditflow.testing.endpoint import ScriptedServer, closed_port, plain

MODELS = {
    "data": [
        {"id": "other", "root": "elsewhere"},
        {
            "id": "judge",
            "root": "Qwen/Qwen3-VL",
            "owned_by": "vllm",
            "max_model_len": 4096,
            "created": 7,
        },
    ]
}
SAID = "judge, root Qwen/Qwen3-VL, owned_by vllm, max_model_len 4096"


def scorer(name, **more):
    return ScriptedServer(lambda _: {"scorer": name}, **more)


async def identity_of_judge(*urls, **options):
    return await judge_identity(urls, "judge", **options)


async def identity_of_scorer(*urls, **options):
    return await consistency_identity(urls, **options)


def test_a_consistency_server_is_asked_for_its_scorer_with_the_token():
    with scorer("abc") as server:
        found = anyio.run(lambda: identity_of_scorer(f"{server.url}/", token="secret"))
        (asked,) = server.requests
    assert found == "abc"
    assert (asked.method, asked.path) == ("GET", "/v1/info")
    assert asked.headers["authorization"] == "Bearer secret"


def test_servers_that_say_the_same_are_named_once_and_others_beside_them():
    with scorer("b") as first, scorer("a") as second, scorer("b") as third:
        nobody = f"http://127.0.0.1:{closed_port()}/v1"
        urls = [server.url for server in (first, second, third)]
        assert anyio.run(identity_of_scorer, urls[0], urls[2], nobody) == "b"
        assert anyio.run(identity_of_scorer, *urls) == "a; b"
        assert "authorization" not in first.requests[0].headers


@pytest.mark.parametrize("said", [[], {}, {"scorer": None}, {"scorer": 7}, {"scorer": ""}])
def test_a_consistency_server_that_names_no_scorer_has_no_identity(said):
    with ScriptedServer(lambda _: said) as server:
        assert anyio.run(identity_of_scorer, server.url) is None


def test_a_judge_is_what_its_server_says_of_the_model_but_not_when_it_was_started():
    with ScriptedServer(lambda _: None, models=MODELS) as server:
        assert anyio.run(identity_of_judge, server.url) == SAID


def test_the_version_of_a_judges_server_is_asked_for_beside_its_api():
    script = [plain(MODELS), plain({"version": "0.11.0"})]
    with ScriptedServer(lambda _: None, script) as server:
        url = f"{server.url.removesuffix('/v1')}/vllm/v1"
        found = anyio.run(lambda: identity_of_judge(url, api_key="secret"))
        asked = [(request.path, request.headers["authorization"]) for request in server.requests]
    assert found == f"{SAID}, server 0.11.0"
    assert asked == [("/vllm/v1/models", "Bearer secret"), ("/vllm/version", "Bearer secret")]


@pytest.mark.parametrize("models", [None, [], {}, {"data": {}}, {"data": ["judge", {"id": "x"}]}])
def test_a_judges_server_that_does_not_list_the_model_has_no_identity(models):
    with ScriptedServer(lambda _: None, models=models) as server:
        assert anyio.run(identity_of_judge, server.url) is None
