"""Listing objects: the answer's form, and the filter of the detector."""

import json
import re
from contextlib import suppress

import jsonschema_rs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mteditflow.planner import ListedObject
from mteditflow.planner.listing import (
    OBJECTS_MAX,
    find_objects,
    fits,
    listing_schema,
    read_objects,
    sift,
)
from mteditflow.rewards import AnswerError, Fault
from tests.loops import some

CAT = {
    "name": "black cat",
    "color": "black",
    "material": None,
    "text": None,
    "count": 2,
    "foreground": True,
}


def listing(*objects):
    return json.dumps({"objects": objects})


def test_a_right_answer_follows_the_schema_and_is_read():
    answer = listing(CAT, {**CAT, "name": "sky", "count": None, "foreground": False})
    jsonschema_rs.validate(listing_schema(), json.loads(answer))
    (cat, sky), left_out = read_objects(answer)
    assert cat == ListedObject(name="black cat", color="black", count=2)
    assert (sky.name, sky.count, sky.foreground) == ("sky", None, False)
    assert left_out == {}
    assert read_objects(listing()) == ((), {})


DOG = {"name": "dog", "color": None}


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ({"count": 0}, "expected greater than or equal to 1, got 0"),
        ({"count": "many"}, "expected a valid integer, got 'many'"),
        ({"count": True}, "expected a valid integer, got True"),
        ({"count": 99}, "expected less than or equal to 20, got 99"),
        ({"text": "OPEN\n24 h"}, "expected one line without square brackets, got 'OPEN\\n24 h'"),
        ({"text": "a [b]"}, "expected one line without square brackets, got 'a [b]'"),
        ({"text": "x" * 81}, "expected at most 80 characters, got 'xxxxxx"),
        ({"text": ""}, "expected text that is not empty, got ''"),
        ({"color": 3}, "expected text, got 3"),
        ({"foreground": "yes"}, "expected true or false, got 'yes'"),
        ({"size": 3}, "expected no such field, got 3"),
    ],
)
def test_an_odd_attribute_costs_the_attribute_alone(odd, reason):
    (cat, dog), left_out = read_objects(listing({**CAT, **odd}, DOG))
    ((place, told),) = left_out.items()
    assert place == f"black cat: {next(iter(odd))}"
    assert told.startswith(reason)
    assert cat == ListedObject(**{k: x for k, x in CAT.items() if k not in odd})
    assert dog.name == "dog"


@pytest.mark.parametrize(
    ("odd", "place", "reason"),
    [
        ({**CAT, "name": "two\nlines"}, "objects[0]", "expected one line without square brackets"),
        ({**CAT, "name": "a [b]"}, "objects[0]", "expected one line without square brackets"),
        ({**CAT, "name": "x" * 81}, "objects[0]", "expected at most 80 characters, got 'xxx"),
        ({**CAT, "name": " "}, "objects[0]", "expected text that is not empty, got ' '"),
        ({**CAT, "name": "--"}, "objects[0]", "expected a name with a letter or digit, got '--'"),
        ({"color": "red"}, "objects[0]", "expected a name, got none"),
        ({}, "objects[0]", "expected a name, got none"),
        ("cat", "objects[0]", "expected an object, got 'cat'"),
    ],
)
def test_an_odd_object_costs_itself_alone(odd, place, reason):
    (dog,), left_out = read_objects(listing(odd, DOG))
    assert dog.name == "dog"
    assert list(left_out) == [place]
    assert left_out[place].startswith(reason)
    with pytest.raises(AnswerError, match=re.escape(f"{place}: {reason}")):  # asked again
        read_objects(listing(odd))


def test_a_second_object_of_a_name_and_a_thirteenth_are_left_out():
    (cat,), left_out = read_objects(listing(CAT, {**CAT, "name": "Black Cat", "count": 0}))
    assert cat.count == 2
    reason = "expected a unique name, got it twice"
    assert left_out == {"Black Cat (objects[1])": reason}
    many = [{**DOG, "name": f"dog {n}"} for n in range(OBJECTS_MAX + 2)]
    objects, left_out = read_objects(listing(*many))
    assert [x.name for x in objects] == [f"dog {n}" for n in range(OBJECTS_MAX)]
    assert left_out == dict.fromkeys(
        ("dog 12", "dog 13"), "expected at most 12 objects, got another one"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps([CAT]), "expected an object"),
        (json.dumps({"objects": CAT}), "objects: expected a valid array"),
        (json.dumps({"objects": [CAT], "more": 3}), "more: expected no such field"),
        ('{"objects": [{"name": "cat"', "expected one JSON object and nothing else"),
    ],
)
def test_an_answer_of_another_form_is_refused(text, message):
    with pytest.raises(AnswerError, match=message) as caught:
        read_objects(text)
    assert caught.value.fault is Fault.format


@given(st.text() | st.builds(lambda x, n: x[:n], st.just(listing(CAT)), st.integers(0, 120)))
def test_garbage_raises_nothing_else(text):
    with suppress(AnswerError):
        assert all(isinstance(x, ListedObject) for x in some(read_objects(text).objects))


# hand-computed: shares of the sides and of the area of a 200 x 100 image
@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 200, 100), False),
        ((0, 0, 181, 45), False),  # side 0.905, area 0.407
        ((0, 0, 181, 44), True),  # side 0.905, area 0.398
        ((0, 0, 180, 90), True),  # sides 0.9 exactly, area 0.81
        ((10, 0, 100, 91), False),  # side 0.91, area 0.4095
        ((0, 50, 200, 55), True),  # a long line
    ],
)
def test_boxes_of_the_whole_image_are_dropped(box, expected):
    assert fits(box, (200, 100)) is expected


def test_objects_without_a_box_are_left_out_with_the_reason():
    objects = [ListedObject(name=name) for name in ("cat", "sky", "unicorn", "dog")]
    boxes = {"cat": [(0, 0, 5, 5)], "sky": [(0, 0, 10, 9)], "unicorn": []}
    boxes["dog"] = [(0, 0, 10, 10), (1, 1, 4, 4)]  # one of its boxes is of a thing
    kept, left_out = sift(objects, boxes, (10, 10))
    assert [x.name for x in kept] == ["cat", "dog"]
    assert left_out == {"sky": "fills the image", "unicorn": "not found by the detector"}


def test_each_object_is_looked_for_alone_in_all_of_the_pixels():
    asked = []

    def detector(images, names):
        asked.extend(names)
        assert all(x.dtype == torch.uint8 and x.shape == (3, 4, 6) for x in some(images))
        assert all(x[:, 1, 2].tolist() == [9, 8, 7] for x in some(images))
        return [torch.tensor([[0.0, 0.0, len(name), 2.0]]) for (name,) in names]

    image = Image.new("RGB", (6, 4))
    image.putpixel((2, 1), (9, 8, 7))
    names = ["Mr. Cat", "b", "c", "d", "e"]
    found = find_objects(detector, image, [ListedObject(name=name) for name in names])
    assert asked == [("mr cat",), ("b",), ("c",), ("d",), ("e",)]
    assert found["Mr. Cat"] == [[0, 0, 6, 2]]
    assert list(found) == names
    assert find_objects(detector, image, []) == {}
