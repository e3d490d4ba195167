import csv
import io
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mteditflow.chains import FORMATS, Chain, ChainError, read_chains, write_chains
from mteditflow.chains.formats.edival import COLUMNS, unquoted
from tests.chains.samples import FILES, chains, files_of_chains, texts
from tests.loops import some


def read(name):
    return read_chains(FILES[name]).chains


def rejected(name, content, folder):
    """Line and reason of the only bad record."""
    path = folder / "file"
    path.write_text(content, encoding="utf-8", newline="")
    (skipped,) = read_chains(path, format=name, strict=False).skipped
    return skipped.line, skipped.reason


# EdiVal-Bench


def test_edival():
    chain, other = read("edival")
    assert chain.to_record() == {
        "id": "4",
        "image": "4_input_raw.jpg",
        "instructions": (
            "Change the count of red cup to 3",
            "Replace the text 'A's' on oak table with 'B'",
            "Change the background to beach, remain the red cup unchanged.",
        ),
        "task_types": ("count_change", "text_change", "background_change"),
        "formatted_instructions": (
            "Change the count of [red cup] to [3]",
            "Replace the text '[A's]' on [oak table] with '[B]'",
            "Change the background to [beach].",
        ),
        "unchanged_objects": (("oak table",), (), ()),
        "all_objects": (("red cup", "oak table"),) * 3,
        "available_objects": (("red cup", "oak table"), ("red cup", "oak table"), ("red cup",)),
        "background_consistency": (True, True, False),
    }
    assert (other.id, other.turns, other.task_types) == ("7", 1, ("subject_add",))


def rows():
    return list(csv.reader(io.StringIO(FILES["edival"].read_text(encoding="utf-8"))))


