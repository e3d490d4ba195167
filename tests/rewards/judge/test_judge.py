"""The judge against a server on the loopback: right scores in their places, or lost with a reason.

The server knows the score that is due from the pictures it is sent: each one's color says which
score its turn deserves. So whatever is mixed up on the way shows in the result.
"""

import base64
import io
import itertools
import json
import math
import re
import threading
from collections import Counter

import anyio
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mteditflow import binary_average, likert_average
from mteditflow.chains import Chain
from mteditflow.rewards import (
    AnswerCache,
    ChatClient,
    ExpectationPrompt,
    Fault,
    InvalidRewardsError,
    Judge,
    JudgePrompt,
    RequestOptions,
    inspect_endpoints,
)
from mteditflow.rewards.judge import judge as module
from mteditflow.testing import endpoint as scripted
from mteditflow.testing.endpoint import ScriptedServer, completion
from tests.loops import some

QUICK = {"attempts": 2, "timeout": 10.0, "back_off": 0.01, "cool_down": 0.05, "patience": 10.0}
PROMPTS = [
    *(
        JudgePrompt(*kind)
        for kind in itertools.product(
            ("trajectory", "turn"), ("likert", "binary"), (False, True), ("json", "text")
        )
    ),
    ExpectationPrompt("likert"),
    ExpectationPrompt("binary"),
]
TEXT = JudgePrompt(thinking=False, answer_format="text")
PER_TURN = JudgePrompt(scope="turn", thinking=False, answer_format="text")
every_prompt = pytest.mark.parametrize("prompt", PROMPTS, ids=repr)


def picture(score):
    return Image.new("RGB", (6, 5), (40 * score, 7, 9))


def batch(*scores):
    """Chains whose turns deserve these scores, and what was made of them."""
    chains = [
        Chain(id=str(b), image=f"{b}.png", instructions=tuple(f"Do {s}" for s in own))
        for b, own in enumerate(scores)
    ]
    return chains, [[picture(0), *map(picture, own)] for own in scores]


