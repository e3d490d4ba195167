"""The nine edit types and the fixed form of their instructions."""

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mteditflow.chains import NO_CHANGE, TASK_TYPES
from mteditflow.planner import (
    EDITS,
    BackgroundChange,
    ColorAlter,
    CountChange,
    MaterialAlter,
    PositionChange,
    SubjectAdd,
    SubjectRemove,
    SubjectReplace,
    TextChange,
    parse_formatted,
)

# The forms of the nine types as the public benchmark writes them.
GOLDEN = {
    "Add [lamp] on the [left] of [red sofa]": SubjectAdd(
        name="lamp", position="left", reference="red sofa"
    ),
    "Add [lamp]": SubjectAdd(name="lamp"),
    "Remove [cup]": SubjectRemove(target="cup"),
    "Replace [cup] with [tea pot]": SubjectReplace(target="cup", name="tea pot"),
    "Change the position of [cup] to [above] of [plate]": PositionChange(
        target="cup", position="above", reference="plate"
    ),
    "Change the count of [cup] to [3]": CountChange(target="cup", count=3),
    "Change the color of [cup] to [dark blue]": ColorAlter(target="cup", color="dark blue"),
    "Change the material of [cup] to [glass]": MaterialAlter(target="cup", material="glass"),
    "Replace the text '[Open]' on [door sign] with '[It's shut]'": TextChange(
        old="Open", target="door sign", new="It's shut"
    ),
    "Add text '[Sale, 50%]' on the image": TextChange(new="Sale, 50%"),
    "Change the background to [a beach], while keeping the [cat], [dog] unchanged": (
        BackgroundChange(background="a beach", kept=("cat", "dog"))
    ),
    "Change the background to [a beach]": BackgroundChange(background="a beach"),
}


def exactly(message):
    return f"^{re.escape(message)}$"


@pytest.mark.parametrize(("text", "edit"), GOLDEN.items())
def test_golden_forms_are_written_and_read(text, edit):
    assert edit.formatted() == text
    assert parse_formatted(text) == edit


def test_there_is_a_class_for_each_type():
    assert (*EDITS, NO_CHANGE) == TASK_TYPES
    assert {edit.task for edit in GOLDEN.values()} == set(EDITS)


@pytest.mark.parametrize(
    ("text", "edit"),
    {
        "Add [lamp] on the left of [sofa]": SubjectAdd(
            name="lamp", position="left", reference="sofa"
        ),
        '"Remove [cup]"': SubjectRemove(target="cup"),
        "'remove  [cup].'": SubjectRemove(target="cup"),
        "change the POSITION of [cup] to Below of [plate]": PositionChange(
            target="cup", position="below", reference="plate"
        ),
        "Change the background to [beach], remain the [cat, the old one], [dog] unchanged": (
            BackgroundChange(background="beach", kept=("cat, the old one", "dog"))
        ),
        "Change the background to [beach], while keeping the cat, red dog and bird unchanged": (
            BackgroundChange(background="beach", kept=("cat", "red dog", "bird"))
        ),
    }.items(),
)
def test_variants_are_read(text, edit):
    assert parse_formatted(text) == edit


NAMES = st.text(min_size=1, max_size=30).filter(
    lambda x: any(c.isalnum() for c in x) and not re.search(r"[\[\]\x00-\x1f\x7f]", x)
)
POSITIONS = st.sampled_from(["left", "right", "above", "below"])


@st.composite
def edits(draw):
    kind = EDITS[draw(st.sampled_from(tuple(EDITS)))]
    slots = {}
    for name, field in kind.model_fields.items():
        if name == "position":
            slots[name] = draw(POSITIONS)
        elif name == "count":
            slots[name] = draw(st.integers(1, 20))
        elif name == "kept":
            slots[name] = tuple(draw(st.lists(NAMES, max_size=3)))
        else:
            slots[name] = draw(NAMES)
        if not field.is_required() and draw(st.booleans()):
            del slots[name]
    try:
        return kind(**slots)
    except ValidationError:  # one of two slots that belong together, or two that are the same
        return SubjectRemove(target=draw(NAMES))


@given(edits())
def test_what_is_written_is_read(edit):
    assert parse_formatted(edit.formatted()) == edit


@given(st.text() | st.sampled_from(sorted(GOLDEN)).flatmap(lambda x: st.permutations(x[:12])))
def test_whatever_else_is_refused_by_a_value_error(text):
    with suppress(ValueError):
        edit = parse_formatted("".join(text))
        assert parse_formatted(edit.formatted()) == edit


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "Eat [cup]": "formatted instruction: expected a form of the nine edit types, "
        "got 'Eat [cup]'",
        "Remove []": "formatted instruction: expected a form of the nine edit types, "
        "got 'Remove []'",
        "Remove [...]": "formatted instruction 'Remove [...]': expected a name with a letter or "
        "digit, got '...'",
        "Change the count of [cup] to [three]": "formatted instruction 'Change the count of [cup] "
        "to [three]': count: expected a valid integer, unable to parse string as an integer, "
        "got 'three'",
        "Change the count of [cup] to [0]": "formatted instruction 'Change the count of [cup] to "
        "[0]': count: expected greater than or equal to 1, got '0'",
        "Change the position of [a] to [left] of [a]": "formatted instruction 'Change the position "
        "of [a] to [left] of [a]': expected another reference than the target, got 'a'",
    }.items(),
)
def test_errors_of_reading(text, message):
    with pytest.raises(ValueError, match=exactly(message)):
        parse_formatted(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SubjectAdd(name="a", position="left"), "both position and reference, or neither"),
        (lambda: SubjectAdd(name="a", reference="b"), "both position and reference, or neither"),
        (lambda: SubjectAdd(name="a", position="beside", reference="b"), "'left', 'right'"),
        (lambda: SubjectReplace(target="a", name="A"), "expected another object than the target"),
        (lambda: TextChange(new="a", old="b"), "both old and target, or neither"),
        (lambda: TextChange(new="a", old="a", target="b"), "expected a new text, got the old one"),
        (lambda: SubjectRemove(target="a]b"), "one line without square brackets, got 'a]b'"),
        (lambda: SubjectRemove(target="a\nb"), "one line without square brackets"),
        (lambda: SubjectRemove(target="  "), "at least 1 character"),
        (lambda: SubjectRemove(target="a" * 81), "at most 80 characters"),
        (lambda: CountChange(target="a", count=True), "valid integer"),
        (lambda: CountChange(target="a", count="2"), "valid integer"),
        (lambda: CountChange(target="a", count=21), "less than or equal to 20"),
        (lambda: SubjectRemove(target="a", name="b"), "Extra inputs are not permitted"),
    ],
)
def test_errors_of_slots(make, message):
    with pytest.raises(ValidationError, match=message):
        make()