def table(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


@given(
    order=st.permutations(range(1, 5)),
    columns=st.permutations(range(9)),
    twice=st.booleans(),
)
def test_edival_rows_and_columns_in_any_order_and_twice_are_the_same_chains(
    order, columns, twice, tmp_path_factory
):
    header, *body = [[row[column] for column in columns] for row in rows()]
    body = [body[place - 1] for place in order] * (1 + twice)
    path = tmp_path_factory.getbasetemp() / "shuffled.csv"
    path.write_text(table([header, *body]), encoding="utf-8", newline="")
    assert sorted(x.to_json() for x in read_chains(path).chains) == [
        x.to_json() for x in read("edival")
    ]


def test_edivals_row_of_a_turn_is_the_authority_on_that_turn(tmp_path):
    changed = rows()
    changed[3][2] = "['crop', 'crop', 'background_change']"
    changed[3][3] = "['old', 'old', 'Change the background to beach']"
    path = tmp_path / "x.csv"
    path.write_text(table(changed), encoding="utf-8", newline="")
    chain = read_chains(path).chains[0]
    assert chain.task_types == ("count_change", "text_change", "background_change")
    assert chain.instructions[:2] == read("edival")[0].instructions[:2]
    assert chain.instructions[2] == "Change the background to beach"


def test_edival_booleans_are_words_in_any_case(tmp_path):
    changed = rows()
    changed[1][5], changed[3][5] = " TRUE", "false "
    path = tmp_path / "x.csv"
    path.write_text(table(changed), encoding="utf-8", newline="")
    assert read_chains(path).chains[0].background_consistency == (True, True, False)


EDIVAL_FAULTS = {
    "no turn 2": (lambda t: t.pop(2), 2, "turns: expected rows of turns 1, 2, ..., got [1, 3]"),
    "no turn 1": (lambda t: t.pop(1), 2, "turns: expected rows of turns 1, 2, ..., got [2, 3]"),
    "turn in words": (lambda t: t[2].__setitem__(1, "two"), 3, "turns: expected the number of"),
    "turn 0": (lambda t: t[4].__setitem__(1, "0"), 5, "task_type: expected 0 entries at turn 0"),
    "a word for a list": (
        lambda t: t[2].__setitem__(6, "cup"), 3, "unchanged_objects: expected a Python list, got 'c"
    ),
    "no code": (
        lambda t: t[1].__setitem__(8, "__import__('os').abort()"),
        2,
        "all_objects: expected a Python list, got",
    ),
    "cut off": (lambda t: t[3].__setitem__(7, "['cup"), 4, "available_objects: expected a Python"),
    "deep": (lambda t: t[3].__setitem__(7, "[" * 9999), 4, "available_objects: expected a Python"),
    "long sum": (
        lambda t: t[3].__setitem__(7, "[1" + "+1j" * 5000 + "]"),
        4,
        "available_objects: expected a Python list, got '[1+1j+1j",
    ),
    "dictionary": (lambda t: t[3].__setitem__(7, "{}"), 4, "available_objects: expected a Python"),
    "one entry too few": (
        lambda t: t[2].__setitem__(4, "['Remove [cup]']"),
        3,
        "format_instructions: expected 2 entries at turn 2, got 1",
    ),
    "number as bool": (
        lambda t: t[1].__setitem__(5, "1"), 2, "bg_consistency: expected True or False, got '1'"
    ),
    "other row of a turn": (
        lambda t: t.insert(3, [*t[2][:5], "False", *t[2][6:]]),
        4,
        "turns: expected one row of turn 2, got a different one",
    ),
    "number as object": (
        lambda t: t[4].__setitem__(6, "[3]"), 5, "unchanged_objects[0][0]: expected text, got 3"
    ),
    "types are numbers": (
        lambda t: t[4].__setitem__(2, "[3]"), 5, "task_type: expected a list of text, got [3]"
    ),
    "turn of 5,000 digits": (
        lambda t: t[4].__setitem__(1, "9" * 5000), 5, "turns: expected the number of a turn, got '"
    ),
    "no index": (lambda t: t[4].__setitem__(0, ""), 5, "id: expected text that is not empty"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "line", "reason"), EDIVAL_FAULTS.values(), ids=EDIVAL_FAULTS)
def test_edival_faults(spoil, line, reason, tmp_path):
    spoilt = rows()
    spoil(spoilt)
    found, told = rejected("edival", table(spoilt), tmp_path)
    assert (found, told[: len(reason)]) == (line, reason)
    assert "\n" not in told


def test_edival_columns(tmp_path):
    missing = table([row[:-1] for row in rows()])
    line, reason = rejected("edival", missing, tmp_path)
    assert line == 1
    assert reason.startswith("expected a header with the column all_objects, got ")
    twice = table([[*row, row[0]] for row in rows()])
    assert rejected("edival", twice, tmp_path)[1].startswith("expected each column once, got ")
    short = rows()
    short[4] = short[4][:-1]
    assert rejected("edival", table(short), tmp_path) == (5, "expected 9 cells, got 8")


def test_unknown_columns_are_kept_one_entry_per_turn(tmp_path):
    path = tmp_path / "x.csv"
    more = [[*row, "note" if number == 0 else f"n{number}"] for number, row in enumerate(rows())]
    path.write_text(table(more), encoding="utf-8", newline="")
    assert read_chains(path).chains[0].note == ["n1", "n2", "n3"]


def test_a_backslash_that_escapes_nothing_is_no_warning(tmp_path):
    changed = rows()
    changed[4][3] = r"['Add text C:\data']"
    path = tmp_path / "x.csv"
    path.write_text(table(changed), encoding="utf-8", newline="")
    assert read_chains(path).chains[1].instructions == (r"Add text C:\data",)


def test_lines_of_edival_are_counted_within_cells(tmp_path):
    changed = rows()
    changed[1][3] = "[\n'Change the count of red cup to 3'\n]"
    changed[2][5] = "perhaps"
    assert rejected("edival", table(changed), tmp_path) == (
        5,
        "bg_consistency: expected True or False, got 'perhaps'",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"Remove it"', "Remove it"),
        ("'Remove it'", "Remove it"),
        ('"Remove it', "Remove it"),
        ('Remove it" ', "Remove it"),
        ("Add text 'A' on it", "Add text 'A' on it"),
        ("Replace it with 'B'", "Replace it with 'B'"),
        ('Write "A" and "B"', 'Write "A" and "B"'),
        ('"A" and "B"', '"A" and "B"'),
        ('"A" is the text', '"A" is the text'),
        ("Remove the dogs'", "Remove the dogs'"),
        ('12" screen, 14" wide', '12" screen, 14" wide'),
        ('Replace the TV with a 65"', 'Replace the TV with a 65"'),
        ('"Replace the TV with a 65"', "Replace the TV with a 65"),
        ('"Change the count to 3', "Change the count to 3"),
        ('""', ""),
    ],
)
def test_only_quotes_around_the_whole_are_stray(text, expected):
    assert unquoted(text) == expected