def deserved(request):
    """Scores of the turns that a request shows."""
    parts = request["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    assert {image.size for image in images} == {(6, 5)}
    return [image.getpixel((0, 0))[0] // 40 for image in images[1:]]


def right(request):
    """The right answer in the form that was asked for."""
    scores = deserved(request)
    asked = request["messages"][0]["content"][-1]["text"]
    words = "yes or no" in asked
    names = [("no", "yes")[score] if words else str(score) for score in scores]
    if request.get("logprobs"):
        return with_logprobs({names[0]: 0.9, "The": 0.1})
    if '"turns"' in asked:
        turns = [{"analysis": "Turn 1: 5", "score": score} for score in scores]
        return completion(json.dumps({"turns": turns}))
    if '"scores"' in asked:
        return completion(json.dumps({"scores": scores}))
    lines = [f"Turn {n}: {name}" for n, name in enumerate(names, start=1)]
    return completion("\n".join(["It did."] * ("Analysis 1" in asked) + lines))


def with_logprobs(probabilities):
    answer = completion(next(iter(probabilities)), finish_reason="length")
    top = [{"token": t, "logprob": math.log(p)} for t, p in probabilities.items()]
    answer["choices"][0]["logprobs"] = {"content": [{"token": "x", "top_logprobs": top}]}
    return answer


def client(*servers, **options):
    return ChatClient([server.url for server in servers], "judge", **QUICK | options)


def run(server, prompt, chains, images, *, votes=1, progress=False, **options):
    judge = Judge(client(server, **options), prompt, votes=votes)
    return anyio.run(lambda: judge.score(chains, images, progress=progress))


def padded(scores):
    longest = max(map(len, scores))
    return torch.tensor([[*own, *[torch.nan] * (longest - len(own))] for own in scores])


def same(score, expected):
    torch.testing.assert_close(score, expected.float(), equal_nan=True, atol=1e-6, rtol=0)


# right scores in their places


@every_prompt
def test_every_prompt_gets_every_turn_its_score(prompt):
    levels = (1, 5, 3, 2, 4) if prompt.scale == "likert" else (1, 0, 0, 1, 1)
    scores = [levels[:3], levels[2:4], levels[4:], levels]
    with ScriptedServer(right) as server:
        result = run(server, prompt, *batch(*scores))
    same(result.score, padded(scores))
    assert result.score.dtype == torch.float32
    assert result.lost == {}
    assert result.turn_mask.tolist() == padded(scores).isfinite().tolist()
    per_turn = isinstance(prompt, ExpectationPrompt) or prompt.scope == "turn"
    assert len(server.requests) == (sum(map(len, scores)) if per_turn else len(scores))


@settings(max_examples=20)
@given(st.permutations(range(5)), st.sampled_from([TEXT, PER_TURN]))
def test_scores_follow_their_chains(order, prompt):
    scores = [(1, 2, 3), (5,), (4, 4), (2, 5, 1), (3, 3, 3)]
    chains, images = batch(*scores)
    with ScriptedServer(right, itertools.cycle([scripted.late(0.01), scripted.good])) as server:
        result = run(server, prompt, [chains[i] for i in order], [images[i] for i in order])
    same(result.score, padded(scores)[list(order)])


def test_what_is_asked():
    chains, images = batch((1, 2), (3, 4))
    with ScriptedServer(right) as server:
        run(server, JudgePrompt(), chains, images)
        body = server.requests[0].json
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema == JudgePrompt().schema(2)
    assert body["temperature"] == 0.0
    assert body["max_completion_tokens"] >= 2 * 400
    assert "logprobs" not in body
    [message] = body["messages"]
    urls = [p["image_url"]["url"] for p in message["content"] if p["type"] == "image_url"]
    assert len(urls) == 3
    assert all(url.startswith("data:image/png;base64,") for url in some(urls))


def test_an_expectation_asks_for_log_probabilities():
    chains, images = batch((4,))
    spread = {"5": 0.5, "4": 0.2, " 4": 0.1, "Well": 0.2}
    with ScriptedServer(lambda request: with_logprobs(spread)) as server:
        result = run(server, ExpectationPrompt(), chains, images)
        body = server.requests[0].json
    assert (body["logprobs"], body["top_logprobs"]) == (True, 20)
    assert body["max_completion_tokens"] == 1
    same(result.score, torch.tensor([[(5 * 0.5 + 4 * 0.3) / 0.8]]))


def test_the_reward_is_the_mean_of_the_turns():
    with ScriptedServer(right) as server:
        result = run(server, TEXT, *batch((5, 3), (1, 1)))
    reward = result.reward(likert_average)
    assert reward.value.tolist() == [0.75, 0.0]
    assert reward.valid.all()


# lost answers


def spoilt(instruction, answer="No score here."):
    """The right answer, but for requests about one instruction."""

    def reply(request):
        told = json.dumps(request["messages"])
        return completion(answer) if f'\\"{instruction}\\"' in told else right(request)

    return reply


def test_a_lost_answer_about_a_turn_marks_that_turn():
    with ScriptedServer(spoilt("Do 4")) as server:
        result = run(server, PER_TURN, *batch((1, 4, 3), (2, 5)))
    same(result.score, torch.tensor([[1, torch.nan, 3], [2, 5, torch.nan]]))
    assert set(result.lost) == {(0, 1)}
    lost = result.lost[0, 1]
    assert (lost.fault, lost.attempts) == (Fault.format, 2)
    assert "No score here." in lost.detail
    assert result.valid.tolist() == [False, True]


def test_a_lost_answer_about_a_trajectory_marks_all_its_turns():
    with ScriptedServer(spoilt("Do 4")) as server:
        result = run(server, TEXT, *batch((1, 4, 3), (2, 5)))
    same(result.score, torch.tensor([[torch.nan] * 3, [2, 5, torch.nan]]))
    assert set(result.lost) == {(0, 0), (0, 1), (0, 2)}
    assert len(set(map(id, result.lost.values()))) == 1
    assert result.reasons == {Fault.format.value: 3}
    assert result.invalid_share == 0.5


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("", Fault.format),
        ("<html></html>", Fault.malformed),
        ("I'm sorry, I can't.", Fault.refusal),
        ("Turn 1: 4", Fault.wrong_count),
        ("Turn 1: 4\nTurn 2: 9", Fault.out_of_range),
        ("Turn 1: 4\nTurn 2: NaN", Fault.not_a_number),
        ("Turn 1: 4\nTurn 2: ٤", Fault.not_a_number),
    ],
)
def test_an_answer_that_cannot_be_read_is_asked_for_again_and_then_lost(answer, fault):
    once = scripted.plain(completion(answer))
    chains, images = batch((4, 2))
    with ScriptedServer(right, [once]) as server:
        same(run(server, TEXT, chains, images).score, torch.tensor([[4, 2]]))
    with ScriptedServer(right, [once, once]) as server:
        result = run(server, TEXT, chains, images)
    assert result.score.isnan().all()
    assert {lost.fault for lost in result.lost.values()} == {fault}


