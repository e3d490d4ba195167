"""The example that scores single edits, against a judge over HTTP that dies half-way."""

import itertools
import json

import pytest
from mteditflow_examples import evaluate_single_turn
from typer.testing import CliRunner

from mteditflow.evaluation.benchmarks.gedit import GROUPS
from mteditflow.evaluation.benchmarks.imgedit import CATEGORIES
from mteditflow.testing.endpoint import ScriptedServer, error, good
from tests.evaluation.judged_items import lines_of, rating, save
from tests.loops import some


def run(command, file, folder, server, output, *more):
    url = server if isinstance(server, str) else server.url
    given = [command, file, folder, "--judge", url, "--model", "m", "--output", output, *more]
    return CliRunner().invoke(evaluate_single_turn.app, [str(x) for x in given])


def judge(script=()):
    """Gives each criterion what the picture's red says."""
    return ScriptedServer(rating(lambda made, name: made), script)


@pytest.fixture
def imgedit(tmp_path):
    """One item of each category; its picture's red, 1..5, is its score."""
    entries = {
        str(i): {"id": "in.png", "prompt": f"Edit {i}", "edit_type": category}
        for i, category in enumerate(CATEGORIES)
    }
    file = tmp_path / "basic_edit.json"
    file.write_text(json.dumps(entries))
    save(tmp_path, {"in.png": 9} | {f"made/{i}.png": 1 + i % 5 for i in range(9)})
    return file, tmp_path / "made"


