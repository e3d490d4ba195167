"""ImgEdit-Bench: reading, what is asked, how answers are read, averages and denominators."""

import io
import json
import sys
from functools import partial
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.ExifTags import Base

from mteditflow.evaluation.benchmarks import (
    Item,
    ItemScores,
    Rubric,
    imgedit_items,
    report_imgedit,
    score_imgedit,
    score_items,
)
from mteditflow.evaluation.benchmarks.imgedit import (
    CATEGORIES,
    RUBRIC_OF_ANY,
    RUBRICS,
    UNKNOWN,
    rubrics_of,
)
from mteditflow.rewards import AnswerCache, AnswerError, ChatClient, Fault, Lost
from mteditflow.testing.endpoint import ScriptedServer, completion, error
from tests.evaluation.judged_items import criteria_of, picture, rating, save, text_of, values_of
from tests.loops import some

NAMES = {
    "add", "remove", "replace", "adjust", "background", "style", "extract", "action", "compose",
}  # fmt: skip
RUBRIC = Rubric({"following": "a", "quality": "b"}, low=1, high=5)


def entry(category, image="1.jpg", prompt="Do it"):
    return {"id": image, "prompt": prompt, "edit_type": category}


def test_a_file_without_categories_is_scored_as_one_group(tmp_path):
    entries = {key: {"id": "before.png", "prompt": f"Edit {key}"} for key in ("1", "2")}
    (tmp_path / "UGE_edit.json").write_text(json.dumps(entries))
    save(tmp_path, {"before.png": 99, "1.png": 7, "2.png": 8})
    items = imgedit_items(tmp_path / "UGE_edit.json", tmp_path).items
    assert [item.group for item in items] == [UNKNOWN] * 2
    with ScriptedServer(rating(lambda made, name: 4 if made == 7 else 2)) as server:
        found = anyio.run(score_imgedit, ChatClient([server.url], "m"), items)
    assert rubrics_of(items) == (RUBRIC_OF_ANY,)
    report = report_imgedit(found)
    assert list(report.groups) == [UNKNOWN]
    assert report.overall.metrics["score"].estimate == 3
    assert not report.absent_groups


def test_an_entry_without_a_category_among_others_is_named(tmp_path):
    entries = {"1": {"id": "1.jpg", "prompt": "Do it"}, "2": entry("add")}
    (tmp_path / "file.json").write_text(json.dumps(entries))
    reading = imgedit_items(tmp_path / "file.json", tmp_path)
    assert [item.key for item in reading.items] == ["2"]
    assert rubrics_of(reading.items) == tuple(RUBRICS.values())
    (skipped,) = reading.skipped
    assert ": 1: edit_type: expected one of ['add', " in skipped
    assert skipped.endswith("got none")


def test_a_key_that_leads_out_of_the_folder_of_edits_is_bad(tmp_path):
    (tmp_path / "file.json").write_text(json.dumps({"../../1": entry("add"), "a/2": entry("add")}))
    (skipped,) = imgedit_items(tmp_path / "file.json", tmp_path / "made").skipped
    assert "../../1: expected a path within" in skipped
    reading = imgedit_items(tmp_path / "file.json", tmp_path / "made", allow_outside=True)
    assert [item.key for item in reading.items] == ["../../1", "a/2"]


def item(key, group="add", folder=Path()):
    return Item(key, group, f"Edit {key}", folder / "before.png", folder / f"{key}.png")


def scores(*rows, lost=(), missing=()):
    """Item scores: rows of (key, category, criteria)."""
    items = [item(key, group) for key, group, _ in rows]
    items += [item(key, group) for key, group in (*lost, *missing)]
    return ItemScores(
        tuple(items),
        {key: criteria for key, _, criteria in rows},
        {key: Lost(Fault.timeout, "none within 1 s", 4) for key, _ in lost},
        {key: "no such file" for key, _ in missing},
    )


def test_there_are_nine_categories_of_three_criteria():
    assert set(CATEGORIES) == NAMES
    assert all(len(rubric.criteria) == 3 for rubric in some(RUBRICS.values()))
    assert {(rubric.low, rubric.high) for rubric in RUBRICS.values()} == {(1, 5)}


def test_the_judge_is_told_that_following_bounds_the_others():
    for rubric in some(RUBRICS.values()):
        first, *others = rubric.criteria
        assert first == "following"
        assert "at most" not in rubric.criteria[first]
        assert all("at most the number of following" in rubric.criteria[x] for x in some(others))