# Edit-R2


def test_edit_r2_of_several_turns_and_of_one():
    chain, single = read("edit-r2")
    assert chain.to_record() == {
        "id": "1",
        "image": "images/a.jpg",
        "instructions": ("Change the color of mug to red", "Remove it"),
        "task_types": ("color_alter", "subject_remove"),
        "formatted_instructions": ("Change the color of [mug] to [red]", "Remove [red mug]"),
        "unchanged_objects": (("lamp",), ("lamp",)),
        "all_objects": (("mug", "lamp", "red mug"),) * 2,
        "available_objects": (("lamp", "red mug"), ("lamp",)),
        "background_consistency": (True, True),
    }
    assert single.to_record() == {
        "id": "2",
        "image": "images/b.jpg",
        "instructions": ("Add a bird",),
        "task_types": ("subject_add",),
        "formatted_instructions": ("Add [bird]",),
        "unchanged_objects": (("tree", "road"),),
        "all_objects": (("tree", "road", "bird"),),
    }


def edit_r2(**fields):
    return json.dumps({"image": "a.png", "instruction": ["a", "b"], **fields})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"turns": 3}, "turns: expected 2, as instructions, got 3"),
        ({"task_type": "subject_add"}, "task_type: expected a list of text, got 'subject_add'"),
        ({"task_type": ["subject_add"]}, "task_types: expected one entry for each of the 2 instr"),
        ({"bg_consistency": True}, "background_consistency: expected a list, got True"),
        ({"instructions": ["c"]}, "instructions: expected this key once, got it beside the format"),
        ({"instruction": 3}, "instructions: expected a list, got 3"),
        ({"id": True}, "id: expected text, got True"),
    ],
)
def test_edit_r2_faults(fields, reason, tmp_path):
    line, told = rejected("edit-r2", edit_r2(**fields), tmp_path)
    assert (line, told[: len(reason)]) == (1, reason)


def test_edit_types_that_are_none_of_the_nine_are_kept_under_their_name(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(edit_r2(task_type=["subject_add", "style"], id=12), encoding="utf-8")
    (chain,) = read_chains(path).chains
    assert chain.id == "12"
    assert chain.task_types is None
    assert chain.task_type == ["subject_add", "style"]
    write_chains([chain], path, format="edit-r2")
    assert json.loads(path.read_text(encoding="utf-8"))["task_type"] == ["subject_add", "style"]
    changed = rows()
    changed[4][2] = "['style']"
    path.write_text(table(changed), encoding="utf-8", newline="")
    chain = read_chains(path).chains[1]
    assert (chain.task_types, chain.task_type) == (None, ["style"])
    write_chains([chain], path, format="edival")
    assert "['style']" in path.read_text(encoding="utf-8")
    longer = chain.model_copy()
    longer.model_extra["task_type"] = ["style", "style"]
    with pytest.raises(ChainError, match="task_types: expected this field, which EdiVal needs"):
        write_chains([longer], path, format="edival")


# Pico-Banana


def test_pico_banana():
    chain, local = read("pico-banana")
    assert (chain.id, chain.turns, chain.image) == ("1", 5, "https://images.example/9_o.jpg")
    assert chain.instructions[4] == "Make it warmer, step 4"
    assert [file["id"] for file in chain.files][-2:] == ["final_image", "original_input_image"]
    assert (local.id, local.image) == ("2", "source/9.jpg")
    assert local.task_types is local.all_objects is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"files": []}, "files: expected one with id 'original_input_image' and a url, got none"),
        ({"files": [7, {"id": "original_input_image"}]}, "files: expected one with id "),
        ({"files": None}, "files: expected a list of {id, url}, got None"),
        ({"metadata_edit_turn_prompts": "a"}, "metadata_edit_turn_prompts: expected a list of"),
        ({"local_input_image": 3}, "image: expected text, got 3"),
        ({"image": "a.png"}, "image: expected this key once, got it beside the format's own"),
    ],
)
def test_pico_banana_faults(change, reason, tmp_path):
    record = json.loads(FILES["pico-banana"].read_text(encoding="utf-8").splitlines()[0])
    line, told = rejected("pico-banana", json.dumps(record | change), tmp_path)
    assert (line, told[: len(reason)]) == (1, reason)


