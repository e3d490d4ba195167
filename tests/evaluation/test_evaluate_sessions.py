"""The commands that score sessions, against a judge over HTTP that loses answers, and refusals."""

import json

import pytest
from mteditflow_examples import evaluate

from mteditflow.testing.endpoint import ScriptedServer, completion, error, good
from tests.evaluation.judged_items import lines_of, save, text_of
from tests.evaluation.judged_sessions import judging, write_sessions
from tests.evaluation.test_mice import EVERY, FORMATTED, OBJECTS, Detector, looks
from tests.evaluation.test_sessions import BAD, GOOD, by_red
from tests.refusals import call, refusal
from tests.samples_of_scores import few_resamples

__all__ = ["few_resamples"]  # a fixture of every test here
NOBODY = "http://127.0.0.1:9/v1"
DINO = "mteditflow.rewards.consistency.models.GroundingDino.from_pretrained"
FIELDS = {
    "task_types": ["subject_remove", "color_alter"],
    "formatted_instructions": FORMATTED,
    "unchanged_objects": OBJECTS,
    "all_objects": EVERY,
    "background_consistency": [True, True],
}


def words(command, folder, server, *more):
    url = server if isinstance(server, str) else server.url
    where = [folder / "sessions.jsonl", folder / "made", "--output", folder / "out"]
    return [command, *where, "--judge", url, "--model", "m", *more]


def run(*given):
    return call(evaluate.app, words(*given))


def test_lme_loses_an_answer_reports_nothing_and_is_resumed(tmp_path):
    """Sessions 1 to 8 of 5 turns; the 3rd of session 8 fails, and all else succeeds."""
    marks = {str(n): [GOOD] * 5 for n in range(1, 8)} | {"8": [GOOD, GOOD, BAD, GOOD, GOOD]}
    write_sessions(tmp_path, marks)

    async def outage(exchange):
        said = text_of(exchange.request.json)
        hit = '"Edit 7 4"' in said and '"Edit 7 5"' not in said and "Image 4, after" in said
        await (error(400) if hit else good)(exchange)

    with ScriptedServer(judging(by_red), [outage] * 200) as server:
        first = run("lme", tmp_path, server, "--patience", 0, "--json")
        asked = len(server.requests)
    assert (first.code, first.out) == (1, "")
    assert first.err.startswith("error: session '7', turn 4: expected an answer of the judge (the ")
    assert first.err.count("\n") == 1
    assert {x.name for x in (tmp_path / "out").glob("lme*")} == set()
    with ScriptedServer(judging(by_red)) as server:
        again = run("lme", tmp_path, server, "--json")
        rest = [x.path for x in server.requests if x.path.endswith("completions")]
    assert again.code == 0, again
    assert len(rest) == 1 + 2  # whether it is there, then turns 4 and 5 of session 7
    assert asked > 8 * 5 + 7 * 4 + 3
    said = json.loads(again.out)
    assert [x["estimate"] for x in said["report"]["by_turn"]["SR"]] == [1, 1, 7 / 8, 7 / 8, 7 / 8]
    assert [x["estimate"] for x in said["report"]["by_turn"]["CR"]] == [0] * 5
    assert said["judged_by"]["checks"] == "lme"
    written = json.loads((tmp_path / "out/lme.json").read_text())
    assert written["report"] == said["report"]
    assert written["scores"]["following"]["8"] == {"1": [9, 9], "2": [9, 9], "3": [6, 6]}
    assert len(written["scores"]["damage"]["8"]) == 5
    assert "| 3 | 87.5 [52.9, 97.8] (8) * |" in (tmp_path / "out/lme.md").read_text()


def test_mse_prints_a_table(tmp_path):
    write_sessions(tmp_path, {"a": [GOOD, BAD]})
    with ScriptedServer(judging(by_red)) as server:
        ended = run("mse", tmp_path, server)
    assert ended.code == 0, ended
    shown = lines_of(ended.out)
    assert "MSE-Bench: 1 sessions of 2 turns" in shown
    assert "100.0 [20.7, 100.0] (1) *" in shown
    assert "0.0 [0.0, 79.3] (1) *" in shown
    with ScriptedServer(judging(by_red)) as server:
        other = call(evaluate.app, [*words("mse", tmp_path, server)[:-1], "another"])
    assert other.code == 2
    assert "mse.json: scores of judge = 'm', got 'another': choose another --output" in other.err