def test_entries_are_read_and_bad_ones_are_named(tmp_path):
    file = tmp_path / "basic_edit.json"
    good = {category: entry(category, f"in/{category}.jpg") for category in CATEGORIES}
    bad = {"b1": entry("paint"), "b2": {"id": "1.jpg"}, "b3": 7}
    text = json.dumps(good | {"old": entry("alter"), "mix": entry("hybrid")} | bad)
    file.write_text(text[:-1] + f', "add": {json.dumps(entry("add"))}}}')
    reading = imgedit_items(file, tmp_path / "made", images="images")
    groups = {each.key: each.group for each in reading.items}
    assert groups == {name: name for name in CATEGORIES} | {"old": "adjust", "mix": "compose"}
    assert reading.items[0].source == Path("images/in/add.jpg")
    assert reading.items[0].edited == tmp_path / "made/add.png"
    assert len(reading.skipped) == 4
    for said in ("b1: edit_type: expected one of", "prompt: expected", "'add' again", "got 7"):
        assert any(said in line for line in reading.skipped), (said, reading.skipped)


def test_a_request_shows_both_images_and_the_instruction_as_json():
    request = RUBRIC.request('Say "no"\n5', ["data:before", "data:after"])
    shown = [x["image_url"]["url"] for x in request.content if x["type"] == "image_url"]
    assert shown == ["data:before", "data:after"]
    text = "".join(x["text"] for x in request.content if x["type"] == "text")
    assert r'Instruction: "Say \"no\"\n5"' in text
    assert '{"analysis": "<analysis>", "following": <number>, "quality": <number>}' in text
    assert request.schema["required"] == ["analysis", "following", "quality"]
    assert request.schema["properties"]["quality"]["enum"] == [1, 2, 3, 4, 5]


@given(st.lists(st.integers(1, 5), min_size=2, max_size=2))
def test_what_has_the_form_is_read(numbers):
    text = json.dumps({"analysis": "x", "following": numbers[0], "quality": numbers[1]})
    assert RUBRIC.parse(text) == tuple(numbers)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"analysis": "x", "following": 6, "quality": 1}', Fault.out_of_range),
        ('{"analysis": "x", "following": 0, "quality": 1}', Fault.out_of_range),
        ('{"analysis": "x", "following": 4.5, "quality": 1}', Fault.not_a_number),
        ('{"analysis": "x", "following": true, "quality": 1}', Fault.not_a_number),
        ('{"analysis": "x", "following": "4/5", "quality": 1}', Fault.not_a_number),
        ('{"analysis": " ", "following": 4, "quality": 1}', Fault.format),
        ('{"following": 4, "quality": 1}', Fault.format),
        ('{"analysis": "x", "following": 4}', Fault.format),
        ('{"analysis": "x", "following": 4, "quality": 1, "Quality": 2}', Fault.format),
        ("<think>x", Fault.reasoning),
        ('{"analysis": "x", "following": 4, "quality": 1, "quality": 2}', Fault.format),
        ("[4, 1]", Fault.format),
        ("Following: 4, quality: 1", Fault.request_ignored),
        ("I'm sorry, I cannot rate this.", Fault.refusal),
        ("", Fault.format),
    ],
)
def test_everything_else_is_a_fault(text, fault):
    with pytest.raises(AnswerError) as caught:
        RUBRIC.parse(text)
    assert caught.value.fault is fault


@pytest.mark.parametrize(
    "text",
    [
        '<think>5?</think>```json\n{"analysis": "x", "following": 4, "quality": 1}\n```</s>',
        '{"more": 9, "analysis": "x", "following": 4.0, "quality": "1"}',
        2 * '{"analysis": "x", "following": 4, "quality": 1}',
    ],
)
def test_an_answer_with_one_reading_is_read(text):
    assert RUBRIC.parse(text) == (4, 1)


def test_averages_by_hand():
    """add: (4 + 2) / 2 = 3; style: 5; Overall (3 + 5) / 2, not the mean over items."""
    found = scores(
        ("1", "add", (5, 4, 3)),
        ("2", "add", (1, 2, 3)),
        ("3", "style", (5, 5, 5)),
        lost=[("4", "add")],
        missing=[("5", "style")],
    )
    report = report_imgedit(found)
    assert report.benchmark == "ImgEdit-Bench"
    assert list(report.groups) == ["add", "style"]
    assert report.groups["add"].metrics["score"].estimate == 3
    assert report.overall.metrics["score"].estimate == 4
    interval = report.groups["add"].metrics["score"]
    assert 2 <= interval.low <= 3 <= interval.high <= 4
    counts = report.overall
    assert (counts.items, counts.scored, counts.lost, counts.missing) == (5, 3, 1, 1)
    assert report.groups["add"].lost == report.groups["style"].missing == 1
    assert report.reasons == {"time-out": 1}
    assert set(report.absent_groups) == NAMES - {"add", "style"}


def test_there_is_no_overall_where_a_category_has_no_score():
    report = report_imgedit(scores(("1", "add", (5, 4, 3)), lost=[("2", "style")]))
    assert report.groups["add"].metrics["score"].estimate == 4
    assert report.groups["style"].metrics["score"].estimate is None
    assert report.overall.metrics["score"].estimate is None
    nothing = report_imgedit(scores(lost=[("2", "style")]))
    assert nothing.overall.scored == 0
    assert nothing.overall.metrics == {}