def test_pico_banana_without_a_local_image_has_its_address(tmp_path):
    record = json.loads(FILES["pico-banana"].read_text(encoding="utf-8").splitlines()[0])
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(record | {"local_input_image": None}), encoding="utf-8")
    assert read_chains(path).chains[0].image == "https://images.example/9_o.jpg"


# flow_grpo and Edit-R1


def test_flow_grpo(tmp_path):
    green, blue = read("flow-grpo")
    assert green.to_record() == {
        "id": "1",
        "image": "images/green.png",
        "instructions": ("Paint the door green",),
        "requirement": "The door is green.",
    }
    assert (blue.id, blue.turns) == ("2", 1)
    assert rejected("flow-grpo", '{"prompt": 3, "image": "a"}', tmp_path) == (
        1,
        "prompt: expected text, got 3",
    )
    assert rejected("flow-grpo", '{"prompt": "Add a dog"}', tmp_path) == (
        1,
        "image: expected this field, got none",
    )


# ImgEdit-Bench


def test_imgedit():
    smooth, chandelier, shirt = read("imgedit")
    assert smooth.to_record() == {
        "id": "1082",
        "image": "animal/000342021.jpg",
        "instructions": ("Give the tortoise a smooth shell.",),
        "edit_type": "adjust",
    }
    assert chandelier.task_types == ("subject_add",)
    assert chandelier.instructions == ('Add a chandelier \u2014 an "elegant" one.',)
    assert (shirt.task_types, shirt.edit_type) == (None, "extract")


ENTRY = '{"id": "a.png", "prompt": "Add a hat", "edit_type": "add"}'


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("[]", 1, "expected '{', got '[]'"),
        ("{}", 1, "expected at least one chain, got an empty file"),
        (f'{{\n"1": {ENTRY},\n"2": 7}}', 3, "expected an object with id, prompt, edit_type, got 7"),
        (f'{{\n"1": {ENTRY},\n"2": {{"id": "b"}}}}', 3, "prompt: expected this field, got none"),
        (f'{{"1": {ENTRY}, "2": {{"id": "b", "prompt": 7}}}}', 1, "prompt: expected text, got 7"),
        (f'{{\n"1": {ENTRY},\n"1": {ENTRY}}}', 3, "id: expected a new one, got '1' again, as on"),
        (f'{{\n"1": {ENTRY}\n', 2, "expected ',', got ''"),
        (f'{{\n"1": {ENTRY},\n"2" {ENTRY}}}', 3, "expected ':', got '{\"id\": "),
        (f'{{\n"1": {ENTRY},\n"2": {{"id": NaN}}}}', 3, "expected JSON, got '{\"id\": NaN}}' (NaN"),
        (f'{{\n"1": {ENTRY}}} more', 2, "expected the end, got ' more'"),
        (f'{{"1": {ENTRY[:-1]}, "image": "b.png"}}}}', 1, "image: expected this key once, got it"),
        (f"{{7: {ENTRY}}}", 1, "id: expected text, got 7"),
    ],
)
def test_imgedit_faults(text, line, reason, tmp_path):
    found, told = rejected("imgedit", text, tmp_path)
    assert (found, told[: len(reason)]) == (line, reason)


@pytest.mark.parametrize("entry", [{"id": "a.png", "prompt": "Add a hat"}])
def test_an_entry_without_an_edit_type_has_an_unknown_one(entry, tmp_path):
    path = tmp_path / "UGE_edit.json"
    path.write_text(json.dumps({"3": entry, "4": {**entry, "edit_type": "add"}}))
    unknown, known = read_chains(path).chains
    assert (unknown.task_types, unknown.model_extra) == (None, {})
    assert known.task_types == ("subject_add",)
    assert json.loads(back([unknown], "imgedit", tmp_path).read_text()) == {"3": entry}