def test_a_server_that_ignores_structured_output_is_named():
    chatty = completion('Sure! {"scores": [4, 2]}')
    with ScriptedServer(lambda request: chatty) as server:
        result = run(server, JudgePrompt(thinking=False), *batch((4, 2)))
    assert result.score.isnan().all()
    assert result.lost[0, 0].fault is Fault.request_ignored
    with pytest.raises(InvalidRewardsError, match="server ignored part of the request"):
        result.require(max_invalid_share=0.5)


def test_a_server_that_ignores_logprobs_is_named():
    with ScriptedServer(lambda request: completion("5")) as server:
        result = run(server, ExpectationPrompt(), *batch((4, 2)))
    assert result.score.isnan().all()
    assert {lost.fault for lost in result.lost.values()} == {Fault.request_ignored}


# votes


def voting(*votes):
    """Vote v of each request says votes[v], or nothing readable for None."""

    def reply(request):
        vote = votes[request["seed"] % 2**20]
        return completion("Hm." if vote is None else f"Turn 1: {vote}")

    return reply


def vote(*votes):
    with ScriptedServer(voting(*votes)) as server:
        result = run(server, TEXT, *batch((1,)), votes=len(votes), temperature=0.7, attempts=1)
    assert sorted(r.json["seed"] for r in server.requests) == list(range(len(votes)))
    return result


def test_votes_are_averaged():
    same(vote(5, 2, 3, 3).score, torch.tensor([[3.25]]))
    same(vote(5).score, torch.tensor([[5.0]]))


def test_votes_that_are_lost_take_no_part():
    same(vote(5, None, 2).score, torch.tensor([[3.5]]))
    same(vote(None, 2).score, torch.tensor([[2.0]]))


@pytest.mark.parametrize("votes", [(None,), (5, None, None), (None, None, None, 3)])
def test_fewer_than_half_of_the_votes_is_lost(votes):
    result = vote(*votes)
    assert result.score.isnan().all()
    assert result.lost[0, 0].fault is Fault.format


def test_binary_votes_are_shares():
    def reply(request):
        return completion(f"Turn 1: {('yes', 'no', 'yes', 'yes')[request['seed'] % 2**20]}")

    prompt = JudgePrompt(scale="binary", thinking=False, answer_format="text")
    with ScriptedServer(reply) as server:
        result = run(server, prompt, *batch((1,)), votes=4, temperature=1.0)
    same(result.score, torch.tensor([[0.75]]))
    with pytest.raises(ValueError, match="0 or 1"):
        result.reward(binary_average)


def test_votes_at_temperature_zero_are_refused():
    with pytest.raises(ValueError, match=r"^votes: expected 1 at temperature 0, got 3"):
        Judge(ChatClient(["http://127.0.0.1:9/v1"], "judge"), TEXT, votes=3)


@pytest.mark.parametrize("count", ["votes", "chains_at_once"])
def test_counts_are_checked(count):
    with pytest.raises(ValueError, match=f"{count}: expected an integer >= 1, got 0"):
        Judge(ChatClient(["http://127.0.0.1:9/v1"], "judge"), TEXT, **{count: 0})


# images


def test_each_image_is_encoded_once_and_off_the_event_loop(monkeypatch):
    chains, images = batch((1, 2, 3), (4, 5))
    encoded, threads = Counter(), set()
    encode = module.png_data_url

    def spy(image):
        encoded[id(image)] += 1
        threads.add(threading.current_thread())
        return encode(image)

    monkeypatch.setattr(module, "png_data_url", spy)
    with ScriptedServer(right) as server:
        run(server, PER_TURN, chains, images, votes=2, temperature=0.5)
    assert len(server.requests) == 2 * 5
    assert encoded == dict.fromkeys((id(image) for own in images for image in own), 1)
    assert threading.current_thread() not in threads


