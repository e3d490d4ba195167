"""The scripted judge knows what it is shown, and a chain's record says what is true of it."""

import json
import random

import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from mteditflow_examples.shapes.rewards import Truth, score
from mteditflow_examples.shapes.served import chain_of, judge_app, record_of
from mteditflow_examples.shapes.vision import RuleDetector, pixels_of, to_pil
from mteditflow_examples.shapes.world import draw, random_chain

from mteditflow.rewards import ChatAnswer, Consistency, ConsistencyScorer, JudgePrompt
from mteditflow.rewards.images import png_data_url
from tests.loops import some

quick = settings(max_examples=20, deadline=None)
seeds = st.integers(min_value=0, max_value=2**32)


def drawn(seed, turns=3):
    return random_chain(random.Random(seed), turns, "train", linked=0.5)


def noisy(chain, seed):
    """What an editor might have made: the true pictures, some of them spoilt, 8 bits a channel."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.stack([draw(state) for state in chain.states[1:]])
    spoilt = torch.rand(len(pictures), 1, 12, 12, generator=generator) < 0.2
    spoilt &= torch.rand(len(pictures), 1, 1, 1, generator=generator) < 0.5
    return [to_pil(picture) for picture in torch.where(spoilt, 0.5, pictures)]


def body(chain, images, scale="likert"):
    prompt = JudgePrompt(scale=scale, thinking=False)
    request = prompt.request(chain.instructions, [png_data_url(image) for image in images])
    answer = {"name": "answer", "schema": request.schema}
    return request, {
        "messages": [{"role": "user", "content": request.content}],
        "response_format": {"type": "json_schema", "json_schema": answer},
    }


@quick
@given(seeds, st.integers(1, 5))
def test_a_chain_is_read_back_from_its_picture_and_instructions(seed, turns):
    chain = drawn(seed, turns)
    reference = pixels_of(to_pil(draw(chain.initial)))
    assert chain_of(reference, chain.instructions).states == chain.states


def test_an_instruction_that_makes_no_sense_is_refused():
    chain = drawn(0)
    with pytest.raises(ValueError, match="instructions: expected one possible in"):
        chain_of(pixels_of(to_pil(draw(chain.initial))), ["Remove the purple cow"])


@quick
@given(seeds)
def test_the_judge_answers_the_exact_rewards_of_what_it_is_shown(seed):
    chain = drawn(seed)
    made = noisy(chain, seed)
    exact = score(torch.stack([pixels_of(i) for i in made])[None] / 255, Truth.of([chain]))
    client = TestClient(judge_app(lost_answers=0.0))
    for scale, expected in (("likert", exact.likert), ("binary", exact.success.long())):
        request, asked = body(chain, [to_pil(draw(chain.initial)), *made], scale)
        answer = client.post("/v1/chat/completions", json=asked).json()
        content = answer["choices"][0]["message"]["content"]
        assert list(request.read(ChatAnswer(text=content))) == expected[0].tolist()


def test_the_share_of_spoilt_answers_is_the_set_one_and_the_same_each_time():
    client = TestClient(judge_app(lost_answers=0.3))
    asked = []
    for seed in range(150):
        chain = drawn(seed, 1)
        asked.append(body(chain, [to_pil(draw(s)) for s in chain.states])[1])
    answers = [
        [client.post("/v1/chat/completions", json=one).json()["choices"][0] for one in asked]
        for _ in range(2)
    ]
    assert answers[0] == answers[1]
    good = [answer["message"]["content"] == '{"scores": [5]}' for answer in answers[0]]
    assert 0.6 < sum(good) / len(good) < 0.8


def test_an_invented_answer_is_the_middle_of_the_scale_where_it_would_be_lost():
    spoils, invents = (TestClient(judge_app(lost_answers=0.3, invent=i)) for i in (False, True))
    found = set()
    for seed in range(30):
        chain = drawn(seed, 2)
        _, asked = body(chain, [to_pil(draw(s)) for s in chain.states])
        lost, invented = (
            client.post("/v1/chat/completions", json=asked).json()["choices"][0]
            for client in (spoils, invents)
        )
        kept = lost["message"]["content"] == '{"scores": [5, 5]}'
        found.add(kept)
        assert invented["finish_reason"] == "stop"
        assert json.loads(invented["message"]["content"]) == {"scores": [5, 5] if kept else [3, 3]}
    assert found == {True, False}


@quick
@given(seeds)
def test_a_record_tells_what_is_kept(seed):
    chain = drawn(seed)
    record = record_of(chain)
    for n, state in some(enumerate(chain.states[1:])):
        names = {f"{t.color} {t.shape}" for t in state.things}
        assert set(record.available_objects[n]) == names
        assert set(record.unchanged_objects[n]) <= names
        assert set(record.unchanged_objects[n]) <= set(record.turn_unchanged_objects[n])
        assert names <= set(record.all_objects[n])
        changed = "background_change" in record.task_types[: n + 1]
        assert record.background_consistency[n] is not changed


@quick
@given(seeds)
def test_perfect_edits_are_consistent_where_the_background_stays(seed):
    chain = drawn(seed)
    images = [to_pil(draw(state)) for state in chain.states]
    scores = Consistency(ConsistencyScorer(RuleDetector())).score([record_of(chain)], [images])
    kept = torch.tensor([record_of(chain).background_consistency])
    # What scaling up smears from an edited thing over the edge of its box is all that differs.
    assert (scores.l1_scores.score[kept] > 0.95).all()
    assert scores.background_l1[~kept].isnan().all()
