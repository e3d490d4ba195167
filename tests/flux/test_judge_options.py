"""Options of the judge's requests, from a configuration to the wire."""

import json

import anyio
import pytest
from mteditflow_examples import evaluate
from mteditflow_examples.flux.config import Rewards
from mteditflow_examples.flux.scoring import Services
from PIL import Image
from typer.testing import CliRunner

from mteditflow.chains import Chain
from mteditflow.rewards import AnswerCache
from mteditflow.testing.endpoint import ScriptedServer, completion


def test_the_services_of_a_run_send_them(tmp_path):
    answer = completion('{"turns": [{"analysis": "a", "score": 4}]}')
    with ScriptedServer(lambda _: answer) as server, AnswerCache(tmp_path / "answers") as cache:
        config = Rewards(
            judge=(server.url,),
            judge_model="m",
            answer_tokens=100,
            reasoning_tokens=4000,
            chat_template_kwargs={"enable_thinking": False},
            extra_body={"top_p": 0.8},
        )
        services = Services(config, cache)
        chain = Chain(id="1", image="1.png", instructions=("Remove the cat",))
        picture = Image.new("RGB", (8, 8))
        scores = anyio.run(services.score, [chain], [[picture, picture]])
        [body] = [request.json for request in server.requests]
    assert scores["following"].score.tolist() == [[4.0]]
    assert body["max_completion_tokens"] == 4100
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["top_p"] == 0.8


@pytest.mark.parametrize("words", [["--extra-body", '{"n": 2}'], ["--chat-template-kwargs", "x"]])
def test_an_evaluation_refuses_what_cannot_be_sent_before_it_loads_anything(tmp_path, words):
    (tmp_path / "chains.jsonl").write_text(json.dumps({}))
    given = ["run", str(tmp_path / "chains.jsonl"), "--images", str(tmp_path), "--model", "m"]
    given += ["--judge", "http://127.0.0.1:9/v1", "--output", str(tmp_path / "out"), *words]
    result = CliRunner().invoke(evaluate.app, given)
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()
