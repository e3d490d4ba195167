"""One question to an OpenAI-compatible server: what is sent, what is read, what is refused."""

import logging
import threading
from itertools import repeat

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mteditflow.rewards import AnswerCache, AnswerError, ChatAnswer, ChatClient, Fault, Lost
from mteditflow.rewards.transport.chat import _read_completion
from mteditflow.testing import endpoint as scripted
from mteditflow.testing.endpoint import ScriptedServer, completion, plain

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
CONTENT = [{"type": "text", "text": "Score the edit."}, IMAGE]
SCHEMA = {"type": "object", "properties": {"score": {"type": "integer"}}}
QUICK = {"attempts": 3, "timeout": 5.0, "back_off": 0.01, "cool_down": 0.05, "patience": 10.0}


def five(request):
    return completion("5")


def score(answer):
    if not (answer.text.isascii() and answer.text.isdigit()):
        raise AnswerError(Fault.format, f"expected a digit, got {answer.text!r}")
    return int(answer.text)


def client(server, **options):
    return ChatClient([server.url], "judge", **QUICK | options)


def ask(client, read=score, content=CONTENT, **options):
    return anyio.run(lambda: client.ask(content, read, **{"max_tokens": 16} | options))


def with_logprobs(*tokens, text="5", finish_reason="length"):
    answer = completion(text, finish_reason=finish_reason)
    content = [
        {
            "token": top[0][0],
            "logprob": top[0][1],
            "top_logprobs": [{"token": t, "logprob": p, "bytes": None} for t, p in top],
        }
        for top in tokens
    ]
    answer["choices"][0]["logprobs"] = {"content": content}
    return answer