def test_imgedit_multi_turn(tmp_path):
    three, two = read("imgedit-multi-turn")
    assert three.to_record() == {
        "id": "1",
        "image": "000000007.jpg",
        "instructions": ("From now on use green; add a hat", "Change the cup", "Undo that"),
    }
    assert (two.id, two.turns) == ("2", 2)
    path = back([three, two], "imgedit-multi-turn", tmp_path)
    assert json.loads(path.read_text()) == json.loads(FILES["imgedit-multi-turn"].read_text())
    for turns in ({"turn2": "a"}, {"turn1": "a", "turn3": "b"}, {}):
        text = json.dumps({"1": {"id": "a.png", **turns}})
        assert rejected("imgedit-multi-turn", text, tmp_path)[1].startswith("turn1, turn2, ...: ")


# MagicBrush


def test_magicbrush(tmp_path):
    kite, rain = read("magicbrush")
    assert kite.to_record() == {
        "id": "310",
        "image": "images/310/310-input.png",
        "instructions": ("add a kite", "let it be night"),
        "masks": ["310-mask1.png", "310-mask2.png"],
        "outputs": ["310-output1.png", "310-output2.png"],
    }
    assert (rain.id, rain.turns) == ("77", 1)
    path = back([kite, rain], "magicbrush", tmp_path)
    assert json.loads(path.read_text()) == json.loads(FILES["magicbrush"].read_text())


STEP = {"input": "a.png", "mask": "m.png", "output": "b.png", "instruction": "add a dog"}


@pytest.mark.parametrize(
    ("session", "reason"),
    [
        ([], "expected a list of turns with input, mask, output, instruction, got []"),
        ({"input": "a"}, "expected a list of turns with input, mask, output, instruction, got {"),
        ([3], "expected an object with input, mask, output, instruction, got 3"),
        ([{**STEP, "instruction": 3}], "instruction of turn 1: expected text, got 3"),
        ([STEP, STEP], "input of turn 2: expected the output of the turn before, 'b.png', got 'a."),
    ],
)
def test_magicbrush_faults(session, reason, tmp_path):
    told = rejected("magicbrush", json.dumps({"1": session, "2": [STEP]}), tmp_path)[1]
    assert told[: len(reason)] == reason


# LME-Bench and MSE-Bench


def test_lme(tmp_path):
    dog, tram = read("lme")
    assert dog.to_record() == {
        "id": "0001",
        "image": "images/0001.png",
        "instructions": (
            "Repaint the picture in charcoal.",
            "Add a blue bowl next to the dog.",
            "Take away the blue bowl.",
        ),
        "category": "pet",
        "source_prompt": "a small dog on a wooden floor",
        "labels": ["hard", "local", "local"],
    }
    assert (tram.id, tram.turns) == ("0002", 3)
    path = back([dog, tram], "lme", tmp_path)
    assert json.loads(path.read_text())["items"] == json.loads(FILES["lme"].read_text())["items"]
    elsewhere = dog.model_copy(update={"image": "a.png"})
    assert '"image": "a.png"' in back([elsewhere], "lme", tmp_path).read_text()


ITEM = {"id": "1", "category": "a", "source_prompt": "b", "turns": ["c"], "labels": ["soft"]}


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({**ITEM, "labels": ["soft", "hard"]}, "labels: expected one for each of 1 turns, got ['"),
        ({**ITEM, "labels": "soft"}, "labels: expected one for each of 1 turns, got 'soft'"),
        ({**ITEM, "turns": "c"}, "turns: expected a list of text, got 'c'"),
        ({**ITEM, "id": 7}, "id: expected text, got 7"),
        (["c"], "expected an object with category, id, labels, source_prompt, turns, got ['c']"),
    ],
)
def test_lme_faults_cost_their_session_alone(item, reason, tmp_path):
    text = json.dumps({"meta": {}, "items": [item, {**ITEM, "id": "2"}]}, indent=1)
    line, told = rejected("lme", text, tmp_path)
    assert told[: len(reason)] == reason
    assert text.splitlines()[line - 1].strip() in ("{", "[")


def test_lme_that_ends_otherwise_or_has_no_sessions(tmp_path):
    text = json.dumps({"items": [ITEM]})
    assert rejected("lme", text[:-1], tmp_path)[1] == "expected '}' and the end, got ''"
    assert rejected("lme", "{}", tmp_path)[1].startswith("expected an object with the sessions un")