@settings(max_examples=5)  # each resamples 2,000 times
@given(st.permutations([(str(i), CATEGORIES[i % 3], (1 + i % 5, 2, 3)) for i in range(9)]))
def test_the_order_of_items_changes_nothing_but_the_draws(rows):
    def estimates(report):
        groups = {**report.groups, "": report.overall}
        return {name: group.metrics["score"].estimate for name, group in groups.items()}

    ordered = sorted(rows)
    assert estimates(report_imgedit(scores(*rows))) == pytest.approx(
        estimates(report_imgedit(scores(*ordered)))
    )


def test_an_item_of_another_benchmark_is_an_error():
    with pytest.raises(ValueError, match="items: expected at least one item, of the groups add"):
        report_imgedit(scores(("1", "motion_change", (1, 1, 1))))
    with pytest.raises(ValueError, match=r"items: expected at least one item, .* got \[\]"):
        report_imgedit(scores())


def by_judge(server, items, **options):
    client = ChatClient([server.url], "m", **options)
    return anyio.run(partial(score_imgedit, client, items))


def test_a_judge_over_http_scores_what_is_there(tmp_path):
    save(tmp_path, {"before.png": 9, "1.png": 5, "2.png": 3})
    (tmp_path / "3.png").write_bytes(b"\x89PNG broken")
    items = [item(key, "add", tmp_path) for key in ("1", "2", "3", "4")]
    with ScriptedServer(rating(lambda made, name: made)) as server:
        found = by_judge(server, items)
    assert found.scores == {"1": (5, 5, 5), "2": (3, 3, 3)}
    assert set(found.missing) == {"3", "4"}
    assert "4.png" in found.missing["4"]
    asked = [request.json for request in server.requests]
    assert sorted(values_of(request) for request in asked) == [[9, 3], [9, 5]]
    assert all(set(criteria_of(x)) == set(RUBRICS["add"].criteria) for x in some(asked))
    assert all("whole number from 1 to 5" in text_of(request) for request in some(asked))


def test_a_photograph_that_was_taken_upside_down_is_shown_upright(tmp_path):
    save(tmp_path, {"1.png": 5})
    photograph, exif = picture(99), Image.Exif()
    photograph.putpixel((0, 0), (9, 0, 0))
    exif[Base.Orientation] = 3  # turned by half
    photograph.save(tmp_path / "before.png", exif=exif)
    with ScriptedServer(rating(lambda made, name: made)) as server:
        by_judge(server, [item("1", "add", tmp_path)])
    assert values_of(server.requests[0].json) == [99, 5]


def test_what_is_lost_has_a_reason_and_is_asked_for_again_alone(tmp_path):
    save(tmp_path, {"before.png": 9, "1.png": 5, "2.png": 3})
    items = [item(key, "add", tmp_path) for key in ("1", "2")]
    with AnswerCache(tmp_path / "answers") as cache:
        script = [error(400), plain_nonsense]
        with ScriptedServer(rating(lambda made, name: made), script) as server:
            found = by_judge(server, items, attempts=1, cache=cache, concurrency=1)
        assert found.scores == {}
        assert {x.fault for x in found.lost.values()} == {Fault.rejected, Fault.out_of_range}
        with ScriptedServer(rating(lambda made, name: made), [good_once, error(400)]) as server:
            found = by_judge(server, items, attempts=1, cache=cache, concurrency=1)
        assert len(found.scores) == len(found.lost) == 1
        with ScriptedServer(rating(lambda made, name: made)) as server:
            found = by_judge(server, items, attempts=1, cache=cache)
        assert found.scores == {"1": (5, 5, 5), "2": (3, 3, 3)}
        assert len(server.requests) == 1


async def good_once(exchange):
    await exchange.reply(exchange.right())


async def plain_nonsense(exchange):
    names = criteria_of(exchange.request.json)
    await exchange.reply(completion(json.dumps({"analysis": "x"} | dict.fromkeys(names, 77))))


def test_keys_that_stand_twice_are_refused():
    client = ChatClient(["http://127.0.0.1:9/v1"], "m")
    with pytest.raises(ValueError, match="items: expected each key once, got '1' again"):
        anyio.run(score_items, client, [item("1"), item("1")], lambda _: [RUBRIC])


@pytest.mark.parametrize("terminal", [False, True])
def test_the_bar_is_shown_when_asked_for_on_a_terminal_or_in_a_log(monkeypatch, terminal):
    """Items without images ask no judge."""
    items, client = [item("1"), item("2")], ChatClient(["http://127.0.0.1:9/v1"], "m", attempts=1)
    for progress in (False, True):
        stream = io.StringIO()
        stream.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        call = partial(score_items, client, items, lambda item: [RUBRIC], progress=progress)
        assert set(anyio.run(call).missing) == {"1", "2"}
        shown = stream.getvalue()
        assert ("judge: " in shown, "2/2" in shown) == (progress, progress)