def test_images_of_other_modes_are_sent_as_rgb():
    chains, images = batch((4, 2))
    images[0][1] = images[0][1].convert("RGBA")
    images[0][2] = images[0][2].quantize()
    with ScriptedServer(right) as server:
        same(run(server, TEXT, chains, images).score, torch.tensor([[4, 2]]))


def test_few_chains_are_encoded_at_a_time():
    chains, images = batch(*[(1, 2)] * 12)
    with ScriptedServer(right, itertools.repeat(scripted.late(0.02))) as server:
        judge = Judge(client(server), TEXT, chains_at_once=3)
        anyio.run(judge.score, chains, images)
    assert server.most_at_once <= 3
    assert len(server.requests) == 12


CHAINS, IMAGES = batch((1, 2), (3,))


@pytest.mark.parametrize(
    ("chains", "images", "error", "message"),
    [
        (
            [],
            [],
            ValueError,
            "images: expected a list for each chain, and at least one chain, got 0",
        ),
        (CHAINS, IMAGES[:1], ValueError, "images: .*, got 1 lists for 2 chains"),
        (
            CHAINS,
            [IMAGES[0], IMAGES[0]],
            ValueError,
            r"images\[1\]: expected the reference and one image for each of 1 turns, got 3 images",
        ),
        (
            CHAINS,
            [IMAGES[0], [picture(0), "cat.png"]],
            TypeError,
            r"images\[1\]\[1\]: expected a PIL image, got str",
        ),
        (
            CHAINS[1:],
            [[picture(0), Image.new("I;16", (6, 5))]],
            ValueError,
            r"images\[0\]\[1\]: expected 8 bits a channel, got mode I;16",
        ),
    ],
)
def test_images_that_do_not_fit_are_named_before_anything_is_asked(chains, images, error, message):
    with ScriptedServer(right) as server:
        with pytest.raises(error, match=f"^{message}"):
            run(server, TEXT, chains, images)
        assert server.requests == []


# around it


def test_a_resumed_round_asks_nothing_again(tmp_path):
    chains, images = batch((1, 2), (3, 4))
    with AnswerCache(tmp_path / "cache.sqlite") as cache, ScriptedServer(right) as server:
        first = run(server, TEXT, chains, images, cache=cache)
        second = run(server, TEXT, chains, images, cache=cache)
        assert len(server.requests) == 2
    assert torch.equal(first.score, second.score)


def test_progress_counts_answers(capsys):
    with ScriptedServer(right) as server:
        run(server, PER_TURN, *batch((1, 2), (3,)), progress=True)
        assert re.search(r"judge: 100%.* 3/3 ", capsys.readouterr().err)
        run(server, PER_TURN, *batch((1, 2), (3,)))
        assert capsys.readouterr().err == ""


def test_a_bug_in_a_prompt_is_not_a_lost_answer():
    class Broken(JudgePrompt):
        def request(self, instructions, images):
            raise ZeroDivisionError

    with ScriptedServer(right) as server, pytest.raises(Exception, match="TaskGroup") as error:
        run(server, Broken(), *batch((1,)))
    innermost = error.value
    while hasattr(innermost, "exceptions"):
        [innermost] = innermost.exceptions
    assert isinstance(innermost, ZeroDivisionError)


# what endpoints honor


def honest(request):
    if request.get("logprobs"):
        return with_logprobs({str(n): 0.1 for n in range(9)})
    if "response_format" in request:
        schema = request["response_format"]["json_schema"]["schema"]
        return completion(json.dumps(least(schema)))
    return completion("ok")


def least(schema):
    """The least value that a JSON schema allows."""
    if "enum" in schema:
        return schema["enum"][0]
    if schema["type"] == "array":
        return [least(schema["items"])] * schema["minItems"]
    if schema["type"] == "object":
        return {name: least(inner) for name, inner in schema["properties"].items()}
    return "a"


def of_the_judge(request):
    return "You judge how well" in json.dumps(request["messages"])


