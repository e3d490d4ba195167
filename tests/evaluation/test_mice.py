"""MICE-Bench: what GA and CU show, CC with and without objects, IF, averages by hand, refusals."""

import os
from functools import partial
from pathlib import Path

import anyio
import pytest
import torch

from mteditflow.chains import Chain, read_chains
from mteditflow.evaluation.benchmarks import (
    EdiValJudge,
    MiceScores,
    Session,
    SessionScores,
    UnansweredError,
    read_sessions,
    report_mice,
    score_mice,
)
from mteditflow.rewards import ChatClient, ConsistencyClient, Fault, Lost, TurnScores
from mteditflow.testing.endpoint import ScriptedServer, completion, error, good
from tests.evaluation.judged_items import criteria_of, save, text_of, values_of
from tests.evaluation.judged_sessions import judging, write_sessions
from tests.loops import some

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("MTEDITFLOW_SHARED", ROOT.parent / "shared")) / "data"
FORMATTED = ["Remove [cup]", "Change the color of [dog] to [red]"]
OBJECTS = [["dog"], []]
EVERY = [["cup", "dog"], ["cup", "dog", "red dog"]]


@pytest.fixture
def sessions(tmp_path):
    """Session a: the cup (red 10) is gone at turn 1 (red 20), and turn 2 is as the judge says."""
    fields = {
        "task_types": ["subject_remove", "color_alter"],
        "formatted_instructions": FORMATTED,
        "unchanged_objects": OBJECTS,
        "all_objects": EVERY,
        "background_consistency": [True, True],
    }
    file = write_sessions(tmp_path, {"a": [20, 30]}, **fields)
    save(tmp_path, {"images/a.png": 10})
    return read_sessions(file, tmp_path / "made")


class Detector:
    """Finds a cup in an image of red 10, and a dog in any."""

    def detect(self, images, names, *, threshold):
        box = torch.tensor([[10.0, 10.0, 60.0, 60.0]])
        found = []
        for image, (name,) in zip(images, names, strict=True):
            there = name == "dog" or (name == "cup" and int(image[0, 0, 0]) == 10)
            found.append((box[: int(there)], torch.ones(int(there))))
        return found


def looks(request):
    """A consistency server: objects 0.75, background 0.25, where they were asked for."""
    if request is None:
        return {"scorer": "s", "models": {}, "versions": {}, "limits": {}}
    pairs = [
        {"object": 0.75 if pair["unchanged_objects"] else None, "background": 0.25}
        for pair in request["pairs"]
    ]
    return {"scorer": "s", "pairs": pairs}


def score(sessions, server, split, **options):
    client = ChatClient([server.url], "m", temperature=0.6, attempts=1)
    return anyio.run(partial(score_mice, client, sessions, split=split, **options))


@pytest.mark.parametrize(("split", "plain"), [("cm", 0), ("cu", 2)])
def test_the_judge_sees_all_turns_so_far_four_times(sessions, split, plain):
    with ScriptedServer(judging(lambda reds, name: int(len(reds) == 2))) as server:
        found = score(sessions, server, split)
        requests = [x.json for x in server.requests]
    assert sorted(values_of(x) for x in requests) == [[10, 20]] * 4 + [[10, 20, 30]] * 4
    assert all(criteria_of(x) == {"all_right": [0, 1]} for x in some(requests))
    last = text_of(max(requests, key=lambda x: len(values_of(x))))
    assert last.count("In plain words: ") == plain
    assert ("sets a rule" in last) is (split == "cm")
    assert found.awareness.scores == {("a", 1): (1,), ("a", 2): (0,)}
    assert (found.following, found.consistency) == (None, None)
    assert list(report_mice(found).all_turns) == [{"cm": "GA", "cu": "CU"}[split]]


def test_all_three_scores(sessions):
    """IF: the cup is gone; the judge denies the color. CC: (0.75 + 0.25) / 2, and none at turn 2.

    At turn 2 no object stays, and the background alone is no CC, as in the public code.
    """

    def answer(request):
        if "scores" in request["response_format"]["json_schema"]["schema"]["properties"]:
            return completion('{"scores": [0]}')
        return judging(lambda reds, name: 1)(request)

    with ScriptedServer(answer) as judge, ScriptedServer(looks) as server:
        checks = EdiValJudge(ChatClient([judge.url], "m"), Detector())
        consistency = ConsistencyClient([server.url])
        found = score(sessions, judge, "cm", checks=checks, consistency=consistency)
    assert found.following.score.tolist() == [[1, 0]]
    report = report_mice(found)
    assert {name: x.estimate for name, x in report.all_turns.items()} == {
        "IF": 0.5,
        "CC": 0.5,
        "GA": 1,
    }
    first, second = report.by_turn["CC"]
    assert (first.estimate, first.count) == (0.5, 1)
    assert (second.estimate, second.low, second.count) == (None, None, 0)


