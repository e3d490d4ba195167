"""GEdit-Bench: the manifest, both questions of an item, SC, PQ and O."""

import json
from functools import partial

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mteditflow.evaluation.benchmarks import (
    Item,
    ItemScores,
    gedit_items,
    report_gedit,
    score_gedit,
)
from mteditflow.evaluation.benchmarks.gedit import GROUPS
from mteditflow.rewards import ChatClient
from mteditflow.testing.endpoint import ScriptedServer, error
from tests.evaluation.judged_items import criteria_of, images_of, rating, save, values_of


def row(key, **changes):
    row = {
        "key": key,
        "task_type": "color_alter",
        "instruction": "Make it red",
        "image": f"images/{key}.png",
        "language": "en",
    }
    return json.dumps({**row, **changes})


def test_rows_are_read_by_language_and_bad_ones_are_named(tmp_path):
    manifest = tmp_path / "manifest.jsonl"
    lines = [
        row("1"),
        row(
            "1",
            language=None,
            instruction_language="cn",
            instruction="\u6539\u6210\u7ea2\u8272",
            more=7,
        ),
        row("2"),
        row("1"),
        row("3", task_type="paint"),
        row("4", language="fr"),
        row("5", instruction=" "),
        "{",
        "",
        row("6", image="../6.png"),
        row("../../../../7", image="7.png"),
    ]
    manifest.write_text("\n".join(lines))
    english = gedit_items(manifest, tmp_path / "made", language="en")
    assert [item.key for item in english.items] == ["1", "2"]
    assert english.items[0].source == tmp_path / "images/1.png"
    assert english.items[0].edited == tmp_path / "made/fullset/color_alter/en/1.png"
    assert [line.split(": ")[0].rsplit(":")[-1] for line in english.skipped] == [
        *("4", "5", "6", "7", "8", "10", "11")
    ]
    for said in ("got '1' again", "task_type: expected", "language: expected", "instruction"):
        assert any(said in line for line in english.skipped)
    assert "image: expected a path within" in english.skipped[-2]
    assert "key: expected a path within" in english.skipped[-1]
    everything = gedit_items(manifest, tmp_path / "made", language="en", allow_outside=True)
    assert [item.key for item in everything.items] == ["1", "2", "6", "../../../../7"]
    chinese = gedit_items(manifest, tmp_path / "made", language="cn")
    assert [item.instruction for item in chinese.items] == ["\u6539\u6210\u7ea2\u8272"]
    with pytest.raises(ValueError, match="language: expected one of"):
        gedit_items(manifest, tmp_path, language="fr")


def test_an_edited_image_is_judged_at_the_size_of_its_source(tmp_path):
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(row("1", image="before.png"))
    Image.new("RGB", (40, 20), (99, 0, 0)).save(tmp_path / "before.png")
    path = tmp_path / "made/fullset/color_alter/en/1.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (64, 32), (7, 0, 0)).save(path)
    (item,) = gedit_items(manifest, tmp_path / "made", language="en").items
    with ScriptedServer(rating(lambda made, name: 5)) as server:
        ask(server, [item])
        shown = [image.size for x in server.requests for image in images_of(x.json)]
    assert shown == [(40, 20)] * 3


def found_of(*rows):
    """Item scores: rows of (group, four scores)."""
    items = tuple(
        Item(str(i), group, "Edit", "before.png", "after.png") for i, (group, _) in enumerate(rows)
    )
    return ItemScores(items, {str(i): marks for i, (_, marks) in enumerate(rows)}, {}, {})


def test_averages_by_hand():
    """O is taken of each item: sqrt(4 9) = 6 and sqrt(0 10) = 0 in one group, 8 in the other."""
    report = report_gedit(
        found_of(
            ("ps_human", (4, 7, 9, 10)),
            ("ps_human", (10, 0, 10, 10)),
            ("text_change", (8, 9, 9, 8)),
        )
    )
    own = {name: x.estimate for name, x in report.groups["ps_human"].metrics.items()}
    assert own == pytest.approx({"SC": 2, "PQ": 9.5, "O": 3})
    whole = {name: x.estimate for name, x in report.overall.metrics.items()}
    assert whole == pytest.approx({"SC": 5, "PQ": 8.75, "O": 5.5})
    assert len(GROUPS) == 11
    assert set(report.absent_groups) == set(GROUPS) - {"ps_human", "text_change"}


@settings(max_examples=5)  # each resamples 2,000 times
@given(st.tuples(*[st.integers(0, 10)] * 4))
def test_overall_lies_between_its_parts(marks):
    own = report_gedit(found_of((GROUPS[0], marks))).overall.metrics
    parts = sorted([own["SC"].estimate, own["PQ"].estimate])
    assert parts[0] - 1e-9 <= own["O"].estimate <= parts[1] + 1e-9
    assert parts[1] <= max(marks)


def ask(server, items, **options):
    client = ChatClient([server.url], "m", **options)
    return anyio.run(partial(score_gedit, client, items))


def test_quality_is_asked_of_the_edited_image_alone(tmp_path, capsys):
    save(tmp_path, {"before.png": 99, "1.png": 7})
    items = [Item("1", GROUPS[0], "Edit", tmp_path / "before.png", tmp_path / "1.png")]
    marks = {"success": 7, "restraint": 6, "naturalness": 5, "cleanness": 4}
    with ScriptedServer(rating(lambda made, name: marks[name])) as server:
        found = ask(server, items)
    assert found.scores == {"1": (7, 6, 5, 4)}
    shown = {tuple(criteria_of(x.json)): values_of(x.json) for x in server.requests}
    assert shown == {("success", "restraint"): [99, 7], ("naturalness", "cleanness"): [7]}
    assert criteria_of(server.requests[0].json).popitem()[1] == list(range(11))
    assert capsys.readouterr().err == ""  # no bar that nobody asked for


def test_an_item_that_lost_one_of_its_two_answers_has_no_score(tmp_path):
    save(tmp_path, {"before.png": 99, "1.png": 7})
    items = [Item("1", GROUPS[0], "Edit", tmp_path / "before.png", tmp_path / "1.png")]
    with ScriptedServer(rating(lambda made, name: made), [error(400)]) as server:
        found = ask(server, items, attempts=1)
    assert found.scores == {}
    assert list(found.lost) == ["1"]
