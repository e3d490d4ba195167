"""Listing objects: the answer's form, and the filter of the detector."""

import json
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
    cat, sky = read_objects(answer)
    assert cat == ListedObject(name="black cat", color="black", count=2)
    assert (sky.name, sky.count, sky.foreground) == ("sky", None, False)
    assert read_objects(listing()) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (listing(CAT, {**CAT, "name": "Black Cat"}), "got 'Black Cat' twice"),
        (
            listing({**CAT, "count": 0}),
            r"objects\[0\]\.count: expected greater than or equal to 1, got 0",
        ),
        (
            listing({**CAT, "count": True}),
            r"objects\[0\]\.count: expected a valid integer, got True",
        ),
        (listing({**CAT, "count": "2"}), r"objects\[0\]\.count: expected a valid integer, got '2'"),
        (listing({**CAT, "foreground": "yes"}), r"objects\[0\]\.foreground: expected"),
        (listing({**CAT, "name": " "}), r"objects\[0\]\.name: expected text that is not empty"),
        (
            listing({**CAT, "name": "a [b]"}),
            r"without square brackets, got 'a \[b\]'",
        ),
        (listing({**CAT, "size": 3}), r"objects\[0\]\.size: "),
        (listing(*[CAT] * (OBJECTS_MAX + 1)), "objects: .*at most 12"),
        (json.dumps([CAT]), "expected an object"),
        ('{"objects": [{"name": "cat"', "expected one JSON object and nothing else"),
    ],
)
def test_a_wrong_answer_is_refused(text, message):
    with pytest.raises(AnswerError, match=message) as caught:
        read_objects(text)
    twice = str(caught.value).endswith("twice")
    assert caught.value.fault is (Fault.senseless if twice else Fault.format)


@given(st.text() | st.builds(lambda x, n: x[:n], st.just(listing(CAT)), st.integers(0, 120)))
def test_garbage_raises_nothing_else(text):
    with suppress(AnswerError):
        assert all(isinstance(x, ListedObject) for x in read_objects(text))


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
        assert all(x.dtype == torch.uint8 and x.shape == (3, 4, 6) for x in images)
        assert all(x[:, 1, 2].tolist() == [9, 8, 7] for x in images)
        return [torch.tensor([[0.0, 0.0, len(name), 2.0]]) for (name,) in names]

    image = Image.new("RGB", (6, 4))
    image.putpixel((2, 1), (9, 8, 7))
    names = ["Mr. Cat", "b", "c", "d", "e"]
    found = find_objects(detector, image, [ListedObject(name=name) for name in names])
    assert asked == [("mr cat",), ("b",), ("c",), ("d",), ("e",)]
    assert found["Mr. Cat"] == [[0, 0, 6, 2]]
    assert list(found) == names
    assert find_objects(detector, image, []) == {}