def found_of(awareness, similar, lost=None):
    """Scores of sessions s0, s1, ... from rows of GA and CC."""
    chains = [
        Chain(id=f"s{b}", image="a.png", instructions=["Edit"] * len(row))
        for b, row in enumerate(awareness)
    ]
    marks = {(f"s{b}", n + 1): (x,) for b, row in enumerate(awareness) for n, x in enumerate(row)}
    score = torch.tensor(similar)
    consistency = TurnScores(score, torch.ones(score.shape, dtype=torch.bool), lost or {})
    sessions = tuple(Session(chain, ()) for chain in chains)
    return MiceScores("cm", SessionScores(sessions, marks, {}), consistency=consistency)


def test_averages_by_hand():
    """GA: turn 1 (1 + 0.5) / 2, turn 2 (0 + 0.25) / 2, all 1.75 / 4. CC: 0.8, and with 0.5 0.65."""
    found = found_of([[1, 0], [0.5, 0.25]], [[0.8, torch.nan], [torch.nan, torch.nan]])
    report = report_mice(found)
    assert [x.estimate for x in report.by_turn["GA"]] == pytest.approx([0.75, 0.125])
    assert report.all_turns["GA"].estimate == pytest.approx(0.4375)
    assert report.all_turns["GA"].count == 4
    assert report.all_turns["CC"].estimate == pytest.approx(0.8)
    assert report.all_turns["CC"].count == 1
    assert report.all_turns["CC"].low < 0.8  # one session is no certainty
    assert report.notes == ()
    halves = report_mice(found, missing=0.5)
    assert [x.estimate for x in halves.by_turn["CC"]] == pytest.approx([0.65, 0.5])
    assert halves.all_turns["CC"].count == 4
    assert "0.5" in halves.notes[0]
    with pytest.raises(ValueError, match="missing: expected"):
        report_mice(found, missing=1.5)


def test_a_lost_answer_of_any_measure_is_no_report(sessions):
    lost = {(1, 0): Lost(Fault.timeout, "no answer within 60 s", 4)}
    found = found_of([[1.0], [1.0]], [[0.8], [torch.nan]], lost)
    with pytest.raises(UnansweredError, match=r"session 's1', turn 1: .*time-out after 4"):
        report_mice(found, missing=0.5)  # lost is not missing
    with ScriptedServer(judging(lambda reds, name: 1), [good, error(400)]) as server:
        votes = score(sessions, server, "cm")
    with pytest.raises(UnansweredError, match=r"session 'a', turn [12]: "):
        report_mice(votes)


def test_what_a_split_needs():
    (session,) = found_of([[1.0]], [[0.8]]).awareness.sessions
    client = ChatClient(["http://127.0.0.1:9/v1"], "m", temperature=0.6, attempts=1)
    with pytest.raises(ValueError, match="split: expected one of"):
        anyio.run(partial(score_mice, client, [session], split="ga"))
    with pytest.raises(ValueError, match="session 's0': expected formatted_instructions, got none"):
        anyio.run(partial(score_mice, client, [session], split="cu"))
    consistency = ConsistencyClient(["http://127.0.0.1:9/v1"])
    given = {"split": "cm", "consistency": consistency}
    with pytest.raises(ValueError, match="session 's0': expected unchanged_objects, got none"):
        anyio.run(partial(score_mice, client, [session], **given))


def test_the_real_file_has_objects_at_936_of_1080_turns():
    """With the 947 turns of ``cu`` that are 1,883 of 2,160, where CC applies."""
    path = SHARED / "edit_r2_cm_test.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}: data of others, kept beside the repository")
    chains = read_chains(path, format="edit-r2").chains
    assert len(chains) == 360
    assert {chain.turns for chain in chains} == {3}
    assert all(chain.formatted_instructions for chain in some(chains))
    assert sum(map(bool, (names for x in chains for names in x.unchanged_objects))) == 936