def test_mse(tmp_path):
    pier, kettle = read("mse")
    assert (pier.id, pier.image, kettle.id) == ("0", "images/0.jpg", "1")
    assert pier.instructions == ("let her look to the left", "put a parasol in her hand")
    assert pier.model_extra["operation"] == ["orientation", "add"]
    path = back([pier, kettle], "mse", tmp_path)
    lines, originals = (x.read_text().splitlines() for x in (path, FILES["mse"]))
    assert [json.loads(x) for x in lines] == [json.loads(x) for x in originals]
    bad = '{"index": "a", "context": ["b"], "image": "a.png"}'
    assert rejected("mse", bad, tmp_path)[1] == "index: expected a whole number, got 'a'"


# SEED-Data-Edit


def test_seed_data_edit(tmp_path):
    kite, bench = read("seed-data-edit")
    assert kite.to_record() == {
        "id": "1",
        "image": "0/source.png",
        "instructions": ("Add a kite", "Make the kite red"),
        "inverse_instruction_1": "Remove the kite",
        "edit_image_1": "0/1.png",
        "inverse_instruction_2": "Make it blue",
        "edit_image_2": "0/2.png",
    }
    assert (bench.id, bench.turns) == ("2", 1)
    record = {"source_image": "a.png", "instruction_1": "a", "instruction_3": "b"}
    reason = "instruction_1, instruction_2, ...: expected one for each turn, got those of turns [1"
    assert rejected("seed-data-edit", json.dumps(record), tmp_path)[1][: len(reason)] == reason


# Images of EdiVal