def test_what_an_endpoint_honours_or_ignores_is_reported():
    ignorant = ScriptedServer(lambda request: completion('{"word": "hello"}'))
    limited = ScriptedServer(
        honest, itertools.repeat(scripted.error(400, "At most 1 image may be provided"))
    )
    with ScriptedServer(honest) as good, ignorant, limited:
        reports = anyio.run(inspect_endpoints, client(good, ignorant, limited))
        shown = [
            sum(part["type"] == "image_url" for part in request.json["messages"][0]["content"])
            for request in good.requests
        ]
    assert [report.endpoint for report in reports] == [good.url, ignorant.url, limited.url]
    assert [report.missing for report in reports] == [
        (),
        ("structured output", "log-probabilities", "judge's answer"),
        ("images", "structured output", "log-probabilities", "judge's answer"),
    ]
    assert max(shown) == 4
    ignored = reports[1].honors
    faults = [ignored[part].fault for part in reports[1].missing]
    assert faults == [Fault.request_ignored, Fault.request_ignored, Fault.format]
    assert "images: honored" in str(reports[1])
    assert "structured output: server ignored part of the request after 2 attempts" in str(
        reports[1]
    )
    assert "At most 1 image" in str(reports[2])


def test_the_word_is_in_no_prompt():
    with ScriptedServer(honest) as server:
        anyio.run(inspect_endpoints, client(server))
        [structured] = [
            r.json
            for r in server.requests
            if "response_format" in r.json and not of_the_judge(r.json)
        ]
    word = honest(structured)["choices"][0]["message"]["content"].split('"')[3]
    schema = structured["response_format"]["json_schema"]["schema"]
    assert schema["properties"] == {"word": {"type": "string", "enum": [word]}}
    assert word not in json.dumps(structured["messages"])


def test_a_talkative_server_may_still_take_images():
    cut = completion("These images show", finish_reason="length")
    with ScriptedServer(lambda request: cut) as server:
        [report] = anyio.run(inspect_endpoints, client(server))
    assert report.missing == ("structured output", "log-probabilities", "judge's answer")
    assert report.honors["structured output"].fault is Fault.cut_off


def judged(reply, **options):
    """The report of an endpoint that answers a judge's question in this way, else honestly."""

    def answer(request):
        return reply(request) if of_the_judge(request) else honest(request)

    with ScriptedServer(answer) as server:
        [report] = anyio.run(inspect_endpoints, client(server, **options))
        asked = [request.json for request in server.requests if of_the_judge(request.json)]
    return report, asked


def test_the_report_tells_reasoning_and_tokens_of_a_real_question():
    usage = {"usage": {"completion_tokens": 143}}
    plain, asked = judged(lambda request: honest(request) | usage)
    assert plain.missing == ()
    assert plain.reasoning == "off"
    assert "reasoning: off\n  longest answer: 143 of at most 1,616 tokens" in str(plain)
    assert len(asked) == 1

    def thinks(request):
        answer = honest(request) | usage
        answer["choices"][0]["message"]["reasoning_content"] = "Let me see."
        return answer

    assert judged(thinks)[0].reasoning == "on"


def test_a_cut_answer_is_explained_with_the_option_to_raise():
    cut = completion(None, finish_reason="length", reasoning="Let me see") | {
        "usage": {"completion_tokens": 1616}
    }
    report, _ = judged(lambda _: cut)
    assert report.missing == ("judge's answer",)
    assert report.reasoning == "on"
    assert "cut off at the token limit" in str(report)
    assert "reasoning_tokens" in str(report)
    assert "enable_thinking" in str(report)
    assert "longest answer: 1,616 of at most 1,616 tokens" in str(report)


def test_options_reach_every_question_of_the_report():
    options = RequestOptions(reasoning_tokens=5000, chat_template_kwargs={"enable_thinking": True})
    report, [asked] = judged(honest, request=options)
    assert report.missing == ()
    assert asked["chat_template_kwargs"] == {"enable_thinking": True}
    assert asked["max_completion_tokens"] == report.usage.limit == 6616


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"yes": 0.9}, "expected 20 log-probabilities of the first token, got 1"),
        (None, "expected top_logprobs, got none"),
    ],
    ids=["one", "none"],
)
def test_one_log_probability_is_too_few_for_five_levels(given, said):
    def reply(request):
        if not request.get("logprobs"):
            return honest(request)
        return completion("yes") if given is None else with_logprobs(given)

    with ScriptedServer(reply) as server:
        [report] = anyio.run(inspect_endpoints, client(server))
    assert report.missing == ("log-probabilities",)
    assert said in str(report)


def test_some_image_is_needed():
    with pytest.raises(ValueError, match="images: expected an integer >= 1, got 0"):
        anyio.run(lambda: inspect_endpoints(ChatClient(["http://a/v1"], "judge"), images=0))
