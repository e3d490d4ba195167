"""Seeing by rule is the inverse of drawing."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from examples.shapes.vision import (
    RuleDetector,
    find_things,
    pixels_of,
    read_state,
    to_index,
    to_pil,
)
from examples.shapes.world import draw, draw_index, random_chain
from tests.loops import some

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(min_value=0, max_value=2**32)


def states(seed):
    return random_chain(random.Random(seed), 4, "train").states


@quick
@given(seeds, st.sampled_from([(12, 12), (96, 96), (512, 512), (100, 40)]))
def test_a_picture_reads_back_into_its_state_at_any_size(seed, size):
    for state in some(states(seed)):
        image = to_pil(draw(state)).resize(size, Image.Resampling.LANCZOS)
        assert read_state(to_index(pixels_of(image))) == state


@quick
@given(seeds)
def test_every_thing_is_found_in_each_of_its_cells_and_nothing_else(seed):
    for state in some(states(seed)):
        found = find_things(draw_index(state))
        where = {(thing.shape, thing.color, thing.material, thing.cells[0]) for thing in found}
        assert len(where) == len(found)
        assert where == {(t.shape, t.color, t.material, c) for t in state.things for c in t.cells}


@quick
@given(seeds)
def test_only_what_is_named_is_found(seed):
    state = states(seed)[0]
    thing = state.things[0]
    found = find_things(draw_index(state), [f"{thing.color} {thing.shape}", "purple cow"])
    assert {t.shape for t in found} == {thing.shape}
    assert find_things(draw_index(state), []) == []


def test_a_spoilt_thing_is_found_until_too_little_is_left():
    state = next(s for seed in range(99) for s in states(seed) if s.things[0].shape == "circle")
    index, circle = draw_index(state), state.things[0]
    cell = circle.cells[0]
    top, left = 6 * (cell // 2), 6 * (cell % 2)
    index[top, left : left + 2] = -1
    assert circle.shape in {t.shape for t in find_things(index)}
    index[top : top + 5, left : left + 5] = -1
    assert cell not in {t.cells[0] for t in find_things(index)}


def test_a_picture_of_no_state_is_refused():
    with pytest.raises(ValueError, match="expected a picture of the shapes world"):
        read_state(np.full((12, 12), -1, dtype=np.int8))


@quick
@given(seeds)
def test_the_detector_boxes_what_it_is_asked_for(seed):
    state = states(seed)[0]
    thing = state.things[0]
    image = pixels_of(to_pil(draw(state)).resize((512, 512), Image.Resampling.LANCZOS))
    names = [f"{thing.color} {thing.shape}"]
    boxes, nothing = RuleDetector()([image, image], [names, ["purple cow"]])
    assert nothing.shape == (0, 4)
    for box, cell in some(zip(boxes, thing.cells, strict=True)):
        row, column = divmod(cell, 2)
        pixels = torch.tensor([column, row, column, row]) * 6 + torch.tensor([0, 0, 5, 5])
        torch.testing.assert_close(box, pixels * 512 / 12)