WITHOUT_TOP = with_logprobs([("5", -0.1)])
WITHOUT_TOP["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = []


# what is sent


def test_golden_request():
    with ScriptedServer(five) as server:
        assert ask(client(server, api_key="sk-1"), seed=7) == 5
        request = server.requests[0]
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert request.headers["authorization"] == "Bearer sk-1"
    assert request.headers["accept-encoding"] == "identity"
    assert request.json == {
        "model": "judge",
        "messages": [{"role": "user", "content": CONTENT}],
        "temperature": 0.0,
        "max_completion_tokens": 16,
        "seed": 7,
    }


def test_structured_output_and_log_probabilities_are_asked_for_where_wanted():
    answer = with_logprobs([("5", -0.1), ("4", -2.5)])
    with ScriptedServer(lambda _: answer) as server:
        ask(client(server, temperature=0.5), schema=SCHEMA, top_logprobs=20)
        request = server.requests[0].json
    assert request["temperature"] == 0.5
    assert request["logprobs"] is True
    assert request["top_logprobs"] == 20
    assert request["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
    }


def test_each_attempt_draws_anew_and_votes_do_not_share_draws():
    bad = plain(completion("five"))
    seeds = []
    for vote in range(3):
        with ScriptedServer(five, [bad, bad]) as server:
            assert ask(client(server, temperature=1.0), seed=vote) == 5
            seeds.append([request.json["seed"] for request in server.requests])
    assert [of_vote[0] for of_vote in seeds] == [0, 1, 2]
    assert len({seed for of_vote in seeds for seed in of_vote}) == 9
    assert all(0 <= seed < 2**31 for of_vote in seeds for seed in of_vote)


def test_the_key_of_the_environment_stays_there(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody")
    with ScriptedServer(five) as server:
        ask(client(server))
    assert "sk-of-somebody" not in str(server.requests[0].headers)


def test_a_key_is_in_no_error_and_no_log(caplog):
    caplog.set_level(logging.DEBUG)
    key = "sk-hunter2"
    echo = scripted.error(401, f"Incorrect API key provided: {key}")
    with ScriptedServer(five, [scripted.error(500, key), scripted.reset, echo]) as server:
        lost = ask(client(server, api_key=key))
        assert server.requests[0].headers["authorization"] == f"Bearer {key}"
    assert lost.fault is Fault.rejected
    assert "Incorrect API key provided: ***" in lost.detail
    assert key not in caplog.text + str(lost) + repr(client(server, api_key=key))


# what is read


def test_golden_answer():
    with ScriptedServer(lambda _: completion(" 5\n")) as server:
        assert ask(client(server), lambda answer: answer) == ChatAnswer(text=" 5\n")


def test_golden_log_probabilities():
    tops = [("5", -0.1), ("4", -2.5), ("五", -9999.0)], [(".", -0.0)]
    with ScriptedServer(lambda _: with_logprobs(*tops)) as server:
        answer = ask(client(server), lambda answer: answer, top_logprobs=3, max_tokens=1)
    assert answer.text == "5"
    assert answer.top_logprobs == (tuple(tops[0]), tuple(tops[1]))


def test_what_servers_add_is_passed_over():
    answer = completion("5", reasoning_content="hm", tool_calls=[], refusal=None)
    answer["choices"][0] |= {"stop_reason": None, "token_ids": None, "logprobs": None}
    answer |= {"prompt_logprobs": None, "kv_transfer_params": None, "object": "whatever"}
    for absent in ("id", "created", "model", "usage"):
        del answer[absent]
    with ScriptedServer(lambda _: answer) as server:
        assert ask(client(server)) == 5


@pytest.mark.parametrize(
    ("answer", "fault", "detail"),
    [
        (completion(None, refusal="I can not."), Fault.refusal, "I can not."),
        (completion("5", finish_reason="content_filter"), Fault.refusal, "content filter"),
        (completion("5", finish_reason="length"), Fault.cut_off, "got '5'"),
        (completion(None, finish_reason="length"), Fault.cut_off, "got ''"),
        (completion(None), Fault.format, "expected text, got a message without any"),
        (completion("five"), Fault.format, "expected a digit, got 'five'"),
        (completion("\u0665"), Fault.format, "expected a digit, got '\u0665'"),
        ({"choices": []}, Fault.malformed, 'expected a chat completion, got {"choices": []}'),
        (
            {"choices": 2 * completion("5")["choices"]},
            Fault.malformed,
            "expected a chat completion",
        ),
        ({"choices": [{"message": "5"}]}, Fault.malformed, "expected a chat completion"),
        ({"choices": [{"message": {"content": 5}}]}, Fault.malformed, "expected a chat completion"),
    ],
)
def test_answers_that_are_none(answer, fault, detail):
    with ScriptedServer(five, repeat(plain(answer))) as server:
        lost = ask(client(server))
        assert (lost.fault, lost.attempts) == (fault, 3)
        assert lost.detail.startswith(f"{server.url}: {detail}")
    with ScriptedServer(five, [plain(answer)]) as server:
        assert ask(client(server)) == 5


@pytest.mark.parametrize(
    "answer",
    [
        completion("5"),
        {"choices": [completion("5")["choices"][0] | {"logprobs": {"content": []}}]},
        {"choices": [completion("5")["choices"][0] | {"logprobs": {"content": None}}]},
        WITHOUT_TOP,
    ],
)
def test_a_server_that_ignores_log_probabilities_is_named(answer):
    with ScriptedServer(lambda _: answer) as server:
        lost = ask(client(server), top_logprobs=5)
    assert lost == Lost(
        Fault.request_ignored, f"{server.url}: expected top_logprobs, got none", attempts=3
    )


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", '"x"', "null"])
def test_a_log_probability_that_is_no_number(value):
    body = scripted.json.dumps(with_logprobs([("5", -0.125)])).replace("-0.125", value)
    with ScriptedServer(five, repeat(plain(body.encode()))) as server:
        lost = ask(client(server), top_logprobs=5)
    assert lost.fault is Fault.malformed


@pytest.mark.parametrize(
    ("name", "fault", "detail"),
    [
        ("HTML", Fault.malformed, "expected a chat completion, got <html><body>It works!"),
        ("EMPTY", Fault.malformed, "expected a chat completion, got an empty body"),
        ("broken_json", Fault.malformed, 'expected a chat completion, got {"id": "scripted"'),
        ("JSON_LIST", Fault.malformed, "expected a chat completion, got [1, 2, 3]"),
        ("NO_CHOICES", Fault.malformed, "expected a chat completion, got {"),
        ("ERROR_IN_200", Fault.malformed, 'expected a chat completion, got {"error": {"message"'),
        ("BAD_UNICODE", Fault.malformed, "expected a chat completion, got {"),
        ("huge", Fault.malformed, "expected at most 16777216 bytes"),
        ("truncated", Fault.connection, "RemoteProtocolError: peer closed connection"),
        ("reset", Fault.connection, "ReadError"),
        ("drip", Fault.timeout, "no answer within 0.3 s"),
        ("silent", Fault.timeout, "no answer within 0.3 s"),
    ],
)
def test_what_the_http_client_lets_through_is_caught(name, fault, detail):
    with ScriptedServer(five, repeat(getattr(scripted, name))) as server:
        lost = ask(client(server, timeout=0.3 if fault is Fault.timeout else 30.0))
        assert (lost.fault, lost.attempts) == (fault, 3)
        assert lost.detail.startswith(f"{server.url}: {detail}")


@given(st.binary(max_size=200))
def test_no_body_is_an_answer_by_accident(body):
    with pytest.raises(AnswerError) as caught:
        _read_completion(body, logprobs=False)
    assert caught.value.fault is Fault.malformed


def test_a_bug_of_the_reader_is_not_a_fault():
    with (
        ScriptedServer(five) as server,
        pytest.raises(ZeroDivisionError, match="division by zero"),
    ):
        ask(client(server), lambda answer: 1 / 0)
    assert len(server.requests) == 1


# the cache


def test_an_accepted_answer_is_not_asked_for_again(tmp_path):
    with AnswerCache(tmp_path / "answers") as cache, ScriptedServer(five) as server:
        assert [ask(client(server, cache=cache)) for _ in range(3)] == [5, 5, 5]
        assert len(server.requests) == len(cache) == 1
        elsewhere = ChatClient(["http://127.0.0.1:9/v1"], "judge", cache=cache, **QUICK)
        assert ask(elsewhere) == 5  # the endpoint is not part of the question


def test_log_probabilities_survive_the_cache(tmp_path):
    answer = with_logprobs([("5", -0.1), ("4", -2.5)])
    with AnswerCache(tmp_path / "answers") as cache, ScriptedServer(lambda _: answer) as server:
        first, second = (
            ask(client(server, cache=cache), lambda answer: answer, top_logprobs=2)
            for _ in range(2)
        )
        assert first == second
        assert first.top_logprobs == ((("5", -0.1), ("4", -2.5)),)
        assert len(server.requests) == 1


def test_all_that_decides_on_an_answer_is_in_its_key(tmp_path):
    other_image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    variations = [
        ({}, {}),
        ({}, {"seed": 1}),
        ({}, {"max_tokens": 17}),
        ({}, {"schema": SCHEMA}),
        ({}, {"schema": {"type": "string"}}),
        ({}, {"content": [CONTENT[0]]}),
        ({}, {"content": [CONTENT[0], other_image]}),
        ({}, {"content": [IMAGE, CONTENT[0]]}),
        ({}, {"top_logprobs": 1}),
        ({"temperature": 0.5}, {}),
    ]
    answer = with_logprobs([("5", 0.0)], finish_reason="stop")
    with AnswerCache(tmp_path / "answers") as cache, ScriptedServer(lambda _: answer) as server:
        for options, question in variations:
            assert ask(client(server, cache=cache, **options), **question) == 5
        assert ask(ChatClient([server.url], "another", cache=cache, **QUICK)) == 5
        assert len(server.requests) == len(cache) == len(variations) + 1


def test_only_accepted_answers_are_stored(tmp_path):
    bad = plain(completion("five"))
    with AnswerCache(tmp_path / "answers") as cache:
        with ScriptedServer(five, repeat(bad)) as server:
            assert ask(client(server, cache=cache)).fault is Fault.format
        assert len(cache) == 0
        with ScriptedServer(five, [bad]) as server:
            assert ask(client(server, cache=cache), seed=3) == 5
        assert ask(client(server, cache=cache), seed=3) == 5  # under the seed that was asked for
        assert len(cache) == 1


def test_a_stored_answer_that_a_stricter_reader_refuses_is_asked_for_again(tmp_path):
    with AnswerCache(tmp_path / "answers") as cache:
        with ScriptedServer(lambda _: completion("five")) as server:
            assert ask(client(server, cache=cache), lambda answer: answer.text) == "five"
        with ScriptedServer(five) as server:
            assert ask(client(server, cache=cache)) == 5
        assert ask(client(server, cache=cache)) == 5
        assert len(cache) == 1


# how it is used


def test_many_at_once_keep_apart():
    """Every answer belongs to its question, also where each second attempt fails."""

    def echo(request):
        return completion(request["messages"][0]["content"][0]["text"])

    async def main(client):
        answers = {}

        async def one(number):
            content = [{"type": "text", "text": str(number)}]
            answers[number] = await client.ask(content, score, max_tokens=16)

        async with anyio.create_task_group() as group:
            for number in range(100):
                group.start_soon(one, number)
        return answers

    script = [scripted.good, scripted.HTML, scripted.reset, scripted.error(503)] * 50
    with ScriptedServer(echo, script) as server:
        asked = client(server, concurrency=8, attempts=20)
        assert anyio.run(main, asked) == {number: number for number in range(100)}
        assert server.most_at_once <= 8
        assert asked.statistics.answered == 100
        assert asked.statistics.attempts == len(server.requests) > 100


def test_event_loops_one_after_the_other_and_side_by_side():
    with ScriptedServer(five) as server:
        shared = client(server)
        assert [ask(shared) for _ in range(3)] == [5, 5, 5]
        results = []
        threads = [threading.Thread(target=lambda: results.append(ask(shared))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [5] * 4


def test_connections_are_kept_for_the_next_question():
    async def main(client):
        for _ in range(20):
            assert await client.ask(CONTENT, score, max_tokens=4) == 5

    with ScriptedServer(five) as server:
        anyio.run(main, client(server))
        assert len(server.requests) == 20
        assert server.connections == 1


@pytest.mark.parametrize("url", ["http://host:8000", "http://host/v1/chat/completions"])
def test_a_url_ends_in_v1(url):
    with pytest.raises(ValueError, match=r"^endpoints: expected URLs that end in /v1, got 'http"):
        ChatClient(["http://host/v1", url], "judge")


@pytest.mark.parametrize(("option", "value"), [("temperature", -0.1), ("attempts", 0)])
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"^{option}: expected"):
        ChatClient(["http://host/v1"], "judge", **{option: value})


@pytest.mark.parametrize(("name", "value"), [("max_tokens", 0), ("top_logprobs", 0), ("seed", -1)])
def test_questions_out_of_range(name, value):
    asked = ChatClient(["http://host/v1"], "judge")
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        ask(asked, **{name: value})
