"""What is asked to fill an edit, and what of the answers is accepted."""

import json
import re

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mteditflow.planner import (
    EDITS,
    BackgroundChange,
    ColorAlter,
    CountChange,
    ListedObject,
    Pool,
    PositionChange,
    SubjectAdd,
    SubjectRemove,
    TextChange,
)
from mteditflow.planner.answers import strict_object
from mteditflow.planner.filling import checked_phrase, edit_prompt, edit_schema, read_edit
from mteditflow.rewards import AnswerError, Fault
from tests.loops import some

POOL = Pool.of(
    [
        ListedObject(name="red car", color="red", count=1),
        ListedObject(name="shop sign", text="Open"),
        ListedObject(name="hill", foreground=False),
    ]
)
PLAIN = Pool.of([ListedObject(name="cat"), ListedObject(name="dog")])

# One right answer for each type.
RIGHT = {
    "subject_add": (
        {"name": "bench", "position": "left", "reference": "red car"},
        "Put a bench to the left of the red car.",
    ),
    "subject_remove": ({"target": "hill"}, "Take the hill out."),
    "subject_replace": ({"target": "red car", "name": "bus"}, "Turn the red car into a bus."),
    "position_change": (
        {"target": "red car", "position": "right", "reference": "shop sign"},
        "Move the red car to the right of the shop sign.",
    ),
    "count_change": ({"target": "red car", "count": 3}, "Make it three red cars."),
    "color_alter": ({"target": "red car", "color": "blue"}, "Paint the red car blue."),
    "material_alter": ({"target": "hill", "material": "wood"}, "Make the hill wooden."),
    "text_change": (
        {"new": "Closed", "old": "Open", "target": "shop sign"},
        "Let the shop sign say 'Closed' instead of 'Open'.",
    ),
    "background_change": (
        {"background": "a beach"},
        "Put a beach behind the red car and the shop sign, which stay as they are.",
    ),
}


def written(edit, instruction):
    return json.dumps({"edit": edit, "instruction": instruction})


@pytest.mark.parametrize("task", EDITS)
def test_a_right_answer_follows_the_schema_and_is_read(task):
    edit, instruction = RIGHT[task]
    jsonschema_rs.validate(edit_schema(POOL, task), {"edit": edit, "instruction": instruction})
    filled = read_edit(written(edit, instruction), POOL, task)
    assert filled.instruction == instruction
    assert filled.pool.edits[-1].task == task
    for slot, value in some(edit.items()):
        assert getattr(filled.pool.edits[-1], slot) == value


def test_an_addition_may_do_without_a_place():
    edit = {"name": "bench", "position": None, "reference": None}
    filled = read_edit(written(edit, "Add a bench."), POOL, "subject_add")
    assert filled.pool.edits == (SubjectAdd(name="bench"),)
    schema = edit_schema(POOL, "subject_add")
    jsonschema_rs.validate(schema, {"edit": edit, "instruction": "Add a bench."})


def test_a_text_is_added_only_where_there_is_none():
    filled = read_edit(written({"new": "Hi"}, "Write 'Hi'."), PLAIN, "text_change")
    assert filled.pool.edits == (TextChange(new="Hi"),)
    with pytest.raises(AnswerError, match=r"expected the slots \['new', 'old', 'target'\]"):
        read_edit(written({"new": "Hi"}, "Write 'Hi'."), POOL, "text_change")


def test_what_a_background_keeps_comes_from_the_pool():
    edit, instruction = RIGHT["background_change"]
    filled = read_edit(written(edit, instruction), POOL, "background_change")
    assert filled.pool.edits[-1].kept == ("red car", "shop sign")
    with pytest.raises(AnswerError, match="expected it to mention 'shop sign'"):
        read_edit(written(edit, "A beach behind the red car."), POOL, "background_change")


def test_a_strict_object_has_all_its_properties_and_no_others():
    assert strict_object({"count": {"type": "integer", "default": 1, "title": "Count"}}) == {
        "type": "object",
        "properties": {"count": {"type": "integer"}},
        "required": ["count"],
        "additionalProperties": False,
    }


@pytest.mark.parametrize("task", EDITS)
def test_the_prompt_says_what_is_there_and_what_is_asked(task):
    prompt = edit_prompt(POOL, ["Remove the cat."], task)
    for name in some(POOL.available):
        assert f'"name": "{name}"' in prompt
    assert "1. Remove the cat." in prompt
    assert f"Its type is {task}" in prompt
    assert all(f'"{slot}": ...' in prompt for slot in some(RIGHT[task][0]))
    assert "none of: red car, shop sign, hill" in prompt
    assert ("stay as they are" in prompt) == (task == "background_change")
    assert "Edits so far, in order:\nnone" in edit_prompt(POOL, [], task)
    listed = [json.loads(line) for line in prompt.splitlines() if line.startswith('{"name"')]
    assert [x["name"] for x in listed] == [x.name for x in POOL.objects]
    told = set(ListedObject.model_fields)  # what edits did to an object is not the model's business
    assert all(x.keys() == told for x in some(listed))
    assert edit_schema(POOL, task)["additionalProperties"] is False


def test_names_in_the_schema_are_those_of_the_pool():
    slots = edit_schema(POOL, "text_change")["properties"]["edit"]["properties"]
    assert slots["target"] == {"enum": ["shop sign"]}
    assert slots["old"] == {"enum": ["Open"]}
    slots = edit_schema(POOL, "position_change")["properties"]["edit"]["properties"]
    assert slots["reference"] == {"enum": ["red car", "shop sign", "hill"]}
    assert list(edit_schema(PLAIN, "text_change")["properties"]["edit"]["properties"]) == ["new"]