def test_a_folder_is_scored_and_the_report_written(imgedit, tmp_path):
    with judge() as server:
        result = run("imgedit", *imgedit, server, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "9 of 9 items scored, 0 lost, 0 without an image, 0 bad entries" in lines_of(
        result.output
    )
    written = json.loads((tmp_path / "out/imgedit.json").read_text())
    whole = written["report"]["overall"]
    assert whole["metrics"]["score"]["estimate"] == pytest.approx(25 / 9)
    assert whole["scored"] == 9
    assert written["scores"]["4"] == [5, 5, 5]
    page = (tmp_path / "out/imgedit.md").read_text()
    assert "| add | 1.00" in page
    assert "| Overall | 2.78" in page


def test_options_of_the_judge_are_sent_and_reported(imgedit, tmp_path):
    words = ["--chat-template-kwargs", '{"enable_thinking": false}', "--reasoning-tokens", 4000]
    with judge() as server:
        result = run("imgedit", *imgedit, server, tmp_path / "out", *words)
        body = server.requests[-1].json
    assert result.exit_code == 0, result.output
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["max_completion_tokens"] > 4500
    written = json.loads((tmp_path / "out/imgedit.json").read_text())
    assert written["judged_by"]["judge"] == "m"
    assert json.loads(written["judged_by"]["request"]) == {
        "reasoning_tokens": 4000,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert '"reasoning_tokens": 4000' in (tmp_path / "out/imgedit.md").read_text()
    result = run("imgedit", *imgedit, server, tmp_path / "out", "--extra-body", '{"n": 2}')
    assert result.exit_code == 2


def test_words_of_a_judge_have_no_effect_on_the_terminal(imgedit, tmp_path):
    words = error(400, "[link=http://evil]\x1b[2Jred[/]")
    with judge(itertools.chain([good], itertools.repeat(words))) as server:
        result = run("imgedit", *imgedit, server, tmp_path / "out")
    assert result.exit_code == 1
    assert "[link=http://evil]" in result.output
    assert "\x1b" not in result.output
    missing = tmp_path / "no \x1b[2J file.json"
    result = run("imgedit", missing, tmp_path, server, tmp_path / "out")
    assert result.exit_code == 2
    assert "\x1b" not in result.output


def test_a_judge_that_dies_half_way_is_told_and_a_second_run_finishes(imgedit, tmp_path):
    script = itertools.chain([good] * 5, itertools.repeat(error(503)))  # the first: is it there
    with judge(script) as server:
        result = run("imgedit", *imgedit, server, tmp_path / "out", "--patience", 0)
        asked = len(server.requests)
    assert result.exit_code == 1
    assert asked > 5
    said = lines_of(result.output)
    assert "4 of 9 items scored, 5 lost" in said
    assert "error: 56% without a score, allowed are 20%" in said
    written = json.loads((tmp_path / "out/imgedit.json").read_text())
    assert len(written["lost"]) == 5
    assert all(reason for reason in some(written["lost"].values()))
    assert written["report"]["overall"]["metrics"]["score"]["estimate"] is None
    with judge() as server:
        again = run("imgedit", *imgedit, server, tmp_path / "out")
        assert len(server.requests) == 1 + 5
    assert again.exit_code == 0, again.output
    assert "9 of 9 items scored" in lines_of(again.output)
    with judge() as server:
        assert run("imgedit", *imgedit, server, tmp_path / "fresh").exit_code == 0
    undisturbed, resumed = ((tmp_path / x / "imgedit.json").read_text() for x in ("fresh", "out"))
    assert undisturbed == resumed


def test_bad_input_is_named_and_counted(imgedit, tmp_path):
    file, made = imgedit
    text = file.read_text()[:-1]
    bad = '"a": {"id": "in.png"}, "0": {"id": "in.png", "prompt": "x", "edit_type": "add"}'
    file.write_text(f"{text}, {bad}}}")
    (made / "1.png").unlink()
    (made / "2.png").write_bytes(b"no image")
    with judge() as server:
        result = run("imgedit", file, made, server, tmp_path / "out", "--max-invalid", 0.5)
    assert result.exit_code == 0, result.output
    said = lines_of(result.output)
    assert "7 of 9 items scored, 0 lost, 2 without an image, 2 bad entries in the file" in said
    for line in ("prompt: expected this field, got none", "got '0' again", "1.png", "2.png"):
        assert line in said
    assert (tmp_path / "out/imgedit.md").read_text().count("- left out: ") == 4
    with judge() as server:
        stricter = run("imgedit", file, made, server, tmp_path / "out", "--max-invalid", 0.3)
    assert stricter.exit_code == 1
    assert "error: 36% without a score" in lines_of(stricter.output)  # 4 of 11 entries
    strict = run("imgedit", file, made, "http://127.0.0.1:9/v1", tmp_path / "out")
    assert strict.exit_code == 1  # all that could be scored is in the cache
    assert f"; going on with the answers in {tmp_path / 'out'}" in lines_of(strict.stderr)
    assert "36% without a score, allowed are 20%" in lines_of(strict.output)


def test_both_languages_are_reported_on_their_own(tmp_path):
    lines = [
        {
            "key": str(i),
            "task_type": GROUPS[i % 2],
            "instruction": "Edit it",
            "image": "in.png",
            "language": language,
        }
        for language in ("en", "cn")
        for i in range(4)
    ]
    lines.append({"key": "x"})
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    made = {
        f"made/fullset/{GROUPS[i % 2]}/{x}/{i}.png": red
        for x, red in (("en", 4), ("cn", 9))
        for i in range(4)
    }
    save(tmp_path, {"in.png": 99} | made)
    with judge() as server:
        result = run("gedit", manifest, tmp_path / "made", server, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.output.count("left out: ") == 1
    for language, expected in (("en", 4), ("cn", 9)):
        report = json.loads((tmp_path / f"out/gedit_{language}.json").read_text())["report"]
        metrics = report["overall"]["metrics"]
        assert [metrics[name]["estimate"] for name in ("SC", "PQ", "O")] == [expected] * 3
        assert report["overall"]["items"] == 4
        assert len(report["absent_groups"]) == 9


@pytest.mark.parametrize(
    ("text", "url", "message"),
    [
        (None, "http://127.0.0.1:9/v1", "No such file"),
        ("{}", "http://127.0.0.1:9/v1", "expected at least one item, got none"),
        ("[1]", "http://127.0.0.1:9/v1", "expected at least one item, got none"),
        ('{"1": {"id": "a", "prompt": "b", "edit_type": "add"}}', "http://x", "end in /v1"),
    ],
)
def test_what_cannot_be_started_is_told(tmp_path, text, url, message):
    file = tmp_path / "basic_edit.json"
    if text is not None:
        file.write_text(text)
    result = run("imgedit", file, tmp_path, url, tmp_path / "out")
    assert result.exit_code == 2
    assert message in lines_of(result.output.replace("\u2502", " "))