@pytest.mark.usefixtures("few_resamples")
def test_mice_measures_what_it_is_given(tmp_path, monkeypatch):
    write_sessions(tmp_path, {"a": [20, 30]}, **FIELDS)
    save(tmp_path, {"images/a.png": 10})
    (tmp_path / "dino").mkdir()
    (tmp_path / "dino/config.json").write_text("{}")
    monkeypatch.setattr(DINO, lambda *_, **__: Detector())

    def answer(request):
        asked = request.get("response_format", {}).get("json_schema", {}).get("schema", {})
        if "scores" in asked.get("properties", {}):
            return completion('{"scores": [0]}')
        return judging(lambda reds, name: 1)(request)

    with ScriptedServer(answer) as judge, ScriptedServer(looks) as server:
        more = ["--detector", tmp_path / "dino", "--consistency", server.url, "--json"]
        ended = run("mice", tmp_path, judge, "--split", "cu", *more)
        again = run("mice", tmp_path, judge, "--split", "cu", *more, "--half-for-missing")
        votes = [x.json for x in judge.requests if x.json and x.json["temperature"] == 0.6]
    assert ended.code == 0, ended
    said = json.loads(ended.out)
    whole = {name: x["estimate"] for name, x in said["report"]["all_turns"].items()}
    assert whole == {"IF": 0.5, "CC": 0.5, "CU": 1}
    assert said["report"]["all_turns"]["CC"]["count"] == 1
    assert json.loads(again.out)["report"]["all_turns"]["CC"]["count"] == 2
    assert len(votes) == 4 * 2  # the second command asks for nothing
    assert said["judged_by"]["checks"] == "mice-cu, 4 votes"
    assert said["judged_by"]["consistency_server"] == "s"
    written = json.loads((tmp_path / "out/mice_cu.json").read_text())
    assert written["scores"]["consistency"] == {"a": [0.5, None]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("sessions")
    write_sessions(root, {"a": [GOOD, GOOD], "b": [GOOD, GOOD]})
    for name in ("short", "none"):
        (root / name).mkdir()
    save(root, {f"short/{name}/turn_1.png": GOOD for name in "ab"})
    (root / "bad.jsonl").write_text('{"id": "c"}')
    return root


JUDGE = ["--judge", NOBODY, "--model", "m", "--output", "OUT/x"]
PLACES = ["ROOT/sessions.jsonl", "ROOT/made"]
WRONG = {
    "no judge": (["mse", *PLACES, "--model", "m"], "Missing option '--judge'"),
    "no model": (["lme", *PLACES, "--judge", NOBODY], "Missing option '--model'"),
    "a judge that is away": (["lme", *PLACES, *JUDGE], "--judge: expected an answer from http://"),
    "a URL": (
        ["mse", *PLACES, "--judge", "http://x", "--model", "m", "--output", "OUT/x"],
        "end in /v1",
    ),
    "no file": (["lme", "ROOT/no", "ROOT/made", *JUDGE], "No such file"),
    "a bad line": (["mse", "ROOT/bad.jsonl", "ROOT/made", *JUDGE], "bad.jsonl"),
    "a session cut off": (
        ["lme", PLACES[0], "ROOT/short", *JUDGE],
        "session 'a', turn 2: expected the image",
    ),
    "no images": (["mse", PLACES[0], "ROOT/none", *JUDGE], "(2 of 2 incomplete)"),
    "no split": (["mice", *PLACES, *JUDGE], "Missing option '--split'"),
    "another split": (["mice", *PLACES, *JUDGE, "--split", "ga"], "'ga' is not one of 'cm', 'cu'"),
    "a split without its field": (
        ["mice", *PLACES, *JUDGE, "--split", "cu"],
        "session 'a': expected formatted_instructions, got none",
    ),
    "no objects": (
        ["mice", *PLACES, *JUDGE, "--split", "cm", "--consistency", NOBODY],
        "session 'a': expected unchanged_objects, got none",
    ),
    "half of nothing": (
        ["mice", *PLACES, *JUDGE, "--split", "cm", "--half-for-missing"],
        "--half-for-missing: expected --consistency with it",
    ),
    "no detector": (
        ["mice", *PLACES, *JUDGE, "--split", "cm", "--detector", "no/such/model"],
        "--detector: expected a folder with config.json or a hub id, got 'no/such/model'",
    ),
    "no votes": (
        ["mice", *PLACES, *JUDGE, "--split", "cm", "--votes", "0"],
        "greater than or equal to 1",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_take_one_line_and_write_nothing(root, tmp_path, case):
    given, message = WRONG[case]
    assert message in refusal(evaluate.app, given, root=root, scratch=tmp_path)
