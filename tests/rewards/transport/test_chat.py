"""One question to an OpenAI-compatible server: what is sent, what is read, what is refused."""

import logging
import sqlite3
import threading
from itertools import repeat

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mteditflow.rewards import (
    AnswerCache,
    AnswerError,
    ChatAnswer,
    ChatClient,
    Fault,
    Lost,
    RequestOptions,
)
from mteditflow.rewards.transport.chat import _read_completion
from mteditflow.testing import endpoint as scripted
from mteditflow.testing.endpoint import ScriptedServer, completion, plain
from tests.loops import some

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
    assert all(0 <= seed < 2**31 for of_vote in some(seeds) for seed in some(of_vote))


def test_a_lost_exchange_is_repeated_as_it_was():
    with ScriptedServer(five, [scripted.error(500), scripted.HTML, scripted.reset]) as server:
        assert ask(client(server, attempts=4), seed=3) == 5
        bodies = [request.json for request in server.requests]
    assert len(bodies) == 4
    assert all(body == bodies[0] for body in some(bodies))


@pytest.mark.parametrize(("temperature", "drawn"), [(0.0, 0.7), (0.3, 0.3)])
def test_an_unreadable_answer_is_drawn_anew_also_at_temperature_0(temperature, drawn):
    """A server that answers by what it is sent gives the same answer to the same request."""

    def reply(request):
        return completion("5" if request["seed"] and request["temperature"] else "five")

    with ScriptedServer(reply) as server:
        assert ask(client(server, temperature=temperature)) == 5
        draws = [(r.json["seed"], r.json["temperature"]) for r in server.requests]
    assert draws == [(0, temperature), (2**20, drawn)]


def test_nothing_of_the_environment_reaches_a_judge(monkeypatch):
    """What the openai client and HTTP libraries read: identity, headers, base URL, proxies."""
    secrets = {
        "OPENAI_API_KEY": "sk-of-somebody",
        "OPENAI_ORG_ID": "org-of-somebody",
        "OPENAI_ORGANIZATION": "org-of-somebody",
        "OPENAI_PROJECT_ID": "proj-of-somebody",
        "OPENAI_ADMIN_KEY": "sk-admin-of-somebody",
        "OPENAI_WEBHOOK_SECRET": "whsec-of-somebody",
        "OPENAI_CUSTOM_HEADERS": "X-Team: of-somebody",
        "OPENAI_BASE_URL": "http://127.0.0.1:9/of-somebody",
        "HTTP_PROXY": "http://of-somebody@127.0.0.1:9",
        "HTTPS_PROXY": "http://of-somebody@127.0.0.1:9",
        "ALL_PROXY": "http://of-somebody@127.0.0.1:9",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    with ScriptedServer(five) as server:
        assert ask(client(server)) == 5
        assert ask(client(server, api_key="sk-mine")) == 5
        without, with_key = server.requests
    assert "somebody" not in f"{without}{with_key}"
    names = {"host", "accept", "accept-encoding", "connection", "user-agent", "content-type",
             "content-length"}  # fmt: skip
    assert set(without.headers) == names
    assert set(with_key.headers) == names | {"authorization"}
    assert with_key.headers["authorization"] == "Bearer sk-mine"


# the options of a request


def test_options_are_sent_as_they_are():
    options = RequestOptions(
        answer_tokens=100,
        reasoning_tokens=4000,
        chat_template_kwargs={"enable_thinking": False},
        extra_body={"top_p": 0.8, "mm_processor_kwargs": {"max_pixels": 9}},
    )
    with ScriptedServer(five) as server:
        assert ask(client(server, request=options)) == 5
        [one] = client(server, request=options).per_endpoint().values()
        assert ask(one) == 5
        bodies = [request.json for request in server.requests]
    assert bodies[0] == bodies[1]
    assert bodies[0] == {
        "model": "judge",
        "messages": [{"role": "user", "content": CONTENT}],
        "temperature": 0.0,
        "max_completion_tokens": 4100,
        "seed": 0,
        "chat_template_kwargs": {"enable_thinking": False},
        "top_p": 0.8,
        "mm_processor_kwargs": {"max_pixels": 9},
    }


def test_reasoning_is_added_to_the_limit_of_a_question_but_not_of_log_probabilities():
    options = RequestOptions(reasoning_tokens=4000)
    answer = with_logprobs([("5", -0.1)])
    with ScriptedServer(lambda _: answer | {"usage": None}) as server:
        ask(client(server, request=options), top_logprobs=5, max_tokens=1)
        ask(client(server, request=options, attempts=1), max_tokens=16)
        limits = [request.json["max_completion_tokens"] for request in server.requests]
    assert limits == [1, 4016]


def test_log_probabilities_are_asked_for_alike_at_each_endpoint():
    with ScriptedServer(five) as one, ScriptedServer(five) as two:
        lost = ask(ChatClient([one.url, two.url], "judge", **QUICK), top_logprobs=5)
        bodies = [request.json for server in (one, two) for request in server.requests]
    assert (lost.fault, lost.attempts) == (Fault.request_ignored, 2)
    assert bodies[0] == bodies[1]
    assert bodies[0]["temperature"] == 0


def test_log_probabilities_of_reasoning_are_none_of_the_answer():
    answer = with_logprobs([("<think>", -0.1), ("5", -3.0)], text="<think>")
    with ScriptedServer(lambda _: answer) as server:
        lost = ask(client(server), top_logprobs=2, max_tokens=1)
    assert lost.fault is Fault.reasoning


@pytest.mark.parametrize(
    "name", ["messages", "model", "n", "logprobs", "seed", "max_tokens", "stop", "stream", "tools"]
)
def test_what_the_client_sets_is_not_overridden(name):
    with pytest.raises(ValueError, match=f"^extra_body: expected parameters that .* got '{name}'"):
        RequestOptions(extra_body={name: 1})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("answer_tokens", 0),
        ("reasoning_tokens", -1),
        ("chat_template_kwargs", [1]),
        ("chat_template_kwargs", {1: 2}),
        ("extra_body", {"top_p": float("nan")}),
        ("extra_body", {"image": b"png"}),
    ],
)
def test_options_that_are_none(option, value):
    with pytest.raises(ValueError, match=f"^{option}: expected"):
        RequestOptions(**{option: value})