def test_edivals_images_may_have_another_suffix(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(FILES["edival"].read_bytes())
    (tmp_path / "4_input_raw.png").touch()
    assert [x.image for x in read_chains(path).chains] == ["4_input_raw.png", "7_input_raw.jpg"]
    (tmp_path / "4_input_raw.jpg").touch()  # the benchmark's own name comes first
    assert read_chains(path).chains[0].image == "4_input_raw.jpg"
    (tmp_path / "4_input_raw.jpg").unlink()
    chains = read_chains(path).chains
    write_chains(chains, tmp_path / "y.csv", format="edival")
    assert read_chains(tmp_path / "y.csv").chains == chains


# There and back


def back(chain_list, name, folder):
    """Write as a format and read again."""
    path = folder / f"back-{name}"
    here = [chain.model_copy(update={"root": path.parent}) for chain in chain_list]
    write_chains(here, path, format=name)
    assert list(read_chains(path, format=name, allow_outside=True).chains) == here
    return path


@pytest.mark.parametrize(
    "name", ["native", "edit-r2", "pico-banana", "seed-data-edit", "imgedit-multi-turn"]
)
@given(data=st.data())
def test_formats_of_several_turns_keep_all(name, data, tmp_path_factory):
    back(data.draw(files_of_chains()), name, tmp_path_factory.getbasetemp())


@given(drawn=files_of_chains(most_turns=1))
def test_flow_grpo_keeps_all_of_one_turn(drawn, tmp_path_factory):
    back(drawn, "flow-grpo", tmp_path_factory.getbasetemp())


WITH_CATEGORY = ("subject_add", "subject_remove", "color_alter", "material_alter")


@given(drawn=files_of_chains(most_turns=1, types=WITH_CATEGORY))
def test_imgedit_keeps_all_of_one_turn_with_a_category(drawn, tmp_path_factory):
    known = [chain for chain in drawn if chain.task_types]
    back(known, "imgedit", tmp_path_factory.getbasetemp()) if known else None


unstray = texts.filter(lambda text: unquoted(text) == text)


@given(
    chain=chains(text=unstray, complete=True, extra=False),
    index=st.integers(0, 10**6),
)
def test_edival_keeps_all_that_it_has_columns_for(chain, index, tmp_path_factory):
    image = f"{index}_input_raw.jpg"
    chain = chain.model_copy(update={"id": str(index), "image": image})
    path = back([chain], "edival", tmp_path_factory.getbasetemp())
    header, *body = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
    assert tuple(header) == COLUMNS
    assert [row[1] for row in body] == [str(n + 1) for n in range(chain.turns)]


@pytest.mark.parametrize("name", FORMATS)
def test_every_sample_comes_back_from_its_own_format_and_from_the_native_one(name, tmp_path):
    chain_list = read(name)
    back(chain_list, name, tmp_path)
    back(chain_list, "native", tmp_path)


@pytest.mark.parametrize("name", ["flow-grpo", "imgedit"])
def test_the_file_that_comes_back_has_the_keys_of_the_public_one(name, tmp_path):
    path = back(read(name), name, tmp_path)
    text = path.read_text(encoding="utf-8")
    if name == "imgedit":
        original = json.loads(FILES[name].read_text(encoding="utf-8"))
        assert json.loads(text) == original
        assert list(json.loads(text)) == list(original)
    else:
        originals = FILES[name].read_text(encoding="utf-8").splitlines()
        for line, original in some(zip(text.splitlines(), originals, strict=True)):
            record = json.loads(line)
            assert record.pop("id").isdecimal()
            assert record == json.loads(original)


# Refusals


def refusal(chain, name, folder):
    path = folder / "refused"
    with pytest.raises(ChainError) as caught:
        write_chains([chain], path, format=name)
    assert not list(folder.iterdir())
    (refused,) = write_chains([chain], path, format=name, strict=False).refused
    assert str(caught.value) == f"{name} cannot hold chain {chain.id!r}: {refused.reason}"
    assert not path.exists()  # nothing is left to write
    return refused.reason


PLAIN = Chain(id="7", image="7_input_raw.jpg", instructions=["Remove it"])


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("flow-grpo", {"instructions": ("a", "b")}, "expected a chain of one turn, got 2 turns"),
        ("imgedit", {"instructions": ("a", "b")}, "expected a chain of one turn, got 2 turns"),
        ("imgedit", {"task_types": ("text_change",)}, "task_types: expected one that ImgEdit has"),
        ("magicbrush", {}, "image: expected a file in 'images/7/', got '"),
        ("magicbrush", {"image": "images/7/a.png"}, "masks: expected one for each of 1 turns, go"),
        ("imgedit", {"task_types": ("count_change",)}, "task_types: expected one that ImgEdit has"),
        ("edival", {}, "task_types: expected this field, which EdiVal needs, got none"),
        ("edival", {"id": "a7"}, "id: expected a number, as EdiVal's image_index, got 'a7'"),
        ("edival", {"image": "7.jpg"}, "image: expected a file '7_input_raw.jpg', got '7.jpg'"),
        ("flow-grpo", {"prompt": "x"}, "prompt: expected this key once, got it beside the format"),
        ("edit-r2", {"turns": 1}, "turns: expected this key once, got it beside the format's own"),
        ("seed-data-edit", {"instruction_2": "x"}, "instruction_2: expected no key of this name"),
        ("imgedit-multi-turn", {"turn4": "x"}, "turn4: expected no key of this name, which is"),
        ("pico-banana", {"files": 3}, "files: expected one with id 'original_input_image' and a"),
        ("lme", {}, "category: expected this field, which LME-Bench has, got none"),
        ("mse", {"id": "07"}, "id: expected a number, as MSE-Bench's index, got '07'"),
        ("mse", {"context": 1}, "context: expected this key once, got it beside the format's own"),
        ("native", {"further": {1}}, "expected values that JSON can hold: Object of type set"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_refused_with_the_reason(name, fields, reason, tmp_path):
    chain = Chain(**{**PLAIN.to_record(), **fields})
    assert refusal(chain, name, tmp_path)[: len(reason)] == reason


def test_edival_refuses_each_missing_field_and_quotes_that_it_would_lose(tmp_path):
    complete = read("edival")[1]
    for field in ("task_types", "formatted_instructions", "all_objects", "background_consistency"):
        chain = complete.model_copy(update={field: None})
        assert refusal(chain, "edival", tmp_path).startswith(f"{field}: expected this field")
    chain = complete.model_copy(update={"instructions": ('"Add it"',)})
    expected = re.escape("instructions: expected no quotes around text, got '\"Add it\"'")
    assert re.match(expected, refusal(chain, "edival", tmp_path))


@settings(max_examples=20)
@given(chain=chains(most_turns=2))
def test_whatever_the_chain_a_format_holds_it_or_says_why_not(chain, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    for name in some(FORMATS):
        writing = write_chains([chain], folder / "any", format=name, strict=False)
        assert writing.count + len(writing.refused) == 1
