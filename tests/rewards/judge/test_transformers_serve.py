"""A real OpenAI-compatible server with a tiny Qwen3-VL of the real classes, on the loopback.

It shows that several images in one message are what such servers take, and that what this one
ignores in silence or refuses is noticed and named.
"""

from dataclasses import dataclass
from functools import partial

import anyio
import httpx2
import pytest
import torch
from PIL import Image

from mteditflow.chains import Chain
from mteditflow.rewards import (
    ChatClient,
    ExpectationPrompt,
    Fault,
    Judge,
    JudgePrompt,
    inspect_endpoints,
)
from mteditflow.rewards.images import png_data_url
from mteditflow.testing.endpoint import ScriptedServer
from tests.rewards import tiny_judge

pytestmark = pytest.mark.slow

SENTENCE = "Turn 1: 5\nTurn 2: 3"
CHAIN = Chain(id="7", image="7.png", instructions=("Remove the cat", "Add a dog"))
SIZES = [(64, 64), (96, 64), (128, 160)]
IMAGES = [
    Image.new("RGB", size, color)
    for size, color in zip(SIZES, ["red", "green", "blue"], strict=True)
]
TEXT = JudgePrompt(thinking=False, answer_format="text")


@dataclass
class Served:
    url: str
    model: str

    def client(self, **options):
        return ChatClient(
            [options.pop("url", self.url)],
            options.pop("model", self.model),
            **{"attempts": 2, "back_off": 0.01, "timeout": 60.0} | options,
        )


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tiny_judge.save(tmp_path_factory.mktemp("served") / "judge", SENTENCE)
    with tiny_judge.serve(folder) as url:
        yield Served(url, str(folder))


def judge(client, prompt=TEXT):
    return anyio.run(Judge(client, prompt).score, [CHAIN], [IMAGES])


def test_a_judge_scores_a_chain_of_images(served):
    scores = judge(served.client())
    assert scores.lost == {}
    assert torch.equal(scores.score, torch.tensor([[5.0, 3.0]]))


def test_every_image_arrives_at_its_size_among_every_word(served):
    """The server counts tokens: one per byte of text, one per 32 x 32 pixels, two around images."""
    answers = []

    def forward(request):
        response = httpx2.post(f"{served.url}/chat/completions", json=request, timeout=60)
        answers.append(response.json())
        return answers[-1]

    with ScriptedServer(forward) as proxy:
        assert judge(served.client(url=proxy.url)).lost == {}
        parts = proxy.requests[0].json["messages"][0]["content"]
    assert [part["type"] for part in parts].count("image_url") == len(IMAGES)
    words = sum(len(part.get("text", "").encode()) for part in parts)
    pictures = sum(width // 32 * (height // 32) + 2 for width, height in SIZES)
    frame = len("<user\n>\n<assistant\n")  # a character here is a control token there
    assert answers[0]["usage"]["prompt_tokens"] == words + pictures + frame


def test_that_it_ignores_structured_output_is_noticed_and_named(served):
    scores = judge(served.client(), JudgePrompt(thinking=False, answer_format="json"))
    assert scores.score.isnan().all()
    assert {lost.fault for lost in scores.lost.values()} == {Fault.request_ignored}
    assert "expected JSON and nothing else, got 'Turn 1: 5" in scores.lost[0, 0].detail


def test_that_it_ignores_log_probabilities_is_noticed_and_named(served):
    scores = judge(served.client(), ExpectationPrompt())
    assert scores.score.isnan().all()
    assert {lost.fault for lost in scores.lost.values()} == {Fault.request_ignored}
    assert "expected top_logprobs, got none" in scores.lost[0, 0].detail


def ask(client, content, **options):
    return anyio.run(lambda: client.ask(content, lambda answer: answer.text, **options))


def test_a_wrong_model_is_rejected_once(served):
    lost = ask(served.client(model="another"), [{"type": "text", "text": "?"}], max_tokens=8)
    assert (lost.fault, lost.attempts) == (Fault.rejected, 1)
    assert "HTTP 400" in lost.detail
    assert "requested 'another'" in lost.detail


def test_a_bad_image_is_a_server_error_here(served):
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    lost = ask(served.client(attempts=1), [broken], max_tokens=8)
    assert lost.fault is Fault.server_error
    assert "HTTP 500" in lost.detail
    whole = {"type": "image_url", "image_url": {"url": png_data_url(IMAGES[0])}}
    assert ask(served.client(), [whole], max_tokens=8) == SENTENCE


def test_an_answer_is_cut_off_where_it_may_not_be_longer(served):
    lost = ask(served.client(), [{"type": "text", "text": "?"}], max_tokens=1)
    assert lost.fault is Fault.cut_off


@pytest.mark.parametrize(
    ("prompt", "unsupported"),
    [
        (JudgePrompt(), ["structured output", "log-probabilities", "judge's answer"]),
        (TEXT, ["structured output", "log-probabilities"]),
    ],
    ids=["json", "text"],
)
def test_the_check_before_a_run_names_what_this_server_ignores(served, prompt, unsupported):
    """A judge that asks for JSON goes without an answer here; one that asks for text gets it."""
    check = partial(inspect_endpoints, served.client(), images=len(IMAGES), prompt=prompt)
    [report] = anyio.run(check)
    assert report.endpoint == served.url
    assert list(report.missing) == unsupported
    assert {report.honors[part].fault for part in report.missing} == {Fault.request_ignored}