def test_options_do_not_change_after_they_are_given():
    given = {"top_p": 0.8, "inner": {"a": 1}}
    options = RequestOptions(extra_body=given)
    given["inner"]["a"] = 2
    given["seed"] = 1
    assert options.body == {"top_p": 0.8, "inner": {"a": 1}}
    assert options.settings == {"extra_body": {"top_p": 0.8, "inner": {"a": 1}}}
    assert RequestOptions().settings == {}


def test_usage_counts_tokens_and_reasoning_of_all_answers():
    def used(tokens, **message):
        return completion("5", **message) | {"usage": {"completion_tokens": tokens}}

    hidden = {
        "usage": {"completion_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 6}}
    }
    script = [
        plain(used(40, reasoning="Hm.")),
        plain(completion("<think>x</think>5") | {"usage": {"completion_tokens": "many"}}),
        plain(completion("5") | hidden),
        plain(used(90, finish_reason="length")),
        scripted.error(500),
    ]
    with ScriptedServer(five, script) as server:
        asked = client(server, attempts=9)
        assert ask(asked) == 5  # the second answer is no digit
        assert [ask(asked, lambda answer: answer.text) for _ in range(2)] == [
            "<think>x</think>5",
            "5",
        ]
        assert ask(asked) == 5
    usage = asked.usage
    assert (usage.answers, usage.reasoned, usage.cut_off) == (5, 3, 1)
    assert (usage.most_tokens, usage.limit) == (90, 16)
    assert str(usage) == "90 of at most 16 tokens"


def test_control_characters_of_a_server_are_escaped():
    words = "\x1b]8;;http://evil\x1b\\click\x1b[2J\u202e\nline"
    bodies = (scripted.error(400, words), plain(words.encode()), plain(completion(words)))
    for body in some(bodies):
        with ScriptedServer(five, repeat(body)) as server:
            lost = ask(client(server, attempts=1))
        assert str(lost).isprintable()
        assert "evil" in lost.detail


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
    answer["choices"][0]["message"]["reasoning"] = {"odd": 1}
    for absent in ("id", "created", "model", "usage"):
        del answer[absent]
    with ScriptedServer(lambda _: answer) as server:
        assert ask(client(server)) == 5


@pytest.mark.parametrize(
    ("answer", "fault", "detail"),
    [
        (completion(None, refusal="I can not."), Fault.refusal, "I can not."),
        (completion("5", finish_reason="content_filter"), Fault.refusal, "content filter"),
        (
            completion("5", finish_reason="length"),
            Fault.cut_off,
            "got '5' within 16 tokens; raise answer_tokens",
        ),
        (completion(None, finish_reason="length"), Fault.cut_off, "got '' within 16 tokens"),
        (
            completion(None, finish_reason="length", reasoning="Hmm."),
            Fault.cut_off,
            "got '' after reasoning 'Hmm.' within 16 tokens; turn reasoning off "
            '(chat_template_kwargs {"enable_thinking": false}) or raise reasoning_tokens',
        ),
        (
            completion("<think>Hmm", finish_reason="length"),
            Fault.cut_off,
            "got '<think>Hmm' within 16 tokens; turn reasoning off",
        ),
        (
            completion(None, reasoning_content="It is 5."),
            Fault.reasoning,
            "expected an answer after the reasoning, got only 'It is 5.'; turn reasoning off",
        ),
        (completion(" ", reasoning="5"), Fault.reasoning, "expected an answer after the reasoning"),
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
        Fault.request_ignored, f"{server.url}: expected top_logprobs, got none", attempts=1
    )
    assert len(server.requests) == 1  # the same distribution would come again


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
        _read_completion(body)
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
        ({"request": RequestOptions(extra_body={"top_p": 0.5})}, {}),
        ({"request": RequestOptions(chat_template_kwargs={"enable_thinking": False})}, {}),
        ({"request": RequestOptions(chat_template_kwargs={"enable_thinking": True})}, {}),
        ({"request": RequestOptions(answer_tokens=99)}, {}),
        ({"request": RequestOptions(reasoning_tokens=99)}, {}),
    ]
    answer = with_logprobs([("5", 0.0)], finish_reason="stop")
    with AnswerCache(tmp_path / "answers") as cache, ScriptedServer(lambda _: answer) as server:
        for options, question in some(variations):
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


@pytest.mark.parametrize("row", ["{}", "no JSON", '{"text": 5}'])
def test_a_row_of_another_form_is_a_miss(tmp_path, row):
    with AnswerCache(tmp_path / "answers") as cache, ScriptedServer(five) as server:
        assert ask(client(server, cache=cache)) == 5
        with sqlite3.connect(cache.path) as other:
            [[key]] = other.execute("SELECT key FROM answers").fetchall()
        other.close()
        cache.put(key, row)
        assert ask(client(server, cache=cache)) == 5
        assert ask(client(server, cache=cache)) == 5
        assert len(server.requests) == 2


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