CAR = "Paint the red car blue."
BLUE = {"target": "red car", "color": "blue"}


@pytest.mark.parametrize(
    ("text", "fault", "message"),
    [
        ("", Fault.format, "expected one JSON object and nothing else, got ''"),
        ('{"edit":', Fault.format, "expected one JSON object and nothing else"),
        (f"Sure! {written(BLUE, CAR)}", Fault.request_ignored, "got 'Sure!"),
        (f"Here:\n```json\n{written(BLUE, CAR)}\n```", Fault.request_ignored, "got 'Here:"),
        ("<think>Hm, blue", Fault.reasoning, "expected an answer after the reasoning"),
        ("I'm sorry, I can't help with that.", Fault.refusal, "got \"I'm sorry"),
        ("[1]", Fault.format, "object"),
        ("null", Fault.format, "object"),
        (json.dumps(BLUE), Fault.format, "edit: expected this field, got none"),
        (written(BLUE, 3), Fault.format, "instruction: expected text, got 3"),
        (written([], CAR), Fault.format, "edit: expected an object, got []"),
        (written({}, CAR), Fault.format, "expected the slots ['target', 'color'], got []"),
        (written({**BLUE, "kept": []}, CAR), Fault.format, "got ['target', 'color', 'kept']"),
        (written({**BLUE, "target": "cow"}, CAR), Fault.senseless, "expected one of ['red car'"),
        (written({**BLUE, "color": "red"}, CAR), Fault.senseless, "another color than 'red'"),
        (written({**BLUE, "color": 7}, CAR), Fault.format, "color: expected text, got 7"),
        (written({**BLUE, "color": None}, CAR), Fault.format, "color: expected text, got None"),
        (written({**BLUE, "color": "a\nb"}, CAR), Fault.format, "one line"),
        (written(BLUE, "Make it nicer."), Fault.senseless, "expected it to mention 'red car'"),
        (written(BLUE, "Paint the red car."), Fault.senseless, "expected it to mention 'blue'"),
        (written(BLUE, "Paint the [red car] blue."), Fault.senseless, "no square brackets"),
        (written(BLUE, ""), Fault.senseless, "expected it to mention 'red car'"),
    ],
)
def test_a_wrong_answer_is_refused_with_its_reason(text, fault, message):
    with pytest.raises(AnswerError, match=re.escape(message)) as caught:
        read_edit(text, POOL, "color_alter")
    assert caught.value.fault == fault


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (CountChange(target="cup", count=3), "Make it 3 cups."),
        (CountChange(target="cup", count=3), "Three Cups, please."),
        (CountChange(target="glass", count=20), "I want twenty glasses."),
        (ColorAlter(target="man", color="gold"), "Make the man's suit golden."),
        (
            SubjectAdd(name="lamp", position="left", reference="red sofa"),
            "A lamp left of that red sofa",
        ),
        (
            TextChange(new="It's 5%", old="Open", target="sign"),
            "Write 'It's 5%', not Open, on the sign",
        ),
        (TextChange(new="Hello (again)"), 'Write "Hello (again)".'),
        (BackgroundChange(background="a beach", kept=("cat",)), "Put a beach behind the cat."),
    ],
)
def test_words_that_say_it(edit, said):
    assert checked_phrase(said, edit) == said
    assert checked_phrase(f' "{said}"\n' if '"' not in said else said, edit) == said


@pytest.mark.parametrize(
    ("edit", "said", "missing"),
    [
        (CountChange(target="cup", count=3), "Make it 30 cups.", "3"),
        (CountChange(target="cup", count=3), "Make it three.", "cup"),
        (SubjectRemove(target="cat"), "Remove the category.", "cat"),
        (SubjectRemove(target="cat"), "Remove the bobcat.", "cat"),
        (SubjectRemove(target="red cat"), "Remove the cat that is red.", "red cat"),
        (PositionChange(target="a", position="above", reference="b"), "Move a over b.", "above"),
        (TextChange(new="SALE"), "Write 'sale'.", "SALE"),
    ],
)
def test_words_that_do_not_say_it(edit, said, missing):
    with pytest.raises(ValueError, match=f"^instruction: expected it to mention '{missing}', got"):
        checked_phrase(said, edit)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(max_size=8)
    | st.sampled_from(["red car", "hill", "left", "blue", "Open", "a beach"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(st.sampled_from(tuple(EDITS)), st.data())
def test_garbage_is_refused_or_makes_sense(task, data):
    """Answers with slots and words changed, and texts cut and spliced: only ``AnswerError``."""
    edit, instruction = RIGHT[task]
    changed = {slot: data.draw(st.just(value) | VALUES) for slot, value in edit.items()}
    text = json.dumps({"edit": changed, "instruction": data.draw(st.just(instruction) | VALUES)})
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    text = data.draw(st.sampled_from([text, text[:start] + text[end:], text[start:end]]))
    try:
        filled = read_edit(text, POOL, task)
    except AnswerError:
        return
    assert filled.pool.edits[-1].task == task
    assert POOL.apply(filled.pool.edits[-1]) == filled.pool
    assert checked_phrase(filled.instruction, filled.pool.edits[-1]) == filled.instruction
