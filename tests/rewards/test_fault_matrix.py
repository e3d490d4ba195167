"""Each cell of the matrix of faults, with the real judge and the real consistency client."""

import json
import random
import re
import time
from itertools import chain as concatenate
from itertools import repeat

import anyio
import pytest
import torch
from PIL import Image

from mteditflow.chains import Chain
from mteditflow.rewards import ChatClient, ConsistencyClient, Judge, JudgePrompt
from mteditflow.rewards.consistency.wire import Info, Limits
from mteditflow.testing import check_reward_client
from mteditflow.testing.endpoint import ScriptedServer, closed_port, completion, good
from tests.loops import some
from tests.rewards.fault_matrix import ATTEMPTS, MATRIX, PAGE, RIGHT, Outcome, render

QUICK = {"attempts": ATTEMPTS, "back_off": 0.01, "cool_down": 0.05, "patience": 10.0}
INFO = Info(scorer="scripted", models={}, versions={}, limits=Limits())
HANGING = ("time-out: no answer", "slow drip: a byte now and then")


def stars(chain):
    """The right score of each turn stands in its instruction."""
    return [int(n) for text in chain.instructions for n in re.findall(r"(\d) stars", text)]


def likeness(chain):
    """And the right consistency in the name of the object that must not change."""
    return [float(names[0].split()[1]) for names in chain.unchanged_objects]


def chain_of(name, scores):
    return Chain(
        id=name,
        image="reference.png",
        instructions=tuple(f"Give picture {name} {score} stars" for score in scores),
        unchanged_objects=tuple((f"object {score / 8}",) for score in scores),
        all_objects=tuple((f"object {score / 8}",) for score in scores),
    )


CHAIN = chain_of("a", (5, 3, 4))


def images_of(chains):
    picture = Image.new("RGB", (16, 16), "green")
    return [[picture] * (chain.turns + 1) for chain in chains]


def judge_answer(request):
    parts = request["messages"][0]["content"]
    found = re.findall(r"Give picture \w+ (\d) stars", " ".join(p.get("text", "") for p in parts))
    return completion(json.dumps({"scores": [int(score) for score in found]}))


def consistency_answer(request):
    if request is None:
        return INFO.model_dump()
    scores = [float(pair["unchanged_objects"][0].split()[1]) for pair in request["pairs"]]
    return {"pairs": [{"object": score} for score in scores], "scorer": "scripted"}


class Judged:
    answer, right, before = staticmethod(judge_answer), staticmethod(stars), ()

    @staticmethod
    def score(urls, chains, **options):
        client = ChatClient(urls, "scripted", **QUICK | options)
        scorer = Judge(client, JudgePrompt(thinking=False))
        return anyio.run(scorer.score, chains, images_of(chains))


class Compared:
    answer, right = staticmethod(consistency_answer), staticmethod(likeness)
    before = (good,)  # it asks for information first

    @staticmethod
    def score(urls, chains, **options):
        client = ConsistencyClient(urls, **QUICK | options)
        return anyio.run(client.score, chains, images_of(chains)).scores


CELLS = pytest.mark.parametrize(
    ("name", "kind", "cell"),
    [
        pytest.param(row.name, kind, cell, id=f"{row.name}-{kind.__name__}")
        for row in MATRIX
        for kind, cell in ((Judged, row.judge), (Compared, row.consistency))
        if cell is not None
    ],
)


def outcome_of(scores, right):
    """What became of one chain; anything but right or wholly invalid is an error."""
    if not scores.lost:
        assert scores.score.tolist() == [right]
        return RIGHT
    assert scores.score.isnan().all()
    assert set(scores.lost) == {(0, n) for n in range(len(right))}
    (lost,) = set(scores.lost.values())
    return Outcome(lost.fault, lost.attempts)


@pytest.mark.parametrize("kind", [Judged, Compared])
def test_a_lost_answer_is_never_a_number(kind):
    def ask(url):
        scores = kind.score([url], [CHAIN])
        return None if scores.lost else float(scores.score.mean())

    check_reward_client(ask, kind.answer)


@CELLS
def test_a_fault_that_lasts(name, kind, cell):
    timeout = 0.3 if name in HANGING else 60.0
    start = time.monotonic()
    if cell.behavior is None:
        scores = kind.score([f"http://127.0.0.1:{closed_port()}/v1"], [CHAIN], timeout=timeout)
    else:
        script = concatenate(kind.before, repeat(cell.behavior))
        with ScriptedServer(kind.answer, script) as server:
            scores = kind.score([server.url], [CHAIN], timeout=timeout)
    assert outcome_of(scores, kind.right(CHAIN)) == cell.always
    assert time.monotonic() - start < 30


@CELLS
def test_a_fault_that_occurs_once(name, kind, cell):
    timeout = 1.0 if name in HANGING else 60.0
    with ScriptedServer(kind.answer, [*kind.before, cell.behavior or good]) as server:
        urls = [server.url]
        if cell.behavior is None:
            urls.insert(0, f"http://127.0.0.1:{closed_port()}/v1")
        scores = kind.score(urls, [CHAIN], timeout=timeout)
    assert outcome_of(scores, kind.right(CHAIN)) == cell.once


@pytest.mark.parametrize("kind", [Judged, Compared])
@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_all_faults_leaves_each_score_right_or_invalid(kind, seed):
    """60 chains, each with scores of its own; four answers in ten go wrong, in every way."""
    draw = random.Random(seed)
    chains = [
        chain_of(f"c{b}", [draw.randint(1, 5) for _ in range(draw.randint(1, 4))])
        for b in range(60)
    ]
    columns = [row.judge if kind is Judged else row.consistency for row in MATRIX]
    faults = [
        cell.behavior
        for row, cell in zip(MATRIX, columns, strict=True)
        if cell and cell.behavior and row.name not in HANGING and "patience" not in row.name
    ]

    def script():
        yield from kind.before
        while True:
            yield draw.choice(faults) if draw.random() < 0.4 else good

    with ScriptedServer(kind.answer, script()) as server:
        scores = kind.score([server.url], chains, concurrency=16, timeout=60.0)
    for b, chain in some(enumerate(chains)):
        found, right = scores.score[b, : chain.turns], torch.tensor(kind.right(chain))
        lost = [(b, n) in scores.lost for n in range(chain.turns)]
        assert torch.equal(found, right) or (found.isnan().all() and all(lost))
    assert 0 < len({b for b, _ in scores.lost}) < 30  # 0.4^3, and what is rejected: 4 of 60


def test_the_page_shows_what_the_tests_saw():
    assert PAGE.read_text() == render(), "make it again: python -m tests.rewards.fault_matrix"
